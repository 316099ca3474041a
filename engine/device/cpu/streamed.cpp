// Both operands of y = x W^T lie along k, so that an element is a dot product of two contiguous rows: the lanes of one accumulator take
// every L-th element of k, and a fixed tree adds them at the end. A register tile is up to kRows rows of x by four rows of W: a vector of W
// is loaded once for all of them, which makes one row run at the rate of memory and many rows near that of the multipliers.
#include "engine/device/cpu/streamed.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "engine/device/cpu/lanes.h"

namespace kava {

namespace {

constexpr int kRows = 6, kOuts = 4;
constexpr int64_t kTaskOuts = 32, kTaskRows = 192;
// With as few rows, memory sets the pace, and rows of W are too short for the processor to foresee the next ones.
constexpr int kPrefetched = 4;

// The lanes of a in the lower half of the result's, those of b in the upper half, each added in pairs half a group apart.
template <class S, int Group>
Vector<S> folded(const Vector<S>& a, const Vector<S>& b) {
  LaneIndex<S> low, high;
  for (int i = 0; i < kLanes<S>; ++i) {
    const int from = i / (Group / 2) * Group % kLanes<S> + i % (Group / 2) + (i >= kLanes<S> / 2 ? kLanes<S> : 0);
    low[i] = from, high[i] = from + Group / 2;
  }
  return shuffled<S>(a, b, low) + shuffled<S>(a, b, high);
}

// The sums of the lanes of four accumulators. Each depends on its own accumulator alone.
template <class S>
void sums_of(S* out, const Vector<S>* acc) {
  constexpr int L = kLanes<S>;
  // After the first two folds a quarter of the lanes belongs to each of the four; the others halve that quarter.
  Vector<S> v = folded<S, L / 2>(folded<S, L>(acc[0], acc[1]), folded<S, L>(acc[2], acc[3]));
  if constexpr (L == 16) v = folded<S, 4>(v, v);
  v = folded<S, 2>(v, v);
  for (int i = 0; i < kOuts; ++i) out[i] = v[i];
}

template <class T>
struct Job {
  const T *x, *w;
  int64_t ldx, ldw, k;
};

// sums [Rows][kOuts] of Rows rows of x and Outs rows of W.
template <class T, int Rows, int Outs>
void dot_tile(Sum<T>* sums, const Job<T>& j) {
  using L = Lanes<T>;
  constexpr auto kBytes = static_cast<int64_t>(sizeof(T));
  typename L::Acc acc[Rows][kOuts] = {};
  int64_t i = 0;
  for (; i + L::kStep <= j.k; i += L::kStep) {
    typename L::Block w[Outs];
#pragma GCC unroll 8
    for (int o = 0; o < Outs; ++o) {
      w[o] = L::load(j.w + o * j.ldw + i);
      if constexpr (Rows <= kPrefetched) __builtin_prefetch(reinterpret_cast<const char*>(j.w) + ((o + 2 * kOuts) * j.ldw + i) * kBytes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const typename L::Block x = L::load(j.x + r * j.ldx + i);
#pragma GCC unroll 8
      for (int o = 0; o < Outs; ++o) acc[r][o] = L::multiplied(acc[r][o], x, w[o]);
    }
  }
  if (i < j.k) {
    auto rest = [&](const T* from) {
      T padded[L::kStep] = {};
      std::memcpy(static_cast<void*>(padded), from + i, static_cast<std::size_t>(j.k - i) * sizeof(T));
      return L::load(padded);
    };
    typename L::Block w[Outs];
    for (int o = 0; o < Outs; ++o) w[o] = rest(j.w + o * j.ldw);
    for (int r = 0; r < Rows; ++r) {
      const typename L::Block x = rest(j.x + r * j.ldx);
      for (int o = 0; o < Outs; ++o) acc[r][o] = L::multiplied(acc[r][o], x, w[o]);
    }
  }
  for (int r = 0; r < Rows; ++r) sums_of<Sum<T>>(sums + r * kOuts, acc[r]);
}

template <class T, int Outs>
void dot_rows(Sum<T>* sums, const Job<T>& j, int64_t rows) {
  switch (rows) {
    case 1:
      return dot_tile<T, 1, Outs>(sums, j);
    case 2:
      return dot_tile<T, 2, Outs>(sums, j);
    case 3:
      return dot_tile<T, 3, Outs>(sums, j);
    case 4:
      return dot_tile<T, 4, Outs>(sums, j);
    case 5:
      return dot_tile<T, 5, Outs>(sums, j);
    default:
      return dot_tile<T, kRows, Outs>(sums, j);
  }
}

template <class T, class O>
void finish(const Matmul::Product& p, const Sum<T>* sums, int64_t row, int64_t rows, int64_t col, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = 0; o < cols; ++o) {
      const Sum<T> s = sums[r * kOuts + o] + (p.bias ? to_float(p.bias.row<T>(0)[col + o]) : Sum<T>{0});
      p.c.row<O>(row + r)[col + o] = rounded<O>(s);
    }
}

template <class T>
void run_task(const Matmul::Product& p, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end) {
  Sum<T> sums[kRows * kOuts];
  for (int64_t col = col_begin; col < col_end; col += kOuts)
    for (int64_t row = row_begin; row < row_end; row += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, row_end - row), cols = std::min<int64_t>(kOuts, col_end - col);
      const Job<T> job{p.a.row<T>(row), p.b.row<T>(col), p.a.stride, p.b.stride, p.a.cols};
      if (cols == kOuts) dot_rows<T, kOuts>(sums, job, rows);
      else
        for (int64_t o = 0; o < cols; ++o) {
          Sum<T> one[kRows * kOuts] = {};
          dot_rows<T, 1>(one, {job.x, job.w + o * job.ldw, job.ldx, job.ldw, job.k}, rows);
          for (int64_t r = 0; r < rows; ++r) sums[r * kOuts + o] = one[r * kOuts];
        }
      if (p.c.dtype == DTypeOf<T>::value) finish<T, T>(p, sums, row, rows, col, cols);
      else finish<T, Sum<T>>(p, sums, row, rows, col, cols);
    }
}

}  // namespace

