// o = softmax(scale q k^T) v over segments, lse = log sum exp(scale q k^T), in one pass over the keys with a running maximum:
//   m' = max(m, max_j s_j),  l' = l 2^(m - m') + sum_j 2^(s_j - m'),  acc' = acc 2^(m - m') + sum_j 2^(s_j - m') v_j,  s = scale log2(e) q
//   k^T.
//
// bf16: a block owns 64 stacked rows of (segment, kv head), a warp 16 of them. Tiles of 64 keys are gathered by the segment's list into a
// double buffer. Padding of the head size and rows beyond the segment are zeros in shared memory. f32: a warp owns one row at a time, lanes
// own keys in q k^T and columns in p v.
#include "kernels/attention.h"
#include "kernels/tile.h"

namespace kava {

namespace {

constexpr int kKeyTile = 64;

template <int kDim>
struct ForwardSmem {
  using QTile = Tile<kQueryTile, kDim>;
  using KTile = Tile<kKeyTile, kDim>;
  static constexpr int kBytes = QTile::kBytes + 4 * KTile::kBytes;
};

template <int kDim>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocks)
    attention_fwd_bf16_kernel(Rows<bf16> o, Rows<float> lse, Rows<const bf16> q, Rows<const bf16> k, Rows<const bf16> v,
                              SegmentLists segments, AttentionDims dims, bool aligned) {
  using Smem = ForwardSmem<kDim>;
  const HeadSegment seg(segments, dims, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y));
  const int first_row = static_cast<int>(blockIdx.z) * kQueryTile, D = dims.head_dim;
  if (first_row >= seg.stacked_rows()) return;

  const uint32_t smem = smem_addr(dynamic_smem<unsigned char>());
  const typename Smem::QTile q_smem{smem};
  auto k_smem = [&](int stage) { return typename Smem::KTile{smem + Smem::QTile::kBytes + 2 * stage * Smem::KTile::kBytes}; };
  auto v_smem = [&](int stage) { return typename Smem::KTile{k_smem(stage).base + Smem::KTile::kBytes}; };
  auto load_keys = [&](int tile) {
    const int first_key = tile * kKeyTile;
    load_tile<kAttentionThreads>(k_smem(tile % 2), D, k.data, aligned, [&](int r) { return seg.key(k, first_key + r, D); });
    load_tile<kAttentionThreads>(v_smem(tile % 2), D, v.data, aligned, [&](int r) { return seg.key(v, first_key + r, D); });
  };
  load_tile<kAttentionThreads>(q_smem, D, q.data, aligned, [&](int r) { return seg.query(q, first_row + r, D); });
  load_keys(0);
  cp_async_commit();

  const AccumulatorPlace place;
  const int warp_row = static_cast<int>(threadIdx.x) / kWarpSize * 16;
  const int last_row = first_row + kQueryTile < seg.stacked_rows() ? first_row + kQueryTile : seg.stacked_rows();
  const int key_tiles = div_up(seg.seen(last_row - 1), kKeyTile);
  const float scale2 = dims.scale * kLog2E;
  // Rows beyond the segment see what its last row sees; their q is zero and they are not stored.
  int row[2], seen[2];
  for (int h = 0; h < 2; ++h) {
    row[h] = first_row + warp_row + place.row(2 * h);
    seen[h] = seg.seen(row[h] < last_row ? row[h] : last_row - 1);
  }

  float acc[kDim / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  for (int tile = 0; tile < key_tiles; ++tile) {
    if (tile + 1 < key_tiles) load_keys(tile + 1);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();  // the tile is complete for all threads

    float s[kKeyTile / 8][4] = {};
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      uint32_t a[4];
      load_a<false>(a, q_smem, warp_row, d);
#pragma unroll
      for (int n = 0; n < kKeyTile / 16; ++n) {
        uint32_t b[2][2];
        load_b<false>(b, k_smem(tile % 2), n * 16, d);
        mma_m16n8k16_bf16(s[2 * n], a, b[0]);
        mma_m16n8k16_bf16(s[2 * n + 1], a, b[1]);
      }
    }

#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float high = most[h];
#pragma unroll
      for (int n = 0; n < kKeyTile / 8; ++n)
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          const int key = tile * kKeyTile + n * 8 + place.col(i);
          s[n][i] = key < seen[h] ? s[n][i] * scale2 : -INFINITY;
          high = fmaxf(high, s[n][i]);
        }
      high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, 1));
      high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, 2));
      const float shrink = fast_exp2(most[h] - high);
      most[h] = high;
      float part = 0;
