// Backward of attention over segments. With p = 2^(s - lse), s = scale log2(e) q k^T, and delta = o . do of a row:
//   dp = do v^T,  ds = p (dp - delta),  dq = scale ds k,  dk += scale ds^T q,  dv += p^T do.
//
// Three kernels. delta: a warp owns one row and head. The others each compute s and dp anew, so that nothing is summed by atomics. dq: as
// in the forward, a block owns 64 stacked rows of (segment, kv head) and walks the keys. dk, dv: a block owns (group of segments, kv head)
// and takes the group's segments in order, in each of them tiles of 64 keys, 16 to a warp, and walks the stacked rows that see them. There
// the products are transposed, so that p^T and ds^T pass from accumulators to operands within a warp; of heads above 64 two warps share 16
// keys, each of which computes s and dp for one half of the rows and sums one half of the columns. Sixteen keys and sixteen rows of which
// no row sees a key are left out.
#include "kernels/attention.h"

namespace kava {

namespace {

/// Forward tensors, the gradient of the output, and delta.
template <class T>
struct Saved {
  Rows<const T> dout, o, q, k, v;
  Rows<const float> lse, delta;
};

__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocks)
    attention_bwd_delta_bf16_kernel(Rows<float> delta, Rows<const bf16> dout, Rows<const bf16> o, SegmentLists segments,
                                    AttentionDims dims) {
  const QueryBlock block(segments);
  const HeadSegment seg(segments, dims, block.segment, static_cast<int>(blockIdx.y));
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize, D = dims.head_dim;
  const int r = block.tile * kAttentionWarps + warp;
  if (r >= seg.stacked_rows()) return;
  const bf16 *o_row = seg.query(o, r, D), *dout_row = seg.query(dout, r, D);
  float sum = 0;
  for (int c = lane; c < D; c += kWarpSize) sum += to_float(o_row[c]) * to_float(dout_row[c]);
  sum = warp_sum(sum);
  if (lane == 0) delta[seg.query_row(r)][seg.head(r)] = sum;
}

// ---- dq, bf16

/// dq of a warp's 16 rows.
template <int kDim>
struct QueryGradient {
  float acc[kDim / 8][4] = {}, lse2[2], delta[2];

  __device__ QueryGradient(const Saved<bf16>& saved, const HeadSegment& seg, const ThreadRows& rows) {
    for (int h = 0; h < 2; ++h) {
      const int row = rows.row[h];
      lse2[h] = rows.valid(h) ? saved.lse[seg.query_row(row)][seg.head(row)] * kLog2E : 0.f;
      delta[h] = rows.valid(h) ? saved.delta[seg.query_row(row)][seg.head(row)] : 0.f;
    }
  }

  /// Adds a tile of keys, sixteen at a time, so that their s and dp fit in registers beside dq.
  __device__ __forceinline__ void add(Tile<kQueryTile, kDim> q, Tile<kQueryTile, kDim> dout, Tile<kKeyTile, kDim> k, Tile<kKeyTile, kDim> v,
                                      const ThreadRows& rows, int warp_row, int first_key, float scale2) {
    const AccumulatorPlace place;
#pragma unroll
    for (int n = 0; n < kKeyTile / 16; ++n) {
      if (first_key + n * 16 >= rows.most) break;
      float s[2][4] = {}, dp[2][4] = {};
#pragma unroll
      for (int d = 0; d < kDim; d += 16) {
        uint32_t a[4], b[2][2];
        load_a<false>(a, q, warp_row, d);
        load_b<false>(b, k, n * 16, d);
        for (int half = 0; half < 2; ++half) mma_m16n8k16_bf16(s[half], a, b[half]);
        load_a<false>(a, dout, warp_row, d);
        load_b<false>(b, v, n * 16, d);
        for (int half = 0; half < 2; ++half) mma_m16n8k16_bf16(dp[half], a, b[half]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
        for (int i = 0; i < 4; ++i) {
          const int h = i / 2, key = first_key + n * 16 + half * 8 + place.col(i);
          s[half][i] = key < rows.seen[h] ? fast_exp2(s[half][i] * scale2 - lse2[h]) * (dp[half][i] - delta[h]) : 0.f;
        }
      uint32_t ds[4];
      accumulators_to_a(ds, s[0], s[1]);
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
        uint32_t b[2][2];
        load_b<true>(b, k, d * 16, n * 16);
        for (int half = 0; half < 2; ++half) mma_m16n8k16_bf16(acc[2 * d + half], ds, b[half]);
      }
    }
  }

  template <bool kAligned>
  __device__ __forceinline__ void store(Rows<bf16> dq, const HeadSegment& seg, const ThreadRows& rows, int D, float scale) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) store_sums<kAligned>(seg.query(dq, rows.row[h], D), acc, h, D, [&](float x) { return x * scale; });
  }
};

