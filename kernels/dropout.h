// The mask of LoRA's input dropout, the same in every backend (the cpu makes it of several blocks at once). Eight neighbouring columns of a
// row share one Philox block; column c takes the half-word c % 8 of its four words, low halves first, and is kept when that is at least
// round(p * 2^16).
#pragma once
#include "kernels/philox.h"

namespace kava {

/// Smallest half-word that is kept. 0 <= p < 1.
constexpr uint32_t dropout_threshold(double p) { return static_cast<uint32_t>(p * 65536 + 0.5); }

constexpr PhiloxKeys dropout_keys(uint64_t seed) { return PhiloxKeys(philox_key(Purpose::dropout, seed)); }

/// The random words of columns 8*column_block .. +7 of one row. sample, row: index in the optimiser batch, row within the sample.
/// column_block < 2^16 and site < 2^16.
constexpr void dropout_bits(uint32_t (&out)[4], const PhiloxKeys& keys, uint32_t step, uint32_t site, int32_t sample, int32_t row,
                            uint32_t column_block) {
  auto words = philox({column_block | site << 16, static_cast<uint32_t>(row), static_cast<uint32_t>(sample), step}, keys);
  for (int i = 0; i < 4; ++i) out[i] = words[i];
}

/// Whether the column is kept, bits being those of its block.
constexpr bool dropout_keep(const uint32_t (&bits)[4], uint32_t column, uint32_t threshold) {
  return (bits[column % 8 / 2] >> (column % 2 * 16) & 0xffff) >= threshold;
}

}  // namespace kava
