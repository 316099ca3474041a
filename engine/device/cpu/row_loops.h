// The loops over columns that ops_*.cpp are made of, written so that the compiler turns them into vector code without reordering sums
// behind our back.
#pragma once
#include <memory>
#include <type_traits>

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

inline void check_rows(const Tensor& x, int64_t rows, int64_t cols) {
  KAVA_CHECK(x.rows == rows && x.cols == cols, "[{}, {}] where [{}, {}] is needed", x.rows, x.cols, rows, cols);
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
  BlockSums(int64_t rows, int64_t block, int64_t cols)
      : blocks_((rows + block - 1) / block), cols_(cols), block_(block), sums_(new S[static_cast<std::size_t>(blocks_ * cols)]()) {}
  /// The row of the block that starts at row `begin`.
  S* of(int64_t begin) { return sums_.get() + begin / block_ * cols_; }
  void add_to(S* y) const {
    for (int64_t b = 0; b < blocks_; ++b) {
      const S* x = sums_.get() + b * cols_;
      each(cols_, [=](int64_t c) { y[c] += x[c]; });
    }
  }

 private:
  int64_t blocks_, cols_, block_;
  std::unique_ptr<S[]> sums_;
};

}  // namespace kava