template <int kDim>
constexpr int kQuerySmem = 2 * Tile<kQueryTile, kDim>::kBytes + KeyStages<kDim, true>::kBytes;

template <int kDim, bool kAligned>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocks)
    attention_bwd_q_bf16_kernel(Rows<bf16> dq, Saved<bf16> saved, SegmentLists segments, AttentionDims dims) {
  const QueryBlock block(segments);
  const HeadSegment seg(segments, dims, block.segment, static_cast<int>(blockIdx.y));
  const int first_row = block.tile * kQueryTile, D = dims.head_dim;
  if (first_row >= seg.stacked_rows()) return;

  const Tile<kQueryTile, kDim> q_smem{smem_addr(dynamic_smem<unsigned char>())}, dout_smem{q_smem.base + q_smem.kBytes};
  const KeyStages<kDim, kAligned> keys{dout_smem.base + dout_smem.kBytes};
  load_tile<kAttentionThreads, kAligned>(q_smem, D, saved.q.data, [&](int r) { return seg.query(saved.q, first_row + r, D); });
  load_tile<kAttentionThreads, kAligned>(dout_smem, D, saved.dout.data, [&](int r) { return seg.query(saved.dout, first_row + r, D); });
  keys.load(0, seg, saved.k, saved.v, D);
  cp_async_commit();

  const int warp_row = static_cast<int>(threadIdx.x) / kWarpSize * 16;
  const ThreadRows rows(seg, first_row + warp_row);
  const int key_tiles = seg.key_tiles(first_row);
  QueryGradient<kDim> gradient(saved, seg, rows);
  for (int tile = 0; tile < key_tiles; ++tile) {
    if (tile + 1 < key_tiles) keys.load(tile + 1, seg, saved.k, saved.v, D);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();  // the tile is complete for all threads
    gradient.add(q_smem, dout_smem, keys.k(tile), keys.v(tile), rows, warp_row, tile * kKeyTile, dims.scale * kLog2E);
    __syncthreads();  // the stage is read before the next but one load overwrites it
  }
  gradient.template store<kAligned>(dq, seg, rows, D, dims.scale);
}

// ---- dk and dv, bf16

constexpr int kRowTile = 32;  // stacked rows of a step

/// Columns of dk and dv that a warp sums: more would not fit in registers. So many warps share 16 keys.
template <int kDim>
constexpr int kColumns = kDim < 64 ? kDim : 64;
template <int kDim>
constexpr int kParts = kDim / kColumns<kDim>;

template <int kDim>
struct KeySmem {
  using KTile = Tile<kKeyTile, kDim>;
  using QTile = Tile<kRowTile, kDim>;
  struct RowStats {
    float lse2[kRowTile], delta[kRowTile];
  };
  /// p and ds as operands, which warps of the same keys pass to each other: of 16 rows of a step and 16 keys.
  struct Passed {
    Bytes16 p[kWarpSize], ds[kWarpSize];
  };
  static constexpr int kStats = 2 * KTile::kBytes + 4 * QTile::kBytes, kPassed = kStats + 2 * sizeof(RowStats),
                       kBytes = kPassed + (kParts<kDim> > 1 ? kAttentionWarps * kRowTile / 16 * sizeof(Passed) : 0);
};

/// The sums of dk and dv over stacked rows, for a warp's 16 keys and columns from first_col on.
template <int kDim>
struct KeyGradient {
  using Smem = KeySmem<kDim>;
  int warp_key = static_cast<int>(threadIdx.x) / kWarpSize % kAttentionWarps * 16, part = static_cast<int>(threadIdx.x) / kAttentionThreads,
      first_col = kParts<kDim> == 1 ? 0 : part * kColumns<kDim>;
  float dk[kColumns<kDim> / 8][4] = {}, dv[kColumns<kDim> / 8][4] = {};

