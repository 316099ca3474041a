// A token drawn from softmax(logits / temperature), on both backends in whole numbers, whose sums are the same in any order: a token's
// weight is exp((logit - most) / temperature) in units of 2^-43 of the best token's. Rounding takes at most 2^-44 of that from a token, and
// 2^20 of them sum to less than 2^64.
#pragma once
#include <cmath>
#include <cstdint>

namespace kava {

/// Tokens follow each other by their number modulo this, then by their number: as many threads draw, each from those of its own.
constexpr int kDrawStride = 256;
constexpr int64_t kMostDrawn = int64_t{1} << 20;
constexpr int kDrawBits = 44;  // of a weight

template <class Real>
constexpr uint64_t draw_weight(Real logit, Real most, Real temperature) {
  return static_cast<uint64_t>(std::llrint(std::exp((logit - most) / temperature) * 0x1p43));
}
/// 64 bits of their two words, the low one first.
constexpr uint64_t draw_bits(const int32_t* words) {
  return static_cast<uint64_t>(static_cast<uint32_t>(words[1])) << 32 | static_cast<uint32_t>(words[0]);
}
/// The least weight of the best tokens that together have the share top_p of all.
constexpr uint64_t draw_need(double top_p, uint64_t all) {
  const double share = top_p * static_cast<double>(all);
  if (share >= static_cast<double>(all)) return all;
  const auto whole = static_cast<uint64_t>(share);
  return static_cast<double>(whole) < share || whole == 0 ? whole + 1 : whole;
}
/// From 0 to all - 1, by 64 random bits.
constexpr uint64_t draw_place(uint64_t bits, uint64_t all) {
  const uint64_t low = (bits & 0xffffffff) * (all & 0xffffffff), b = (bits >> 32) * (all & 0xffffffff) + (low >> 32),
                 c = (bits & 0xffffffff) * (all >> 32) + (b & 0xffffffff);
  return (bits >> 32) * (all >> 32) + (b >> 32) + (c >> 32);
}

}  // namespace kava
