// Backward of attention over segments. With p = 2^(s - lse), s = scale log2(e) q k^T, and delta = o . do of a row:
//   dp = do v^T,  ds = p (dp - delta),  dq = scale ds k,  dk += scale ds^T q,  dv += p^T do.
//
// bf16: one kernel. A block owns (group of segments, kv head) and takes the group's segments in order, so that nothing is summed by
// atomics. Of a segment it holds a tile of 96 keys and values, all of a short one, and walks the stacked rows that see them, 48 or 32 at a
// time. Each warp owns 16 keys: the products are transposed, so that p^T and ds^T pass from accumulators to operands of dv and dk within
// the warp; of heads above 64 two warps share 16 keys, each of which computes s and dp for one half of the rows and sums one half of the
// columns. ds is passed in shared memory to the warps that multiply it by the keys for dq, where each owns some columns of sixteen rows;
// where a segment has more tiles of keys, the block keeps dq in f32 in between. Sixteen keys and sixteen rows of which no row sees a key
// are left out. delta of the next rows is made while these are computed. f32: three kernels. delta; dq, a warp for a row; dk and dv, a
// block for (group of segments, kv head), a warp for a key.
#include "kernels/attention.h"

namespace kava {

namespace {

constexpr int kBackwardKeys = 96;  // keys of a tile, 16 to a warp

/// Forward tensors, the gradient of the output, and in f32 delta.
template <class T>
struct Saved {
  Rows<const T> dout, o, q, k, v;
  Rows<const float> lse, delta;
};

// ---- bf16

/// What a block is made of: tiles of keys and of stacked rows, and how its warps share them.
template <int kDim>
struct Form {
  static constexpr int kColumns = kDim < 64 ? kDim : 64;  // of dk and dv, that a warp sums: more would not fit in registers
  static constexpr int kParts = kDim / kColumns;          // so many warps share 16 keys
  static constexpr int kRows = kParts == 1 ? 48 : 32;     // stacked rows of a step
  static constexpr int kThreads = kBackwardKeys / 16 * kParts * kWarpSize;
  static constexpr int kLoaders = kDim == 16 ? 96 : kParts == 1 ? 192 : 256;  // threads that load rows, each as many chunks of them
  static constexpr int kQueryColumns = kDim < 64 ? 16 : 32;                   // of dq, that a warp sums for 16 rows
  using KTile = Tile<kBackwardKeys, kDim>;
  using QTile = Tile<kRows, kDim>;
  using PTile = Tile<kBackwardKeys, kParts == 1 ? 64 : 32>;  // p or ds [keys, rows]
  struct RowStats {
    float lse2[kRows], delta[kRows];
  };
  static constexpr int kStats = 2 * KTile::kBytes + 4 * QTile::kBytes + kParts * PTile::kBytes, kBytes = kStats + 2 * sizeof(RowStats);
};

/// lse and delta of the rows of a step, on their way while dq of the one before is computed.
template <int kDim, bool kAligned>
struct StatsOnTheWay {
  static constexpr int kChunks = kDim / 8, kTrips = Form<kDim>::kRows * kChunks / Form<kDim>::kLoaders,
                       kRowStep = Form<kDim>::kLoaders / kChunks;
  int first = static_cast<int>(threadIdx.x) / kChunks, chunk = static_cast<int>(threadIdx.x) % kChunks;
  Bytes16 o[kTrips];
  float lse;  // of row threadIdx.x of the step

  __device__ __forceinline__ void load(const Saved<bf16>& saved, const HeadSegment& seg, int first_row, int D) {
#pragma unroll
    for (int j = 0; j < kTrips; ++j) {
      const bf16* row = seg.query(saved.o, first_row + first + j * kRowStep, D);
      const int column = chunk * 8;
      if constexpr (kAligned) o[j] = row && column < D ? load_16(row + column) : Bytes16{};
      else o[j] = chunk_of(row + (row ? column : 0), row ? D - column : 0);
    }
    const int own = static_cast<int>(threadIdx.x), row = first_row + own;
    lse = own < Form<kDim>::kRows && row < seg.stacked_rows() ? saved.lse[seg.query_row(row)][seg.head(row)] : 0.f;
  }

