// RMSNorm of every head by itself with its rotary embedding, and the gradient: with z = x rstd w and half = D/2,
//   y[d] = z[d] cos - z[d+half] sin,  y[d+half] = z[d+half] cos + z[d] sin;
//   backward: g = dy turned back,  dx = rstd (g w) - rstd^3 mean(g w x) x,  dw = sum of g x rstd over rows and heads.
//
// A warp owns a head of a row; its lanes own pairs. The head is read twice, the second time from the cache. The gradient of the gain is
// summed as those of norm.cu are: a block owns kGainRows rows and 32 columns of the first stage, whose sums the second stage adds in order.
#include <stdexcept>

#include "kernels/gpu.h"
#include "kernels/kernels.h"

namespace kava {

namespace {

constexpr int kHeadWarps = 8, kHeadThreads = kHeadWarps * kWarpSize;

struct Pair {
  float a, b;
};
__device__ __forceinline__ Pair turned(Pair x, float c, float s) { return {x.a * c - x.b * s, x.b * c + x.a * s}; }
template <class T>
__device__ __forceinline__ Pair pair_at(const T* head, int d, int half) {
  return {to_float(head[d]), to_float(head[d + half])};
}

/// This warp's head among rows * heads, -1 beyond the last.
__device__ __forceinline__ int64_t warp_head(int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kHeadWarps + threadIdx.x / kWarpSize;
  return i < count ? i : -1;
}

template <class T>
__global__ void __launch_bounds__(kHeadThreads)
    norm_rope_fwd_kernel(Rows<T> y, Rows<float> rstd, Rows<const T> x, const T* w, const __grid_constant__ RopeTables at, float eps,
                         int64_t count, int heads, int half) {
  const int64_t i = warp_head(count);
  if (i < 0) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t r = i / heads;
  const int head = static_cast<int>(i % heads), position = at.positions[r];
  const T* in = x[r] + static_cast<int64_t>(head) * 2 * half;
  T* out = y[r] + static_cast<int64_t>(head) * 2 * half;
  float square = 0;
  for (int d = lane; d < half; d += kWarpSize) {
    const Pair v = pair_at(in, d, half);
    square += v.a * v.a + v.b * v.b;
  }
  const float scale = 1 / sqrtf(warp_sum(square) / static_cast<float>(2 * half) + eps);
  if (rstd.data && lane == 0) rstd[r][head] = scale;
  for (int d = lane; d < half; d += kWarpSize) {
    const Pair v = pair_at(in, d, half), gain = pair_at(w, d, half);
    const Pair t = turned({v.a * scale * gain.a, v.b * scale * gain.b}, at.cosine[position][d], at.sine[position][d]);
    out[d] = from_float<T>(t.a);
    out[d + half] = from_float<T>(t.b);
  }
}

template <class T, class G>
__global__ void __launch_bounds__(kHeadThreads)
    norm_rope_bwd_kernel(Rows<T> dx, Rows<const G> dy, Rows<const T> x, Rows<const float> rstd, const T* w,
                         const __grid_constant__ RopeTables at, int64_t count, int heads, int half) {
  const int64_t i = warp_head(count);
  if (i < 0) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t r = i / heads;
  const int head = static_cast<int>(i % heads), position = at.positions[r];
  const int64_t first = static_cast<int64_t>(head) * 2 * half;
  const T* in = x[r] + first;
  const G* dout = dy[r] + first;
  T* out = dx[r] + first;
  auto weighted = [&](int d) {
    const Pair g = turned(pair_at(dout, d, half), at.cosine[position][d], -at.sine[position][d]), gain = pair_at(w, d, half);
    return Pair{g.a * gain.a, g.b * gain.b};
  };
  float dot = 0;
  for (int d = lane; d < half; d += kWarpSize) {
    const Pair g = weighted(d), v = pair_at(in, d, half);
    dot += g.a * v.a + g.b * v.b;
  }
  const float scale = rstd[r][head], pull = scale * scale * scale * warp_sum(dot) / static_cast<float>(2 * half);
  for (int d = lane; d < half; d += kWarpSize) {
    const Pair g = weighted(d), v = pair_at(in, d, half);
    out[d] = from_float<T>(scale * g.a - pull * v.a);
    out[d + half] = from_float<T>(scale * g.b - pull * v.b);
  }
}

/// partial[block of rows][column] = sum over its rows and their heads. A warp takes every eighth row, a lane a column; the warps' sums are
/// added in order.
template <class T, class G>
__global__ void __launch_bounds__(kHeadThreads)
    norm_rope_gain_kernel(float* partial, Rows<const G> dy, Rows<const T> x, Rows<const float> rstd, const __grid_constant__ RopeTables at,
                          int64_t rows, int heads, int half) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int col = static_cast<int>(blockIdx.y) * kWarpSize + lane;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kGainRows, end = begin + kGainRows < rows ? begin + kGainRows : rows;
  float gain = 0;
  if (col < 2 * half) {
    const int d = col % half;
    for (int64_t r = begin + warp; r < end; r += kHeadWarps) {
      const float c = at.cosine[at.positions[r]][d], s = at.sine[at.positions[r]][d];
      for (int head = 0; head < heads; ++head) {
        const int64_t first = static_cast<int64_t>(head) * 2 * half;
        const Pair g = turned(pair_at(dy[r] + first, d, half), c, -s);
        gain += (col < half ? g.a : g.b) * to_float(x[r][first + col]) * rstd[r][head];
      }
    }
  }
  float* sums = dynamic_smem<float>();
  sums[warp * kWarpSize + lane] = gain;
  __syncthreads();  // all warps' sums are there
  if (warp > 0 || col >= 2 * half) return;
  float total = 0;
  for (int i = 0; i < kHeadWarps; ++i) total += sums[i * kWarpSize + lane];
  partial[static_cast<int64_t>(blockIdx.x) * 2 * half + col] = total;
}

/// dw += sum over blocks of rows, in order.
__global__ void __launch_bounds__(kHeadThreads) norm_rope_gain_sum_kernel(float* dw, const float* partial, int blocks, int cols) {
  const int col = static_cast<int>(blockIdx.x) * kHeadThreads + static_cast<int>(threadIdx.x);
  if (col >= cols) return;
  float gain = 0;
  for (int64_t b = 0; b < blocks; ++b) gain += partial[b * cols + col];
  dw[col] += gain;
}

unsigned head_blocks(int64_t count) {
  const int64_t blocks = div_up(count, int64_t{kHeadWarps});
  if (blocks >= int64_t{1} << 31) throw std::invalid_argument("more heads to turn than a launch counts");
  return static_cast<unsigned>(blocks);
}

}  // namespace

