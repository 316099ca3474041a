// Values that are drawn or computed and not read: the base of model.init = "random", and the starts of trainables.
#pragma once
#include <vector>

#include "engine/config/config.h"
#include "engine/device/ops.h"
#include "models/model.h"

namespace kava {

/// The start of a base tensor under model.init = "random".
void set_random_weight(Ops& ops, const Tensor& to, const WeightSpec& spec, const ModelConfig& shape, int64_t seed);

/// Error(code usage) where the new rows are to start as the row of latent.token_init and that is not one token of the model's tokenizer.
void require_token_init(const RunConfig& config);

/// The starts of all trainables that are not part of the base, whose buffers hold zeros. embedding [V, C] has its values.
void set_starts(Model& model, const std::vector<TrainableSpec>& specs);

}  // namespace kava
