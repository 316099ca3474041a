// o = softmax(scale q k^T) v over segments, lse = log sum exp(scale q k^T), in one pass over the keys with a running maximum:
//   s = scale log2(e) q k^T,  m' = max(m, max_j s_j),  l' = l 2^(m - m') + sum_j 2^(s_j - m'),
//   acc' = acc 2^(m - m') + sum_j 2^(s_j - m') v_j.
//
// bf16: segments with few stacked rows take a form of their own (attention_few.cu). Of the others a block owns 64 stacked rows of (segment,
// kv head), a warp 16 of them. Tiles of 64 keys are gathered by the segment's list into a double buffer; a warp takes of them, sixteen at a
// time, those that one of its rows sees. Padding of the head size and rows beyond the segment are zeros in shared memory. f32: a warp owns
// one row at a time, lanes own keys in q k^T and columns in p v.
#include "kernels/attention.h"

namespace kava {

namespace {

/// What a warp knows of its 16 rows: acc = sum of p v and sum = sum of p, both for p = 2^(s - most).
template <int kDim>
struct RunningSoftmax {
  float acc[kDim / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, sum[2] = {};

  /// Adds a tile of keys, of which the warp's rows see at most `visible`, at least one.
  template <class KeyTile>
  __device__ __forceinline__ void add(const uint32_t (&q)[kDim / 16][4], KeyTile k, KeyTile v, const ThreadRows& rows, int first_key,
                                      int visible, float scale2) {
    float s[kKeyTile / 8][4];
#pragma unroll
    for (int n = 0; n < kKeyTile / 16; ++n) {
      if (n * 16 >= visible) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) s[2 * n][i] = s[2 * n + 1][i] = 0;
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
        uint32_t b[2][2];
        load_b<false>(b, k, n * 16, d * 16);
        for (int half = 0; half < 2; ++half) mma_m16n8k16_bf16(s[2 * n + half], q[d], b[half]);
      }
    }
    turn(s, rows, first_key, visible, scale2);
#pragma unroll
    for (int n = 0; n < kKeyTile / 16; ++n) {
      if (n * 16 >= visible) break;
      uint32_t p[4], b[2][2];
      accumulators_to_a(p, s[2 * n], s[2 * n + 1]);
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
        load_b<true>(b, v, d * 16, n * 16);
        for (int half = 0; half < 2; ++half) mma_m16n8k16_bf16(acc[2 * d + half], p, b[half]);
      }
    }
  }

  /// Turns the products q k^T of a tile of keys into p, and scales acc and sum to the new maximum.
  __device__ __forceinline__ void turn(float (&s)[kKeyTile / 8][4], const ThreadRows& rows, int first_key, int visible, float scale2) {
    if (first_key + kKeyTile > rows.least) {  // else every row sees the whole tile
      const AccumulatorPlace place;
#pragma unroll
      for (int n = 0; n < kKeyTile / 8; ++n)
        for (int i = 0; i < 4; ++i)
          if (first_key + n * 8 + place.col(i) >= rows.seen[i / 2]) s[n][i] = -INFINITY;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float high = -INFINITY, part = 0;
#pragma unroll
      for (int n = 0; n < kKeyTile / 8; ++n) {
        if (n / 2 * 16 >= visible) break;
        for (int i = 2 * h; i < 2 * h + 2; ++i) high = fmaxf(high, s[n][i]);
      }
      for (int lanes = 1; lanes < 4; lanes *= 2) high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, lanes));
      high = fmaxf(most[h], high * scale2);
#pragma unroll
      for (int n = 0; n < kKeyTile / 8; ++n) {
        if (n / 2 * 16 >= visible) break;
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          s[n][i] = fast_exp2(s[n][i] * scale2 - high);
          part += s[n][i];
        }
      }
      for (int lanes = 1; lanes < 4; lanes *= 2) part += __shfl_xor_sync(kAllLanes, part, lanes);
      const float shrink = fast_exp2(most[h] - high);
      most[h] = high;
      sum[h] = sum[h] * shrink + part;
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d)
        for (int i = 2 * h; i < 2 * h + 2; ++i) acc[d][i] *= shrink;
    }
  }

  template <bool kAligned>
  __device__ __forceinline__ void store(Rows<bf16> o, Rows<float> lse, const HeadSegment& seg, const ThreadRows& rows, int D) const {
    const AccumulatorPlace place;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = rows.row[h];
      store_sums<kAligned>(seg.query(o, row, D), acc, h, D, [&](float x) { return x / sum[h]; });
      if (rows.valid(h) && lse.data && place.lane % 4 == 0) lse[seg.query_row(row)][seg.head(row)] = (most[h] + log2f(sum[h])) * kLn2;
    }
  }
};

template <int kDim>
constexpr int kForwardSmem = Tile<kQueryTile, kDim>::kBytes + KeyStages<kDim, true>::kBytes;

