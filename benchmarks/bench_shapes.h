// The shapes that kava_bench measures, and samples for them that need no file.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "engine/data/data.h"
#include "models/config.h"

namespace kava {

/// Sizes of a model and of what is measured at them.
struct Shapes {
  std::string name, family;
  int64_t layers, hidden, heads, kv_heads, head_dim, mlp, vocab;
  double rope_theta;
  int64_t batch, rows;  // samples of a step; rows of the ops alone
  int64_t rank, head_rows, params, copied,
      product;                            // of LoRA; of the head; elements of an update; bytes of a copy; sides of the largest product
  std::optional<ModelConfig> given = {};  // that they were taken from

  ModelConfig model() const;
};

/// Of that name, or of a model folder's config.json with all else as at `base`. Error(usage) naming those there are.
Shapes shapes_of(const std::string& name_or_folder, const std::string& base);
/// Their names, the default of each device said.
std::string shapes_help();

/// Rows whose lengths have the statistics of GSM8k-AUG without the last step of the trace; by the formula of benchmarks/torch_reference.py.
/// Ids lie below vocab.
std::vector<Sample> bench_samples(int64_t vocab, int64_t batch);
/// The same rows with all steps of their traces, and where each begins, as the methods with stages train on them.
std::vector<Sample> bench_samples_in_steps(int64_t vocab, int64_t batch);

}  // namespace kava