template <class T>
void norm_rope_fwd(Stream stream, Rows<T> y, Rows<float> rstd, Rows<const T> x, const T* w, const RopeTables& at, float eps, int64_t rows,
                   int heads, int head_dim) {
  const int64_t count = rows * heads;
  if (count == 0) return;
  launch(stream, norm_rope_fwd_kernel<T>, head_blocks(count), kHeadThreads, 0, y, rstd, x, w, at, eps, count, heads, head_dim / 2);
}

template <class T, class G>
void norm_rope_bwd(Stream stream, Rows<T> dx, float* dw, float* workspace, Rows<const G> dy, Rows<const T> x, Rows<const float> rstd,
                   const T* w, const RopeTables& at, int64_t rows, int heads, int head_dim) {
  const int64_t count = rows * heads;
  if (count == 0) return;
  // The gain first: dx may lie where dy is.
  if (dw) {
    const int blocks = static_cast<int>(div_up(rows, int64_t{kGainRows}));
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(div_up(head_dim, kWarpSize)));
    launch(stream, norm_rope_gain_kernel<T, G>, grid, kHeadThreads, kHeadThreads * sizeof(float), workspace, dy, x, rstd, at, rows, heads,
           head_dim / 2);
    launch(stream, norm_rope_gain_sum_kernel, static_cast<unsigned>(div_up(head_dim, kHeadThreads)), kHeadThreads, 0, dw, workspace, blocks,
           head_dim);
  }
  launch(stream, norm_rope_bwd_kernel<T, G>, head_blocks(count), kHeadThreads, 0, dx, dy, x, rstd, w, at, count, heads, head_dim / 2);
}

#define KAVA_NORM_ROPE_OF(T) \
  template void norm_rope_fwd(Stream, Rows<T>, Rows<float>, Rows<const T>, const T*, const RopeTables&, float, int64_t, int, int);
#define KAVA_NORM_ROPE_GRADIENT_OF(T, G)                                                                                  \
  template void norm_rope_bwd(Stream, Rows<T>, float*, float*, Rows<const G>, Rows<const T>, Rows<const float>, const T*, \
                              const RopeTables&, int64_t, int, int);
KAVA_NORM_ROPE_OF(float)
KAVA_NORM_ROPE_OF(bf16)
KAVA_NORM_ROPE_GRADIENT_OF(float, float)
KAVA_NORM_ROPE_GRADIENT_OF(bf16, bf16)
KAVA_NORM_ROPE_GRADIENT_OF(bf16, float)
#undef KAVA_NORM_ROPE_OF
#undef KAVA_NORM_ROPE_GRADIENT_OF

}  // namespace kava