  /// dout: the step's rows in shared memory, of which load_tile gave this thread the same chunks.
  __device__ __forceinline__ void store(typename Form<kDim>::RowStats& stats, typename Form<kDim>::QTile dout) const {
#pragma unroll
    for (int j = 0; j < kTrips; ++j) {
      const int r = first + j * kRowStep;
      const Bytes16 other = load_16(smem_words(dout.chunk(r, chunk)));
      float delta = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        delta += low_float(o[j].word[i]) * low_float(other.word[i]);
        delta += high_float(o[j].word[i]) * high_float(other.word[i]);
      }
      for (int lanes = 1; lanes < kChunks; lanes *= 2) delta += __shfl_xor_sync(kAllLanes, delta, lanes);
      if (chunk == 0) stats.delta[r] = delta;
    }
    if (static_cast<int>(threadIdx.x) < Form<kDim>::kRows) stats.lse2[threadIdx.x] = lse * kLog2E;
  }

 private:
  static __device__ __forceinline__ float low_float(uint32_t pair) { return __uint_as_float(pair << 16); }
  static __device__ __forceinline__ float high_float(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
};

/// The sums of dk and dv over stacked rows, for a warp's 16 keys and columns from first_col on.
template <int kDim>
struct KeyGradient {
  using F = Form<kDim>;
  static constexpr int kKeyWarps = kBackwardKeys / 16;
  int warp_key = static_cast<int>(threadIdx.x) / kWarpSize % kKeyWarps * 16,
      part = F::kParts == 1 ? 0 : static_cast<int>(threadIdx.x) / kWarpSize / kKeyWarps, first_col = part * F::kColumns;
  float dk[F::kColumns / 8][4] = {}, dv[F::kColumns / 8][4] = {};

  /// Leaves in tiles [keys, rows] what others need of p and ds of the tile of keys from first_key on and of the rows from first_row on.
  __device__ __forceinline__ void scores(const HeadSegment& seg, typename F::KTile k, typename F::KTile v, typename F::QTile q,
                                         typename F::QTile dout, const typename F::RowStats& stats, typename F::PTile p_tile,
                                         typename F::PTile ds_tile, int first_key, int first_row, float scale2) {
    uint32_t p[4], ds[4];
#pragma unroll
    for (int i = 0; i < F::kRows / 16 / F::kParts; ++i) {
      const int n = i * F::kParts + part;
      if (!sees(seg, first_key, first_row, n)) continue;
      scores(p, ds, seg, k, v, q, dout, stats, first_key, first_row, n, scale2);
      put(ds_tile, ds, n);
      if constexpr (F::kParts > 1) put(p_tile, p, n);
      else sum(p, ds, q, dout, n);
    }
  }

  /// What is left of the sums where warps share keys.
  __device__ __forceinline__ void sum_shared(const HeadSegment& seg, typename F::QTile q, typename F::QTile dout, typename F::PTile p_tile,
                                             typename F::PTile ds_tile, int first_key, int first_row) {
#pragma unroll
    for (int n = 0; n < F::kRows / 16; ++n) {
      if (!sees(seg, first_key, first_row, n)) continue;
      uint32_t p[4], ds[4];
      load_a<false>(p, p_tile, warp_key, n * 16);
      load_a<false>(ds, ds_tile, warp_key, n * 16);
      sum(p, ds, q, dout, n);
    }
  }

