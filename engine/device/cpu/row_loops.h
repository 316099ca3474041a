// The loops over columns that ops_*.cpp are made of, written so that the compiler turns them into vector code without reordering sums
// behind our back.
#pragma once
#include <algorithm>
#include <type_traits>

#include "engine/device/arena.h"
#include "engine/device/cpu/threads.h"
#include "engine/device/tensor.h"

namespace kava {

/// Element i of a row in the type that sums are kept in, and back.
template <class T>
inline Sum<T> load(const T* x, int64_t i) {
  if constexpr (std::is_same_v<T, bf16>) return to_float(x[i]);
  else return x[i];
}
template <class T, class S>
inline void store(T* y, int64_t i, S value) {
  y[i] = rounded<T>(static_cast<Sum<T>>(value));
}

/// f.operator()<T, G>() for storage T and a gradient in storage or sum type.
template <class F>
void dispatch_gradient(const Tensor& x, const Tensor& dy, F f) {
  dispatch(x.dtype, [&]<class T>() {
    if (dy.dtype == x.dtype) f.template operator()<T, T>();
    else if constexpr (std::is_same_v<T, bf16>) f.template operator()<T, Sum<T>>();
    else KAVA_CHECK(false, "a gradient in {} of {}", name_of(dy.dtype), name_of(x.dtype));
  });
}

/// f.operator()<Y, X>() for y and x that are both i32, or each in the storage or the sum type of one model.
template <class F>
void dispatch_kin(const Tensor& y, const Tensor& x, F f) {
  if (y.dtype == DType::i32) return f.template operator()<int32_t, int32_t>();
  dispatch(y.dtype, [&]<class Y>() {
    if (x.dtype == y.dtype) f.template operator()<Y, Y>();
    else if constexpr (std::is_same_v<Y, bf16>) f.template operator()<bf16, float>();
    else if constexpr (std::is_same_v<Y, float>) f.template operator()<float, bf16>();
    else KAVA_CHECK(false, "{} from {}", name_of(y.dtype), name_of(x.dtype));
  });
}

/// f(i) for every column. Rows that f reads and writes are the same row or do not overlap.
template <class F>
inline void each(int64_t n, F f) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) f(i);
}

/// Sum of term(i) over the columns in a fixed order: lane l of 64 bytes sums the columns l, l + lanes, ..; then the lanes in pairs.
template <class S, class Term>
inline S sum_over(int64_t n, Term term) {
  constexpr int64_t kLanes = 64 / static_cast<int64_t>(sizeof(S));
  S lane[kLanes] = {};
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lane[l] += term(i + l);
  for (int64_t l = 0; l < n - whole; ++l) lane[l & (kLanes - 1)] += term(whole + l);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

/// Elements that one task of a loop over joined rows takes.
constexpr int64_t kPiece = 1 << 14;

/// body(row, begin, end) over all the elements of a tensor of this shape. joined: the rows follow one another without a gap in every
/// operand, and are taken as one long row.
template <class Body>
void for_pieces(Threads& threads, const Tensor& shape, bool joined, int64_t block, Body body) {
  if (joined) threads.blocks(shape.count(), kPiece, [&](int64_t begin, int64_t end) { body(int64_t{0}, begin, end); });
  else
    threads.blocks(shape.rows, block, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) body(r, int64_t{0}, shape.cols);
    });
}

/// Sums over rows, as the gradients of a norm's gain are: each block of rows adds into a row of its own, and the blocks are added in order.
template <class S>
class BlockSums {
 public:
  /// Room for `rows` rows in blocks; none where there are no rows.
  BlockSums(Arena& arena, int64_t rows, int64_t block, int64_t cols) : block_(block) {
    if (rows > 0) sums_ = arena.alloc(DTypeOf<S>::value, (rows + block - 1) / block, cols);
  }
  /// The row of the block that starts at row `begin`, zeroed.
  S* of(int64_t begin) {
    S* row = sums_.row<S>(begin / block_);
    std::fill_n(row, sums_.cols, S(0));
    return row;
  }
  void add_to(S* y) const {
    for (int64_t b = 0; b < sums_.rows; ++b) {
      const S* x = sums_.row<S>(b);
      each(sums_.cols, [=](int64_t c) { y[c] += x[c]; });
    }
  }

 private:
  Tensor sums_;
  int64_t block_;
};

}  // namespace kava
