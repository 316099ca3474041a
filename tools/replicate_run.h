// The runs of a table, several at a time: begun in order, gone on with where they were stopped, tried again where they failed.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "tools/replicate_process.h"
#include "tools/replicate_work.h"

namespace kava {

struct RunOptions {
  int jobs = 1;
  int retries = 1;          // of a work in one call, after a failure that may be a passing one
  double budget_hours = 0;  // > 0: stop after that
  bool keep_all = false;    // checkpoints of a run that is evaluated, beside the best
  std::string device = "auto";
  bool fewer = false;  // without GPUs as many at a time as there are cores, where jobs are more
};

/// Runs what is not done. Returns 0 where all is; the code of the first work that failed for good; 75 where it was stopped, by a signal
/// or by the budget.
int run_works(const ReplicaTable& table, const std::vector<Work>& works, const std::filesystem::path& out, const RunOptions& options);

/// The first `count` devices as `visible`, the value of CUDA_VISIBLE_DEVICES, names them; their numbers where it is null, not set.
std::vector<std::string> gpu_names(const char* visible, int count);

/// What each of several runs at a time has to itself: one of the GPUs, where there are any, and an equal part of the cores and of the
/// threads that `usable` of them run at once; of fewer cores than GPUs each run has all. Error(code usage) where there are more runs than
/// GPUs, or without GPUs than `usable`.
std::vector<Share> shares_of(int jobs, const std::vector<int>& cores, int usable, const std::vector<std::string>& gpus);
/// Of this process.
std::vector<Share> shares_for(const RunOptions& options);

/// The command of a work at this moment: with --resume where its run has begun.
std::vector<std::string> command_of(const Work& work, const RunOptions& options);

}  // namespace kava
