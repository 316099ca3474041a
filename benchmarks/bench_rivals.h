// The cuda backend on a GPU beside the vendor's libraries.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "benchmarks/bench_shapes.h"
#include "engine/device/ops.h"

namespace kava {

struct Rivals {
  struct Row {
    std::string name;
    double seconds, flops;  // of a call
  };
  std::vector<Row> rows;
  std::vector<std::string> missing;  // a line on each rival that a GPU is without
  std::vector<std::string> wrong;    // and on each that is there and makes nothing, or a tensor of other values
};

/// Products of the model's linears by the own kernel and by cuBLASLt; attention over plain causal segments of 100 tokens, forward and
/// backward, and cuDNN's, of whose plans the fastest counts. Of the rows that are `wanted`. Without a GPU there are the own ones alone.
Rivals bench_rivals(Ops& ops, const Shapes& shapes, const std::function<bool(const std::string& name)>& wanted);

}  // namespace kava
