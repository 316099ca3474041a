// R-KV eviction of one layer in one kernel (docs/method.md section 4), per sample and K/V head, over the sample's n trace keys:
//   importance  I = mean over the answer's queries of softmax_i(q_j k_i / sqrt(D)), over the heads of the group by `group`
//   redundancy  R = softmax_i(-(1/n) sum_{j != i} cos(k_i, k_j)), by the sum of the unit keys: k^_i . sum_j k^_j - |k^_i|^2
//   score       S = lambda I + (1 - lambda) R; the top M are kept, ties to the lower index; their keys and values are gathered
//
// A block owns (sample, K/V head). Products of queries and keys are f32, in tiles of shared memory: a lane owns one or two keys, a warp
// kVectors query vectors; the logits of some whole query tokens with all keys stand in the workspace, and a warp takes a token for its
// softmax. What is left is of the order of n (D + queries) and f64, so that what is kept hangs on the products alone.
#include <bit>
#include <cmath>

#include "kernels/chunks.h"
#include "kernels/philox.h"

namespace kava {

namespace {

constexpr int kRkvThreads = 128, kRkvWarps = kRkvThreads / kWarpSize;
[[maybe_unused]] constexpr int kRkvBlocks = 7;  // per SM at least; without a number ptxas spills for occupancy
constexpr double kNormEps = 1e-8;

constexpr int kDepth = 64;                        // columns of a tile
constexpr int kTileStride = kDepth + kHalfChunk;  // words from a row to the next: lanes with a row each meet no bank twice
constexpr int kVectors = 5;                       // query vectors of a warp
constexpr int kTileKeys = 2 * kWarpSize, kTileQueries = kVectors * kRkvWarps, kTileRows = kTileKeys + kTileQueries;

constexpr int kKeyLanes = kDepth / kChunk;            // that share a key where its columns are summed
constexpr int kKeysAtOnce = kRkvThreads / kKeyLanes;  // keys that a block sums at a time
constexpr int kPartStride = kRkvThreads + kKeyLanes;  // words of a column's parts; the rows of half a warp meet no bank twice
static_assert(kChunk * kPartStride * sizeof(double) <= kTileRows * kTileStride * sizeof(float));
static_assert(kDepth <= kRkvThreads);

/// Query vectors whose logits stand in the workspace at a time: all heads of some tokens.
constexpr int vectors_at_once(int group) { return group < kTileQueries ? kTileQueries / group * group : group; }

template <class T>
struct Rkv {
  RkvOutputs<T> out;
  RkvInputs<T> in;
  RkvDims dims;
  double* workspace;           // [rows, K, trace tokens]
  int64_t plane;               // words of a row of that
  double scale, group_weight;  // 1 / sqrt(D); of a head of the group
  int heads, at_once;          // of a group; vectors_at_once of that
};

/// What a block works on. A row of the workspace has a word for each of the trace's tokens: the first are logits, one row for each query
/// vector, then stand each warp's sums for importance, of which the first becomes it. After these the first rows are redundancy, inverse
/// norms, then ranks' values, squares.
template <class T>
struct Trace {
  const Rkv<T>& p;

  __device__ int begin() const { return p.in.trace_offsets[sample()]; }
  __device__ int n() const { return p.in.trace_offsets[sample() + 1] - begin(); }
  __device__ static int64_t sample() { return blockIdx.x; }
  __device__ static int64_t head() { return blockIdx.y; }
  __device__ int queries() const { return p.in.query_offsets[sample() + 1] - p.in.query_offsets[sample()]; }
  __device__ int dim() const { return p.dims.head_dim; }
  __device__ double* row(int r) const { return p.workspace + r * p.plane + head() * p.dims.trace_tokens + begin(); }
  __device__ double* redundancy() const { return row(0); }
  __device__ double* inverse_norms() const { return row(1); }
  __device__ int64_t* values() const { return reinterpret_cast<int64_t*>(row(1)); }
  __device__ double* squares() const { return row(2); }
  __device__ double* importance() const { return row(p.at_once); }
  __device__ double score(int i) const { return p.dims.lambda * importance()[i] + (1 - p.dims.lambda) * redundancy()[i]; }
  __device__ int64_t step_row(int i) const { return p.in.trace_rows[begin() + i]; }
  __device__ const T* key(int i) const { return p.in.k[step_row(i)] + head() * dim(); }
  /// Vector v of the sample's, the heads of a token side by side.
  __device__ const T* query(int v) const {
    return p.in.q[p.in.query_rows[p.in.query_offsets[sample()] + v / p.heads]] + (head() * p.heads + v % p.heads) * dim();
  }
};

/// x[i] = exp(x[i] - max) / sum over n words, of which lane l holds every 32nd from l on.
__device__ __forceinline__ void warp_softmax(double* x, int n) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  double most = -INFINITY, sum = 0;
#pragma unroll 1
  for (int i = lane; i < n; i += kWarpSize) most = x[i] > most ? x[i] : most;
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(kAllLanes, most, step);
    most = other > most ? other : most;
  }
#pragma unroll 1
  for (int i = lane; i < n; i += kWarpSize) sum += x[i] = exp(x[i] - most);
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  const double inverse = 1 / sum;
#pragma unroll 1
  for (int i = lane; i < n; i += kWarpSize) x[i] *= inverse;
}

