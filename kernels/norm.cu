// RMSNorm with the residual's sum, LayerNorm, and their gradients.
//   RMSNorm:    sum = a + b,  y = sum rstd w,  rstd = (mean(sum^2) + eps)^-1/2
//   backward:   dx += rstd (dy w) - rstd^3 mean(dy w x) x
//   LayerNorm:  sum = a + b,  z = (sum - mean) rstd,  y = z w + bias;  backward: dx += rstd (g - mean(g) - z mean(g z)),  g = dy w
//
// A warp owns a row. It reads the row once, in chunks of eight columns, and keeps it in its part of shared memory, in the type that it is
// stored in; lanes own chunks, so no barrier is needed. Gains are read by every block: eight rows of a block are so many that this is
// little. Gradients of gains and biases are sums over rows (column_sums.h).
#include <algorithm>

#include "kernels/column_sums.h"

namespace kava {

namespace {

constexpr int kNormWarps = 8;
[[maybe_unused]] constexpr int kNormThreads = kNormWarps * kWarpSize;  // where launch bounds mean something

/// This warp's row, -1 beyond the last.
__device__ __forceinline__ int64_t warp_row(int64_t rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
  return row < rows ? row : -1;
}
__device__ __forceinline__ int lane_column() { return static_cast<int>(threadIdx.x) % kWarpSize * kChunk; }

constexpr int padded(int cols) { return div_up(cols, kChunk) * kChunk; }

/// A row in shared memory, whole chunks long; of f32 first all chunks' first halves, so that lanes' accesses lie side by side.
template <class T>
struct KeptRow {
  T* at;
  int half;

  __device__ KeptRow(unsigned char* bytes, int cols) : at(reinterpret_cast<T*>(bytes)), half(padded(cols) / 2) {}
  __device__ __forceinline__ void keep(int first, const Columns& x) {
    if constexpr (sizeof(T) == 2) {
      store_columns<T, true>(at, first, 0, x);
    } else {
      for (int h = 0; h < 2; ++h)
        store_columns<T, true>(at + h * half, first / 2, 0,
                               ColumnsOf<kHalfChunk>{x.at[4 * h], x.at[4 * h + 1], x.at[4 * h + 2], x.at[4 * h + 3]});
    }
  }
  __device__ __forceinline__ Columns kept(int first) const {
    if constexpr (sizeof(T) == 2) {
      return load_columns<T, true>(at, first, 0);
    } else {
      const auto low = load_columns<T, true, kHalfChunk>(at, first / 2, 0),
                 high = load_columns<T, true, kHalfChunk>(at + half, first / 2, 0);
      return {low.at[0], low.at[1], low.at[2], low.at[3], high.at[0], high.at[1], high.at[2], high.at[3]};
    }
  }
};

/// This warp's part of shared memory, where it keeps `bytes` for each column.
__device__ __forceinline__ unsigned char* warp_bytes(int cols, std::size_t bytes) {
  return dynamic_smem<unsigned char>() + threadIdx.x / kWarpSize * (static_cast<std::size_t>(padded(cols)) * bytes);
}
/// How a kernel runs whose warps keep `bytes` for each column: by fewer warps where rows are long.
struct NormLaunch {
  NormLaunch(int64_t rows, int64_t cols, std::size_t bytes) {
    const std::size_t warp = static_cast<std::size_t>(padded(static_cast<int>(cols))) * bytes;
    const std::size_t warps = std::min<std::size_t>(kNormShared / warp, kNormWarps);
    if (warps == 0) throw std::invalid_argument("rows of more columns than a warp keeps");
    blocks = static_cast<unsigned>(div_up(rows, static_cast<int64_t>(warps)));
    threads = static_cast<unsigned>(warps) * kWarpSize;
    shared = warps * warp;
  }
  unsigned blocks, threads;
  std::size_t shared;
};

template <class T>
struct RmsNorm {
  Rows<T> y, sum;
  float* rstd;
  int64_t rstd_stride;
  Rows<const T> a, b;
  const T* w;
  float eps;
};

/// A chunk of the row that is normalised: a (+ b), as rounded as it is stored, which goes to sum where that is wanted.
template <class T, bool kAligned>
__device__ __forceinline__ Columns summed_columns(Rows<T> sum, Rows<const T> a, Rows<const T> b, int64_t r, int first, int cols) {
  Columns x = load_columns<T, kAligned>(a[r], first, cols);
  if (b.data) {
    const Columns other = load_columns<T, kAligned>(b[r], first, cols);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x.at[i] = to_float(from_float<T>(x.at[i] + other.at[i]));
  }
  if (sum.data) store_columns<T, kAligned>(sum[r], first, cols, x);
  return x;
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kNormThreads) add_rms_norm_fwd_kernel(const __grid_constant__ RmsNorm<T> p, int64_t rows, int cols) {
  const int64_t r = warp_row(rows);
  if (r < 0) return;
  KeptRow<T> row(warp_bytes(cols, sizeof(T)), cols);
  float square = 0;
  for (int first = lane_column(); first < cols; first += kWarpSize * kChunk) {
    const Columns x = summed_columns<T, kAligned>(p.sum, p.a, p.b, r, first, cols);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) square += x.at[i] * x.at[i];
    row.keep(first, x);
  }
  const float scale = 1 / sqrtf(warp_sum(square) / static_cast<float>(cols) + p.eps);
  if (p.rstd && threadIdx.x % kWarpSize == 0) p.rstd[r * p.rstd_stride] = scale;
  for (int first = lane_column(); first < cols; first += kWarpSize * kChunk) {
    Columns x = row.kept(first);
    const Columns gain = load_columns<T, kAligned>(p.w, first, cols);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x.at[i] = x.at[i] * scale * gain.at[i];
    store_columns<T, kAligned>(p.y[r], first, cols, x);
  }
}

template <class T, class G>
struct NormGradient {
  Rows<T> dx;
  Rows<const G> dy;
  Rows<const T> x;
  const float *mean, *rstd;  // mean: null for RMSNorm
  int64_t mean_stride, rstd_stride;
  const T* w;
  __device__ float center(int64_t r) const { return mean ? mean[r * mean_stride] : 0.f; }
  __device__ float scale(int64_t r) const { return rstd[r * rstd_stride]; }
};

/// What the second pass over a row takes from the first.
template <class T, class G>
struct KeptGradient {
  static constexpr std::size_t kBytes = sizeof(T) + sizeof(G);
  KeptRow<T> x;
  KeptRow<G> dy;

