// Distributions over the counter-based random numbers of kernels/philox.h.
#pragma once
#include <array>
#include <cmath>
#include <cstdint>

#include "kernels/philox.h"

namespace kava {

/// Uniform in [0, 1) from one word: 24 bits, exact in f32.
inline double uniform01(uint32_t word) { return (word >> 8) * 0x1p-24; }

/// Two standard normal numbers (Box-Muller in f64) from two words each of 32 bits.
inline std::array<double, 2> normal_pair(uint32_t a, uint32_t b) {
  double r = std::sqrt(-2.0 * std::log((a + 1.0) * 0x1p-32)), angle = 6.283185307179586 * (b * 0x1p-32);
  return {r * std::cos(angle), r * std::sin(angle)};
}

}  // namespace kava