  template <bool kAligned>
  __device__ __forceinline__ void store(const HeadSegment& seg, Rows<float> dk_rows, Rows<float> dv_rows, int first_key, int D,
                                        float scale) const {
    const AccumulatorPlace place;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int key = first_key + warp_key + place.row(2 * h);
      float *to_k = seg.key(dk_rows, key, D), *to_v = seg.key(dv_rows, key, D);
      if (!to_k) continue;
#pragma unroll
      for (int d = 0; d < F::kColumns / 8; ++d) {
        const int col = first_col + d * 8 + place.col(0);
        store_pair<true>(to_k + col, kAligned, D - col, dk[d][2 * h] * scale, dk[d][2 * h + 1] * scale);
        store_pair<true>(to_v + col, kAligned, D - col, dv[d][2 * h], dv[d][2 * h + 1]);
      }
    }
  }

 private:
  __device__ bool sees(const HeadSegment& seg, int first_key, int first_row, int n) const {
    return seg.most_seen(first_row + n * 16) > first_key + warp_key;
  }

  /// p and ds of the warp's keys and of sixteen stacked rows.
  __device__ __forceinline__ void scores(uint32_t (&p)[4], uint32_t (&ds)[4], const HeadSegment& seg, typename F::KTile k,
                                         typename F::KTile v, typename F::QTile q, typename F::QTile dout,
                                         const typename F::RowStats& stats, int first_key, int first_row, int n, float scale2) const {
    const AccumulatorPlace place;
    float s[2][4] = {}, dp[2][4] = {};  // [keys, stacked rows]
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      uint32_t a[4], b[2][2];
      load_a<false>(a, k, warp_key, d);
      load_b<false>(b, q, n * 16, d);
      for (int half = 0; half < 2; ++half) mma_m16n8k16_bf16(s[half], a, b[half]);
      load_a<false>(a, v, warp_key, d);
      load_b<false>(b, dout, n * 16, d);
      for (int half = 0; half < 2; ++half) mma_m16n8k16_bf16(dp[half], a, b[half]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < 4; ++i) {
        // Rows beyond the segment are zero in q, dout and delta: they add nothing.
        const int in_tile = n * 16 + half * 8 + place.col(i);
        const bool sees = first_key + warp_key + place.row(i) < seg.seen(first_row + in_tile);
        s[half][i] = sees ? fast_exp2(s[half][i] * scale2 - stats.lse2[in_tile]) : 0.f;
        dp[half][i] = s[half][i] * (dp[half][i] - stats.delta[in_tile]);
      }
    accumulators_to_a(p, s[0], s[1]);
    accumulators_to_a(ds, dp[0], dp[1]);
  }

  /// Puts an operand of the warp's keys and of sixteen rows in its place.
  __device__ __forceinline__ void put(typename F::PTile tile, const uint32_t (&a)[4], int n) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
    for (int i = 0; i < 4; ++i) smem_words(tile.at(warp_key + lane / 4 + i % 2 * 8, n * 16 + i / 2 * 8))[lane % 4] = a[i];
  }

  __device__ __forceinline__ void sum(const uint32_t (&p)[4], const uint32_t (&ds)[4], typename F::QTile q, typename F::QTile dout, int n) {
#pragma unroll
    for (int d = 0; d < F::kColumns / 16; ++d) {
      uint32_t b[2][2];
      load_b<true>(b, dout, first_col + d * 16, n * 16);
      for (int half = 0; half < 2; ++half) mma_m16n8k16_bf16(dv[2 * d + half], p, b[half]);
      load_b<true>(b, q, first_col + d * 16, n * 16);
      for (int half = 0; half < 2; ++half) mma_m16n8k16_bf16(dk[2 * d + half], ds, b[half]);
    }
  }
};

/// The sums of dq over the tiles of keys, in f32 until a row's last tile.
struct QuerySums {
  float* data;  // null where every segment has one tile
  int heads, width;
  __device__ float* row(const HeadSegment& seg, int r) const { return data + (int64_t{seg.query_row(r)} * heads + seg.head(r)) * width; }
};