  __device__ explicit KeptGradient(int cols)
      : x(warp_bytes(cols, kBytes), cols), dy(warp_bytes(cols, kBytes) + static_cast<std::size_t>(padded(cols)) * sizeof(T), cols) {}
};

template <class T, class G, bool kAligned>
__global__ void __launch_bounds__(kNormThreads) rms_norm_bwd_kernel(const __grid_constant__ NormGradient<T, G> p, int64_t rows, int cols) {
  const int64_t r = warp_row(rows);
  if (r < 0) return;
  KeptGradient<T, G> kept(cols);
  float dot = 0;
  for (int first = lane_column(); first < cols; first += kWarpSize * kChunk) {
    const Columns x = load_columns<T, kAligned>(p.x[r], first, cols), gain = load_columns<T, kAligned>(p.w, first, cols),
                  dy = load_columns<G, kAligned>(p.dy[r], first, cols);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) dot += dy.at[i] * gain.at[i] * x.at[i];
    kept.x.keep(first, x);
    kept.dy.keep(first, dy);
  }
  const float scale = p.scale(r), pull = scale * scale * scale * warp_sum(dot) / static_cast<float>(cols);
  for (int first = lane_column(); first < cols; first += kWarpSize * kChunk) {
    const Columns x = kept.x.kept(first), dy = kept.dy.kept(first), gain = load_columns<T, kAligned>(p.w, first, cols);
    Columns d = load_columns<T, kAligned>(p.dx[r], first, cols);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) d.at[i] += scale * (dy.at[i] * gain.at[i]) - pull * x.at[i];
    store_columns<T, kAligned>(p.dx[r], first, cols, d);
  }
}

template <class T>
struct LayerNorm {
  Rows<T> y, sum;
  float *mean, *rstd;
  int64_t mean_stride, rstd_stride;
  Rows<const T> a, b;
  const T *w, *bias;
  float eps;
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kNormThreads) add_layer_norm_fwd_kernel(const __grid_constant__ LayerNorm<T> p, int64_t rows, int cols) {
  const int64_t r = warp_row(rows);
  if (r < 0) return;
  KeptRow<T> row(warp_bytes(cols, sizeof(T)), cols);
  float sum = 0;
  for (int first = lane_column(); first < cols; first += kWarpSize * kChunk) {
    const Columns x = summed_columns<T, kAligned>(p.sum, p.a, p.b, r, first, cols);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum += x.at[i];
    row.keep(first, x);
  }
  const float center = warp_sum(sum) / static_cast<float>(cols);
  float square = 0;
  for (int first = lane_column(); first < cols; first += kWarpSize * kChunk) {
    const Columns x = row.kept(first);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (first + i < cols) square += (x.at[i] - center) * (x.at[i] - center);
  }
  const float scale = 1 / sqrtf(warp_sum(square) / static_cast<float>(cols) + p.eps);
  if (threadIdx.x % kWarpSize == 0) p.mean[r * p.mean_stride] = center, p.rstd[r * p.rstd_stride] = scale;
  for (int first = lane_column(); first < cols; first += kWarpSize * kChunk) {
    Columns x = row.kept(first);
    const Columns gain = load_columns<T, kAligned>(p.w, first, cols), bias = load_columns<T, kAligned>(p.bias, first, cols);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x.at[i] = (x.at[i] - center) * scale * gain.at[i] + bias.at[i];
    store_columns<T, kAligned>(p.y[r], first, cols, x);
  }
}

