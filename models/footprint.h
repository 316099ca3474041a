// How much memory a run needs, found by running its real step on a dry backend.
#pragma once
#include <span>
#include <vector>

#include "engine/data/data.h"
#include "models/model.h"
#include "models/recipe.h"

namespace kava {

/// Bytes of weights, trainables, gradients, moments, and the copies of the trainables in host memory while a checkpoint is written.
int64_t model_bytes(const RunConfig& config, const ModelConfig& shape);

/// Bytes of the weights of a model for inference.
int64_t inference_bytes(const RunConfig& config, const ModelConfig& shape);

/// Bytes that one forward and backward over the samples takes from its arena. `planned` is a model without values on a dry backend.
int64_t step_bytes(Model& planned, const Recipe& recipe, std::span<const Sample> samples);

/// A forward and the recipe that it is run by.
struct PlannedForward {
  Recipe recipe;
  int64_t stage = 0;
  std::vector<Sample> samples;
};
/// The largest forward of a run that cuts its batches into pieces of `micro` samples: that with the most tokens among the batches of its
/// first epochs (all of them up to four million samples), at the stage where it has the most.
PlannedForward largest_forward(const RunConfig& config, std::span<const Sample> samples, int64_t micro);

/// Error(code preflight) naming the largest train.micro_batch that does, where the run's largest forward does not fit beside the model in
/// `available` bytes of this backend's kind; Error(code data) where the model folder's weights have another shape. Nothing is allocated.
void require_memory(const Ops& ops, const RunConfig& config, const ModelConfig& shape, std::span<const Sample> samples, int64_t available);

}  // namespace kava
