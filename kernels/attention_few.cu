// Attention forward, bf16, of segments with few stacked rows, as decoding has: o = softmax(scale q k^T) v and lse, as in attention_fwd.cu.
//
// The keys of a segment are cut into parts of 128, so that one question keeps many multiprocessors busy; how they are cut depends on the
// segment alone. A block serves a part for one kv head, and all of its keys and values are on their way at once. A warp multiplies the
// rows, filled up to 16, by 32 of the keys; the maximum of the part is passed in shared memory, and so is p, by which each warp then
// multiplies its own columns of the values. A segment of one part is done then. Of the others a block leaves acc = sum of p v and sum = sum
// of p, both for p = 2^(s - most), and a second kernel, a warp for each row, adds up the parts in order.
#include "kernels/attention.h"

namespace kava {

namespace {

constexpr int kPartKeys = 128, kWarpKeys = kPartKeys / kAttentionWarps;

/// The workspace: what is left of each part of every segment, row by row.
struct Parts {
  struct alignas(8) Stats {
    float most, sum;
  };
  float* data;
  int parts, rows, kv_heads, width;  // of the segment with the most; width: of a row of acc, in whole sectors
  int64_t count;

  Parts(float* workspace, const SegmentLists& s, const AttentionDims& dims)
      : data(workspace),
        parts(div_up(s.most_keys, kPartKeys)),
        rows(few_rows(s, dims)),
        kv_heads(dims.kv_heads),
        width(div_up(dims.head_dim, 8) * 8),
        count(int64_t{s.count} * kv_heads * parts * rows) {}

  /// Floats, none where every segment has one part.
  int64_t size() const { return parts > 1 ? count * (width + 2) : 0; }

  __device__ int64_t place(int segment, int kv_head, int part, int row) const {
    return ((int64_t{segment} * kv_heads + kv_head) * parts + part) * rows + row;
  }
  __device__ float* acc(int64_t place) const { return data + place * width; }
  __device__ Stats& stats(int64_t place) const { return reinterpret_cast<Stats*>(data + count * width)[place]; }
};

template <int kDim>
struct FewSmem {
  using QTile = Tile<kFewRows, kDim>;
  using KTile = Tile<kPartKeys, kDim>;
  /// p as operands of the products with v, for each 16 keys, and of each warp's keys the maximum and the sum of p by row.
  struct Passed {
    Bytes16 p[kPartKeys / 16][kWarpSize];
    float most[kAttentionWarps][kFewRows], sum[kAttentionWarps][kFewRows];
  };
  static constexpr int kPassed = QTile::kBytes + 2 * KTile::kBytes, kBytes = kPassed + sizeof(Passed);
};

/// Columns of the values that a warp multiplies; of small heads some warps have none.
template <int kDim>
constexpr int kFewColumns = kDim < 16 * kAttentionWarps ? 16 : kDim / kAttentionWarps;

template <int kDim, bool kAligned>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocks)
    attention_few_bf16_kernel(Rows<bf16> o, Rows<float> lse, Parts parts, Rows<const bf16> q, Rows<const bf16> k, Rows<const bf16> v,
                              SegmentLists segments, AttentionDims dims) {
  using Smem = FewSmem<kDim>;
  const QueryBlock block(segments);
  const HeadSegment seg(segments, dims, block.segment, static_cast<int>(blockIdx.y));
  const int first_key = block.tile * kPartKeys, D = dims.head_dim;
  if (!seg.few() || seg.queries == 0 || first_key >= seg.key_count) return;

  unsigned char* bytes = dynamic_smem<unsigned char>();
  const typename Smem::QTile q_smem{smem_addr(bytes)};
  const typename Smem::KTile k_smem{q_smem.base + q_smem.kBytes}, v_smem{k_smem.base + k_smem.kBytes};
  auto& passed = *reinterpret_cast<typename Smem::Passed*>(bytes + Smem::kPassed);
  load_tile<kAttentionThreads, kAligned>(q_smem, D, q.data, [&](int r) { return seg.query(q, r, D); });
  load_tile<kAttentionThreads, kAligned>(k_smem, D, k.data, [&](int r) { return seg.key(k, first_key + r, D); });
  cp_async_commit();
  load_tile<kAttentionThreads, kAligned>(v_smem, D, v.data, [&](int r) { return seg.key(v, first_key + r, D); });
  cp_async_commit();

  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, warp_key = warp * kWarpKeys, keys = seg.key_count - first_key;
  const ThreadRows rows(seg, 0);
  const AccumulatorPlace place;
  cp_async_wait<1>();
  __syncthreads();  // rows and keys are complete for all threads
  float s[kWarpKeys / 8][4] = {};
#pragma unroll
  for (int n = 0; n < kWarpKeys / 16; ++n) {
    if (warp_key + n * 16 >= keys) break;
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      uint32_t a[4], b[2][2];
      load_a<false>(a, q_smem, 0, d);
      load_b<false>(b, k_smem, warp_key + n * 16, d);
      for (int half = 0; half < 2; ++half) mma_m16n8k16_bf16(s[2 * n + half], a, b[half]);
    }
  }
  float most[2] = {-INFINITY, -INFINITY}, sum[2] = {};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int n = 0; n < kWarpKeys / 8; ++n)
      for (int i = 2 * h; i < 2 * h + 2; ++i) {
        const bool sees = first_key + warp_key + n * 8 + place.col(i) < rows.seen[h];
        s[n][i] = sees ? s[n][i] * (dims.scale * kLog2E) : -INFINITY;
        most[h] = fmaxf(most[h], s[n][i]);
      }
    for (int lanes = 1; lanes < 4; lanes *= 2) most[h] = fmaxf(most[h], __shfl_xor_sync(kAllLanes, most[h], lanes));
    if (place.lane % 4 == 0) passed.most[warp][place.row(2 * h)] = most[h];
  }
  __syncthreads();  // the maxima of all warps are there
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    // p of a row that sees no key of the part is no number, which nobody reads.
    for (int w = 0; w < kAttentionWarps; ++w) most[h] = fmaxf(most[h], passed.most[w][place.row(2 * h)]);