/// Columns `first` to first + kDepth of the tiles' rows in shared memory, zero where there is nothing.
template <class T, bool kAligned>
__device__ __forceinline__ void stage(float* tiles, const T* const* rows, int first, int dim) {
  constexpr int kPerRow = kDepth / kHalfChunk, kStep = kRkvThreads / kPerRow;
  const int c = static_cast<int>(threadIdx.x) % kPerRow * kHalfChunk;
#pragma unroll 4
  for (int r = static_cast<int>(threadIdx.x) / kPerRow; r < kTileRows; r += kStep) {
    ColumnsOf<kHalfChunk> x = {};
    if (const T* row = rows[r]; row && first + c < dim) x = load_columns<T, kAligned, kHalfChunk>(row, first + c, dim);
    store_columns<float, true>(tiles + r * kTileStride, c, kDepth, x);
  }
}

/// sums[v][k] += the products of the warp's vectors with the lane's keys, over the columns of a tile.
template <int kKeys>
__device__ __forceinline__ void multiply_tile(float (&sums)[kVectors][2], const float* keys, const float* queries) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
#pragma unroll 1
  for (int c = 0; c < kDepth; c += kHalfChunk) {
    ColumnsOf<kHalfChunk> key[kKeys];
#pragma unroll
    for (int k = 0; k < kKeys; ++k) key[k] = load_columns<float, true, kHalfChunk>(keys + (k * kWarpSize + lane) * kTileStride, c, kDepth);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const auto query = load_columns<float, true, kHalfChunk>(queries + (warp * kVectors + v) * kTileStride, c, kDepth);
#pragma unroll
      for (int k = 0; k < kKeys; ++k)
#pragma unroll
        for (int e = 0; e < kHalfChunk; ++e) sums[v][k] += query.at[e] * key[k].at[e];
    }
  }
}

/// Row v0 + v of the workspace, for v < kTileQueries and below `left`: the logits of the sample's vector `first` + v with kTileKeys keys
/// from k0 on. They are there after a barrier; one lies before the first is written. rows: a word for each row of the tiles.
template <class T, bool kAligned>
__device__ __forceinline__ void logits_of(const Trace<T>& t, int first, int left, int v0, int k0, float* tiles, const T** rows) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
  if (thread < kTileKeys) rows[thread] = k0 + thread < t.n() ? t.key(k0 + thread) : nullptr;
  else if (const int v = thread - kTileKeys; v < kTileQueries) rows[thread] = v < left ? t.query(first + v) : nullptr;
  float sums[kVectors][2] = {};
#pragma unroll 1
  for (int d0 = 0; d0 < t.dim(); d0 += kDepth) {
    __syncthreads();  // the places of the rows are there, and the tiles before have been read
    stage<T, kAligned>(tiles, rows, d0, t.dim());
    __syncthreads();  // the tiles are there
    if (warp * kVectors >= left) continue;
    if (t.n() - k0 > kWarpSize) multiply_tile<2>(sums, tiles, tiles + kTileKeys * kTileStride);
    else multiply_tile<1>(sums, tiles, tiles + kTileKeys * kTileStride);
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int vector = warp * kVectors + v, i = k0 + k * kWarpSize + lane;
      if (vector < left && i < t.n()) t.row(v0 + vector)[i] = t.p.scale * static_cast<double>(sums[v][k]);
    }
}