  /// A step: stacked rows from first_row on, on the tile of keys from first_key on.
  __device__ __forceinline__ void add(const HeadSegment& seg, typename Smem::KTile k, typename Smem::KTile v, typename Smem::QTile q,
                                      typename Smem::QTile dout, const typename Smem::RowStats& stats, typename Smem::Passed* passed,
                                      int first_key, int first_row, float scale2) {
    auto sees = [&](int n) { return seg.most_seen(first_row + n * 16) > first_key + warp_key; };
    uint32_t p[4], ds[4];
    if constexpr (kParts<kDim> == 1) {
#pragma unroll
      for (int n = 0; n < kRowTile / 16; ++n) {
        if (!sees(n)) continue;
        scores(p, ds, seg, k, v, q, dout, stats, first_key, first_row, n, scale2);
        sum(p, ds, q, dout, n);
      }
    } else {
      static_assert(kParts<kDim> == kRowTile / 16);
      passed += warp_key / 16 * kParts<kDim>;
      const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
      if (sees(part)) {
        scores(p, ds, seg, k, v, q, dout, stats, first_key, first_row, part, scale2);
        store_16(&passed[part].p[lane], Bytes16{p[0], p[1], p[2], p[3]});
        store_16(&passed[part].ds[lane], Bytes16{ds[0], ds[1], ds[2], ds[3]});
      }
      __syncthreads();  // what the other warp of these keys passes is there
#pragma unroll
      for (int n = 0; n < kParts<kDim>; ++n) {
        if (!sees(n)) continue;
        const Bytes16 p_words = load_16(&passed[n].p[lane]), ds_words = load_16(&passed[n].ds[lane]);
#pragma unroll
        for (int i = 0; i < 4; ++i) p[i] = p_words.word[i], ds[i] = ds_words.word[i];
        sum(p, ds, q, dout, n);
      }
    }
  }

