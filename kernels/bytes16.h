// What one access takes at most.
#pragma once
#include <cstdint>

namespace kava {

struct alignas(16) Bytes16 {
  uint32_t word[4];
};
/// Half of that.
struct alignas(8) Bytes8 {
  uint32_t word[2];
};

}  // namespace kava
