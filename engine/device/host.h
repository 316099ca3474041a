// Values of tensors in host memory, as f64 whatever their type.
#pragma once
#include <span>
#include <vector>

#include "engine/device/ops.h"

namespace kava {

/// The elements of a contiguous floating tensor.
std::vector<double> to_host(Ops& ops, const Tensor& x);

/// Sets the elements of a contiguous floating tensor, rounded to its type (to bf16 by way of f32).
void from_host(Ops& ops, const Tensor& y, std::span<const double> values);

}  // namespace kava
