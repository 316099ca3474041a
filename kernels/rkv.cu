// R-KV eviction of one layer in one kernel (docs/method.md section 4), per sample and K/V head, over the sample's n trace keys:
//   redundancy  R = softmax_i(-(1/n) sum_{j != i} cos(k_i, k_j)), by the sum of the unit keys: k^_i . sum_j k^_j - |k^_i|^2; for n = 2 by
//   the
//               pair's cosine itself, so that its two keys tie exactly
//   importance  I = mean over the answer's queries of softmax_i(q_j k_i / sqrt(D)), over the heads of the group by `group`
//   score       S = lambda I + (1 - lambda) R; the top M are kept, ties to the lower index; their keys and values are gathered
//
// A block owns (sample, K/V head). Scores are f64 in a workspace, one word for each of trace token, head and kind. A warp takes a key where
// a product over the head's columns is made; elsewhere a thread takes a token.
#include <cmath>

#include "kernels/chunks.h"
#include "kernels/philox.h"

namespace kava {

namespace {

constexpr int kRkvThreads = 128, kRkvWarps = kRkvThreads / kWarpSize;
[[maybe_unused]] constexpr int kRkvBlocks = 8;  // per SM at least; without a number ptxas spills for occupancy
constexpr double kNormEps = 1e-8;

template <class T>
struct Rkv {
  RkvOutputs<T> out;
  RkvInputs<T> in;
  RkvDims dims;
  double* workspace;           // [3 + rank word, K, trace tokens]
  double scale, group_weight;  // 1 / sqrt(D); of a head of the group
};

/// What a block works on.
template <class T>
struct Trace {
  const Rkv<T>& p;
  int64_t sample, head;
  int begin, n, dim;
  double *importance, *redundancy, *pooled;  // of this trace's tokens
  int32_t* rank;

  __device__ explicit Trace(const Rkv<T>& p_)
      : p(p_),
        sample(blockIdx.x),
        head(blockIdx.y),
        begin(p.in.trace_offsets[sample]),
        n(p.in.trace_offsets[sample + 1] - begin),
        dim(p.dims.head_dim) {
    const int64_t plane = static_cast<int64_t>(p.dims.kv_heads) * p.dims.trace_tokens;
    importance = p.workspace + head * p.dims.trace_tokens + begin;
    redundancy = importance + plane, pooled = redundancy + plane;
    rank = reinterpret_cast<int32_t*>(pooled + plane);
  }
  __device__ int64_t row(int i) const { return p.in.trace_rows[begin + i]; }
  __device__ const T* key(int i) const { return p.in.k[row(i)] + head * dim; }
};

/// x[i] = exp(factor (x[i] - max)) / sum over n words, of which thread t holds every kRkvThreads-th from t on. Others may read them after a
/// barrier.
__device__ void block_softmax(double* x, int n, double* scratch, double factor = 1) {
  double most = -INFINITY;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kRkvThreads) most = x[i] > most ? x[i] : most;
  most = block_max<double, kRkvThreads>(most, scratch);
  double sum = 0;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kRkvThreads) sum += x[i] = exp(factor * (x[i] - most));
  const double inverse = 1 / block_sum<double, kRkvThreads>(sum, scratch);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kRkvThreads) x[i] *= inverse;
}

__device__ __forceinline__ double warp_sum_f64(double v) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}

/// unit: D words of shared memory for the sum of the unit keys. Inverse norms stand in `pooled` meanwhile.
template <class T>
__device__ void redundancy_of(const Trace<T>& t, double* unit, double* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
#pragma unroll 1
  for (int i = warp; i < t.n; i += kRkvWarps) {
    const T* key = t.key(i);
    double square = 0;
#pragma unroll 1
    for (int d = lane; d < t.dim; d += kWarpSize) square += static_cast<double>(to_float(key[d])) * static_cast<double>(to_float(key[d]));
    square = warp_sum_f64(square);
    if (lane == 0) t.pooled[i] = 1 / (sqrt(square) + kNormEps);
  }
  __syncthreads();  // all inverse norms are there
#pragma unroll 1
  for (int d = static_cast<int>(threadIdx.x); d < t.dim; d += kRkvThreads) {
    double sum = 0;
#pragma unroll 1
    for (int i = 0; i < t.n; ++i) sum += static_cast<double>(to_float(t.key(i)[d])) * t.pooled[i];
    unit[d] = sum;
  }
  __syncthreads();  // the sum of the unit keys is there
#pragma unroll 1
  for (int i = warp; i < t.n; i += kRkvWarps) {
    const T *key = t.key(i), *other = t.key(t.n == 2 ? 1 - i : i);
    const double inverse = t.pooled[i], other_inverse = t.n == 2 ? t.pooled[1 - i] : inverse;
    double dot = 0;
#pragma unroll 1
    for (int d = lane; d < t.dim; d += kWarpSize) {
      const double u = static_cast<double>(to_float(key[d])) * inverse;
      // Both keys of two take the same products in the same order.
      dot += t.n == 2 ? u * (static_cast<double>(to_float(other[d])) * other_inverse) : u * (unit[d] - u);
    }
    dot = warp_sum_f64(dot);
    if (lane == 0) t.redundancy[i] = -dot;
  }
  __syncthreads();  // all sums of cosines are there
  block_softmax(t.redundancy, t.n, scratch, 1 / static_cast<double>(t.n));
}

