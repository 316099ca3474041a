#include "engine/device/indices.h"

#include <algorithm>
#include <vector>

#include "engine/error.h"

namespace kava {

void check_indices(std::span<const int32_t> indices, int64_t least, int64_t end) {
  for (int32_t i : indices) KAVA_CHECK(i >= least && i < end, "index {} is outside {}..{}", i, least, end - 1);
}

void check_distinct(std::span<const int32_t> indices, int64_t end) {
  check_indices(indices, 0, end);
  std::vector<bool> seen(static_cast<std::size_t>(end));
  for (int32_t i : indices) {
    KAVA_CHECK(!seen[static_cast<std::size_t>(i)], "index {} stands twice", i);
    seen[static_cast<std::size_t>(i)] = true;
  }
}

void check_offsets(std::span<const int32_t> offsets, int64_t end) {
  KAVA_CHECK(!offsets.empty() && offsets.front() == 0 && offsets.back() == end && std::ranges::is_sorted(offsets),
             "offsets that do not lead from 0 to {}", end);
}

}  // namespace kava
