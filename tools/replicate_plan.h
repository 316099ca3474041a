// What `replicate` says without doing it: its plan, its commands, and how far it is.
#pragma once
#include <filesystem>
#include <optional>
#include <vector>

#include "tools/replicate_run.h"

namespace kava {

/// Error(code data) naming at once every file that is missing of those that the works not done need (models with weights and tokenizer,
/// adapters, data) and that the table has a SHA-256 of, or the first that has another SHA-256. A SHA-256 of what only other rows of the
/// table need is passed over.
void require_files(const ReplicaTable& table, const std::vector<Work>& works, const std::filesystem::path& out);

/// The SHA-256 of the data files that a work reads, but for those that the table makes: a state's `inputs`.
Json digests_of_inputs(const ReplicaTable& table, const Work& work, const std::filesystem::path& out);
/// Refuses, with Error(code data), to go on where a file holds something else than a work read of it that is done: a table's values are
/// means and differences over the same contents.
void require_same_contents(const ReplicaTable& table, const std::filesystem::path& out);

/// How many trainings and evaluations are not done.
void print_counts(const std::vector<Work>& works, const std::filesystem::path& out);

/// Steps, hours, disk and end of what is not done, by kava_train --plan. `rate`: TFLOP/s. Returns 0, or kava_train's code where it fails.
int print_plan(const ReplicaTable& table, const std::vector<Work>& works, const std::filesystem::path& out, const RunOptions& options,
               std::optional<double> rate);

int print_commands(const std::vector<Work>& works, const std::filesystem::path& out, const RunOptions& options);

/// Needs no lock, so that it works beside the replicate that runs.
int print_status(const ReplicaTable& table, const std::vector<Work>& works, const std::filesystem::path& out);

}  // namespace kava
