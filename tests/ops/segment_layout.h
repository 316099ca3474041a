// Segments with key lists, as the tests of attention write them down.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

namespace kava::test {

struct SegmentSpec {
  std::vector<int> keys;  // rows of the step
  int query_begin, queries;
};

struct Layout {
  std::vector<SegmentSpec> segments;
  std::vector<int> group_offsets;
  int64_t step_rows, query_rows;
};

struct Heads {
  int heads, kv_heads, dim;
  double scale() const { return 1 / std::sqrt(static_cast<double>(dim)); }
};

}  // namespace kava::test
