// The training loop: batches in the order of (seed, epoch), one optimiser step each, validation, checkpoints. Independent of a terminal.
//
// A run of n samples takes N = train.max_steps steps, or else epochs * ceil(n / batch); the last batch of an epoch may be smaller. A state
// saved after any step and loaded again goes on to the same bytes.
//
// Forward i of a batch, of train.micro_batch samples, belongs to rank i % ranks. Each forward's gradient and sums are made by themselves
// and added in the order of the forwards, on every rank: any number of ranks gives the bytes of one. Ranks whose devices are linked
// (Comm::link) add up their own and then each other's: two runs of as many ranks have equal bytes.
//
// A step is read once: its sums and the square of its gradient's norm. Whether it is an update the device decides by itself, so where calls
// are queued that read is taken when the next step is queued already, but for what needs it first: a moment's reset, validation, a
// checkpoint, a stop and the end.
#pragma once
#include <chrono>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/device/comm.h"
#include "engine/files/json.h"
#include "models/buckets.h"
#include "models/curriculum.h"
#include "models/kava.h"
#include "models/run_folder.h"
#include "models/training_state.h"

namespace kava {

/// Learning rate of step k (from 0) of N: peak k/W in the W = ceil(warmup N) steps of the warm-up, then the schedule.
double learning_rate(const RunConfig::Train& train, int64_t step, int64_t total_steps);

/// Steps of a run over n samples.
int64_t total_steps(const RunConfig::Train& train, int64_t samples);

/// One optimiser step, as logged. Losses are the batch's.
struct StepReport {
  int64_t step = 0;     // steps done, this one included
  int64_t epoch = 0;    // of the batch, from 0
  int64_t samples = 0;  // seen so far
  StepLosses losses;
  double loss = 0, grad_norm = 0, lr = 0;
  bool updated = true;  // false: loss or gradient was not finite
  /// Then: the samples of the batch of which that is so by themselves, on rank 0; until the next step.
  std::vector<const Sample*> not_finite;
  int64_t batch_samples = 0, batch_tokens = 0;
  std::optional<int64_t> stage;  // methods with stages: of the batch, and
  int64_t latents = 0;           // the most latents of a sample,
  double left = 0;               // the mean tokens of the traces that the student still wrote
  double flops = 0;              // fewest, of the batch
  /// Root mean square of the embeddings, 0 where it is not measured (of trained ones: in steps that are logged), and that of the latents'
  /// inputs of the last pass over it; nothing where no latent is fed.
  double embedding_rms = 0;
  std::optional<double> latent_norm_ratio;
  /// Norm of each running term's gradient, weighted, where it is measured: by its place in metrics.jsonl.
  std::map<std::string, double> term_grads;
};

struct Validation {
  double score = 0;                                       // by which the best checkpoint is chosen
  std::map<std::string, double> values;                   // of its object in metrics.jsonl, besides the step
  double loss = std::numeric_limits<double>::infinity();  // decides between equal scores
};

/// Rates over the steps since the last report.
struct Speed {
  double samples_per_s = 0, tokens_per_s = 0, flops_per_s = 0;
};

/// Losses, gradient norm, learning rate and rates of a step, as metrics.jsonl and progress.json name them.
nlohmann::ordered_json step_metrics(const StepReport& report, const Speed& speed);

/// What a run asks of those around it; everything may be empty. stop and checkpoint are this rank's own: what one is asked, all do.
struct TrainingHooks {
  std::function<void(const StepReport&, const Speed&)> on_step;  // every step
  std::function<void(int64_t step, const Validation&)> on_validation;
  std::function<void(const std::string&)> note;                              // something a person wants to know
  std::function<bool()> stop;                                                // asked between steps
  std::function<bool()> checkpoint;                                          // asked between steps: one is wanted now
  std::function<std::optional<Validation>(Arena&, int64_t stage)> validate;  // nothing: it was stopped
  std::function<double(double reached)> matrix_rate;  // FLOP/s that mfu is a share of, after a step reached so many; nothing: mfu is 0
};

/// What a step of so many forwards keeps in its arena for all of them: f64 [1, kStepSums of each, and the square of the gradient's norm].
Tensor step_scalars(Arena& arena, int64_t forwards);

class Trainer {
 public:
  /// The model at its start and an empty state, or both as a checkpoint has them, the same on all ranks. Samples and comm must outlive the
  /// trainer; without comm it is alone.
  Trainer(Model& model, std::span<const Sample> samples, TrainingState state, Comm* comm = nullptr);

