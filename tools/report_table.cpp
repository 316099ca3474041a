// What a report shows of a table of replicate: measured and published, comparisons, questions by method.
#include <algorithm>
#include <filesystem>
#include <numeric>

#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/files/json_at.h"
#include "engine/text/unicode.h"
#include "tools/replicate_results.h"
#include "tools/report_page.h"
#include "tools/report_plot.h"

namespace kava::report {

namespace fs = std::filesystem;

namespace {

constexpr std::size_t kMostColumns = 400;  // questions of a map

double real(const JsonAt& at) {
  if (!at.value().is_number()) at.refuse("is no number", "make the table again");
  return at.value().get<double>();
}

std::string cells_figure(const JsonAt& table, const std::string& column, const std::string& measure, const std::string& id,
                         const std::string& title) {
  std::vector<Bar> bars;
  const JsonAt rows = table.at("rows");
  for (std::size_t r = 0; r < rows.array().size(); ++r) {
    const JsonAt row = rows.at(r), cells = row.at("cells");
    for (std::size_t c = 0; c < cells.array().size(); ++c) {
      const JsonAt cell = cells.at(c);
      if (cell.at("column").string() != column || cell.at("measure").string() != measure) continue;
      const std::string &block = row.at("block").string(), &title = row.at("title").string();
      Bar bar{(block.empty() ? "" : beginning(block, std::max<std::size_t>(14, 52 - std::min<std::size_t>(38, title.size()))) + ": ") +
                  beginning(title, 38),
              0,
              0,
              0,
              cell.has("mean"),
              {}};
      if (bar.measured) {
        const double sd = cell.has("sd") ? real(cell.at("sd")) : 0;
        bar.value = real(cell.at("mean")), bar.low = bar.value - sd, bar.high = bar.value + sd;
      }
      const JsonAt published = cell.at("published");
      for (std::size_t p = 0; p < published.array().size(); ++p) bar.marks.push_back(real(published.at(p).at("value")));
      if (bar.measured || !bar.marks.empty()) bars.push_back(std::move(bar));
    }
  }
  return bar_plot(id, title, bars, false);
}

std::string comparisons(const JsonAt& table, const std::string& id) {
  std::vector<Bar> bars;
  const JsonAt all = table.at("comparisons");
  for (std::size_t i = 0; i < all.array().size(); ++i) {
    const JsonAt c = all.at(i);
    bars.push_back({c.at("row").string() + " - " + c.at("against").string() + ", " + c.at("column").string(),
                    real(c.at("difference")),
                    real(c.at("low")),
                    real(c.at("high")),
                    true,
                    {}});
  }
  return bar_plot(id, "Paired differences in points, with 95 % of the resamples", bars, true);
}

// Which questions each row got right, means over its seeds; questions that more rows get right stand left.
std::string questions(const JsonAt& table, const fs::path& folder, const JsonAt& column, const std::string& id) {
  std::vector<std::string> names;
  std::vector<std::vector<double>> shares;
  const JsonAt rows = table.at("rows"), seeds = table.at("seeds");
  for (std::size_t r = 0; r < rows.array().size(); ++r) {
    std::vector<double> sum;
    int n = 0;
    for (std::size_t s = 0; s < seeds.array().size(); ++s) {
      const fs::path path =
          folder / "state" /
          fmt::format("{}.{}.eval_{}.json", rows.at(r).at("name").string(), seeds.at(s).value().dump(), column.at("data").string());
      if (!is_there(path)) continue;
      const Json state = read_json(path.string());
      const std::string file = path.string();
      const JsonAt root(state, file);
      if (!root.has("result")) continue;
      const JsonAt verdicts = root.at("result").at("verdicts");
      const std::string& of_column = column.at("scorer").string();
      const std::string& scorer = of_column == "strict" && rows.at(r).has("scorer") ? rows.at(r).at("scorer").string() : of_column;
      if (!verdicts.has(scorer.c_str())) continue;
      const std::string line = verdicts.at(scorer.c_str()).string();
      if (sum.empty()) sum.resize(line.size());
      if (sum.size() != line.size()) continue;
      ++n;
      for (std::size_t i = 0; i < line.size(); ++i) sum[i] += line[i] == '1';
    }
    if (n == 0 || (!shares.empty() && shares[0].size() != sum.size())) continue;
    for (double& v : sum) v /= n;
    names.push_back(rows.at(r).at("name").string()), shares.push_back(std::move(sum));
  }
  if (shares.empty()) return "";
  const std::size_t count = std::min(shares[0].size(), kMostColumns);
  std::vector<std::size_t> order(count);
  std::iota(order.begin(), order.end(), std::size_t{0});
  auto total = [&](std::size_t i) {
    return std::accumulate(shares.begin(), shares.end(), 0.0, [&](double t, const auto& s) { return t + s[i]; });
  };
  std::ranges::stable_sort(order, std::greater<>(), total);
  std::vector<HeatMap> rows_of_maps;
  for (std::size_t r = 0; r < shares.size(); ++r) {
    HeatMap map{names[r], 1, static_cast<int>(count), {}, 0, 16};
    for (std::size_t i : order) map.values.push_back(static_cast<float>(shares[r][i]));
    rows_of_maps.push_back(std::move(map));
  }
  return heat_maps(
      id, "Questions right by row: " + column.at("title").string(),
      fmt::format("The first {} questions, those that most rows get right at the left; full colour: right with every seed.", count),
      rows_of_maps);
}

}  // namespace

std::string table_section(const std::string& folder, const std::string& prefix) {
  const std::string file = (fs::path(folder) / "table.json").string();
  const Json json = read_json(file);
  const JsonAt table(json, file), columns = table.at("columns"), measures = table.at("measures");
  std::string out =
      "<h2>" + html(table.at("title").string()) +
      "</h2>\n<p class=\"about\">Bars: means over seeds, with one sample standard deviation to each side. Marks: published values.</p>\n";
  for (std::size_t m = 0; m < measures.array().size(); ++m)
    for (std::size_t c = 0; c < columns.array().size(); ++c) {
      const std::string measure = measures.at(m).string(), name = columns.at(c).at("name").string();
      const std::string words = measure == "accuracy" ? "Accuracy in %"
                                : measure == "passes" ? "Forward passes a question"
                                                      : "Milliseconds a question";
      out += cells_figure(table, name, measure, prefix + measure + (c == 0 ? "" : "_" + name),
                          words + ": " + columns.at(c).at("title").string());
    }
  out += comparisons(table, prefix + "comparisons");
  for (std::size_t c = 0; c < columns.array().size(); ++c)
    out += questions(table, folder, columns.at(c), prefix + "questions" + (c == 0 ? "" : "_" + columns.at(c).at("name").string()));
  std::vector<std::vector<std::string>> rows = {{"row", "column", "measure", "measured", "published"}};
  const JsonAt all = table.at("rows");
  for (std::size_t r = 0; r < all.array().size(); ++r) {
    const JsonAt row = all.at(r), cells = row.at("cells");
    for (std::size_t c = 0; c < cells.array().size(); ++c) {
      const JsonAt cell = cells.at(c), values = cell.at("published");
      for (const char* key : {"mean", "sd"})
        if (!cell.at(key).is_null()) (void)real(cell.at(key));
      std::string published;
      for (std::size_t p = 0; p < values.array().size(); ++p) {
        const JsonAt value = values.at(p);
        published += fmt::format("{}{} ({}){}", published.empty() ? "" : "\n", value.at("value").value().dump(),
                                 value.at("source").string(), value.at("flags").array().empty() ? "" : " !");
      }
      if (cell.at("n").whole(1 << 20) != 0 || !published.empty())
        rows.push_back(
            {row.at("name").string(), cell.at("column").string(), cell.at("measure").string(), measured_text(cell.value()), published});
    }
  }
  out += figure(prefix + "numbers", "Numbers", text_table(rows),
                "Measured: mean ± sample standard deviation (seeds). !: more than 3 points or 2 standard deviations apart.");
  const JsonAt notes = table.at("notes");
  for (std::size_t i = 0; i < notes.array().size(); ++i) out += "<p>" + html(notes.at(i).string()) + "</p>\n";
  return out;
}

}  // namespace kava::report
