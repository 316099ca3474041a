// The ops of kava_bench beside the main ones: those of other models' layers, of rows, and the LoRA of the layers that hold one linear map.
#pragma once
#include <functional>
#include <string>

#include "benchmarks/bench_shapes.h"
#include "engine/device/ops.h"

namespace kava {

/// How kava_bench measures.
struct OpMeasure {
  std::function<bool(const std::string& name)> wanted;
  std::function<int64_t(double bytes)> sets_of;  // of tensors with so many bytes, that no cache holds together
  /// An op that memory bounds, on one of the sets.
  std::function<void(const std::string& name, double bytes, int64_t sets, const std::function<void(std::size_t)>& body)> in_turn;
  /// One that products bound.
  std::function<void(const std::string& name, double flops, const std::function<void()>& body)> product;
};

void bench_other_ops(Ops& ops, Arena& arena, const Shapes& shapes, const OpMeasure& measure);

}  // namespace kava
