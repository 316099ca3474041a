// What `replicate` has to do for a table, and what of it is done: one file of state for each work, written whole or not at all.
#pragma once
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "engine/error.h"
#include "engine/files/json.h"
#include "tools/replicate_table.h"

namespace kava {

KAVA_CHOICE(WorkKind, data, train, eval)

/// One process to run.
struct Work {
  WorkKind kind = WorkKind::data;
  std::string id;                   // "kava.42.train"; names its state
  std::size_t row = 0, column = 0;  // of the table; the first column of its data file
  int64_t seed = 0;
  std::vector<std::size_t> needs;      // works that come first
  std::string fingerprint;             // of all that its result depends on but the contents of files
  std::filesystem::path run;           // the run folder
  std::vector<std::string> arguments;  // the program's name first
  std::filesystem::path log, result;   // result: what kava_eval writes and replicate takes into the state
};

/// What is asked for of a table.
struct Selection {
  std::vector<std::string> only;  // names or groups of rows; empty: all
  std::vector<int64_t> seeds;     // empty: the table's
};

/// In the order in which they are to begin. Error(code usage) where a configuration is wrong or the selection names nothing.
std::vector<Work> works_of(const ReplicaTable& table, const Selection& selection, const std::filesystem::path& out);

/// The columns' different data files: of each column the first one with the same data, form and limit.
std::size_t data_column(const ReplicaTable& table, std::size_t column);

std::string train_id(const TableRow& row, int64_t seed);
std::string eval_id(const ReplicaTable& table, const TableRow& row, int64_t seed, std::size_t column);

struct WorkState {
  bool done = false;
  int attempts = 0;
  int code = 0;        // of a failed or stopped one
  std::string reason;  // its last words
  double seconds = 0;  // over all attempts
  std::string fingerprint;
  Json result;                   // of an evaluation; else null
  Json inputs = Json::object();  // the SHA-256 of each data file that it read, by its path from the table's folder
  bool stopped() const { return !done && code == static_cast<int>(Exit::stopped); }
};

std::filesystem::path state_path(const std::filesystem::path& out, const std::string& id);

/// Nothing where the work was never begun, or failed with another configuration. Error(code data) for a file that is no state, (code usage)
/// where the work is done with another configuration than the table's.
std::optional<WorkState> read_state(const std::filesystem::path& out, const Work& work);
void write_state(const std::filesystem::path& out, const Work& work, const WorkState& state);

/// What the aggregation needs of a result of kava_eval: accuracies, passes, times and verdicts, one character a question. Error(code data).
Json evaluation_summary(const std::string& path);

}  // namespace kava