#pragma unroll
    for (int n = 0; n < kWarpKeys / 8; ++n)
      for (int i = 2 * h; i < 2 * h + 2; ++i) sum[h] += s[n][i] = fast_exp2(s[n][i] - most[h]);
    for (int lanes = 1; lanes < 4; lanes *= 2) sum[h] += __shfl_xor_sync(kAllLanes, sum[h], lanes);
    if (place.lane % 4 == 0) passed.sum[warp][place.row(2 * h)] = sum[h];
  }
#pragma unroll
  for (int n = 0; n < kWarpKeys / 16; ++n) {
    uint32_t p[4];
    accumulators_to_a(p, s[2 * n], s[2 * n + 1]);
    store_16(&passed.p[warp_key / 16 + n][place.lane], Bytes16{p[0], p[1], p[2], p[3]});
  }
  cp_async_wait<0>();
  __syncthreads();  // p and sums of all warps are there, and the values

  constexpr int kColumns = kFewColumns<kDim>;
  const int first_col = warp * kColumns;
  if (first_col >= kDim) return;
  float acc[kColumns / 8][4] = {};
#pragma unroll
  for (int n = 0; n < kPartKeys / 16; ++n) {
    if (n * 16 >= keys) break;
    const Bytes16 words = load_16(&passed.p[n][place.lane]);
    const uint32_t p[4] = {words.word[0], words.word[1], words.word[2], words.word[3]};
#pragma unroll
    for (int d = 0; d < kColumns / 16; ++d) {
      uint32_t b[2][2];
      load_b<true>(b, v_smem, first_col + d * 16, n * 16);
      for (int half = 0; half < 2; ++half) mma_m16n8k16_bf16(acc[2 * d + half], p, b[half]);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] = 0;
    for (int w = 0; w < kAttentionWarps; ++w) sum[h] += passed.sum[w][place.row(2 * h)];
    const int row = rows.row[h];
    if (seg.key_count <= kPartKeys) {
      bf16* out = seg.query(o, row, D);
      store_sums<kAligned>(out ? out + first_col : nullptr, acc, h, D - first_col < kColumns ? D - first_col : kColumns,
                           [&](float x) { return x / sum[h]; });
      if (rows.valid(h) && lse.data && warp == 0 && place.lane % 4 == 0)
        lse[seg.query_row(row)][seg.head(row)] = (most[h] + log2f(sum[h])) * kLn2;
    } else if (rows.valid(h)) {
      const int64_t to = parts.place(block.segment, seg.kv_head, block.tile, row);
#pragma unroll
      for (int d = 0; d < kColumns / 8; ++d) {
        const int col = first_col + d * 8 + place.col(0);
        store_pair<false>(parts.acc(to) + col, true, parts.width - col, acc[d][2 * h], acc[d][2 * h + 1]);
      }
      if (warp == 0 && place.lane % 4 == 0) parts.stats(to) = {most[h], sum[h]};
    }
  }
}