/// sum[i] += what a query token makes of key i, from the logits of its heads in rows v and on. A warp's, whose lanes keep to their own
/// keys.
template <class T>
__device__ __forceinline__ void add_importance(const Trace<T>& t, int v, double* sum) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const bool by_head = t.p.dims.group != RkvGroup::max_logits, mean = t.p.dims.group == RkvGroup::mean_prob;
  auto pooled = [&](int i) {
    double most = t.row(v)[i];
#pragma unroll 1
    for (int h = 1; h < t.p.heads; ++h) {
      const double x = t.row(v + h)[i];
      if (mean) most += x;
      else most = x > most ? x : most;
    }
    return most;
  };
  if (!by_head) {
#pragma unroll 1
    for (int i = lane; i < t.n(); i += kWarpSize) t.row(v)[i] = pooled(i);
  }
#pragma unroll 1
  for (int h = 0; h < (by_head ? t.p.heads : 1); ++h) warp_softmax(t.row(v + h), t.n());
#pragma unroll 1
  for (int i = lane; i < t.n(); i += kWarpSize) sum[i] += by_head ? pooled(i) : t.row(v)[i];
}

template <class T, bool kAligned>
__device__ void importance_of(const Trace<T>& t, float* tiles, const T** rows) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  auto sum_of = [&](int w) { return t.row(t.p.at_once + w); };
#pragma unroll 1
  for (int i = lane; i < t.n(); i += kWarpSize) sum_of(warp)[i] = 0;
  // By tokens, as many as the workspace holds the logits of; of these by tiles of vectors, and of these by tiles of keys.
  const int across = div_up(t.n(), kTileKeys), down = div_up(t.p.at_once, kTileQueries);
#pragma unroll 1
  for (int tile = 0; tile < div_up(t.queries() * t.p.heads, t.p.at_once) * down * across; ++tile) {
    const int k0 = tile % across * kTileKeys, v0 = tile / across % down * kTileQueries, begin = tile / across / down * t.p.at_once;
    const int left = t.queries() * t.p.heads - begin, count = left < t.p.at_once ? left : t.p.at_once;
    logits_of<T, kAligned>(t, begin + v0, count - v0, v0, k0, tiles, rows);
    if (k0 + kTileKeys < t.n() || v0 + kTileQueries < t.p.at_once) continue;
    __syncthreads();  // all logits are there
#pragma unroll 1
    for (int v = warp * t.p.heads; v < count; v += kRkvWarps * t.p.heads) add_importance(t, v, sum_of(warp));
  }
  __syncthreads();  // all logits have been read, and all sums are there
  const double weight = t.p.group_weight / static_cast<double>(t.queries() > 0 ? t.queries() : 1);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < t.n(); i += kRkvThreads) {
    double all = sum_of(0)[i];
#pragma unroll
    for (int w = 1; w < kRkvWarps; ++w) all += sum_of(w)[i];
    t.importance()[i] = weight * all;
  }
}