/// logits: the pooled row of one query, in `pooled`; of one head where softmaxes are taken by head, in shared words is no room: the row of
/// a head stands in `redundancy`'s place only before that is made, so importance comes first.
template <class T>
__device__ void importance_of(const Trace<T>& t, double* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int group = t.p.dims.heads / t.p.dims.kv_heads;
  const int first = t.p.in.query_offsets[t.sample], queries = t.p.in.query_offsets[t.sample + 1] - first;
  const double scale = t.p.scale, weight = t.p.group_weight / static_cast<double>(queries);
  const bool by_head = t.p.dims.group != RkvGroup::max_logits;
  double* logits = t.redundancy;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < t.n; i += kRkvThreads) t.importance[i] = 0;
#pragma unroll 1
  for (int j = 0; j < queries; ++j) {
#pragma unroll 1
    for (int h = 0; h < group; ++h) {
      const T* q = t.p.in.q[t.p.in.query_rows[first + j]] + (t.head * group + h) * t.dim;
#pragma unroll 1
      for (int i = warp; i < t.n; i += kRkvWarps) {
        const T* key = t.key(i);
        float dot = 0;
#pragma unroll 1
        for (int d = lane; d < t.dim; d += kWarpSize) dot += to_float(q[d]) * to_float(key[d]);
        dot = warp_sum(dot);
        if (lane == 0) logits[i] = scale * static_cast<double>(dot);
      }
      __syncthreads();  // the head's logits are there
      if (by_head) block_softmax(logits, t.n, scratch);
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < t.n; i += kRkvThreads) {
        const double x = logits[i];
        if (h == 0) t.pooled[i] = x;
        else if (t.p.dims.group == RkvGroup::mean_prob) t.pooled[i] += x;
        else t.pooled[i] = x > t.pooled[i] ? x : t.pooled[i];
      }
      __syncthreads();  // the logits have been pooled before the next head's overwrite them
    }
    if (!by_head) block_softmax(t.pooled, t.n, scratch);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < t.n; i += kRkvThreads) t.importance[i] += weight * t.pooled[i];
  }
}

/// What tokens are ranked by: the score, or a random draw.
template <class T>
__device__ __forceinline__ double ranked_by(const Trace<T>& t, int i) {
  const RkvDims& d = t.p.dims;
  if (d.policy != RkvPolicy::random) return d.lambda * t.importance[i] + (1 - d.lambda) * t.redundancy[i];
  const uint32_t place = d.layer << 16 | static_cast<uint32_t>(t.head);
  return philox({static_cast<uint32_t>(i), static_cast<uint32_t>(t.p.in.samples[t.sample]), place, d.step},
                philox_key(Purpose::eviction, d.seed))[0];
}

/// rank[i] = how many tokens come before i: a larger value, or an equal one at a lower index; a NaN counts as the least. They are there for
/// other threads after a barrier.
template <class T>
__device__ void rank_tokens(const Trace<T>& t) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < t.n; i += kRkvThreads) t.pooled[i] = ranked_by(t, i);
  __syncthreads();  // all values are there
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < t.n; i += kRkvThreads) {
    const double mine = t.pooled[i];
    int before = 0;
#pragma unroll 1
    for (int j = 0; j < t.n; ++j) {
      const double other = t.pooled[j];
      const bool tie = other == mine || (other != other && mine != mine);
      before += tie ? j < i : mine != mine || other > mine;
    }
    t.rank[i] = before;
  }
}

