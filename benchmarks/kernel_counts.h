// What the emulator counts of the kernels' accesses, products and barriers (tests/simt/watch.h), as a table.
#pragma once
#include <functional>
#include <string>

#include "engine/device/ops.h"
#include "engine/files/json.h"
#include "models/layout.h"

namespace kava {

constexpr double kMmaFlops = 2 * 16 * 8 * 16;  // of an m16n8k16

/// Two samples: 46 queries on themselves, then 24 and 19 on those and themselves.
struct CountedAttention {
  CountedAttention(int64_t heads, int64_t kv_heads, int64_t head_dim);
  SegmentList segments;
  int64_t rows;
  /// Products with an element that some query sees, where the heads of a key head are stacked: of scores and of sums, in the backward two
  /// and three.
  double fewest_forward = 0, fewest_backward = 0;
};

class KernelCounts {
 public:
  /// Of the emulated backend's module alone, which must be loaded.
  KernelCounts();

  void begin(const std::string& shape);
  /// Counts what run() launches, of each launch a sample of blocks, and prints a line for each kernel, and below it the lines of the source
  /// that move more than they must. fewest_mma: products of m16n8k16 that the work needs, 0: none.
  void count(Ops& ops, const std::string& op, double fewest_mma, const std::function<void()>& run);
  /// Of all launches counted.
  const Json& results() const { return results_; }

  static constexpr int kBlocks = 16, kProductBlocks = 4;  // of a launch

 private:
  void (*start_)(int most_blocks);
  const char* (*take_)();
  std::string shape_;
  Json results_ = Json::array();
};

}  // namespace kava