  /// One optimiser step. Error(code numeric) after kMostSkipped steps in a row without a finite loss and gradient.
  StepReport step();

  /// Steps, validation, metrics and checkpoints up to the end or until stopped; returns whether the end was reached. There is a checkpoint
  /// of the last step either way. The folder is rank 0's, and nothing on the others. Error(code numeric) also where a trained value is not
  /// finite when a checkpoint is due, and where the end is reached without one update; Error(code comm) where ranks hold different values
  /// then.
  bool run(RunFolder* folder, const TrainingHooks& hooks);

  const TrainingState& state() const { return state_; }
  /// Of steps and validation.
  const Arena& arena() const { return arena_; }

  static constexpr int64_t kMostSkipped = 10;

 private:
  struct Asked {
    bool stop = false, checkpoint = false;
  };
  /// A step that is made, or queued, and what its sums are divided by.
  struct Begun {
    StepReport report;
    std::vector<BatchTotals> forwards;
  };

  std::span<const Sample> batch_of(int64_t step);
  bool resets_moments();
  Begun begin_step();
  Begun begin_next(RunFolder* folder, const TrainingHooks& hooks);
  void ask_for(Begun begun);
  StepReport end_step();
  void settle(RunFolder* folder, const TrainingHooks& hooks);
  double gradients(std::span<const Sample> batch, const Recipe& recipe, std::span<const BatchTotals> forwards);
  double forward(std::span<const Sample> batch, const Recipe& recipe, std::span<const BatchTotals> forwards, int64_t i,
                 std::function<void(int64_t)> layer_done = {});
  double sum_in_order(std::span<const Sample> batch, const Recipe& recipe, std::span<const BatchTotals> forwards);
  double sum_own(std::span<const Sample> batch, const Recipe& recipe, std::span<const BatchTotals> forwards);
  void leave(int64_t layer, const std::function<void(const Bucket&)>& send);
  std::map<std::string, double> term_gradients(std::span<const Sample> batch, const Recipe& recipe, std::span<const BatchTotals> forwards);
  std::vector<const Sample*> not_finite(int64_t step);
  double embedding_rms();
  bool is_logged(int64_t step) const;
  double gather_sums(double flops, int64_t n);
  Asked asked(const TrainingHooks& hooks);
  void require_same_values();
  bool left_in(int64_t step);
  bool counts(int64_t first, int64_t steps);
  bool due(int64_t every) const;
  void validate(RunFolder* folder, const TrainingHooks& hooks);
  void save(RunFolder* folder, const TrainingHooks& hooks);
  void log(RunFolder* folder, const TrainingHooks& hooks, const StepReport& report, double seconds);

  Model& model_;
  Comm self_;
  Comm& comm_;
  Arena arena_;
  Tensor scalars_;               // f64: the sums of each forward of a step, and the square of its gradient's norm
  Buffer total_;                 // of the gradients of a step's forwards, where there are several
  std::vector<Bucket> buckets_;  // of the gradient
  std::size_t left_ = 0;         // of those, how many have been sent in this forward
  const RunConfig::Train& options_;
  std::span<const Sample> samples_;
  TrainingState state_;
  int64_t steps_per_epoch_ = 0;
  Curriculum curriculum_;
  std::vector<int64_t> order_;
  int64_t order_epoch_ = -1;
  std::vector<Sample> batch_;
  double embedding_rms_ = 0;
  std::optional<StepSum> only_;                    // of the terms, while its gradient is measured
  std::optional<Begun> begun_;                     // the step whose scalars are still to be taken
  bool saved_ = false;                             // whether a checkpoint holds this state
  bool extended_ = false;                          // the checkpoint that this began from says another length or partition
  std::chrono::steady_clock::time_point counted_;  // until when the steps' seconds are counted
  // Since the last logged line.
  double logged_seconds_ = 0, logged_flops_ = 0;
  int64_t logged_samples_ = 0, logged_tokens_ = 0;
};

}  // namespace kava