/// f over the key's columns, added up over the lanes that share it. f takes a number and its place in `unit`, where the columns of a tile
/// lie as lanes take them: the first ones of their chunks, then the second ones.
template <class T, bool kAligned, class F>
__device__ __forceinline__ double sum_of_key(const Trace<T>& t, int i, const F& f) {
  const T* key = t.key(i);
  const int lane = static_cast<int>(threadIdx.x) % kKeyLanes;
  double sum = 0;
#pragma unroll 1
  for (int d0 = 0; d0 + lane * kChunk < t.dim(); d0 += kDepth) {
    const Columns x = load_columns<T, kAligned>(key, d0 + lane * kChunk, t.dim());
#pragma unroll
    for (int e = 0; e < kChunk; ++e) sum += f(static_cast<double>(x.at[e]), d0 + e * kKeyLanes + lane);
  }
#pragma unroll
  for (int step = kKeyLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return sum;
}

/// unit: words of shared memory for the sum of the unit keys, whole tiles of them. Tokens beyond the last are the last again. Of two keys
/// each has the other's cosine alone, the first one's for both, so that they tie exactly.
template <class T, bool kAligned>
__device__ void redundancy_of(const Trace<T>& t, double* parts, double* unit) {
  const int at = static_cast<int>(threadIdx.x) / kKeyLanes, lane = static_cast<int>(threadIdx.x) % kKeyLanes;
#pragma unroll 1
  for (int i0 = 0; i0 < t.n(); i0 += kKeysAtOnce) {
    const int i = i0 + at < t.n() ? i0 + at : t.n() - 1;
    const double square = sum_of_key<T, kAligned>(t, i, [](double x, int) { return x * x; });
    t.squares()[i] = square, t.inverse_norms()[i] = 1 / (sqrt(square) + kNormEps);
  }
  __syncthreads();  // all norms are there
#pragma unroll 1
  for (int d0 = 0; d0 < t.dim(); d0 += kDepth) {
    const int first = d0 + lane * kChunk;
    double sum[kChunk] = {};
#pragma unroll 1
    for (int i = at; i < t.n() && first < t.dim(); i += kKeysAtOnce) {
      const Columns x = load_columns<T, kAligned>(t.key(i), first, t.dim());
      const double inverse = t.inverse_norms()[i];
#pragma unroll
      for (int e = 0; e < kChunk; ++e) sum[e] += static_cast<double>(x.at[e]) * inverse;
    }
#pragma unroll
    for (int e = 0; e < kChunk; ++e) parts[e * kPartStride + static_cast<int>(threadIdx.x)] = sum[e];
    __syncthreads();  // the parts of these columns are there
    if (threadIdx.x < kDepth) {
      double total = 0;
#pragma unroll 4
      for (int g = 0; g < kKeysAtOnce; ++g) total += parts[at * kPartStride + g * kKeyLanes + lane];
      unit[d0 + static_cast<int>(threadIdx.x)] = total;
    }
    __syncthreads();  // they have been read, and these columns of the sum are there
  }
  const double share = -1 / static_cast<double>(t.n());
#pragma unroll 1
  for (int i0 = 0; i0 < t.n(); i0 += kKeysAtOnce) {
    const int i = i0 + at < t.n() ? i0 + at : t.n() - 1, key = t.n() == 2 ? 0 : i;
    const double dot = sum_of_key<T, kAligned>(t, key, [&](double x, int place) { return x * unit[place]; }),
                 inverse = t.inverse_norms()[key];
    t.redundancy()[i] = share * inverse * (dot - inverse * t.squares()[key]);
  }
  __syncthreads();  // all sums of cosines are there
  if (threadIdx.x < kWarpSize) warp_softmax(t.redundancy(), t.n());
  __syncthreads();  // all redundancies are there
}

/// What tokens are ranked by, the score or a random draw, as a whole number: scores lie between 0 and 1, where numbers are ordered as their
/// bits are. A NaN is less than all.
template <class T>
__device__ __forceinline__ int64_t ranked_by(const Trace<T>& t, int i) {
  const RkvDims& d = t.p.dims;
  if (d.policy == RkvPolicy::random) {
    const uint32_t place = d.layer << 16 | static_cast<uint32_t>(t.head());
    return philox({static_cast<uint32_t>(i), static_cast<uint32_t>(t.p.in.samples[t.sample()]), place, d.step},
                  philox_key(Purpose::eviction, d.seed))[0];
  }
  const double score = t.score(i);
  return score >= 0 ? std::bit_cast<int64_t>(score) : -1;
}

/// The token in each of M slots, -1 in empty ones; before: as many words. A barrier lies before the first value is read, and behind all.
template <class T>
__device__ void fill_slots(const Trace<T>& t, int32_t* slots, int32_t* before) {
  const RkvDims& d = t.p.dims;
  const int M = d.latents, thread = static_cast<int>(threadIdx.x);
  const bool by_score = d.policy == RkvPolicy::scored && d.by_score, direct = d.policy == RkvPolicy::crop || d.policy == RkvPolicy::uniform;
  const bool ranked = by_score || (!direct && t.n() > M);
#pragma unroll 1
  for (int m = thread; m < M; m += kRkvThreads) {
    const bool spread = d.policy == RkvPolicy::uniform && t.n() > M;
    before[m] = m >= t.n() ? -1 : spread ? static_cast<int32_t>(static_cast<int64_t>(m) * t.n() / M) : m;
    slots[m] = before[m];
  }
  __syncthreads();  // all slots are filled without ranks, or empty where there is no token
  if (!ranked) return;
  int32_t* by_rank = by_score ? slots : before;
#pragma unroll 1
  for (int i = thread; i < t.n(); i += kRkvThreads) {
    const int64_t mine = t.values()[i];
    int rank = 0;
#pragma unroll 4
    for (int j = 0; j < t.n(); ++j) rank += t.values()[j] > mine || (t.values()[j] == mine && j < i);
    if (rank < M) by_rank[rank] = i;
  }
  __syncthreads();  // the best M stand by their ranks
  if (by_score) return;
#pragma unroll 1
  for (int m = thread; m < M; m += kRkvThreads) {
    int slot = 0;
#pragma unroll 4
    for (int other = 0; other < M; ++other) slot += before[other] < before[m];
    slots[slot] = before[m];
  }
  __syncthreads();  // they stand by their times
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kRkvThreads, kRkvBlocks) rkv_select_kernel(const __grid_constant__ Rkv<T> p) {
  const Trace<T> t{p};
  float* tiles = dynamic_smem<float>();
  double* unit = reinterpret_cast<double*>(tiles + kTileRows * kTileStride);
  const T** rows = reinterpret_cast<const T**>(unit + div_up(t.dim(), kDepth) * kDepth);
  int32_t* slots = reinterpret_cast<int32_t*>(rows + kTileRows);
  const int M = p.dims.latents;
  importance_of<T, kAligned>(t, tiles, rows);
  redundancy_of<T, kAligned>(t, reinterpret_cast<double*>(tiles), unit);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < t.n(); i += kRkvThreads) {
    const int64_t at = t.begin() + i;
    if (p.out.importance.data) p.out.importance[t.head()][at] = static_cast<float>(t.importance()[i]);
    if (p.out.redundancy.data) p.out.redundancy[t.head()][at] = static_cast<float>(t.redundancy()[i]);
    if (p.out.score.data) p.out.score[t.head()][at] = static_cast<float>(t.score(i));
    t.values()[i] = ranked_by(t, i);
  }
  fill_slots(t, slots, slots + M);
#pragma unroll 1
  for (int m = static_cast<int>(threadIdx.x); m < M; m += kRkvThreads) p.out.kept[t.sample() * M + m][t.head()] = slots[m];
  const int chunks = div_up(t.dim(), kChunk);
  const int64_t col = t.head() * t.dim();
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < M * chunks; i += kRkvThreads) {
    const int m = i / chunks, first = i % chunks * kChunk, token = slots[m];
    const int64_t to = t.sample() * M + m;
    Columns k = {}, v = {};
    if (token >= 0) {
      const int64_t row = t.step_row(token);
      k = load_columns<T, kAligned>(p.in.match_k[p.in.match_by_rows ? row : t.begin() + token] + col, first, t.dim());
      v = load_columns<T, kAligned>(p.in.v[row] + col, first, t.dim());
    }
    store_columns<T, kAligned>(p.out.target_k[to] + col, first, t.dim(), k);
    store_columns<T, kAligned>(p.out.target_v[to] + col, first, t.dim(), v);
  }
}

}  // namespace

