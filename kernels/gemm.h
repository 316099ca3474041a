// Sums of matrix products with everything that a LoRA linear map needs around them, in one kernel:
//   C [m, n] = factor * mask( sum over the first `scaled` products of A B ) + sum over the other products of A B + bias
// stored to `set`, stored in f32 to `set_sum`, or added to `add`. A product is A [m, k] B [k, n], in one of three forms by where k lies in
// memory:
//   nt: A [m, k], B [n, k]     nn: A [m, k], B [k, n]     tn: A [k, m], B [k, n]
// The dropout mask (kernels/dropout.h) may act on A (nt), on B (tn), both holding x by rows, of a single product, or on the scaled sum
// (nn), whose rows are x's.
//
// Where C has too few tiles to fill a device, k is cut into parts, which are summed side by side and then added in their order.
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
  // bf16, one product without bands, bias or a mask on its sum, to set or add: f32 [parts * m, n rounded up to 8] for the sums of the
  // parts. Rows begin at multiples of 16 bytes. Null: summed in one go, and so is f32.
  Rows<float> partial;
  int parts = 1;

  void then(Rows<const T> a, Rows<const T> b, int k) { products[count++] = {a, b, k}; }
};

/// Blocks of 128 x 128 that a large device works on at a time: two on each of 132 SMs. What kernels decide by this number goes by shapes
/// alone, on every device.
constexpr int kGemmBlocks = 264;
constexpr int64_t large_tiles(int64_t m, int64_t n) { return (m + 127) / 128 * ((n + 127) / 128); }
/// Parts of a sum over k rows for C [m, n]: as many as fill a device, of 512 rows at least. 0: C's tiles alone half fill it.
constexpr int row_parts(int64_t m, int64_t n, int64_t k) {
  const int64_t tiles = large_tiles(m, n);
  if (tiles == 0 || tiles > kGemmBlocks / 2) return 0;
  const int64_t fill = kGemmBlocks / tiles, most = k / 512;
  return static_cast<int>(most < 1 ? 1 : fill < most ? fill : most);
}

template <GemmForm form, class T>
void gemm(Stream stream, const Gemm<T>& g);

}  // namespace kava
