// What a person sees of a training run on standard output: a bar that is redrawn on a terminal, one line a logged step elsewhere. "Peak" is
// the machine's matrix rate, measured at the start.
#pragma once
#include <chrono>
#include <string>

#include "engine/device/ops.h"
#include "models/trainer.h"

namespace kava {

/// FLOP/s of the backend's matrix product in this type, measured for a small part of the time that a run of so many FLOP takes.
double measure_matrix_rate(Ops& ops, DType storage, double run_flops);

/// "1:02:03"
std::string duration_text(double seconds);

class Progress {
 public:
  /// From `first_step` on, of total_steps; every log_every'th step gets a line. alone: what looks like a terminal is one; a launcher may
  /// put a pseudo-terminal between a rank and its own output.
  Progress(int64_t first_step, int64_t total_steps, int64_t log_every, double matrix_rate, bool alone = true);

  void step(const StepReport& report, const Speed& speed);
  void validation(int64_t step, const Validation& validation);
  void note(const std::string& text);
  /// Ends the bar's line.
  void finish();

 private:
  std::string losses_text(const StepReport& report) const;
  std::string speed_text(const StepReport& report, const Speed& speed) const;
  void print(const std::string& text);

  int64_t first_step_, total_steps_, log_every_;
  double matrix_rate_;
  bool terminal_;
  bool bar_shown_ = false;
  std::chrono::steady_clock::time_point start_, drawn_;
};

}  // namespace kava
