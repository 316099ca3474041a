// What kava_bench has measured, and its file.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "benchmarks/bench_step.h"
#include "engine/device/cuda_module.h"
#include "engine/files/json.h"

namespace kava {

struct BenchResults {
  struct Row {
    std::string name;
    double seconds, amount;  // of work: floating-point operations or bytes
    std::string unit;        // GFLOP/s or GB/s
    double ceiling;          // in that unit; 0: none is known
  };
  struct Compared {
    std::string name, shape;
    double share, of_first;  // of the matrix rate; of the first one's share
  };
  struct WholeStep {
    MeasuredStep measured;
    double share, matrix_rate;         // of that rate, in GFLOP/s, measured again after the steps
    std::optional<CudaInside> graphs;  // on a device
  };

  double matrix_rate = 0, copy_rate = 0;  // GFLOP/s, GB/s
  std::string multiplier;                 // what makes the products of the matrix rate
  std::vector<Row> rows;
  std::optional<WholeStep> step;
  std::vector<Compared> compared;
};

/// A JSON list to which more may be added: a row of each result, of both ceilings, of the step and of what was compared, each with its
/// name, device and shape.
Json json_of(const BenchResults& found, const std::string& device, const std::string& shape);

}  // namespace kava
