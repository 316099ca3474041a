// Rounding in two steps with the result of one.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

namespace kava {

/// Rounds to f32 towards zero and marks a lost remainder in the last bit, so that a second rounding to a shorter type is correct.
inline float round_to_odd(double x) {
  float f = static_cast<float>(x);
  std::uint32_t bits = std::bit_cast<std::uint32_t>(f);
  if (std::isnan(x) || static_cast<double>(f) == x) return f;
  if (std::fabs(static_cast<double>(f)) > std::fabs(x)) --bits;
  return std::bit_cast<float>(bits | 1u);
}

}  // namespace kava