int64_t rkv_workspace_words(const RkvDims& dims) {
  return (vectors_at_once(dims.heads / dims.kv_heads) + int64_t{kRkvWarps}) * dims.kv_heads * dims.trace_tokens;
}

template <class T>
void rkv_select(Stream stream, const RkvOutputs<T>& out, double* workspace, const RkvInputs<T>& in, const RkvDims& dims) {
  if (dims.samples == 0 || dims.kv_heads == 0) return;
  const auto words = [](int64_t n, std::size_t bytes) { return static_cast<std::size_t>(n) * bytes; };
  const std::size_t smem = words(kTileRows * kTileStride, sizeof(float)) +
                           words(div_up(dims.head_dim, kDepth) * kDepth + kTileRows, sizeof(double)) +
                           words(2 * int64_t{dims.latents}, sizeof(int32_t));
  const Rkv<T> p{out,
                 in,
                 dims,
                 workspace,
                 int64_t{dims.kv_heads} * dims.trace_tokens,
                 1 / std::sqrt(static_cast<double>(dims.head_dim)),
                 dims.group == RkvGroup::mean_prob ? static_cast<double>(dims.kv_heads) / dims.heads : 1.0,
                 dims.heads / dims.kv_heads,
                 vectors_at_once(dims.heads / dims.kv_heads)};
  const int64_t dim = dims.head_dim;
  const bool aligned = chunked(in.q, dim) && chunked(in.k, dim) && chunked(in.match_k, dim) && chunked(in.v, dim) &&
                       chunked(out.target_k, dim) && chunked(out.target_v, dim);
  dispatch_aligned(aligned, [&]<bool kAligned>() {
    launch(stream, rkv_select_kernel<T, kAligned>, dim3(static_cast<unsigned>(dims.samples), static_cast<unsigned>(dims.kv_heads)),
           kRkvThreads, smem, p);
  });
}
template void rkv_select(Stream, const RkvOutputs<float>&, double*, const RkvInputs<float>&, const RkvDims&);
template void rkv_select(Stream, const RkvOutputs<bf16>&, double*, const RkvInputs<bf16>&, const RkvDims&);

}  // namespace kava