template <int kDim, bool kAligned>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocks)
    attention_fwd_bf16_kernel(Rows<bf16> o, Rows<float> lse, Rows<const bf16> q, Rows<const bf16> k, Rows<const bf16> v,
                              SegmentLists segments, AttentionDims dims) {
  const QueryBlock block(segments);
  const HeadSegment seg(segments, dims, block.segment, static_cast<int>(blockIdx.y));
  const int first_row = block.tile * kQueryTile, D = dims.head_dim;
  if (seg.few() || first_row >= seg.stacked_rows()) return;

  const Tile<kQueryTile, kDim> q_smem{smem_addr(dynamic_smem<unsigned char>())};
  const KeyStages<kDim, kAligned> keys{q_smem.base + q_smem.kBytes};
  const int key_tiles = seg.key_tiles(first_row);
  load_tile<kAttentionThreads, kAligned>(q_smem, D, q.data, [&](int r) { return seg.query(q, first_row + r, D); });
  for (int tile = 0; tile < 2; ++tile) {
    if (tile < key_tiles) keys.load(tile, seg, k, v, D);
    cp_async_commit();
  }

  const int warp_row = static_cast<int>(threadIdx.x) / kWarpSize * 16;
  const ThreadRows rows(seg, first_row + warp_row);
  RunningSoftmax<kDim> softmax;
  uint32_t q_row[kDim / 16][4];
  for (int tile = 0; tile < key_tiles; ++tile) {
    if (tile == 0) cp_async_wait<1>();
    else cp_async_wait<0>();
    __syncthreads();  // the tile is complete for all threads, which have read the one before
    if (tile > 0 && tile + 1 < key_tiles) keys.load(tile + 1, seg, k, v, D);
    cp_async_commit();
    if (tile == 0) {
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) load_a<false>(q_row[d], q_smem, warp_row, d * 16);
    }
    const int first_key = tile * kKeyTile, visible = rows.most - first_key;
    if (visible > 0) softmax.add(q_row, keys.k(tile), keys.v(tile), rows, first_key, visible, dims.scale * kLog2E);
  }
  softmax.template store<kAligned>(o, lse, seg, rows, D);
}

__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocks)
    attention_fwd_f32_kernel(Rows<float> o, Rows<float> lse, Rows<const float> q, Rows<const float> k, Rows<const float> v,
                             SegmentLists segments, AttentionDims dims) {
  const QueryBlock block(segments);
  const HeadSegment seg(segments, dims, block.segment, static_cast<int>(blockIdx.y));
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize, D = dims.head_dim;
  const int r = block.tile * kAttentionWarps + warp;
  if (r >= seg.stacked_rows()) return;
  const float* q_row = seg.query(q, r, D);
  const int seen = seg.seen(r);
  float acc[kMostColumns] = {}, most = -INFINITY, sum = 0;
  for (int first_key = 0; first_key < seen; first_key += kWarpSize) {
    const int key = first_key + lane;
    const float s = key < seen ? dot(q_row, seg.key(k, key, D), D) * dims.scale : -INFINITY;
    const float high = fmaxf(most, warp_max(s)), shrink = expf(most - high), p = expf(s - high);
    most = high;
    sum = sum * shrink + warp_sum(p);
    for (float& a : acc) a *= shrink;
    const int keys = seen - first_key < kWarpSize ? seen - first_key : kWarpSize;
    for (int j = 0; j < keys; ++j) add_row(acc, __shfl_sync(kAllLanes, p, j), seg.key(v, first_key + j, D), lane, D);
  }
  float* out = seg.query(o, r, D);
  for (int c = 0; c < kMostColumns; ++c)
    if (lane + c * kWarpSize < D) out[lane + c * kWarpSize] = acc[c] / sum;
  if (lse.data && lane == 0) lse[seg.query_row(r)][seg.head(r)] = most + logf(sum);
}

}  // namespace

template <>
void attention_fwd(Stream stream, Rows<bf16> o, Rows<float> lse, float* workspace, Rows<const bf16> q, Rows<const bf16> k,
                   Rows<const bf16> v, const SegmentLists& segments, const AttentionDims& dims) {
  if (!check_attention(segments, dims)) return;
  const bool aligned = chunks_aligned(q, dims.head_dim) && chunks_aligned(k, dims.head_dim) && chunks_aligned(v, dims.head_dim) &&
                       chunks_aligned(o, dims.head_dim);
  if (some_few(segments, dims)) attention_few_fwd(stream, o, lse, workspace, q, k, v, segments, dims, aligned);
  if (!some_more(segments, dims)) return;
  dispatch_tiles(dims.head_dim, aligned, [&]<int kDim, bool kAligned>() {
    launch(stream, attention_fwd_bf16_kernel<kDim, kAligned>, query_grid(segments, dims, kQueryTile), kAttentionThreads, kForwardSmem<kDim>,
           o, lse, q, k, v, segments, dims);
  });
}

template <>
void attention_fwd(Stream stream, Rows<float> o, Rows<float> lse, float*, Rows<const float> q, Rows<const float> k, Rows<const float> v,
                   const SegmentLists& segments, const AttentionDims& dims) {
  if (!check_attention(segments, dims)) return;
  launch(stream, attention_fwd_f32_kernel, query_grid(segments, dims, kAttentionWarps), kAttentionThreads, 0, o, lse, q, k, v, segments,
         dims);
}

}  // namespace kava