void streamed_products(Threads& threads, std::span<const Matmul::Product> products) {
  struct Task {
    const Matmul::Product* product;
    int64_t row, col;
  };
  std::vector<Task> tasks;
  for (const Matmul::Product& p : products) {
    KAVA_CHECK(p.transpose_b && p.c.rows == p.a.rows && p.c.cols == p.b.rows && p.a.cols == p.b.cols, "[{}, {}] = [{}, {}] [{}, {}]^T",
               p.c.rows, p.c.cols, p.a.rows, p.a.cols, p.b.rows, p.b.cols);
    KAVA_CHECK(p.b.dtype == p.a.dtype && (p.c.dtype == p.a.dtype || p.c.dtype == sum_type(p.a.dtype)) &&
                   (!p.bias || (p.bias.dtype == p.a.dtype && p.bias.cols == p.c.cols)),
               "{} = {} {}", name_of(p.c.dtype), name_of(p.a.dtype), name_of(p.b.dtype));
    for (int64_t row = 0; row < p.c.rows; row += kTaskRows)
      for (int64_t col = 0; col < p.c.cols; col += kTaskOuts) tasks.push_back({&p, row, col});
  }
  threads.run(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& t = tasks[static_cast<std::size_t>(i)];
    const Matmul::Product& p = *t.product;
    dispatch(p.a.dtype, [&]<class T>() {
      run_task<T>(p, t.row, std::min(p.c.rows, t.row + kTaskRows), t.col, std::min(p.c.cols, t.col + kTaskOuts));
    });
  });
}

}  // namespace kava
