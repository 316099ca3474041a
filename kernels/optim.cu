// The update: sums of squares in f64, and AdamW with decoupled decay over flat buffers.
//
// The step's scalars are made on the device, so that no host waits for the gradient's norm: one thread turns the sum of squares and the
// counter of updates into the factors of this step, or into "change nothing" where the sum is not finite.
#include "kernels/chunks.h"

namespace kava {

namespace {

constexpr int kSquareThreads = 256, kSquarePiece = kSquareThreads * 32;

/// partial[block] = sum of squares of its kSquarePiece elements.
template <class X>
__global__ void __launch_bounds__(kSquareThreads) sum_squares_kernel(double* partial, const X* x, int64_t n) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kSquarePiece + threadIdx.x;
  double sum = 0;
#pragma unroll 8
  for (int j = 0; j < kSquarePiece / kSquareThreads; ++j) {
    const int64_t i = begin + j * kSquareThreads;
    const double v = i < n ? static_cast<double>(to_float(x[i])) : 0.0;
    sum += v * v;
  }
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

constexpr int kAdamwThreads = 256, kAdamwEach = 4;

__global__ void __launch_bounds__(kAdamwThreads) adamw_kernel(const __grid_constant__ Adamw p, int64_t n) {
  if (!p.factors->updates) return;
  const float scale = p.factors->scale, rate = p.factors->rate, root_correction = p.factors->root_correction;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * (kAdamwThreads * kAdamwEach) + threadIdx.x;
  float grad[kAdamwEach], m[kAdamwEach], v[kAdamwEach], value[kAdamwEach];
#pragma unroll
  for (int j = 0; j < kAdamwEach; ++j) {
    const int64_t i = begin + j * kAdamwThreads;
    if (i < n) grad[j] = p.grad[i], m[j] = p.m[i], v[j] = p.v[i], value[j] = p.value[i];
  }
#pragma unroll
  for (int j = 0; j < kAdamwEach; ++j) {
    const int64_t i = begin + j * kAdamwThreads;
    if (i >= n) continue;
    const float g = grad[j] * scale, first = p.beta1 * m[j] + p.rest1 * g, second = p.beta2 * v[j] + p.rest2 * g * g;
    const float next = value[j] * p.decay - rate * first / (sqrtf(second) * root_correction + p.eps);
    p.m[i] = first, p.v[i] = second, p.value[i] = next;
    if (p.half) p.half[i] = from_float<bf16>(next);
  }
}

}  // namespace

int64_t sum_squares_partials(int64_t n) { return div_up(n, int64_t{kSquarePiece}); }

template <class X>
void sum_squares(Stream stream, double* out, double* partials, const X* x, int64_t n) {
  const int64_t count = sum_squares_partials(n);
  constexpr std::size_t kScratch = kSquareThreads / kWarpSize * sizeof(double);
  if (count > 0) launch(stream, sum_squares_kernel<X>, static_cast<unsigned>(count), kSquareThreads, kScratch, partials, x, n);
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
  launch(stream, adamw_kernel, static_cast<unsigned>(div_up(n, int64_t{kAdamwThreads * kAdamwEach})), kAdamwThreads, 0, p, n);
}

}  // namespace kava
