// What one access takes at most.
#pragma once
#include <cstdint>

namespace kava {

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

}  // namespace kava