template <class T, class G, bool kAligned>
__global__ void __launch_bounds__(kNormThreads)
    layer_norm_bwd_kernel(const __grid_constant__ NormGradient<T, G> p, int64_t rows, int cols) {
  const int64_t r = warp_row(rows);
  if (r < 0) return;
  KeptGradient<T, G> kept(cols);
  const float center = p.center(r), scale = p.scale(r);
  float g_sum = 0, gz_sum = 0;
  for (int first = lane_column(); first < cols; first += kWarpSize * kChunk) {
    const Columns x = load_columns<T, kAligned>(p.x[r], first, cols), dy = load_columns<G, kAligned>(p.dy[r], first, cols),
                  gain = load_columns<T, kAligned>(p.w, first, cols);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float g = dy.at[i] * gain.at[i];
      g_sum += g, gz_sum += g * ((x.at[i] - center) * scale);
    }
    kept.x.keep(first, x);
    kept.dy.keep(first, dy);
  }
  const float g_mean = warp_sum(g_sum) / static_cast<float>(cols), gz_mean = warp_sum(gz_sum) / static_cast<float>(cols);
  for (int first = lane_column(); first < cols; first += kWarpSize * kChunk) {
    const Columns x = kept.x.kept(first), dy = kept.dy.kept(first), gain = load_columns<T, kAligned>(p.w, first, cols);
    Columns d = load_columns<T, kAligned>(p.dx[r], first, cols);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) d.at[i] += scale * (dy.at[i] * gain.at[i] - g_mean - (x.at[i] - center) * scale * gz_mean);
    store_columns<T, kAligned>(p.dx[r], first, cols, d);
  }
}

// ---- gradients of gains and biases

/// Of a row dy z and dy, z = (x - mean) rstd.
template <class T, class G, bool kAligned>
struct NormGainTerms {
  static constexpr int kSums = 2, kLanes = kWarpSize, kLoads = 2;
  NormGradient<T, G> p;
  int cols;
  struct Loaded {
    Columns dy, x;
    float center, scale;
  };
  __device__ __forceinline__ Loaded load(int64_t r, int first) const {
    return {load_columns<G, kAligned>(p.dy[r], first, cols), load_columns<T, kAligned>(p.x[r], first, cols), p.center(r), p.scale(r)};
  }
  __device__ __forceinline__ void add(Columns (&sums)[kSums], const Loaded& row) const {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      sums[0].at[i] += row.dy.at[i] * ((row.x.at[i] - row.center) * row.scale);
      sums[1].at[i] += row.dy.at[i];
    }
  }
};

template <class T, class G>
void norm_gains(Stream stream, float* dw, float* db, float* workspace, const NormGradient<T, G>& p, int64_t rows, int64_t cols) {
  if (!dw && !db) return;
  dispatch_aligned(chunked(p.dy, cols) && chunked(p.x, cols), [&]<bool kAligned>() {
    column_sums(stream, SumsOf<2>{dw, db}, workspace, NormGainTerms<T, G, kAligned>{p, static_cast<int>(cols)}, rows,
                static_cast<int>(cols));
  });
}

}  // namespace

template <class T>
void add_rms_norm_fwd(Stream stream, Rows<T> y, Rows<T> sum, Rows<float> rstd, Rows<const T> a, Rows<const T> b, const T* w, float eps,
                      int64_t rows, int64_t cols) {
  if (rows == 0) return;
  if (!b.data && sum.data == a.data) sum = {};
  const bool aligned = chunked(y, cols) && chunked(sum, cols) && chunked(a, cols) && chunked(b, cols) && chunked(Rows<const T>{w, 8}, cols);
  const NormLaunch on(rows, cols, sizeof(T));
  dispatch_aligned(aligned, [&]<bool kAligned>() {
    launch(stream, add_rms_norm_fwd_kernel<T, kAligned>, on.blocks, on.threads, on.shared,
           RmsNorm<T>{y, sum, rstd.data, rstd.stride, a, b, w, eps}, rows, static_cast<int>(cols));
  });
}

