// RMSNorm of every head by itself with its rotary embedding, and the gradient: with z = x rstd w and half = D/2,
//   y[d] = z[d] cos - z[d+half] sin,  y[d+half] = z[d+half] cos + z[d] sin;
//   backward: g = dy turned back,  dx = rstd (g w) - rstd^3 mean(g w x) x,  dw = sum of g x rstd over rows and heads.
//
// A thread owns eight pairs of a head, which it reads once; as many lanes as a head has such chunks, rounded up to a power of two, own a
// head of a row. The gradient of the gain is a sum over rows and heads (column_sums.h).
#include "kernels/column_sums.h"

namespace kava {

namespace {

constexpr int kTurnThreads = 256;
constexpr int kMostHalf = kWarpSize * kChunk;

/// Chunks of a head's two halves, and what turns them.
struct Pairs {
  Columns a, b;
};
__device__ __forceinline__ Pairs turned(const Pairs& x, const Columns& c, const Columns& s, float sign) {
  Pairs y;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const float turn = sign * s.at[i];
    y.a.at[i] = x.a.at[i] * c.at[i] - x.b.at[i] * turn;
    y.b.at[i] = x.b.at[i] * c.at[i] + x.a.at[i] * turn;
  }
  return y;
}
__device__ __forceinline__ Pairs scaled(const Pairs& x, const Pairs& by) {
  Pairs y;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) y.a.at[i] = x.a.at[i] * by.a.at[i], y.b.at[i] = x.b.at[i] * by.b.at[i];
  return y;
}
__device__ __forceinline__ float dot(const Pairs& x, const Pairs& y) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) sum += x.a.at[i] * y.a.at[i] + x.b.at[i] * y.b.at[i];
  return sum;
}
template <class T, bool kAligned>
__device__ __forceinline__ Pairs load_pairs(const T* head, int first, int half) {
  return {load_columns<T, kAligned>(head, first, half), load_columns<T, kAligned>(head + half, first, half)};
}
template <class T, bool kAligned>
__device__ __forceinline__ void store_pairs(T* head, int first, int half, const Pairs& x) {
  store_columns<T, kAligned>(head, first, half, x.a);
  store_columns<T, kAligned>(head + half, first, half, x.b);
}
/// The sum over a head's lanes.
__device__ __forceinline__ float head_sum(float v, uint32_t lanes) {
  for (uint32_t step = lanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}

/// Heads of rows, by lanes.
struct Heads {
  uint32_t count;  // rows * heads
  uint32_t heads, lanes;
  int half;

  /// This thread's head; beyond the last one the lanes have no pairs.
  __device__ __forceinline__ uint32_t head() const { return blockIdx.x * (kTurnThreads / lanes) + threadIdx.x / lanes; }
  __device__ __forceinline__ int first() const { return static_cast<int>(threadIdx.x % lanes) * kChunk; }
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kTurnThreads)
    norm_rope_fwd_kernel(Rows<T> y, Rows<float> rstd, Rows<const T> x, const T* w, const __grid_constant__ RopeTables at, float eps,
                         const __grid_constant__ Heads in) {
  const uint32_t i = in.head(), r = i / in.heads, head = i % in.heads;
  const int first = in.first(), half = in.half;
  const bool owns = i < in.count && first < half;
  Pairs v{};
  if (owns) v = load_pairs<T, kAligned>(x[r] + static_cast<int64_t>(head) * (2 * half), first, half);
  const float scale = 1 / sqrtf(head_sum(dot(v, v), in.lanes) / static_cast<float>(2 * half) + eps);
  if (!owns) return;
  if (rstd.data && first == 0) rstd[r][head] = scale;
  const int64_t position = at.positions[r];
  Pairs z = scaled(v, load_pairs<T, kAligned>(w, first, half));
#pragma unroll
  for (int j = 0; j < kChunk; ++j) z.a.at[j] *= scale, z.b.at[j] *= scale;
  store_pairs<T, kAligned>(y[r] + static_cast<int64_t>(head) * (2 * half), first, half,
                           turned(z, load_columns<float, kAligned>(at.cosine[position], first, half),
                                  load_columns<float, kAligned>(at.sine[position], first, half), 1));
}

template <class T, class G, bool kAligned>
__global__ void __launch_bounds__(kTurnThreads)
    norm_rope_bwd_kernel(Rows<T> dx, Rows<const G> dy, Rows<const T> x, Rows<const float> rstd, const T* w,
                         const __grid_constant__ RopeTables at, const __grid_constant__ Heads in) {
  const uint32_t i = in.head(), r = i / in.heads, head = i % in.heads;
  const int first = in.first(), half = in.half;
  const int64_t column = static_cast<int64_t>(head) * (2 * half);
  const bool owns = i < in.count && first < half;
  Pairs v{}, g{};
  if (owns) {
    const int64_t position = at.positions[r];
    v = load_pairs<T, kAligned>(x[r] + column, first, half);
    g = scaled(turned(load_pairs<G, kAligned>(dy[r] + column, first, half), load_columns<float, kAligned>(at.cosine[position], first, half),
                      load_columns<float, kAligned>(at.sine[position], first, half), -1),
               load_pairs<T, kAligned>(w, first, half));
  }
  const float sum = head_sum(dot(g, v), in.lanes);
  if (!owns) return;
  const float scale = rstd[r][head], pull = scale * scale * scale * sum / static_cast<float>(2 * half);
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
    g.a.at[j] = scale * g.a.at[j] - pull * v.a.at[j];
    g.b.at[j] = scale * g.b.at[j] - pull * v.b.at[j];
  }
  store_pairs<T, kAligned>(dx[r] + column, first, half, g);
}

