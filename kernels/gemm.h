// Sums of matrix products with everything that a LoRA linear map needs around them, in one kernel:
//   C [m, n] = factor * mask( sum over the first `scaled` products of A B ) + sum over the other products of A B + bias
// stored to `set`, stored in f32 to `set_sum`, or added to `add`. A product is A [m, k] B [k, n], in one of three forms by where k lies in
// memory:
//   nt: A [m, k], B [n, k]     nn: A [m, k], B [k, n]     tn: A [k, m], B [k, n]
// The dropout mask (kernels/dropout.h) may act on A (nt), on B (tn), both holding x by rows, of a single product, or on the scaled sum
// (nn), whose rows are x's.
#pragma once
#include "kernels/kernels.h"

namespace kava {

enum class GemmForm { nt, nn, tn };

template <class T>
struct Product {
  Rows<const T> a, b;
  int k = 0;
};

/// Columns n_begin to n_end of C, for which B is zero but from k_begin to k_end.
struct Band {
  int n_begin, n_end, k_begin, k_end;
};

template <class T>
struct Gemm {
  static constexpr int kMostProducts = 2, kMostBands = 4;
  Rows<T> set;
  Rows<float> set_sum, add;  // one of the three
  int m = 0, n = 0, scaled = 0, count = 0;
  float factor = 1;
  bool masked = false;
  DropoutMask mask = {};
  const T* bias = nullptr;
  Product<T> products[kMostProducts];
  Band bands[kMostBands] = {};  // of the last product, for all columns; whoever skips no zeros may leave them alone
  int band_count = 0;           // 0: B is anything

  void then(Rows<const T> a, Rows<const T> b, int k) { products[count++] = {a, b, k}; }
};

template <GemmForm form, class T>
void gemm(Stream stream, const Gemm<T>& g);

}  // namespace kava
