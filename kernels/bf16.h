// bf16 as it lies in memory, shared by the engine and the kernels; constexpr, so that nvcc takes it in device code too.
#pragma once
#include <bit>
#include <cstdint>

namespace kava {

struct bf16 {
  uint16_t bits;
};

constexpr float to_float(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
constexpr float to_float(float x) { return x; }
constexpr double to_float(double x) { return x; }

/// Round to nearest, ties to even; a NaN stays a NaN.
constexpr bf16 to_bf16(float f) {
  uint32_t u = std::bit_cast<uint32_t>(f);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded)};
}

}  // namespace kava
