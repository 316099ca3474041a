#include "tools/replicate_results.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "engine/error.h"
#include "engine/files/files.h"
#include "models/statistics.h"
#include "tools/replicate_work.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

constexpr double kFlagPoints = 3, kFlagDeviations = 2, kRounding = 1e-9;

// The states of a table's works.
class States {
 public:
  States(const ReplicaTable& table, const fs::path& out) : table_(table) {
    for (const Work& work : works_of(table, {}, out)) states_[work.id] = read_state(out, work);
  }

  const std::optional<WorkState>& of(const std::string& id) { return states_[id]; }

  /// The result of an evaluation, or null.
  const Json& result(const TableRow& row, int64_t seed, std::size_t column) {
    static const Json none;
    const std::optional<WorkState>& state = of(eval_id(table_, row, seed, column));
    return state && state->done ? state->result : none;
  }

 private:
  const ReplicaTable& table_;
  std::map<std::string, std::optional<WorkState>> states_;
};

Json value_of(const Json& result, Measure measure, Scorer scorer) {
  if (result.is_null()) return nullptr;
  if (measure == Measure::passes) return result["passes"];
  if (measure == Measure::ms) return result["ms"];
  const auto share = result["accuracy"].find(name_of(scorer));
  return share == result["accuracy"].end() || !share->is_number() ? Json() : Json(100 * share->get<double>());
}

// The sample standard deviation; nothing of a single value.
std::optional<double> deviation(const std::vector<double>& values, double mean) {
  if (values.size() < 2) return std::nullopt;
  double sum = 0;
  for (double v : values) sum += (v - mean) * (v - mean);
  return std::sqrt(sum / static_cast<double>(values.size() - 1));
}

// Points are those of a share; passes differ by deviations alone, and times by the machine.
Json flags_of(Measure measure, double mean, const std::optional<double>& sd, const PublishedValue& published) {
  Json flags = Json::array();
  const double difference = mean - published.value;
  if (measure == Measure::accuracy && std::abs(difference) > kFlagPoints) flags.push_back("points");
  const std::optional<double> scale = published.sd ? published.sd : sd;
  if (scale && std::abs(difference) > kFlagDeviations * *scale + kRounding) flags.push_back("deviations");
  return flags;
}

Json cell_of(States& states, const ReplicaTable& table, const TableRow& row, std::size_t column, Measure measure) {
  const TableColumn& c = table.columns[column];
  Json values = Json::array();
  std::vector<double> numbers;
  for (int64_t seed : table.seeds) {
    values.push_back(row.shown ? value_of(states.result(row, seed, column), measure, scorer_of(row, c)) : Json());
    if (values.back().is_number()) numbers.push_back(values.back().get<double>());
  }
  Json cell = {{"column", c.name}, {"measure", name_of(measure)}, {"values", std::move(values)}, {"n", numbers.size()}, {"mean", nullptr},
               {"sd", nullptr},    {"published", Json::array()}};
  const double mean = std::accumulate(numbers.begin(), numbers.end(), 0.0) / std::max<double>(1, static_cast<double>(numbers.size()));
  const std::optional<double> sd = deviation(numbers, mean);
  if (!numbers.empty()) cell["mean"] = mean;
  if (sd) cell["sd"] = *sd;
  for (const PublishedValue& p : row.published) {
    if (p.column != c.name || p.measure != measure) continue;
    Json json = {{"value", p.value}, {"sd", p.sd ? Json(*p.sd) : Json()}, {"source", p.source}, {"flags", Json::array()}};
    if (!numbers.empty() && measure != Measure::ms) json["flags"] = flags_of(measure, mean, sd, p);
    cell["published"].push_back(std::move(json));
  }
  return cell;
}