/// A warp adds up the parts of a row; lanes own its columns.
__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocks)
    attention_parts_bf16_kernel(Rows<bf16> o, Rows<float> lse, Parts parts, SegmentLists segments, AttentionDims dims) {
  const QueryBlock block(segments);
  const HeadSegment seg(segments, dims, block.segment, static_cast<int>(blockIdx.y));
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize, D = dims.head_dim;
  const int r = block.tile * kAttentionWarps + warp;
  if (!seg.few() || r >= seg.stacked_rows() || seg.key_count <= kPartKeys) return;
  const int count = div_up(seg.seen(r), kPartKeys);
  auto place = [&](int part) { return parts.place(block.segment, seg.kv_head, part, r); };
  float acc[kMostColumns] = {}, most = -INFINITY, sum = 0;
  for (int part = lane; part < count; part += kWarpSize) most = fmaxf(most, parts.stats(place(part)).most);
  most = warp_max(most);
#pragma unroll 4
  for (int part = 0; part < count; ++part) {
    const Parts::Stats stats = parts.stats(place(part));
    const float shrink = fast_exp2(stats.most - most);
    sum += shrink * stats.sum;
    add_row(acc, shrink, parts.acc(place(part)), lane, D);
  }
  bf16* out = seg.query(o, r, D);
#pragma unroll
  for (int c = 0; c < kMostColumns; ++c)
    if (lane + c * kWarpSize < D) out[lane + c * kWarpSize] = from_float<bf16>(acc[c] / sum);
  if (lse.data && lane == 0) lse[seg.query_row(r)][seg.head(r)] = (most + log2f(sum)) * kLn2;
}

}  // namespace

template <>
int64_t attention_fwd_workspace<bf16>(const SegmentLists& segments, const AttentionDims& dims) {
  return some_few(segments, dims) ? Parts(nullptr, segments, dims).size() : 0;
}

template <>
int64_t attention_fwd_workspace<float>(const SegmentLists&, const AttentionDims&) {
  return 0;
}

void attention_few_fwd(Stream stream, Rows<bf16> o, Rows<float> lse, float* workspace, Rows<const bf16> q, Rows<const bf16> k,
                       Rows<const bf16> v, const SegmentLists& segments, const AttentionDims& dims, bool aligned) {
  const Parts parts(workspace, segments, dims);
  auto grid = [&](int tiles) { return dim3(static_cast<unsigned>(segments.count * tiles), static_cast<unsigned>(dims.kv_heads)); };
  dispatch_tiles(dims.head_dim, aligned, [&]<int kDim, bool kAligned>() {
    launch(stream, attention_few_bf16_kernel<kDim, kAligned>, grid(parts.parts), kAttentionThreads, FewSmem<kDim>::kBytes, o, lse, parts, q,
           k, v, segments, dims);
  });
  if (parts.parts == 1) return;
  launch(stream, attention_parts_bf16_kernel, grid(div_up(parts.rows, kAttentionWarps)), kAttentionThreads, 0, o, lse, parts, segments,
         dims);
}

}  // namespace kava
