// Values of tensors in host memory, as f64 whatever their type.
#pragma once
#include <functional>
#include <span>
#include <vector>

#include "engine/device/ops.h"

namespace kava {

/// The elements of a contiguous floating tensor.
std::vector<double> to_host(Ops& ops, const Tensor& x);

/// Sets the elements of a floating tensor, rounded to its type (to bf16 by way of f32).
void from_host(Ops& ops, const Tensor& y, std::span<const double> values);

/// The same piece by piece, on the backend's threads: values(begin, out) gives those from number `begin` on, which four divides.
void from_host(Ops& ops, const Tensor& y, const std::function<void(int64_t begin, std::span<double> out)>& values);

}  // namespace kava
