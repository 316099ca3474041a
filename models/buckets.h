// The gradient in parts, in the order in which a backward is done with them: what one rank sends while it still makes the rest.
#pragma once
#include <cstdint>
#include <vector>

#include "models/model.h"

namespace kava {

struct Bucket {
  int64_t layer = 0;           // it is whole once the backward of the first pass has been through this layer; -1: at the end
  std::vector<Tensor> ranges;  // of the flat gradient, [1, n] each, the gaps between parameters among them
};

/// All of parameters.grad(), each element once: the layers from the last to the first, as many together as have least_bytes, then the rest.
/// The same on all ranks.
std::vector<Bucket> gradient_buckets(const Model& model, int64_t least_bytes);

}  // namespace kava
