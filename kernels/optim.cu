// The update: sums of squares in f64, and AdamW with decoupled decay over flat buffers.
//
// The step's scalars are made on the device, so that no host waits for the gradient's norm: one thread turns the sum of squares and the
// counter of updates into the factors of this step, or into "change nothing" where the sum is not finite.
#include "kernels/chunks.h"

namespace kava {

namespace {

/// Chunks of a flat buffer: one access where it begins at a multiple of 16 bytes, but for a last one that ends with it. Nothing is beyond.
template <class T, bool kAligned, int kCount>
__device__ __forceinline__ ColumnsOf<kCount> load_flat(const T* x, int64_t first, int64_t n) {
  const bool whole = first + kCount <= n;
  if (kAligned && whole) return load_columns<T, true, kCount>(x + first, 0, kCount);
  return load_columns<T, false, kCount>(x + first, 0, whole ? kCount : static_cast<int>(n - first));
}
template <class T, bool kAligned, int kCount>
__device__ __forceinline__ void store_flat(T* x, int64_t first, int64_t n, const ColumnsOf<kCount>& v) {
  const bool whole = first + kCount <= n;
  if (kAligned && whole) store_columns<T, true>(x + first, 0, kCount, v);
  else store_columns<T, false>(x + first, 0, whole ? kCount : static_cast<int>(n - first), v);
}
template <class T>
bool begins_at_16(const T* x) {
  return rows_at_16(Rows<const T>{x, kChunk});
}

constexpr int kSquareThreads = 256, kSquareLoads = 4, kSquarePiece = kSquareThreads * kSquareLoads * kChunk;

/// partial[block] = sum of squares of its kSquarePiece elements.
template <class X, bool kAligned>
__global__ void __launch_bounds__(kSquareThreads) sum_squares_kernel(double* partial, const X* x, int64_t n) {
  constexpr int kColumns = 16 / sizeof(X), kLoads = kSquarePiece / kSquareThreads / kColumns;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kSquarePiece + static_cast<int64_t>(threadIdx.x) * kColumns;
  ColumnsOf<kColumns> v[kLoads];
#pragma unroll
  for (int j = 0; j < kLoads; ++j) v[j] = load_flat<X, kAligned, kColumns>(x, begin + j * (kSquareThreads * kColumns), n);
  double sum = 0;
#pragma unroll
  for (int j = 0; j < kLoads; ++j)
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sum += static_cast<double>(v[j].at[i]) * static_cast<double>(v[j].at[i]);
  sum = block_sum<double, kSquareThreads>(sum, dynamic_smem<double>());
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kSquareThreads) sum_partials_kernel(double* out, const double* partial, int count) {
  double sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kSquareThreads) sum += partial[i];
  sum = block_sum<double, kSquareThreads>(sum, dynamic_smem<double>());
  if (threadIdx.x == 0) *out = sum;
}

__global__ void adamw_factors_kernel(AdamwFactors* factors, const double* grad_square, const int32_t* updates, double lr, double beta1,
                                     double beta2, double clip) {
  const double square = *grad_square, step = static_cast<double>(*updates);
  factors->updates = square * 0 == 0 ? 1 : 0;  // neither infinite nor a NaN
  factors->scale = static_cast<float>(clip > 0 ? fmin(1.0, clip / (sqrt(square) + 1e-6)) : 1.0);
  factors->rate = static_cast<float>(lr / (1 - pow(beta1, step)));
  factors->root_correction = static_cast<float>(1 / sqrt(1 - pow(beta2, step)));
}

__global__ void count_update_kernel(int32_t* updates, double* grad_square, const double* losses, int count) {
  double square = *grad_square;
  for (int i = 0; i < count; ++i) square += 0 * losses[i];  // 0 of a finite number, NaN of any other
  *grad_square = square;
  if (square * 0 == 0) ++*updates;
}

struct Adamw {
  float *value, *m, *v;
  bf16* half;
  const float* grad;
  const AdamwFactors* factors;
  float decay, beta1, rest1, beta2, rest2, eps;
};

constexpr int kAdamwThreads = 256, kAdamwEach = kHalfChunk;

/// A thread owns four elements.
template <bool kAligned>
__global__ void __launch_bounds__(kAdamwThreads) adamw_kernel(const __grid_constant__ Adamw p, int64_t n) {
  if (!p.factors->updates) return;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kAdamwThreads + threadIdx.x) * kAdamwEach;
  const float scale = p.factors->scale, rate = p.factors->rate, root_correction = p.factors->root_correction;
  const auto grad = load_flat<float, kAligned, kAdamwEach>(p.grad, first, n);
  auto m = load_flat<float, kAligned, kAdamwEach>(p.m, first, n), v = load_flat<float, kAligned, kAdamwEach>(p.v, first, n),
       value = load_flat<float, kAligned, kAdamwEach>(p.value, first, n);
#pragma unroll
  for (int i = 0; i < kAdamwEach; ++i) {
    const float g = grad.at[i] * scale;
    m.at[i] = p.beta1 * m.at[i] + p.rest1 * g;
    v.at[i] = p.beta2 * v.at[i] + p.rest2 * g * g;
    value.at[i] = value.at[i] * p.decay - rate * m.at[i] / (sqrtf(v.at[i]) * root_correction + p.eps);
  }
  store_flat<float, kAligned>(p.m, first, n, m);
  store_flat<float, kAligned>(p.v, first, n, v);
  store_flat<float, kAligned>(p.value, first, n, value);
  if (p.half) store_flat<bf16, kAligned>(p.half, first, n, value);
}

}  // namespace

