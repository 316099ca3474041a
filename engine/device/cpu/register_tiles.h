// Products of a few rows with sums held in registers, for operands that a cache holds, and the turning of rows into columns for them.
#pragma once
#include <algorithm>

#include "engine/device/cpu/lanes.h"

namespace kava {

/// n up to whole vectors of S.
template <class S>
constexpr int64_t padded(int64_t n) {
  return (n + kLanes<S> - 1) / kLanes<S> * kLanes<S>;
}

/// The most rows of a tile, and vectors of its columns held at a time: what fits the registers.
constexpr int64_t kHeldRows = 6;
#ifdef __AVX512F__
constexpr int64_t kHeldVectors = 4;
#else
constexpr int64_t kHeldVectors = 1;
#endif

template <class T, int Rows, int Vectors, bool Add>
void register_tile(Sum<T>* c, int64_t ldc, const Sum<T>* a, int64_t a_row, int64_t a_col, const Sum<T>* b, int64_t ldb, int64_t k) {
  using L = Lanes<T>;
  using V = Vector<Sum<T>>;
  constexpr int64_t kWidth = kLanes<Sum<T>>;
  typename L::Acc acc[Rows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) {
      if constexpr (Add) acc[i][j] = *reinterpret_cast<const V*>(c + i * ldc + j * kWidth);
      else acc[i][j] = V{};
    }
  for (int64_t l = 0; l < k; ++l) {
    typename L::Block row[Vectors];
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) row[j] = L::load(b + l * ldb + j * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const typename L::Block x = L::spread(a + i * a_row + l * a_col);
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) acc[i][j] = L::multiplied(acc[i][j], x, row[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) *reinterpret_cast<V*>(c + i * ldc + j * kWidth) = acc[i][j];
}

template <class T, int Rows, bool Add>
void row_tile(Sum<T>* c, int64_t ldc, const Sum<T>* a, int64_t a_row, int64_t a_col, const Sum<T>* b, int64_t ldb, int64_t n, int64_t k) {
  constexpr int64_t kWidth = kLanes<Sum<T>>;
  // The pieces are as even as whole vectors allow: a single vector of columns would leave the multipliers waiting for their operands.
  int64_t vectors = n / kWidth, pieces = (vectors + kHeldVectors - 1) / kHeldVectors;
  for (int64_t col = 0; pieces > 0; --pieces) {
    const int64_t some = (vectors + pieces - 1) / pieces;
    auto tile = [&]<int Vectors>() { register_tile<T, Rows, Vectors, Add>(c + col, ldc, a, a_row, a_col, b + col, ldb, k); };
    if (some == 1) tile.template operator()<1>();
    if constexpr (kHeldVectors > 1) {
      if (some == 2) tile.template operator()<2>();
      if (some == 3) tile.template operator()<3>();
      if (some == 4) tile.template operator()<4>();
    }
    vectors -= some, col += some * kWidth;
  }
}

/// c [m, n] (+)= a b for m <= kHeldRows rows. Unit (i, l) of a lies at a[i * a_row + l * a_col], unit (l, j) of b at b[l * ldb + j]; n is a
/// multiple of a vector's lanes. Each element is summed over l in order.
template <class T, bool Add>
void tile_product(Sum<T>* c, int64_t ldc, const Sum<T>* a, int64_t a_row, int64_t a_col, const Sum<T>* b, int64_t ldb, int64_t m, int64_t n,
                  int64_t k) {
  switch (m) {
    case 1:
      return row_tile<T, 1, Add>(c, ldc, a, a_row, a_col, b, ldb, n, k);
    case 2:
      return row_tile<T, 2, Add>(c, ldc, a, a_row, a_col, b, ldb, n, k);
    case 3:
      return row_tile<T, 3, Add>(c, ldc, a, a_row, a_col, b, ldb, n, k);
    case 4:
      return row_tile<T, 4, Add>(c, ldc, a, a_row, a_col, b, ldb, n, k);
    case 5:
      return row_tile<T, 5, Add>(c, ldc, a, a_row, a_col, b, ldb, n, k);
    default:
      return row_tile<T, kHeldRows, Add>(c, ldc, a, a_row, a_col, b, ldb, n, k);
  }
}

template <class S, int Half>
[[gnu::always_inline]] inline void exchange(Vector<S>* rows) {
  constexpr int L = kLanes<S>;
  LaneIndex<S> low, high;
  for (int i = 0; i < L; ++i) {
    low[i] = i & Half ? i - Half + L : i;
    high[i] = i & Half ? i + L : i + Half;
  }
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    if (i & Half) continue;
    const Vector<S> a = rows[i], b = rows[i + Half];
    rows[i] = shuffled<S>(a, b, low), rows[i + Half] = shuffled<S>(a, b, high);
  }
}

/// Lane j of row i changes places with lane i of row j, for as many rows as a vector has lanes.
template <class S>
[[gnu::always_inline]] inline void transpose(Vector<S>* rows) {
  if constexpr (kLanes<S> == 16) exchange<S, 8>(rows);
  exchange<S, 4>(rows);
  exchange<S, 2>(rows);
  exchange<S, 1>(rows);
}

}  // namespace kava