/// The slot of token i, -1 where it is evicted.
template <class T>
__device__ int slot_of(const Trace<T>& t, int i) {
  const RkvDims& d = t.p.dims;
  const int M = d.latents;
  const bool ranked = d.policy == RkvPolicy::scored || d.policy == RkvPolicy::random;
  if (ranked && d.policy == RkvPolicy::scored && d.by_score) return t.rank[i] < M ? t.rank[i] : -1;
  if (t.n <= M) return i;
  if (d.policy == RkvPolicy::crop) return i < M ? i : -1;
  if (d.policy == RkvPolicy::uniform) {
    // Slot s keeps floor(s n / M), so token i stands in slot ceil(i M / n) if that slot's floor is i.
    const int64_t slot = div_up(static_cast<int64_t>(i) * M, static_cast<int64_t>(t.n));
    return slot < M && slot * t.n / M == i ? static_cast<int>(slot) : -1;
  }
  if (t.rank[i] >= M) return -1;
  int slot = 0;
#pragma unroll 1
  for (int j = 0; j < i; ++j) slot += t.rank[j] < M;
  return slot;
}

template <class T>
__global__ void __launch_bounds__(kRkvThreads, kRkvBlocks) rkv_select_kernel(const __grid_constant__ Rkv<T> p) {
  const Trace<T> t(p);
  double* scratch = dynamic_smem<double>();
  double* unit = scratch + kRkvWarps;
  int32_t* slots = reinterpret_cast<int32_t*>(unit + t.dim);  // [M]: the token in each slot
  const int M = p.dims.latents;
  if (t.n > 0) {
    importance_of(t, scratch);
    __syncthreads();  // pooled, and the logits in redundancy's place, have been read
    redundancy_of(t, unit, scratch);
    rank_tokens(t);
  }
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < t.n; i += kRkvThreads) {
    const int64_t at = t.begin + i;
    if (p.out.importance.data) p.out.importance[t.head][at] = static_cast<float>(t.importance[i]);
    if (p.out.redundancy.data) p.out.redundancy[t.head][at] = static_cast<float>(t.redundancy[i]);
    if (p.out.score.data)
      p.out.score[t.head][at] = static_cast<float>(p.dims.lambda * t.importance[i] + (1 - p.dims.lambda) * t.redundancy[i]);
  }
#pragma unroll 1
  for (int m = static_cast<int>(threadIdx.x); m < M; m += kRkvThreads) slots[m] = -1;
  __syncthreads();  // all slots are empty, and all ranks are there
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < t.n; i += kRkvThreads) {
    const int slot = slot_of(t, i);
    if (slot >= 0) slots[slot] = i;
  }
  __syncthreads();  // all slots are filled
#pragma unroll 1
  for (int m = static_cast<int>(threadIdx.x); m < M; m += kRkvThreads) p.out.kept[t.sample * M + m][t.head] = slots[m];
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < M * t.dim; i += kRkvThreads) {
    const int m = i / t.dim, d = i % t.dim, token = slots[m];
    const int64_t col = t.head * t.dim + d, to = t.sample * M + m;
    p.out.target_k[to][col] = token < 0 ? T{} : p.in.match_k[p.in.match_by_rows ? t.row(token) : t.begin + token][col];
    p.out.target_v[to][col] = token < 0 ? T{} : p.in.v[t.row(token)][col];
  }
}

}  // namespace

int64_t rkv_workspace_words(const RkvDims& dims) { return 4 * int64_t{dims.kv_heads} * dims.trace_tokens; }

template <class T>
void rkv_select(Stream stream, const RkvOutputs<T>& out, double* workspace, const RkvInputs<T>& in, const RkvDims& dims) {
  if (dims.samples == 0 || dims.kv_heads == 0) return;
  const std::size_t smem =
      (kRkvWarps + static_cast<std::size_t>(dims.head_dim)) * sizeof(double) + static_cast<std::size_t>(dims.latents) * sizeof(int32_t);
  launch(stream, rkv_select_kernel<T>, dim3(static_cast<unsigned>(dims.samples), static_cast<unsigned>(dims.kv_heads)), kRkvThreads, smem,
         Rkv<T>{out, in, dims, workspace, 1 / std::sqrt(static_cast<double>(dims.head_dim)),
                dims.group == RkvGroup::mean_prob ? static_cast<double>(dims.kv_heads) / dims.heads : 1.0});
}
template void rkv_select(Stream, const RkvOutputs<float>&, double*, const RkvInputs<float>&, const RkvDims&);
template void rkv_select(Stream, const RkvOutputs<bf16>&, double*, const RkvInputs<bf16>&, const RkvDims&);

}  // namespace kava