// Row against reference in one column, over the seeds that both have on the same questions; null where there is none.
Json comparison_of(States& states, const ReplicaTable& table, const TableRow& row, const TableRow& reference, std::size_t column) {
  const TableColumn& c = table.columns[column];
  std::vector<std::string> a, b;
  Json questions;
  for (int64_t seed : table.seeds) {
    const Json &x = states.result(row, seed, column), &y = states.result(reference, seed, column);
    if (x.is_null() || y.is_null() || x["questions_sha256"] != y["questions_sha256"]) continue;
    const auto v = x["verdicts"].find(name_of(scorer_of(row, c))), w = y["verdicts"].find(name_of(scorer_of(reference, c)));
    if (v == x["verdicts"].end() || w == y["verdicts"].end() || v->get_ref<const std::string&>().empty()) continue;
    if (!questions.is_null() && questions != x["questions_sha256"]) continue;
    if (v->get_ref<const std::string&>().size() != w->get_ref<const std::string&>().size()) continue;
    questions = x["questions_sha256"];
    a.push_back(v->get<std::string>()), b.push_back(w->get<std::string>());
  }
  if (a.empty()) return nullptr;
  const Paired p = paired_bootstrap(a, b);
  return {{"row", row.name},          {"against", reference.name},  {"column", c.name}, {"seeds", a.size()},
          {"questions", a[0].size()}, {"difference", p.difference}, {"low", p.low},     {"high", p.high}};
}

Json comparisons_of(States& states, const ReplicaTable& table) {
  Json out = Json::array();
  if (table.reference.empty()) return out;
  auto is_reference = [&](const TableRow& row) { return std::ranges::find(row.groups, table.reference) != row.groups.end(); };
  for (const TableRow& row : table.rows) {
    if (!row.shown || is_reference(row)) continue;
    for (const TableRow& reference : table.rows) {
      if (reference.block != row.block || !is_reference(reference)) continue;
      for (std::size_t column = 0; column < table.columns.size(); ++column)
        if (Json c = comparison_of(states, table, row, reference, column); !c.is_null()) out.push_back(std::move(c));
    }
  }
  return out;
}

Json missing_of(States& states, const ReplicaTable& table) {
  Json out = Json::array();
  auto look = [&](const std::string& id) {
    const std::optional<WorkState>& state = states.of(id);
    if (state && state->done) return;
    const bool failed = state && !state->stopped();
    out.push_back({{"work", id}, {"status", failed ? "failed" : "open"}, {"reason", failed ? state->reason : ""}});
  };
  for (const TableRow& row : table.rows)
    for (int64_t seed : table.seeds) {
      look(train_id(row, seed));
      for (std::size_t column = 0; row.shown && column < table.columns.size(); ++column)
        if (data_column(table, column) == column) look(eval_id(table, row, seed, column));
    }
  return out;
}

Json times_of(States& states, const ReplicaTable& table) {
  Json works = Json::object();
  double total = 0;
  auto add = [&](const std::string& id) {
    const std::optional<WorkState>& state = states.of(id);
    if (!state) return;
    works[id] = {{"seconds", state->seconds}, {"attempts", state->attempts}};
    if (!state->result.is_null()) works[id]["ms_per_question"] = state->result["ms"];
    total += state->seconds;
  };
  add("data");
  for (const TableRow& row : table.rows)
    for (int64_t seed : table.seeds) {
      add(train_id(row, seed));
      for (std::size_t column = 0; column < table.columns.size(); ++column)
        if (data_column(table, column) == column) add(eval_id(table, row, seed, column));
    }
  return {{"seconds", total}, {"works", std::move(works)}};
}

}  // namespace

Paired paired_bootstrap(const std::vector<std::string>& a, const std::vector<std::string>& b) {
  const std::size_t n = a.at(0).size();
  std::vector<double> differences(n);  // in points
  for (std::size_t seed = 0; seed < a.size(); ++seed)
    for (std::size_t i = 0; i < n; ++i) differences[i] += 100.0 * (a[seed][i] - b[seed][i]) / static_cast<double>(a.size());
  const Interval interval = bootstrap_means({differences})[0];
  return {std::accumulate(differences.begin(), differences.end(), 0.0) / static_cast<double>(n), interval.low, interval.high};
}

