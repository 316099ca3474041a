#include "tools/compare.h"

#include <fmt/core.h>

#include <algorithm>

#include "engine/files/json_at.h"
#include "models/statistics.h"

namespace kava {

namespace {

struct Table {
  int64_t both = 0, only_a = 0, only_b = 0, neither = 0;
  int64_t count() const { return both + only_a + only_b + neither; }
};

const std::string kAgain = "name a result as kava_eval wrote it, or evaluate again";

// All that is compared is there, in its form, so that a fault is told of the file that has it.
void check_result(const JsonAt& result) {
  if (!result.has("records")) result.refuse("has no records of its questions", "evaluate again: kava_eval writes them into --out");
  (void)result.at("data").string();
  const JsonAt records = result.at("records");
  if (records.array().empty()) records.refuse("holds no question", "evaluate on a file of questions");
  for (std::size_t i = 0; i < records.array().size(); ++i) {
    const JsonAt record = records.at(i), verdicts = record.at("correct");
    (void)record.at("question").string(), (void)record.at("gold").string();
    (void)verdicts.object();
    for (const auto& [scorer, value] : records.at(std::size_t{0}).at("correct").object()) (void)verdicts.at(scorer.c_str()).boolean();
  }
}

bool has_verdict(const JsonAt& record, const std::string& scorer) { return record.at("correct").has(scorer.c_str()); }

Table table_of(const JsonAt& a, const JsonAt& b, std::size_t count, const std::string& scorer) {
  Table t;
  for (std::size_t i = 0; i < count; ++i) {
    const bool in_a = a.at(i).at("correct").at(scorer.c_str()).boolean(), in_b = b.at(i).at("correct").at(scorer.c_str()).boolean();
    ++(in_a ? (in_b ? t.both : t.only_a) : (in_b ? t.only_b : t.neither));
  }
  return t;
}

void check_same_questions(const JsonAt& a, const JsonAt& b, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i)
    for (const char* key : {"question", "gold"})
      if (a.at(i).at(key).string() != b.at(i).at(key).string())
        b.at(i).at(key).refuse("differs from that of " + shown_path(a.file()), "compare results on the same data file");
}

// 95 % bootstrap interval of B - A, in points.
Interval difference(const JsonAt& a, const JsonAt& b, std::size_t count, const std::string& scorer) {
  std::vector<double> points;
  for (std::size_t i = 0; i < count; ++i)
    points.push_back(100.0 *
                     (int{b.at(i).at("correct").at(scorer.c_str()).boolean()} - int{a.at(i).at("correct").at(scorer.c_str()).boolean()}));
  return bootstrap_means({points})[0];
}

void print_row(const std::string& scorer, const Table& t, const Interval& interval) {
  const double n = static_cast<double>(t.count());
  const double a = 100 * static_cast<double>(t.both + t.only_a) / n, b = 100 * static_cast<double>(t.both + t.only_b) / n;
  fmt::print("{:<10}{:>8.2f}{:>8.2f}{:>+9.2f}{:>20}{:>8}{:>8}{:>8}{:>9}{:>12}\n", scorer, a, b, b - a,
             fmt::format("{:+.2f} to {:+.2f}", interval.low, interval.high), t.both, t.only_a, t.only_b, t.neither,
             p_text(mcnemar_p(t.only_a, t.only_b)));
}

void compare_data(const JsonAt& a, const JsonAt& b) {
  for (const JsonAt& result : {a, b}) check_result(result);
  const JsonAt records_a = a.at("records"), records_b = b.at("records");
  const std::size_t count = std::min(records_a.array().size(), records_b.array().size());
  check_same_questions(records_a, records_b, count);
  const std::size_t rest = std::max(records_a.array().size(), records_b.array().size()) - count;
  fmt::print("{}: {} questions{}\n", shown_path(a.at("data").string()), count,
             rest > 0 ? fmt::format(" ({} more in one of the results are not compared)", rest) : "");
  fmt::print("{:<10}{:>8}{:>8}{:>9}{:>20}{:>8}{:>8}{:>8}{:>9}{:>12}\n", "scorer", "A %", "B %", "B - A pp", "95 % pp", "both", "only A",
             "only B", "neither", "p");
  for (const auto& [scorer, value] : records_a.at(std::size_t{0}).at("correct").object())
    if (has_verdict(records_b.at(std::size_t{0}), scorer))
      print_row(escaped(scorer, 20), table_of(records_a, records_b, count, scorer), difference(records_a, records_b, count, scorer));
}

}  // namespace

int compare_results(const std::string& path_a, const std::string& path_b) {
  const Json json_a = read_json(path_a), json_b = read_json(path_b);
  const JsonAt a(json_a, path_a, "", kAgain), b(json_b, path_b, "", kAgain);
  for (const JsonAt& file : {a, b}) {
    if (!file.value().is_object() || !file.has("results"))
      file.refuse("is no result of kava_eval", "name a file of its --out, or of a run's eval/");
    (void)file.at("model").string();
    if (file.at("results").array().empty()) file.at("results").refuse("holds no result");
  }
  const JsonAt results_a = a.at("results"), results_b = b.at("results");
  if (results_a.array().size() != results_b.array().size())
    throw Error(
        Exit::data, shown_path(path_b),
        fmt::format("holds results of {} data files, {} of {}", results_b.array().size(), shown_path(path_a), results_a.array().size()),
        "compare results of the same --data");
  fmt::print("A = {} ({})\nB = {} ({})\n", shown_path(path_a), shown_path(a.at("model").string()), shown_path(path_b),
             shown_path(b.at("model").string()));
  for (std::size_t i = 0; i < results_a.array().size(); ++i) compare_data(results_a.at(i), results_b.at(i));
  fmt::print(
      "A %, B %: share of right answers. B - A and its 95 % interval (bootstrap over the questions, paired, {} resamples) in percentage "
      "points.\n"
      "both to neither: numbers of questions. p: exact McNemar test, two-sided, on the questions that only one of the two got right.\n",
      kResamples);
  return 0;
}

}  // namespace kava