/// dq of a step's rows from a tile of keys: a warp sums some columns of sixteen rows.
template <int kDim, bool kAligned>
__device__ __forceinline__ void add_query_gradient(Rows<bf16> dq, QuerySums sums, const HeadSegment& seg, typename Form<kDim>::KTile k,
                                                   typename Form<kDim>::PTile ds_tile, int first_key, int first_row, int D, float scale) {
  constexpr int kRowWarps = Form<kDim>::kRows / 16, kColumns = Form<kDim>::kQueryColumns;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, n = warp % kRowWarps, first_col = warp / kRowWarps * kColumns;
  const int most = seg.most_seen(first_row + n * 16), visible = most - first_key;
  if (first_col >= kDim || visible <= 0) return;
  float acc[kColumns / 8][4] = {};
#pragma unroll
  for (int key = 0; key < kBackwardKeys; key += 16) {
    if (key >= visible) break;
    uint32_t a[4], b[2][2];
    load_a<true>(a, ds_tile, n * 16, key);
#pragma unroll
    for (int d = 0; d < kColumns / 16; ++d) {
      load_b<true>(b, k, first_col + d * 16, key);
      for (int half = 0; half < 2; ++half) mma_m16n8k16_bf16(acc[2 * d + half], a, b[half]);
    }
  }
  const AccumulatorPlace place;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = first_row + n * 16 + place.row(2 * h);
    // The thread that left a row's sums finds them again.
    if (first_key > 0 && row < seg.stacked_rows()) {
      const float* sum = sums.row(seg, row);
#pragma unroll
      for (int d = 0; d < kColumns / 8; ++d) {
        const int col = first_col + d * 8 + place.col(0);
        if (col >= sums.width) break;
        const Bytes8 old = load_8(sum + col);
        acc[d][2 * h] += __uint_as_float(old.word[0]), acc[d][2 * h + 1] += __uint_as_float(old.word[1]);
      }
    }
    if (visible > kBackwardKeys) {
      if (row >= seg.stacked_rows()) continue;
      float* sum = sums.row(seg, row);
#pragma unroll
      for (int d = 0; d < kColumns / 8; ++d) {
        const int col = first_col + d * 8 + place.col(0);
        store_pair<false>(sum + col, true, sums.width - col, acc[d][2 * h], acc[d][2 * h + 1]);
      }
      continue;
    }
    bf16* out = seg.query(dq, row, D);
    store_sums<kAligned>(out ? out + first_col : nullptr, acc, h, D - first_col < kColumns ? D - first_col : kColumns,
                         [&](float x) { return x * scale; });
  }
}

