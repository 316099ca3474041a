// RUN/progress.json: how far a run is, for those who look at it from outside (docs/formats.md).
#pragma once
#include <chrono>
#include <filesystem>
#include <optional>
#include <utility>

#include "engine/files/json.h"
#include "models/trainer.h"

namespace kava {

class ProgressFile {
 public:
  ProgressFile(const std::filesystem::path& run, int64_t first_step, int64_t total_steps);

  /// Rewrites the file where the last time is 5 seconds ago, and at the last step.
  void step(const StepReport& report, const Speed& speed);
  /// Rewrites it after a step, where `writes`.
  void validation(int64_t step, const Validation& validation, bool writes);
  /// The run ends here: the file is of its last step.
  void end();

 private:
  void write();

  const std::filesystem::path path_;
  const int64_t first_step_, total_steps_;
  std::chrono::steady_clock::time_point start_, written_;
  Json validation_;
  std::optional<std::pair<StepReport, Speed>> last_;  // of the newest step
  int64_t written_step_ = -1;
};

}  // namespace kava
