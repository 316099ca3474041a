// The forms of table.json that people read: Markdown, LaTeX, CSV.
#include <algorithm>
#include <map>
#include <utility>

#include "engine/error.h"
#include "tools/replicate_results.h"

namespace kava {

namespace {

std::string number(const Json& value) { return fmt::format("{:.2f}", value.get<double>()); }

const std::map<std::string, std::string> kTitles = {
    {"accuracy", "Accuracy, %"}, {"passes", "Forward passes a question"}, {"ms", "Milliseconds a question"}};

const Json& cell_of(const Json& row, const std::string& column, const Json& measure) {
  return *std::ranges::find_if(row["cells"], [&](const Json& c) { return c["column"] == column && c["measure"] == measure; });
}

// The numbers of the sources, in the order in which they are first met.
class Sources {
 public:
  explicit Sources(const Json& table) {
    for (const Json& row : table["rows"])
      for (const Json& cell : row["cells"])
        for (const Json& p : cell["published"])
          if (number_of_.emplace(p["source"].get<std::string>(), order_.size() + 1).second)
            order_.push_back(p["source"].get<std::string>());
  }
  std::size_t of(const Json& published) const { return number_of_.at(published["source"].get<std::string>()); }
  const std::vector<std::string>& all() const { return order_; }

 private:
  std::map<std::string, std::size_t> number_of_;
  std::vector<std::string> order_;
};

std::string published_text(const Json& cell, const Sources& sources, const std::string& plus_minus) {
  std::string out;
  for (const Json& p : cell["published"]) {
    if (!out.empty()) out += ", ";
    out += number(p["value"]);
    if (!p["sd"].is_null()) out += plus_minus + number(p["sd"]);
    out += fmt::format(" [{}]", sources.of(p));
  }
  return out;
}

bool is_flagged(const Json& cell) {
  return std::ranges::any_of(cell["published"], [](const Json& p) { return !p["flags"].empty(); });
}

bool has_published(const Json& table, const Json& column, const Json& measure) {
  return std::ranges::any_of(
      table["rows"], [&](const Json& row) { return !cell_of(row, column["name"].get<std::string>(), measure)["published"].empty(); });
}

std::string text_of(const Json& cell, const std::string& plus_minus) {
  if (cell["mean"].is_null()) return "";
  std::string out = number(cell["mean"]);
  if (!cell["sd"].is_null()) out += plus_minus + number(cell["sd"]);
  return out + fmt::format(" ({})", cell["n"].get<int64_t>());
}

// Of text that a table's file gives.
std::string for_markdown(const std::string& text) {
  std::string out;
  for (char c : text) {
    if (c == '|' || c == '\\' || c == '<' || c == '*' || c == '`') out += '\\';
    out += c == '\n' ? ' ' : c;
  }
  return out;
}

std::string for_latex(const std::string& text) {
  std::string out;
  for (char c : text) {
    if (c == '\\') out += "\\textbackslash{}";
    else if (c == '~' || c == '^') out += fmt::format("\\{}{{}}", c);
    else if (std::string_view("&%$#_{}").find(c) != std::string_view::npos) out += fmt::format("\\{}", c);
    else out += c == '\n' ? ' ' : c;
  }
  return out;
}

std::string for_csv(const std::string& text) {
  if (text.find_first_of(",\"\n\r") == std::string::npos) return text;
  std::string out = "\"";
  for (char c : text) out += c == '"' ? "\"\"" : std::string(1, c);
  return out + "\"";
}

// Calls `header` where a block begins, also one without a name behind another, and `row` for each of its rows.
template <class Header, class Row>
void for_each_row(const Json& table, const Header& header, const Row& row) {
  std::string block;
  for (const Json& r : table["rows"]) {
    if (r["block"] != block) {
      block = r["block"].get<std::string>();
      header(block.empty() ? "Other" : block);
    }
    row(r);
  }
}

std::string flag_text(const Json& row, const Json& cell, const Json& published) {
  std::string why;
  for (const Json& flag : published["flags"])
    why += (why.empty() ? "" : ", ") + std::string(flag == "points" ? "over 3 points" : "over 2 standard deviations");
  return fmt::format("{}, {}: {:+.2f} against {} ({})", row["title"].get<std::string>(), cell["column"].get<std::string>(),
                     cell["mean"].get<double>() - published["value"].get<double>(), number(published["value"]), why);
}

std::vector<std::string> all_flags(const Json& table) {
  std::vector<std::string> out;
  for (const Json& row : table["rows"])
    for (const Json& cell : row["cells"])
      for (const Json& p : cell["published"])
        if (!p["flags"].empty())
          out.push_back((row["block"].get<std::string>().empty() ? "" : row["block"].get<std::string>() + ": ") + flag_text(row, cell, p));
  return out;
}

std::string markdown_table(const Json& table, const Json& measure, const Sources& sources) {
  std::string out = fmt::format("\n## {}\n\n| |", kTitles.at(measure.get<std::string>())), line = "|---|";
  std::size_t cells = 0;
  for (const Json& column : table["columns"]) {
    const std::string title = for_markdown(column["title"].get<std::string>());
    const std::string scorer = measure == "accuracy" ? ", " + column["scorer"].get<std::string>() : "";
    out += fmt::format(" {}{}: measured |", title, scorer), line += "---|", ++cells;
    if (has_published(table, column, measure)) out += fmt::format(" {}: published |", title), line += "---|", ++cells;
  }
  out += "\n" + line + "\n";
  auto header = [&](const std::string& block) {
    out += fmt::format("| **{}** |", for_markdown(block));
    for (std::size_t i = 0; i < cells; ++i) out += " |";
    out += "\n";
  };
  for_each_row(table, header, [&](const Json& row) {
    out += fmt::format("| {} |", for_markdown(row["title"].get<std::string>()));
    for (const Json& column : table["columns"]) {
      const Json& cell = cell_of(row, column["name"].get<std::string>(), measure);
      out += fmt::format(" {}{} |", text_of(cell, " ± "), is_flagged(cell) ? " !" : "");
      if (has_published(table, column, measure)) out += fmt::format(" {} |", for_markdown(published_text(cell, sources, " ± ")));
    }
    out += "\n";
  });
  return out;
}

constexpr const char* kComparisons =
    "Difference in points, row minus reference, over the questions that both answered, means over seeds; 95 % of 2,000 resamples of the "
    "questions.";

// The paired comparisons, the header first.
std::vector<std::vector<std::string>> comparison_rows(const Json& table) {
  std::vector<std::vector<std::string>> rows = {{"row", "reference", "column", "questions", "seeds", "difference", "95 %"}};
  for (const Json& c : table["comparisons"])
    rows.push_back({c["row"].get<std::string>(), c["against"].get<std::string>(), c["column"].get<std::string>(), c["questions"].dump(),
                    c["seeds"].dump(), fmt::format("{:+.2f}", c["difference"].get<double>()),
                    fmt::format("{:+.2f} to {:+.2f}", c["low"].get<double>(), c["high"].get<double>())});
  return rows;
}

std::string markdown_comparisons(const Json& table) {
  std::string out = fmt::format("\n## Paired comparisons\n\n{}\n\n", kComparisons), line = "|---|---|---|---|---|---|---|\n";
  for (const auto& row : comparison_rows(table)) out += fmt::format("| {} |\n{}", fmt::join(row, " | "), std::exchange(line, ""));
  return out;
}

std::string latex_comparisons(const Json& table) {
  std::string out = fmt::format("% {}\n\\begin{{tabular}}{{lllrrrr}}\n\\hline\n", for_latex(kComparisons)), line = "\\hline\n";
  for (const auto& row : comparison_rows(table)) {
    for (std::size_t i = 0; i < row.size(); ++i) out += (i == 0 ? "" : " & ") + for_latex(row[i]);
    out += " \\\\\n" + std::exchange(line, "");
  }
  return out + "\\hline\n\\end{tabular}\n";
}

// What is not done: a line for each failure, then one for all that is open.
std::vector<std::string> missing_lines(const Json& table) {
  std::vector<std::string> lines;
  std::string open;
  for (const Json& m : table["missing"]) {
    const std::string work = m["work"].get<std::string>();
    if (m["status"] == "failed") lines.push_back(work + " failed: " + m["reason"].get<std::string>());
    else open += (open.empty() ? "open: " : ", ") + work;
  }
  if (!open.empty()) lines.push_back(open);
  return lines;
}

// One line of table.csv: values by the names of its columns.
std::string csv_line(const std::map<std::string, std::string>& values) {
  std::string out;
  for (const char* name : {"kind", "block", "row", "column", "measure", "value", "sd", "n", "source", "flags", "against", "questions",
                           "low", "high", "work", "reason"}) {
    const auto found = values.find(name);
    out += (out.empty() ? "" : ",") + (values.empty() ? name : found == values.end() ? "" : for_csv(found->second));
  }
  return out + "\n";
}

}  // namespace

std::string measured_text(const Json& cell) { return text_of(cell, " ± "); }

std::string markdown_of(const Json& table) {
  const Sources sources(table);
  std::string out = fmt::format("# {}\n\nMeasured: mean ± sample standard deviation (number of seeds).{}\n",
                                for_markdown(table["title"].get<std::string>()),
                                sources.all().empty() ? "" : " Published numbers stand apart, each with its source.");
  for (const Json& measure : table["measures"]) out += markdown_table(table, measure, sources);
  if (!table["comparisons"].empty()) out += markdown_comparisons(table);
  if (const auto flags = all_flags(table); !flags.empty()) {
    out += "\n## Measured differs from published (!)\n\n";
    for (const std::string& flag : flags) out += "* " + for_markdown(flag) + "\n";
  }
  if (!sources.all().empty()) {
    out += "\n## Sources\n\n";
    for (std::size_t i = 0; i < sources.all().size(); ++i) out += fmt::format("* [{}] {}\n", i + 1, for_markdown(sources.all()[i]));
  }
  if (!table["notes"].empty()) {
    out += "\n## Notes\n\n";
    for (const Json& note : table["notes"]) out += "* " + for_markdown(note.get<std::string>()) + "\n";
  }
  if (!table["missing"].empty()) {
    out += fmt::format("\n## Not done: {} works\n\n", table["missing"].size());
    for (const std::string& line : missing_lines(table)) out += "* " + for_markdown(line) + "\n";
  }
  return out;
}

std::string latex_of(const Json& table) {
  const Sources sources(table);
  std::string out =
      fmt::format("% {}. Measured: mean and sample standard deviation (number of seeds).\n", for_latex(table["title"].get<std::string>()));
  for (const Json& measure : table["measures"]) {
    std::string header, forms = "l";
    std::size_t cells = 1;
    for (const Json& column : table["columns"]) {
      const std::string title = for_latex(column["title"].get<std::string>());
      header += " & " + title + ", measured", forms += "r", ++cells;
      if (has_published(table, column, measure)) header += " & " + title + ", published", forms += "r", ++cells;
    }
    out += fmt::format("% {}\n\\begin{{tabular}}{{{}}}\n\\hline\n{} \\\\\n\\hline\n", for_latex(kTitles.at(measure.get<std::string>())),
                       forms, header);
    auto block = [&](const std::string& name) {
      out += fmt::format("\\multicolumn{{{}}}{{l}}{{\\textbf{{{}}}}} \\\\\n", cells, for_latex(name));
    };
    for_each_row(table, block, [&](const Json& row) {
      out += for_latex(row["title"].get<std::string>());
      for (const Json& column : table["columns"]) {
        const Json& cell = cell_of(row, column["name"].get<std::string>(), measure);
        out += fmt::format(" & {}{}", text_of(cell, " $\\pm$ "), is_flagged(cell) ? " !" : "");
        if (has_published(table, column, measure)) out += " & " + published_text(cell, sources, " $\\pm$ ");
      }
      out += " \\\\\n";
    });
    out += "\\hline\n\\end{tabular}\n";
  }
  if (!table["comparisons"].empty()) out += latex_comparisons(table);
  for (const std::string& flag : all_flags(table)) out += "% ! " + for_latex(flag) + "\n";
  for (std::size_t i = 0; i < sources.all().size(); ++i) out += fmt::format("% [{}] {}\n", i + 1, for_latex(sources.all()[i]));
  for (const Json& note : table["notes"]) out += "% " + for_latex(note.get<std::string>()) + "\n";
  for (const std::string& line : missing_lines(table)) out += "% not done: " + for_latex(line) + "\n";
  return out;
}

std::string csv_of(const Json& table) {
  std::string out = csv_line({});
  auto text = [](const Json& value) { return value.is_null() ? "" : value.is_string() ? value.get<std::string>() : value.dump(); };
  for (const Json& row : table["rows"])
    for (const Json& cell : row["cells"]) {
      std::map<std::string, std::string> line = {
          {"block", text(row["block"])}, {"row", text(row["name"])}, {"column", text(cell["column"])}, {"measure", text(cell["measure"])}};
      line["kind"] = "measured", line["value"] = text(cell["mean"]), line["sd"] = text(cell["sd"]), line["n"] = text(cell["n"]);
      out += csv_line(line);
      for (const Json& p : cell["published"]) {
        line["kind"] = "published", line["value"] = text(p["value"]), line["sd"] = text(p["sd"]), line["n"].clear();
        line["source"] = text(p["source"]), line["flags"].clear();
        for (const Json& flag : p["flags"]) line["flags"] += (line["flags"].empty() ? "" : " ") + text(flag);
        out += csv_line(line);
      }
    }
  for (const Json& c : table["comparisons"])
    out += csv_line({{"kind", "comparison"},
                     {"row", text(c["row"])},
                     {"column", text(c["column"])},
                     {"measure", "accuracy"},
                     {"value", text(c["difference"])},
                     {"n", text(c["seeds"])},
                     {"against", text(c["against"])},
                     {"questions", text(c["questions"])},
                     {"low", text(c["low"])},
                     {"high", text(c["high"])}});
  for (const Json& m : table["missing"])
    out += csv_line({{"kind", text(m["status"])}, {"work", text(m["work"])}, {"reason", text(m["reason"])}});
  return out;
}

}  // namespace kava