/// Of a head of a row g x rstd. The rows that are summed are those heads.
template <class T, class G, bool kAligned>
struct HeadGainTerms {
  static constexpr int kSums = 1, kLanes = 16, kLoads = 1;
  Rows<const G> dy;
  Rows<const T> x;
  Rows<const float> rstd;
  RopeTables at;
  uint32_t heads;
  int half;
  struct Loaded {
    Columns own, other, x, cosine, sine;  // other: the pairs' other halves
    float scale;
    int first;
  };
  __device__ __forceinline__ Loaded load(int64_t i, int first) const {
    const uint32_t r = static_cast<uint32_t>(i) / heads;
    const int cols = 2 * half;
    const int64_t head = static_cast<uint32_t>(i) % heads, column = head * cols, position = at.positions[r];
    const G* g = dy[r] + column;
    Loaded row;
    row.own = load_columns<G, kAligned>(g, first, cols), row.x = load_columns<T, kAligned>(x[r] + column, first, cols);
    row.scale = rstd[r][head], row.first = first;
    if constexpr (kAligned) {  // a chunk lies in one half
      const int pair = first < half ? first : first - half;
      row.other = load_columns<G, true>(g, first < half ? first + half : pair, cols);
      row.cosine = load_columns<float, true>(at.cosine[position], pair, half);
      row.sine = load_columns<float, true>(at.sine[position], pair, half);
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        const int col = first + j < cols ? first + j : 0, pair = col < half ? col : col - half;
        row.other.at[j] = to_float(g[col < half ? col + half : pair]);
        row.cosine.at[j] = at.cosine[position][pair], row.sine.at[j] = at.sine[position][pair];
      }
    }
    return row;
  }
  __device__ __forceinline__ void add(Columns (&sums)[kSums], const Loaded& row) const {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      const float turn = row.first + j < half ? row.sine.at[j] : -row.sine.at[j];
      sums[0].at[j] += (row.own.at[j] * row.cosine.at[j] + row.other.at[j] * turn) * row.x.at[j] * row.scale;
    }
  }
};

Heads heads_of(int64_t rows, int heads, int head_dim) {
  Heads in{static_cast<uint32_t>(rows * heads), static_cast<uint32_t>(heads), 1, head_dim / 2};
  if (in.half > kMostHalf) throw std::invalid_argument("heads of more than 512 columns to turn");
  while (static_cast<int>(in.lanes) * kChunk < in.half) in.lanes *= 2;
  if (rows * heads * in.lanes >= int64_t{1} << 31) throw std::invalid_argument("more heads to turn than a launch counts");
  return in;
}
unsigned head_blocks(const Heads& in) { return div_up(in.count * in.lanes, uint32_t{kTurnThreads}); }
/// Whether halves of heads and the tables' rows are read in whole chunks.
template <class T>
bool chunked_heads(const RopeTables& at, const T* w, int half) {
  return chunked(at.cosine, half) && chunked(at.sine, half) && chunked(Rows<const T>{w, kChunk}, half);
}

}  // namespace

template <class T>
void norm_rope_fwd(Stream stream, Rows<T> y, Rows<float> rstd, Rows<const T> x, const T* w, const RopeTables& at, float eps, int64_t rows,
                   int heads, int head_dim) {
  const Heads in = heads_of(rows, heads, head_dim);
  if (in.count == 0) return;
  dispatch_aligned(chunked_heads(at, w, in.half) && chunked(y, in.half) && chunked(x, in.half), [&]<bool kAligned>() {
    launch(stream, norm_rope_fwd_kernel<T, kAligned>, head_blocks(in), kTurnThreads, 0, y, rstd, x, w, at, eps, in);
  });
}

template <class T, class G>
void norm_rope_bwd(Stream stream, Rows<T> dx, float* dw, float* workspace, Rows<const G> dy, Rows<const T> x, Rows<const float> rstd,
                   const T* w, const RopeTables& at, int64_t rows, int heads, int head_dim) {
  const Heads in = heads_of(rows, heads, head_dim);
  if (in.count == 0) return;
  const bool aligned = chunked_heads(at, w, in.half) && chunked(dx, in.half) && chunked(dy, in.half) && chunked(x, in.half);
  dispatch_aligned(aligned, [&]<bool kAligned>() {
    // The gain first: dx may lie where dy is.
    if (dw)
      column_sums(stream, SumsOf<1>{dw}, workspace, HeadGainTerms<T, G, kAligned>{dy, x, rstd, at, in.heads, in.half}, in.count, head_dim);
    launch(stream, norm_rope_bwd_kernel<T, G, kAligned>, head_blocks(in), kTurnThreads, 0, dx, dy, x, rstd, w, at, in);
  });
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
