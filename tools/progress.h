// What a person sees of a training run on standard output: two lines that are redrawn on a terminal, one line a logged step elsewhere.
#pragma once
#include <chrono>
#include <deque>
#include <optional>
#include <string>

#include "engine/config/config.h"
#include "engine/device/ops.h"
#include "models/trainer.h"
#include "models/training_state.h"
#include "tools/terminal.h"

namespace kava {

/// What the machine's matrix products reach, in FLOP/s: the rate that shares are told of. Measured at the start for a small part of the
/// time that a run takes. On the cpu a step that beats it has shown a higher one. On a device, whose calls are queued, it is the mean of
/// large products on random numbers, many queued at a time, once it is hot, and stays as it is.
class MatrixRate {
 public:
  MatrixRate(Ops& ops, DType storage, double run_flops);
  double measured() const { return rate_; }
  /// The rate after a step reached so much. On the cpu it is measured again where that is more, and never less than that.
  double after(double reached);

 private:
  double measure() const;
  double measure_queued() const;

  Ops& ops_;
  DType storage_;
  bool large_;
  double rate_ = 0;
};

class Progress {
 public:
  /// Of total_steps; every log_every'th step gets a line. Terms of the loss whose weight is 0 are not told of. alone:
  /// what looks like a terminal is one; a launcher may put a pseudo-terminal between a rank and its own output.
  Progress(int64_t total_steps, const RunConfig& config, bool alone = true);

  /// `share`: of the machine's matrix rate; 0: not known.
  void step(const StepReport& report, const Speed& speed, double share);
  void validation(int64_t step, const Validation& validation, const std::optional<Best>& best);
  /// Of a validation that runs.
  void validating(int64_t done, int64_t total, int64_t correct);
  void note(const std::string& text);
  /// Ends the lines that move.
  void finish();

 private:
  Fields loss_fields(const StepReport& report) const;
  Fields speed_fields(const StepReport& report, const Speed& speed, double share) const;
  void count_time();
  double seconds_left(int64_t step) const;
  void print(const std::string& text);

  int64_t total_steps_, log_every_;
  RunConfig::Loss weights_;
  double kv_weight_, codi_weight_;
  MovingLines lines_;
  std::optional<WorkLine> validating_;
  // Time: of the last steps alone, and of all that came between steps.
  std::deque<double> step_seconds_;
  double pauses_ = 0;
  int64_t steps_ = 0;
  bool paused_ = false;
  std::chrono::steady_clock::time_point last_step_;
};

}  // namespace kava