template <class T, class G>
void rms_norm_bwd(Stream stream, Rows<T> dx, float* dw, float* workspace, Rows<const G> dy, Rows<const T> x, Rows<const float> rstd,
                  const T* w, int64_t rows, int64_t cols) {
  if (rows == 0) return;
  const NormGradient<T, G> p{dx, dy, x, nullptr, rstd.data, 0, rstd.stride, w};
  const bool aligned = chunked(dx, cols) && chunked(dy, cols) && chunked(x, cols) && chunked(Rows<const T>{w, 8}, cols);
  const NormLaunch on(rows, cols, KeptGradient<T, G>::kBytes);
  dispatch_aligned(aligned, [&]<bool kAligned>() {
    launch(stream, rms_norm_bwd_kernel<T, G, kAligned>, on.blocks, on.threads, on.shared, p, rows, static_cast<int>(cols));
  });
  norm_gains(stream, dw, nullptr, workspace, p, rows, cols);
}

template <class T>
void add_layer_norm_fwd(Stream stream, Rows<T> y, Rows<T> sum, Rows<float> mean, Rows<float> rstd, Rows<const T> a, Rows<const T> b,
                        const T* w, const T* bias, float eps, int64_t rows, int64_t cols) {
  if (rows == 0) return;
  if (!b.data && sum.data == a.data) sum = {};
  const bool aligned = chunked(y, cols) && chunked(sum, cols) && chunked(a, cols) && chunked(b, cols) &&
                       chunked(Rows<const T>{w, 8}, cols) && chunked(Rows<const T>{bias, 8}, cols);
  const NormLaunch on(rows, cols, sizeof(T));
  dispatch_aligned(aligned, [&]<bool kAligned>() {
    launch(stream, add_layer_norm_fwd_kernel<T, kAligned>, on.blocks, on.threads, on.shared,
           LayerNorm<T>{y, sum, mean.data, rstd.data, mean.stride, rstd.stride, a, b, w, bias, eps}, rows, static_cast<int>(cols));
  });
}

template <class T, class G>
void layer_norm_bwd(Stream stream, Rows<T> dx, float* dw, float* db, float* workspace, Rows<const G> dy, Rows<const T> x,
                    Rows<const float> mean, Rows<const float> rstd, const T* w, int64_t rows, int64_t cols) {
  if (rows == 0) return;
  const NormGradient<T, G> p{dx, dy, x, mean.data, rstd.data, mean.stride, rstd.stride, w};
  const bool aligned = chunked(dx, cols) && chunked(dy, cols) && chunked(x, cols) && chunked(Rows<const T>{w, 8}, cols);
  const NormLaunch on(rows, cols, KeptGradient<T, G>::kBytes);
  dispatch_aligned(aligned, [&]<bool kAligned>() {
    launch(stream, layer_norm_bwd_kernel<T, G, kAligned>, on.blocks, on.threads, on.shared, p, rows, static_cast<int>(cols));
  });
  norm_gains(stream, dw, db, workspace, p, rows, cols);
}

#define KAVA_NORMS_OF(T)                                                                                                                  \
  template void add_rms_norm_fwd(Stream, Rows<T>, Rows<T>, Rows<float>, Rows<const T>, Rows<const T>, const T*, float, int64_t, int64_t); \
  template void add_layer_norm_fwd(Stream, Rows<T>, Rows<T>, Rows<float>, Rows<float>, Rows<const T>, Rows<const T>, const T*, const T*,  \
                                   float, int64_t, int64_t);
#define KAVA_NORM_GRADIENTS_OF(T, G)                                                                                              \
  template void rms_norm_bwd(Stream, Rows<T>, float*, float*, Rows<const G>, Rows<const T>, Rows<const float>, const T*, int64_t, \
                             int64_t);                                                                                            \
  template void layer_norm_bwd(Stream, Rows<T>, float*, float*, float*, Rows<const G>, Rows<const T>, Rows<const float>,          \
                               Rows<const float>, const T*, int64_t, int64_t);
KAVA_NORMS_OF(float)
KAVA_NORMS_OF(bf16)
KAVA_NORM_GRADIENTS_OF(float, float)
KAVA_NORM_GRADIENTS_OF(bf16, bf16)
KAVA_NORM_GRADIENTS_OF(bf16, float)
#undef KAVA_NORMS_OF
#undef KAVA_NORM_GRADIENTS_OF

}  // namespace kava
