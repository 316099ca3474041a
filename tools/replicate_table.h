// The table of `replicate` as its TOML file says it (docs/replicate.md): rows of configurations, columns of data and scorers, seeds, and
// what was published.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "engine/choice.h"
#include "engine/config/config.h"
#include "engine/config/toml_file.h"
#include "engine/data/synth.h"
#include "models/evaluate.h"

namespace kava {

/// Accuracy in %, forward passes a question, milliseconds a question.
KAVA_CHOICE(Measure, accuracy, passes, ms)

struct PublishedValue {
  std::string column;
  Measure measure = Measure::accuracy;
  double value = 0;
  std::optional<double> sd;
  std::string source;
};

struct TableColumn {
  std::string name, title;
  std::string data;  // of the file, as given
  std::optional<DataFormat> format;
  int64_t limit = 0;  // 0: all rows
  Scorer scorer = Scorer::strict;
  std::string scorer_place;  // FILE:LINE:COL
};

struct TableRow {
  std::string name, title, block;
  std::string config;                   // as given
  std::vector<std::string> sets;        // as given
  std::string start;                    // the row whose trained model this one starts from, or ""
  std::string start_place, sets_place;  // FILE:LINE:COL
  std::vector<std::string> groups;
  std::optional<Scorer> scorer;  // in the place of strict, where a column has that
  std::string scorer_place;
  bool shown = true;  // else it is only trained, for others to start from
  std::vector<PublishedValue> published;
};

/// What the answers of a row are judged by in a column.
inline Scorer scorer_of(const TableRow& row, const TableColumn& column) {
  return column.scorer == Scorer::strict ? row.scorer.value_or(Scorer::strict) : column.scorer;
}

struct ReplicaTable {
  std::filesystem::path file, folder;  // absolute
  std::string name, title;
  std::vector<int64_t> seeds;
  std::vector<Measure> measures;
  std::string reference;  // a group: each row is compared with the row of its block that is in it
  std::vector<std::string> notes;
  std::optional<SynthOptions> synth;           // data that kava_data makes first, in OUT/data
  std::map<std::string, std::string> digests;  // path as given -> SHA-256 that it must have
  std::vector<TableColumn> columns;
  std::vector<TableRow> rows;

  const TableRow* find(const std::string& row) const;
};

/// Error(code usage) at FILE:LINE:COL for what the form does not allow: an unknown key, a row that starts from none or has a seed of
/// its own, a reference that is none, a published value without a source.
ReplicaTable read_table(const std::string& path);

/// A text of the table with {out} and {seed} put in.
std::string filled_in(const std::string& text, const std::filesystem::path& out, int64_t seed);

/// A path of the table, from its folder, with {out} and {seed} put in.
std::filesystem::path table_path(const ReplicaTable& table, const std::string& path, const std::filesystem::path& out, int64_t seed);

/// What the run of a row leaves: its adapter, or its model where every weight was trained.
std::string adapter_of(const TableRow& row, const std::filesystem::path& out, int64_t seed);

/// The arguments of --set for one run, the seed last; their relative paths are from the table's folder, which is to be the working one.
std::vector<std::string> settings_of(const ReplicaTable& table, const TableRow& row, const std::filesystem::path& out, int64_t seed);

}  // namespace kava
