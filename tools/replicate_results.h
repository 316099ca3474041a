// What the finished works of a table give: means over seeds, comparisons between rows, what differs from what was published; and its forms.
#pragma once
#include <filesystem>
#include <string>

#include "engine/files/json.h"
#include "tools/replicate_table.h"

namespace kava {

/// table.json: the one source of the other forms. Reads states alone. `times` puts milliseconds into it, which differ between equal runs.
Json aggregate(const ReplicaTable& table, const std::filesystem::path& out, bool times);

std::string markdown_of(const Json& table);
std::string latex_of(const Json& table);
/// One line for each number: measured or published.
std::string csv_of(const Json& table);

/// Writes table.json, table.md, table.tex, table.csv and times.json.
void write_tables(const ReplicaTable& table, const std::filesystem::path& out, bool times);

/// The difference of two accuracies on the same questions, verdicts averaged over seeds.
struct Paired {
  double difference = 0;     // of A - B, in points
  double low = 0, high = 0;  // 95 % of the resamples of questions
};
/// a, b: verdicts '0' and '1' of every seed, one string a seed, all of one length.
Paired paired_bootstrap(const std::vector<std::string>& a, const std::vector<std::string>& b);

/// "63.10 ± 0.42 (3)", "63.10 (1)", "" without values.
std::string measured_text(const Json& cell);

}  // namespace kava
