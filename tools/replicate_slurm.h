// The runs of a table as one Slurm array job. A task is all rows of one seed that start from the same row, so that no two tasks train the
// same run; a task that is requeued goes on where it was.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "tools/replicate_work.h"

namespace kava {

/// The works of a task, from 0. Error(code usage) beyond the last.
std::vector<Work> task_works(const ReplicaTable& table, const std::vector<Work>& works, int64_t task);

/// `options`: of replicate, for each task. Makes the data, writes OUT/replicate.sbatch and gives it to sbatch. Returns 0; Error(code
/// preflight) without sbatch or where it refuses.
int submit_to_slurm(const ReplicaTable& table, const std::vector<Work>& works, const std::filesystem::path& out,
                    const std::vector<std::string>& options);

}  // namespace kava
