// What a training step costs at least, whatever form it is run in (docs/kernels.md, arithmetic). One multiply-add is two operations.
//   forward   per row and layer:  2P + 2R + 4nHD             P weights of the layer, R of its LoRA, n keys seen
//   backward  per row and layer:  2P + 4R + 10nHD  (+ 2P where the weights are trained)
//   head      per supervised token:  2VC + 2VC     (+ 2VC where it is trained)
#pragma once
#include <span>

#include "engine/config/config.h"
#include "engine/data/data.h"
#include "models/config.h"
#include "models/layout.h"
#include "models/recipe.h"

namespace kava {

/// Forward and backward over the samples with shared questions and pruned latents. Rows whose last-layer state nobody reads need only K and
/// V there, and frozen embeddings need no gradient below the first layer.
double minimum_flops(const RunConfig& config, const Recipe& recipe, const ModelConfig& shape, std::span<const Sample> samples,
                     int64_t first_index = 0);
/// The same from the layout of such a step.
double minimum_flops(const RunConfig& config, const ModelConfig& shape, const Layout& layout);
/// Whether the steps of a configuration have such a layout.
bool has_fewest_rows(const RunConfig& config);

/// Tokens of the samples' data that the recipe runs, each once.
int64_t token_count(const Recipe& recipe, std::span<const Sample> samples);

}  // namespace kava
