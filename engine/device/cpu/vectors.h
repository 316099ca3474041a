// Vectors of 64 bytes, lanes of one sum type, in the compilers' own arithmetic. They may lie at any element of an array.
#pragma once

#include <cstdint>
#include <type_traits>

namespace kava {

constexpr int kVectorBytes = 64;

template <class S>
struct VectorOf {
  typedef S type __attribute__((vector_size(kVectorBytes), aligned(sizeof(S)), may_alias));
};
template <class S>
using Vector = typename VectorOf<S>::type;

/// How many lanes a vector has.
template <class S>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(S));

/// A whole number for each lane of a Vector<S>.
template <class S>
using LaneIndex = Vector<std::conditional_t<sizeof(S) == 8, int64_t, int32_t>>;

/// Lane i of the result is lane from[i] of a followed by b.
template <class S>
inline Vector<S> shuffled(const Vector<S>& a, const Vector<S>& b, const LaneIndex<S>& from) {
#ifdef __clang__
  Vector<S> out;
  for (int i = 0; i < kLanes<S>; ++i) out[i] = from[i] < kLanes<S> ? a[from[i]] : b[from[i] - kLanes<S>];
  return out;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

}  // namespace kava
