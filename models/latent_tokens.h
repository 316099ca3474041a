// Latents in words: which token's value row in the first layer lies nearest to a latent's.
#pragma once
#include <span>
#include <vector>

#include "models/model.h"

namespace kava {

struct NearestToken {
  int32_t id = 0;
  double distance = 0;  // Euclidean, over all K/V heads
};

/// values: [n, K*D], rows of V in the first layer. Candidates are the embedding's rows 0..tokens-1; their value rows are W_v of the normed
/// embedding with bias and LoRA, where positions are learned with that of positions[i], the value's own, in the embedding. Ties go to the
/// lower id.
std::vector<NearestToken> nearest_tokens(Model& model, Arena& arena, std::span<const float> values, int64_t tokens,
                                         std::span<const int32_t> positions = {});

}  // namespace kava