template <int kDim, bool kAligned>
__global__ void __launch_bounds__(Form<kDim>::kThreads, kAligned ? kAttentionBlocks / Form<kDim>::kParts : 1)
    attention_bwd_bf16_kernel(Rows<bf16> dq, Rows<float> dk, Rows<float> dv, QuerySums sums, Saved<bf16> saved, SegmentLists segments,
                              AttentionDims dims) {
  using F = Form<kDim>;
  unsigned char* bytes = dynamic_smem<unsigned char>();
  const typename F::KTile k_smem{smem_addr(bytes)}, v_smem{k_smem.base + k_smem.kBytes};
  auto q_smem = [&](int tile) { return typename F::QTile{v_smem.base + v_smem.kBytes + tile % 2 * 2 * F::QTile::kBytes}; };
  auto dout_smem = [&](int tile) { return typename F::QTile{q_smem(tile).base + F::QTile::kBytes}; };
  const typename F::PTile ds_smem{q_smem(0).base + 4 * F::QTile::kBytes}, p_smem{ds_smem.base + (F::kParts - 1) * ds_smem.kBytes};
  auto* stats = reinterpret_cast<typename F::RowStats*>(bytes + F::kStats);
  const int D = dims.head_dim;
  const bool loads = static_cast<int>(threadIdx.x) < F::kLoaders;

  const int group = static_cast<int>(blockIdx.x);
  for (int s = segments.group_offsets[group]; s < segments.group_offsets[group + 1]; ++s) {
    const HeadSegment seg(segments, dims, s, static_cast<int>(blockIdx.y));
    StatsOnTheWay<kDim, kAligned> on_the_way;
    auto load_rows = [&](int tile) {
      const int first = tile * F::kRows;
      if (!loads) return;
      load_tile<F::kLoaders, kAligned>(q_smem(tile), D, saved.q.data, [&](int i) { return seg.query(saved.q, first + i, D); });
      load_tile<F::kLoaders, kAligned>(dout_smem(tile), D, saved.dout.data, [&](int i) { return seg.query(saved.dout, first + i, D); });
    };
    auto load_stats = [&](int tile) {
      if (loads) on_the_way.load(saved, seg, tile * F::kRows, D);
    };
    auto finish_rows = [&](int tile) {
      cp_async_wait<0>();
      if (loads) on_the_way.store(stats[tile % 2], dout_smem(tile));
    };
    const int row_tiles = div_up(seg.stacked_rows(), F::kRows);
    for (int first_key = 0; row_tiles > 0 && first_key < seg.key_count; first_key += kBackwardKeys) {
      load_tile<F::kThreads, kAligned>(k_smem, D, saved.k.data, [&](int r) { return seg.key(saved.k, first_key + r, D); });
      load_tile<F::kThreads, kAligned>(v_smem, D, saved.v.data, [&](int r) { return seg.key(saved.v, first_key + r, D); });
      // Rows before the first query that sees the tile's first key have nothing to add.
      const int first_query = first_key - (seg.key_count - seg.queries);
      const int first_tile = first_query > 0 ? first_query * seg.group / F::kRows : 0;
      load_rows(first_tile);
      cp_async_commit();
      load_stats(first_tile);
      finish_rows(first_tile);
      KeyGradient<kDim> gradient;
      for (int tile = first_tile; tile < row_tiles; ++tile) {
        __syncthreads();  // the step is complete for all threads, which have read all of the one before
        if (tile + 1 < row_tiles) load_rows(tile + 1);
        cp_async_commit();
        const int first_row = tile * F::kRows;
        gradient.scores(seg, k_smem, v_smem, q_smem(tile), dout_smem(tile), stats[tile % 2], p_smem, ds_smem, first_key, first_row,
                        dims.scale * kLog2E);
        if (tile + 1 < row_tiles) load_stats(tile + 1);
        __syncthreads();  // ds of all warps is there
        if constexpr (F::kParts > 1) gradient.sum_shared(seg, q_smem(tile), dout_smem(tile), p_smem, ds_smem, first_key, first_row);
        add_query_gradient<kDim, kAligned>(dq, sums, seg, k_smem, ds_smem, first_key, first_row, D, dims.scale);
        if (tile + 1 < row_tiles) finish_rows(tile + 1);
      }
      __syncthreads();  // keys and rows are read before they are overwritten
      // Another thread may own the same element in a later segment: a barrier of its loop lies between.
      gradient.template store<kAligned>(seg, dk, dv, first_key, D, dims.scale);
    }
  }
}

// ---- f32: a warp owns one stacked row (dq) or one key of a segment (dk, dv) at a time

// exp(s - lse) alone adds up to 1 only to within the rounding of lse, so p is divided by its sum, whose inverse lies behind the deltas.
// Where one key takes nearly all weight, dp - delta cancels: to rounding where delta is summed from the same p and dp, which o . do is not.
__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocks)
    attention_bwd_delta_f32_kernel(Rows<float> delta, Saved<float> saved, SegmentLists segments, AttentionDims dims) {
  const QueryBlock block(segments);
  const HeadSegment seg(segments, dims, block.segment, static_cast<int>(blockIdx.y));
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize, D = dims.head_dim;
  const int r = block.tile * kAttentionWarps + warp;
  if (r >= seg.stacked_rows()) return;
  const float *q = seg.query(saved.q, r, D), *dout = seg.query(saved.dout, r, D);
  const float lse = saved.lse[seg.query_row(r)][seg.head(r)];
  float weights = 0, weighted = 0;
  for (int key = lane; key < seg.seen(r); key += kWarpSize) {
    const float p = expf(dot(q, seg.key(saved.k, key, D), D) * dims.scale - lse);
    weights += p;
    weighted += p * dot(dout, seg.key(saved.v, key, D), D);
  }
  weights = warp_sum(weights), weighted = warp_sum(weighted);
  if (lane > 0) return;
  float* to = delta[seg.query_row(r)] + seg.head(r);
  to[0] = weighted / weights, to[dims.heads] = 1 / weights;
}

