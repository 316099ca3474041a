// RUN/progress.json: how far a run is, for those who look at it from outside (docs/formats.md).
#pragma once
#include <chrono>
#include <filesystem>
#include <optional>
#include <utility>

#include "models/trainer.h"

namespace kava {

class ProgressFile {
 public:
  ProgressFile(const std::filesystem::path& run, int64_t first_step, int64_t total_steps);

  /// Rewrites the file where the last time is 5 seconds ago, and at the last step.
  void step(const StepReport& report, const Speed& speed);
  /// writes: one after the last step rewrites the file.
  void validation(int64_t step, const Validation& validation, bool writes);

 private:
  void write(const StepReport& report, const Speed& speed);

  const std::filesystem::path path_;
  const int64_t first_step_, total_steps_;
  std::chrono::steady_clock::time_point start_, written_;
  std::map<std::string, double> validation_;
  std::optional<std::pair<StepReport, Speed>> last_;  // of the last step
};

}  // namespace kava
