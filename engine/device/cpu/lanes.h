// How vectors of a storage type are multiplied into sums. A unit is what one lane of a sum takes at a time: an element, or two neighbours
// of bf16, whose products are exact in f32. A unit has the size of a sum, so that units lie in arrays of sums.
#pragma once
#include <cstring>
#include <type_traits>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "engine/device/cpu/vectors.h"
#include "engine/device/tensor.h"

namespace kava {

/// acc + x w, with AVX-512 rounded once. Left to the compiler, which may round twice (GCC 14 does in some tiles of AVX-512's, of AVX2's it
/// was not seen to), the bytes of a row would depend on how many stand beside it.
template <class S>
inline Vector<S> multiply_add(const Vector<S>& acc, const Vector<S>& x, const Vector<S>& w) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, float>)
    return reinterpret_cast<Vector<S>>(
        _mm512_fmadd_ps(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(w), reinterpret_cast<__m512>(acc)));
  else
    return reinterpret_cast<Vector<S>>(
        _mm512_fmadd_pd(reinterpret_cast<__m512d>(x), reinterpret_cast<__m512d>(w), reinterpret_cast<__m512d>(acc)));
#else
  return acc + x * w;
#endif
}

template <class T>
struct Lanes {
  using Acc = Vector<T>;
  using Block = Vector<T>;
  static constexpr int64_t kPack = 1;          // elements of a unit
  static constexpr int64_t kStep = kLanes<T>;  // elements of a block
  static Block load(const void* x) { return *static_cast<const Block*>(x); }
  /// One unit in every lane.
  static Block spread(const void* unit) {
    T x;
    std::memcpy(&x, unit, sizeof x);
    return x - Block{};
  }
  static Acc multiplied(Acc acc, const Block& x, const Block& w) { return multiply_add<T>(acc, x, w); }
};

#ifdef __AVX512BF16__
template <>
struct Lanes<bf16> {
  using Acc = __m512;  // g++ 12 keeps a copy in memory of sums that are cast to another type for each product
  using Block = __m512i;
  static constexpr int64_t kPack = 2;
  static constexpr int64_t kStep = kPack * kLanes<float>;
  static Block load(const void* x) { return _mm512_loadu_si512(x); }
  static Block spread(const void* unit) {
    int x;
    std::memcpy(&x, unit, sizeof x);
    return _mm512_set1_epi32(x);
  }
  static Acc multiplied(Acc acc, const Block& x, const Block& w) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  }
};
#else
template <>
struct Lanes<bf16> {
  using Acc = Vector<float>;
  struct Block {
    Acc even, odd;
  };
  static constexpr int64_t kPack = 2;
  static constexpr int64_t kStep = kPack * kLanes<float>;
  static Block load(const void* x) {
    Vector<uint32_t> pairs;
    std::memcpy(&pairs, x, sizeof pairs);  // Clang takes what a reference names for aligned
    return widened(pairs);
  }
  static Block spread(const void* unit) {
    uint32_t x;
    std::memcpy(&x, unit, sizeof x);
    return widened(x | Vector<uint32_t>{});
  }
  static Acc multiplied(Acc acc, const Block& x, const Block& w) {
    return multiply_add<float>(multiply_add<float>(acc, x.even, w.even), x.odd, w.odd);
  }

 private:
  static Block widened(const Vector<uint32_t>& pairs) {
    return {reinterpret_cast<Acc>(pairs << 16), reinterpret_cast<Acc>(pairs & 0xffff0000u)};
  }
};
#endif

}  // namespace kava