  /// p and ds of the warp's keys and of sixteen stacked rows.
  __device__ __forceinline__ void scores(uint32_t (&p)[4], uint32_t (&ds)[4], const HeadSegment& seg, typename Smem::KTile k,
                                         typename Smem::KTile v, typename Smem::QTile q, typename Smem::QTile dout,
                                         const typename Smem::RowStats& stats, int first_key, int first_row, int n, float scale2) const {
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

  __device__ __forceinline__ void sum(const uint32_t (&p)[4], const uint32_t (&ds)[4], typename Smem::QTile q, typename Smem::QTile dout,
                                      int n) {
#pragma unroll
    for (int d = 0; d < kColumns<kDim> / 16; ++d) {
      uint32_t b[2][2];
      load_b<true>(b, dout, first_col + d * 16, n * 16);
      for (int half = 0; half < 2; ++half) mma_m16n8k16_bf16(dv[2 * d + half], p, b[half]);
      load_b<true>(b, q, first_col + d * 16, n * 16);
      for (int half = 0; half < 2; ++half) mma_m16n8k16_bf16(dk[2 * d + half], ds, b[half]);
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
      for (int d = 0; d < kColumns<kDim> / 8; ++d) {
        const int col = first_col + d * 8 + place.col(0);
        store_pair<true>(to_k + col, kAligned, D - col, dk[d][2 * h] * scale, dk[d][2 * h + 1] * scale);
        store_pair<true>(to_v + col, kAligned, D - col, dv[d][2 * h], dv[d][2 * h + 1]);
      }
    }
  }
};

template <int kDim, bool kAligned>
__global__ void __launch_bounds__(kAttentionThreads* kParts<kDim>, kAttentionBlocks / kParts<kDim>)
    attention_bwd_kv_bf16_kernel(Rows<float> dk, Rows<float> dv, Saved<bf16> saved, SegmentLists segments, AttentionDims dims) {
  using Smem = KeySmem<kDim>;
  constexpr int kThreads = kAttentionThreads * kParts<kDim>;
  unsigned char* bytes = dynamic_smem<unsigned char>();
  const uint32_t smem = smem_addr(bytes);
  const typename Smem::KTile k_smem{smem}, v_smem{smem + Smem::KTile::kBytes};
  auto q_smem = [&](int stage) { return typename Smem::QTile{smem + 2 * Smem::KTile::kBytes + 2 * stage * Smem::QTile::kBytes}; };
  auto dout_smem = [&](int stage) { return typename Smem::QTile{q_smem(stage).base + Smem::QTile::kBytes}; };
  auto* stats = reinterpret_cast<typename Smem::RowStats*>(bytes + Smem::kStats);
  auto* passed = reinterpret_cast<typename Smem::Passed*>(bytes + Smem::kPassed);
  const int D = dims.head_dim, thread = static_cast<int>(threadIdx.x);

  const int group = static_cast<int>(blockIdx.x);
  for (int s = segments.group_offsets[group]; s < segments.group_offsets[group + 1]; ++s) {
    const HeadSegment seg(segments, dims, s, static_cast<int>(blockIdx.y));
    auto load_rows = [&](int tile) {
      const int first = tile * kRowTile, r = first + thread, stage = tile % 2;
      load_tile<kThreads, kAligned>(q_smem(stage), D, saved.q.data, [&](int i) { return seg.query(saved.q, first + i, D); });
      load_tile<kThreads, kAligned>(dout_smem(stage), D, saved.dout.data, [&](int i) { return seg.query(saved.dout, first + i, D); });
      if (thread < kRowTile) {
        const bool valid = r < seg.stacked_rows();
        stats[stage].lse2[thread] = valid ? saved.lse[seg.query_row(r)][seg.head(r)] * kLog2E : 0.f;
        stats[stage].delta[thread] = valid ? saved.delta[seg.query_row(r)][seg.head(r)] : 0.f;
      }
    };
    const int row_tiles = div_up(seg.stacked_rows(), kRowTile);
    for (int first_key = 0; row_tiles > 0 && first_key < seg.key_count; first_key += kKeyTile) {
      load_tile<kThreads, kAligned>(k_smem, D, saved.k.data, [&](int r) { return seg.key(saved.k, first_key + r, D); });
      load_tile<kThreads, kAligned>(v_smem, D, saved.v.data, [&](int r) { return seg.key(saved.v, first_key + r, D); });
      // Rows before the first query that sees the tile's first key have nothing to add.
      const int first_query = first_key - (seg.key_count - seg.queries);
      const int first_tile = first_query > 0 ? first_query * seg.group / kRowTile : 0;
      load_rows(first_tile);
      cp_async_commit();
      KeyGradient<kDim> gradient;
      for (int tile = first_tile; tile < row_tiles; ++tile) {
        if (tile + 1 < row_tiles) load_rows(tile + 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();  // the tile is complete for all threads
        gradient.add(seg, k_smem, v_smem, q_smem(tile % 2), dout_smem(tile % 2), stats[tile % 2], passed, first_key, tile * kRowTile,
                     dims.scale * kLog2E);
        __syncthreads();  // the stage, and at the end the keys, are read before they are overwritten
      }
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

dim3 group_grid(const SegmentLists& s, const AttentionDims& dims) {
  return dim3(static_cast<unsigned>(s.groups), static_cast<unsigned>(dims.kv_heads));
}

}  // namespace

template <>
void attention_bwd(Stream stream, Rows<bf16> dq, Rows<float> dk, Rows<float> dv, Rows<float> delta, Rows<const bf16> dout,
                   Rows<const bf16> o, Rows<const float> lse, Rows<const bf16> q, Rows<const bf16> k, Rows<const bf16> v,
                   const SegmentLists& segments, const AttentionDims& dims) {
  if (!check_attention(segments, dims)) return;
  launch(stream, attention_bwd_delta_bf16_kernel, query_grid(segments, dims, kAttentionWarps), kAttentionThreads, 0, delta, dout, o,
         segments, dims);
  const Saved<bf16> saved{dout, o, q, k, v, lse, delta};
  const bool aligned = chunks_aligned(q, dims.head_dim) && chunks_aligned(k, dims.head_dim) && chunks_aligned(v, dims.head_dim) &&
                       chunks_aligned(dout, dims.head_dim) && chunks_aligned(dq, dims.head_dim) && chunks_aligned(dk, dims.head_dim) &&
                       chunks_aligned(dv, dims.head_dim);
  dispatch_tiles(dims.head_dim, aligned, [&]<int kDim, bool kAligned>() {
    launch(stream, attention_bwd_q_bf16_kernel<kDim, kAligned>, query_grid(segments, dims, kQueryTile), kAttentionThreads, kQuerySmem<kDim>,
           dq, saved, segments, dims);
    launch(stream, attention_bwd_kv_bf16_kernel<kDim, kAligned>, group_grid(segments, dims), kAttentionThreads * kParts<kDim>,
           KeySmem<kDim>::kBytes, dk, dv, saved, segments, dims);
  });
}

template <>
void attention_bwd(Stream stream, Rows<float> dq, Rows<float> dk, Rows<float> dv, Rows<float> delta, Rows<const float> dout,
                   Rows<const float> o, Rows<const float> lse, Rows<const float> q, Rows<const float> k, Rows<const float> v,
                   const SegmentLists& segments, const AttentionDims& dims) {
  if (!check_attention(segments, dims)) return;
  const Saved<float> saved{dout, o, q, k, v, lse, delta};
  launch(stream, attention_bwd_delta_f32_kernel, query_grid(segments, dims, kAttentionWarps), kAttentionThreads, 0, delta, saved, segments,
         dims);
  launch(stream, attention_bwd_q_f32_kernel, query_grid(segments, dims, kAttentionWarps), kAttentionThreads, 0, dq, saved, segments, dims);
  launch(stream, attention_bwd_kv_f32_kernel, group_grid(segments, dims), kAttentionThreads, 0, dk, dv, saved, segments, dims);
}

}  // namespace kava
