// What goes wrong in training without an error: each is said once with what to do about it, and counted.
#pragma once
#include <deque>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "models/trainer.h"

namespace kava {

class Alarms {
 public:
  /// total: steps of the run.
  Alarms(const RunConfig& config, int64_t total);

  /// Lines to tell, mostly none. A kind of alarm is told when it is raised first, spikes every time.
  std::vector<std::string> start(std::span<const Sample> train);
  std::vector<std::string> step(const StepReport& report);
  std::vector<std::string> validation(int64_t step, const Validation& validation);

  /// Whether a value stands apart from those before it: above their median by more than 8 times what their absolute deviations from it have
  /// as median (1.4826 of that is a standard deviation, were they normal), and by more than a tenth of itself. From 20 values on.
  static bool is_spike(double value, std::vector<double> before);

  /// "latents' norm 12 times, validation under valid.floor 3 times"; "" where none was raised.
  std::string summary() const;

 private:
  // each: told every time.
  void raise(const std::string& kind, const std::string& line, std::vector<std::string>& lines, bool each = false);

  void spikes(const StepReport& report, std::vector<std::string>& lines);

  const RunConfig& config_;
  const int64_t warmup_;
  std::deque<double> losses_, norms_;  // of the last steps
  std::map<std::string, int64_t> count_;
};

}  // namespace kava
