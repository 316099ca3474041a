// How much memory a run takes, found by running its own steps and its own validation on a dry backend.
#pragma once
#include <span>
#include <vector>

#include "engine/data/data.h"
#include "models/model.h"
#include "models/recipe.h"

namespace kava {

class Validator;

/// Bytes of the weights of a model for inference.
int64_t inference_bytes(const RunConfig& config, const ModelConfig& shape);

/// Rows that a forward of the recipe has for one sample, the index-th of its batch: those of make_layout.
int64_t step_rows(const RunConfig& config, const Recipe& recipe, const Sample& sample, int64_t index);

/// Bytes by purpose. Training steps and validation take turns in one arena, so the larger of the two counts.
struct MemoryUse {
  int64_t weights = 0;      // the frozen weights, rotary tables
  int64_t trainables = 0;   // values, gradients, moments, and their copies for the products
  int64_t activations = 0;  // of a training step: what its forward leaves to its backward
  int64_t temporaries = 0;  // what its backward and its ops take on top
  int64_t decoding = 0;     // validation: decoding, and forwards without backward
  int64_t arena() const { return activations + temporaries > decoding ? activations + temporaries : decoding; }
  int64_t total() const { return weights + trainables + arena(); }
};

struct MemoryPlan {
  MemoryUse device, host;
  int64_t samples = 0, rows = 0, stage = 0;  // of the largest forward of a training step
  bool at_least = false;                     // activations are a bound below, above what is available; nothing was run
  /// What has to fit: of a backend whose memory is the host's, both.
  int64_t total(bool shared) const { return device.total() + (shared ? host.total() : 0); }
};

/// The samples of a forward of a run of so many samples: those of train.micro_batch, or where that is 0 a batch's part on each of the
/// ranks. At most the batch.
int64_t forward_samples(const RunConfig& config, int64_t samples, int ranks);

/// Plans runs of one configuration over one set of samples, with other numbers of samples a forward.
class MemoryPlanner {
 public:
  /// ops: a backend of the kind that is planned for, which is asked for nothing but a dry twin. ranks: how many share the forwards of a
  /// step. Everything must outlive the planner.
  MemoryPlanner(const Ops& ops, const RunConfig& config, const ModelConfig& shape, std::span<const Sample> samples, const Validator* valid,
                int ranks);

  /// With forwards of `micro` samples: the most that any of the run's steps takes among its largest forwards and those of its longest
  /// samples; all steps of a short run. Where even less than a forward takes is above `available`, that is its activations.
  MemoryPlan plan(int64_t micro, int64_t available) const;
  /// Samples of a forward where the configuration says nothing.
  int64_t asked_micro_batch() const;
  /// The largest number of samples a forward, up to `most`, that fits `available` bytes; 0 where not even one does.
  int64_t largest_micro_batch(int64_t most, int64_t available) const;
  /// Fewest operations of a step: the mean over some steps of the run.
  double flops_per_step() const;
  const RunConfig& config() const { return config_; }
  int64_t steps() const { return steps_; }
  /// Bytes of the checkpoints that are kept, of one that is being written and of the final adapter.
  int64_t disk_bytes() const;
  /// Whether the device's memory is the host's.
  bool shared() const { return shared_; }

 private:
  struct Candidate {
    int64_t step, first, samples, rows, longest, stage;  // first: in the batch; longest: rows of one sample
  };
  std::vector<Candidate> candidates(int64_t micro) const;
  std::vector<Sample> batch_of(int64_t step) const;

  const Ops& ops_;
  const RunConfig& config_;
  const ModelConfig& shape_;
  std::span<const Sample> samples_;
  const Validator* valid_;
  int ranks_;
  int64_t steps_per_epoch_, steps_;
  bool shared_;
};

/// Error(code preflight) for a plan with forwards of `asked` samples that `available` bytes do not hold: what it takes, and the largest
/// train.micro_batch that fits (0: none) with what that takes, or that it is the validation which does not.
Error memory_refusal(const MemoryPlanner& planner, const MemoryPlan& plan, int64_t asked, int64_t fits, int64_t available);

/// Error(code preflight) naming the largest train.micro_batch that does, where the run does not fit in `available` bytes; Error(code data)
/// where the model folder's weights have another shape. uncertain: by how much less there may be when that is tried. Nothing is allocated.
void require_memory(const MemoryPlanner& planner, const RunConfig& config, const ModelConfig& shape, int64_t available,
                    int64_t uncertain = 0);

}  // namespace kava