namespace {

// What a reader has to know to put numbers of two rows, or of another source, beside each other.
std::vector<std::string> notes_of(States& states, const ReplicaTable& table) {
  std::vector<std::string> notes = table.notes, free;
  bool forced = false;
  for (const TableRow& row : table.rows)
    for (std::size_t column = 0; row.shown && column < table.columns.size(); ++column)
      for (int64_t seed : table.seeds) {
        const Json& result = states.result(row, seed, column);
        if (!result.contains("prompt")) continue;
        if (result["prompt"] != "free") forced = true;
        else if (std::ranges::find(free, row.title) == free.end()) free.push_back(row.title);
      }
  const bool passes = std::ranges::find(table.measures, Measure::passes) != table.measures.end();
  if (passes && !free.empty())
    notes.push_back(fmt::format("Passes count the answer prompt, and the blank before a number, where the model writes them: {}.{}",
                                fmt::join(free, ", "), forced ? " The other rows are given them." : ""));
  std::map<Scorer, std::vector<std::string>> own;
  for (const TableRow& row : table.rows)
    if (row.shown && row.scorer && *row.scorer != Scorer::strict)
      if (auto& titles = own[*row.scorer]; std::ranges::find(titles, row.title) == titles.end()) titles.push_back(row.title);
  for (const auto& [scorer, titles] : own)
    notes.push_back(fmt::format("By the scorer {} where the column says strict: {}.", name_of(scorer), fmt::join(titles, ", ")));
  if (std::ranges::any_of(table.columns, [](const TableColumn& c) { return c.scorer == Scorer::gsm_hard; }))
    notes.push_back("gsm_hard: numbers are equal where they differ by 1e-6 of their size at most.");
  return notes;
}

Json aggregate(States& states, const ReplicaTable& table, bool times) {
  Json columns = Json::array(), rows = Json::array(), measures = Json::array();
  for (std::size_t i = 0; i < table.columns.size(); ++i) {
    const TableColumn& c = table.columns[i];
    // data: the column whose evaluation this one reads
    const TableColumn& of = table.columns[data_column(table, i)];
    const std::string part = of.limit > 0 ? fmt::format(" (first {})", of.limit) : "";
    columns.push_back({{"name", c.name}, {"title", c.title + part}, {"scorer", name_of(c.scorer)}, {"limit", of.limit}, {"data", of.name}});
  }
  for (Measure measure : table.measures)
    if (measure != Measure::ms || times) measures.push_back(name_of(measure));
  for (const TableRow& row : table.rows) {
    if (!row.shown) continue;
    Json cells = Json::array();
    for (const Json& measure : measures)
      for (std::size_t column = 0; column < table.columns.size(); ++column)
        cells.push_back(cell_of(states, table, row, column, *choice_of<Measure>(measure.get<std::string>())));
    rows.push_back({{"name", row.name},
                    {"title", row.title},
                    {"block", row.block},
                    {"config", row.config},
                    {"scorer", row.scorer ? Json(name_of(*row.scorer)) : Json()},
                    {"set", row.sets},
                    {"cells", std::move(cells)}});
  }
  return {{"format", 1},
          {"name", table.name},
          {"title", table.title},
          {"seeds", table.seeds},
          {"measures", std::move(measures)},
          {"columns", std::move(columns)},
          {"rows", std::move(rows)},
          {"comparisons", comparisons_of(states, table)},
          {"missing", missing_of(states, table)},
          {"notes", notes_of(states, table)}};
}

}  // namespace

Json aggregate(const ReplicaTable& table, const fs::path& out, bool times) {
  States states(table, out);
  return aggregate(states, table, times);
}

void write_tables(const ReplicaTable& table, const fs::path& out, bool times) {
  States states(table, out);
  const Json json = aggregate(states, table, times);
  write_file((out / "table.json").string(), json.dump(1) + "\n");
  write_file((out / "table.md").string(), markdown_of(json));
  write_file((out / "table.tex").string(), latex_of(json));
  write_file((out / "table.csv").string(), csv_of(json));
  write_file((out / "times.json").string(), times_of(states, table).dump(1) + "\n");
}

}  // namespace kava