#pragma unroll
      for (int n = 0; n < kKeyTile / 8; ++n)
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          s[n][i] = fast_exp2(s[n][i] - high);
          part += s[n][i];
        }
      part += __shfl_xor_sync(kAllLanes, part, 1);
      part += __shfl_xor_sync(kAllLanes, part, 2);
      sum[h] = sum[h] * shrink + part;
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d)
        for (int i = 2 * h; i < 2 * h + 2; ++i) acc[d][i] *= shrink;
    }

#pragma unroll
    for (int n = 0; n < kKeyTile / 16; ++n) {
      uint32_t p[4];
      accumulators_to_a(p, s[2 * n], s[2 * n + 1]);
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
        uint32_t b[2][2];
        load_b<true>(b, v_smem(tile % 2), d * 16, n * 16);
        mma_m16n8k16_bf16(acc[2 * d], p, b[0]);
        mma_m16n8k16_bf16(acc[2 * d + 1], p, b[1]);
      }
    }
    __syncthreads();  // the stage is read before the next but one load overwrites it
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (row[h] >= last_row) continue;
    const float inverse = 1.f / sum[h];
    bf16* out = seg.query(o, row[h], D);
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d)
      for (int i = 2 * h; i < 2 * h + 2; ++i) {
        const int col = d * 8 + place.col(i);
        if (col < D) out[col] = from_float<bf16>(acc[d][i] * inverse);
      }
    if (lse.data && place.lane % 4 == 0) lse[seg.query_row(row[h])][seg.head(row[h])] = (most[h] + log2f(sum[h])) * kLn2;
  }
}

constexpr int kMostColumns = 4;  // of a lane: head_dim / 32

__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocks)
    attention_fwd_f32_kernel(Rows<float> o, Rows<float> lse, Rows<const float> q, Rows<const float> k, Rows<const float> v,
                             SegmentLists segments, AttentionDims dims) {
  const HeadSegment seg(segments, dims, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y));
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize, D = dims.head_dim;
  const int r = static_cast<int>(blockIdx.z) * kAttentionWarps + warp;
  if (r >= seg.stacked_rows()) return;
  const float* q_row = seg.query(q, r, D);
  const int seen = seg.seen(r);
  float acc[kMostColumns] = {}, most = -INFINITY, sum = 0;
  for (int first_key = 0; first_key < seen; first_key += kWarpSize) {
    const int key = first_key + lane;
    const float* k_row = seg.key(k, key < seen ? key : seen - 1, D);
    float s = 0;
    for (int d = 0; d < D; ++d) s += q_row[d] * k_row[d];
    s = key < seen ? s * dims.scale : -INFINITY;
    const float high = fmaxf(most, warp_max(s)), shrink = expf(most - high), p = expf(s - high);
    most = high;
    sum = sum * shrink + warp_sum(p);
    for (float& a : acc) a *= shrink;
    const int keys = seen - first_key < kWarpSize ? seen - first_key : kWarpSize;
    for (int j = 0; j < keys; ++j) {
      const float p_j = __shfl_sync(kAllLanes, p, j);
      const float* v_row = seg.key(v, first_key + j, D);
      for (int c = 0; c < kMostColumns; ++c)
        if (lane + c * kWarpSize < D) acc[c] += p_j * v_row[lane + c * kWarpSize];
    }
  }
  float* out = seg.query(o, r, D);
  for (int c = 0; c < kMostColumns; ++c)
    if (lane + c * kWarpSize < D) out[lane + c * kWarpSize] = acc[c] / sum;
  if (lse.data && lane == 0) lse[seg.query_row(r)][seg.head(r)] = most + logf(sum);
}

}  // namespace

template <>
void attention_fwd(Stream stream, Rows<bf16> o, Rows<float> lse, Rows<const bf16> q, Rows<const bf16> k, Rows<const bf16> v,
                   const SegmentLists& segments, const AttentionDims& dims) {
  const bool aligned = chunks_aligned(q, dims.head_dim) && chunks_aligned(k, dims.head_dim) && chunks_aligned(v, dims.head_dim);
  dispatch_head_dim(dims.head_dim, [&]<int kDim>() {
    launch(stream, attention_fwd_bf16_kernel<kDim>, query_grid(segments, dims, kQueryTile), kAttentionThreads, ForwardSmem<kDim>::kBytes, o,
           lse, q, k, v, segments, dims, aligned);
  });
}

template <>
void attention_fwd(Stream stream, Rows<float> o, Rows<float> lse, Rows<const float> q, Rows<const float> k, Rows<const float> v,
                   const SegmentLists& segments, const AttentionDims& dims) {
  launch(stream, attention_fwd_f32_kernel, query_grid(segments, dims, kAttentionWarps), kAttentionThreads, 0, o, lse, q, k, v, segments,
         dims);
}

}  // namespace kava