__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocks)
    attention_bwd_q_f32_kernel(Rows<float> dq, Saved<float> saved, SegmentLists segments, AttentionDims dims) {
  const QueryBlock block(segments);
  const HeadSegment seg(segments, dims, block.segment, static_cast<int>(blockIdx.y));
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize, D = dims.head_dim;
  const int r = block.tile * kAttentionWarps + warp;
  if (r >= seg.stacked_rows()) return;
  const float *q = seg.query(saved.q, r, D), *dout = seg.query(saved.dout, r, D);
  const float lse = saved.lse[seg.query_row(r)][seg.head(r)];
  const float *saved_delta = saved.delta[seg.query_row(r)] + seg.head(r), delta = saved_delta[0], inverse = saved_delta[dims.heads];
  const int seen = seg.seen(r);
  float acc[kMostColumns] = {};
  for (int first_key = 0; first_key < seen; first_key += kWarpSize) {
    const int key = first_key + lane < seen ? first_key + lane : seen - 1;
    const float p = expf(dot(q, seg.key(saved.k, key, D), D) * dims.scale - lse) * inverse;
    const float ds = p * (dot(dout, seg.key(saved.v, key, D), D) - delta);
    const int keys = seen - first_key < kWarpSize ? seen - first_key : kWarpSize;
    for (int j = 0; j < keys; ++j) add_row(acc, __shfl_sync(kAllLanes, ds, j), seg.key(saved.k, first_key + j, D), lane, D);
  }
  float* out = seg.query(dq, r, D);
#pragma unroll
  for (int c = 0; c < kMostColumns; ++c)
    if (lane + c * kWarpSize < D) out[lane + c * kWarpSize] = acc[c] * dims.scale;
}

__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocks)
    attention_bwd_kv_f32_kernel(Rows<float> dk, Rows<float> dv, Saved<float> saved, SegmentLists segments, AttentionDims dims) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize, D = dims.head_dim;
  const int group = static_cast<int>(blockIdx.x);
  for (int s = segments.group_offsets[group]; s < segments.group_offsets[group + 1]; ++s) {
    const HeadSegment seg(segments, dims, s, static_cast<int>(blockIdx.y));
    const int rows = seg.stacked_rows();
    for (int key = warp; key < seg.key_count && rows > 0; key += kAttentionWarps) {
      const float *k = seg.key(saved.k, key, D), *v = seg.key(saved.v, key, D);
      float k_acc[kMostColumns] = {}, v_acc[kMostColumns] = {};
      for (int first_row = 0; first_row < rows; first_row += kWarpSize) {
        const int r = first_row + lane < rows ? first_row + lane : rows - 1;
        const float *q = seg.query(saved.q, r, D), *dout = seg.query(saved.dout, r, D);
        const float lse = saved.lse[seg.query_row(r)][seg.head(r)];
        const float *saved_delta = saved.delta[seg.query_row(r)] + seg.head(r), delta = saved_delta[0], inverse = saved_delta[dims.heads];
        const float p = key < seg.seen(r) ? expf(dot(q, k, D) * dims.scale - lse) * inverse : 0.f;
        const float ds = p * (dot(dout, v, D) - delta);
        const int count = rows - first_row < kWarpSize ? rows - first_row : kWarpSize;
        for (int i = 0; i < count; ++i) {
          add_row(v_acc, __shfl_sync(kAllLanes, p, i), seg.query(saved.dout, first_row + i, D), lane, D);
          add_row(k_acc, __shfl_sync(kAllLanes, ds, i), seg.query(saved.q, first_row + i, D), lane, D);
        }
      }
      float *to_k = seg.key(dk, key, D), *to_v = seg.key(dv, key, D);
#pragma unroll
      for (int c = 0; c < kMostColumns; ++c) {
        const int col = lane + c * kWarpSize;
        if (col >= D) continue;
        to_k[col] += k_acc[c] * dims.scale;
        to_v[col] += v_acc[c];
      }
    }
    __syncthreads();  // another warp may own the same key row in the next segment
  }
}