int64_t sum_squares_partials(int64_t n) { return div_up(n, int64_t{kSquarePiece}); }

template <class X>
void sum_squares(Stream stream, double* out, double* partials, const X* x, int64_t n) {
  const int64_t count = sum_squares_partials(n);
  constexpr std::size_t kScratch = kSquareThreads / kWarpSize * sizeof(double);
  if (count > 0)
    dispatch_aligned(begins_at_16(x), [&]<bool kAligned>() {
      launch(stream, sum_squares_kernel<X, kAligned>, static_cast<unsigned>(count), kSquareThreads, kScratch, partials, x, n);
    });
  launch(stream, sum_partials_kernel, 1, kSquareThreads, kScratch, out, partials, static_cast<int>(count));
}
template void sum_squares(Stream, double*, double*, const float*, int64_t);
template void sum_squares(Stream, double*, double*, const bf16*, int64_t);

void count_update(Stream stream, int32_t* updates, double* grad_square, const double* losses, int count) {
  launch(stream, count_update_kernel, 1, 1, 0, updates, grad_square, losses, count);
}

void adamw(Stream stream, float* value, float* m, float* v, bf16* half, const float* grad, AdamwFactors* factors, const double* grad_square,
           const int32_t* updates, const AdamwRates& rates, int64_t n) {
  launch(stream, adamw_factors_kernel, 1, 1, 0, factors, grad_square, updates, rates.lr, rates.beta1, rates.beta2, rates.clip);
  if (n == 0) return;
  const Adamw p{value,
                m,
                v,
                half,
                grad,
                factors,
                static_cast<float>(1 - rates.lr * rates.weight_decay),
                static_cast<float>(rates.beta1),
                static_cast<float>(1 - rates.beta1),
                static_cast<float>(rates.beta2),
                static_cast<float>(1 - rates.beta2),
                static_cast<float>(rates.eps)};
  const bool aligned = begins_at_16(value) && begins_at_16(m) && begins_at_16(v) && begins_at_16(grad) && begins_at_16(half);
  dispatch_aligned(aligned, [&]<bool kAligned>() {
    launch(stream, adamw_kernel<kAligned>, static_cast<unsigned>(div_up(n, int64_t{kAdamwThreads * kAdamwEach})), kAdamwThreads, 0, p, n);
  });
}

}  // namespace kava