/// Floats of a row of the sums of dq, in whole sectors.
int query_sums_width(const AttentionDims& dims) { return div_up(dims.head_dim, 8) * 8; }

dim3 group_grid(const SegmentLists& s, const AttentionDims& dims) {
  return dim3(static_cast<unsigned>(s.groups), static_cast<unsigned>(dims.kv_heads));
}

}  // namespace

template <>
int64_t attention_bwd_workspace<bf16>(int64_t rows, const SegmentLists& segments, const AttentionDims& dims) {
  return segments.most_keys > kBackwardKeys ? rows * dims.heads * query_sums_width(dims) : 0;
}

template <>
int64_t attention_bwd_workspace<float>(int64_t rows, const SegmentLists&, const AttentionDims& dims) {
  return rows * 2 * dims.heads;
}

template <>
void attention_bwd(Stream stream, Rows<bf16> dq, Rows<float> dk, Rows<float> dv, float* workspace, Rows<const bf16> dout,
                   Rows<const bf16> o, Rows<const float> lse, Rows<const bf16> q, Rows<const bf16> k, Rows<const bf16> v,
                   const SegmentLists& segments, const AttentionDims& dims) {
  if (!check_attention(segments, dims)) return;
  const Saved<bf16> saved{dout, o, q, k, v, lse, {}};
  const QuerySums sums{workspace, dims.heads, query_sums_width(dims)};
  const int D = dims.head_dim;
  const bool aligned = chunks_aligned(q, D) && chunks_aligned(k, D) && chunks_aligned(v, D) && chunks_aligned(o, D) &&
                       chunks_aligned(dout, D) && chunks_aligned(dq, D) && chunks_aligned(dk, D) && chunks_aligned(dv, D);
  dispatch_tiles(D, aligned, [&]<int kDim, bool kAligned>() {
    launch(stream, attention_bwd_bf16_kernel<kDim, kAligned>, group_grid(segments, dims), Form<kDim>::kThreads, Form<kDim>::kBytes, dq, dk,
           dv, sums, saved, segments, dims);
  });
}

template <>
void attention_bwd(Stream stream, Rows<float> dq, Rows<float> dk, Rows<float> dv, float* workspace, Rows<const float> dout,
                   Rows<const float> o, Rows<const float> lse, Rows<const float> q, Rows<const float> k, Rows<const float> v,
                   const SegmentLists& segments, const AttentionDims& dims) {
  if (!check_attention(segments, dims)) return;
  const Rows<float> delta{workspace, 2 * dims.heads};
  const Saved<float> saved{dout, o, q, k, v, lse, delta};
  launch(stream, attention_bwd_delta_f32_kernel, query_grid(segments, dims, kAttentionWarps), kAttentionThreads, 0, delta, saved, segments,
         dims);
  launch(stream, attention_bwd_q_f32_kernel, query_grid(segments, dims, kAttentionWarps), kAttentionThreads, 0, dq, saved, segments, dims);
  launch(stream, attention_bwd_kv_f32_kernel, group_grid(segments, dims), kAttentionThreads, 0, dk, dv, saved, segments, dims);
}

}  // namespace kava
