// What the attention kernels share: the rows of a segment as one kv head sees them.
//
// A block works on (segment, kv head). The G = H/K query heads of the kv head are stacked: stacked row r is query r / G, head r % G of the
// group, so that one product serves the whole group. Query i of n sees the first key_count - n + 1 + i keys.
#pragma once
#include "kernels/gpu.h"
#include "kernels/kernels.h"

namespace kava {

struct HeadSegment {
  const int32_t* keys;
  int key_count, query_begin, queries, group, kv_head;

  __device__ HeadSegment(const SegmentLists& s, const AttentionDims& dims, int segment, int kv_head_)
      : keys(s.keys + s.key_offsets[segment]),
        key_count(s.key_offsets[segment + 1] - s.key_offsets[segment]),
        query_begin(s.query_begin[segment]),
        queries(s.query_count[segment]),
        group(dims.heads / dims.kv_heads),
        kv_head(kv_head_) {}

  __device__ int stacked_rows() const { return queries * group; }
  __device__ int query_row(int r) const { return query_begin + r / group; }
  __device__ int head(int r) const { return kv_head * group + r % group; }
  /// Keys that stacked row r sees.
  __device__ int seen(int r) const { return key_count - queries + 1 + r / group; }

  /// Row r of a [rows, H*D] matrix, null beyond the segment.
  template <class T>
  __device__ T* query(Rows<T> x, int r, int head_dim) const {
    return r < stacked_rows() ? x[query_row(r)] + head(r) * head_dim : nullptr;
  }
  /// Key j's row of a [step rows, K*D] matrix, null beyond the segment.
  template <class T>
  __device__ T* key(Rows<T> x, int j, int head_dim) const {
    return j < key_count ? x[keys[j]] + kv_head * head_dim : nullptr;
  }
};

constexpr int kAttentionWarps = 4, kAttentionThreads = kAttentionWarps * kWarpSize;
constexpr int kAttentionBlocks = 2;  // per SM at least; without a number ptxas spills for occupancy
constexpr int kQueryTile = 64;       // stacked rows of a block, 16 per warp

/// One block per segment, kv head and `tile` stacked rows; blocks beyond a segment's rows end at once.
inline dim3 query_grid(const SegmentLists& s, const AttentionDims& dims, int tile) {
  const int rows = s.most_queries * (dims.heads / dims.kv_heads);
  return dim3(static_cast<unsigned>(s.count), static_cast<unsigned>(dims.kv_heads), static_cast<unsigned>(div_up(rows, tile)));
}

/// Whether every row of x can be read in chunks of 16 bytes.
template <class T>
bool chunks_aligned(Rows<T> x, int head_dim) {
  constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
  return reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && x.stride % kChunk == 0 && head_dim % kChunk == 0;
}

/// Calls f.template operator()<padded head size>().
template <class F>
void dispatch_head_dim(int head_dim, F&& f) {
  if (head_dim <= 16) f.template operator()<16>();
  else if (head_dim <= 32) f.template operator()<32>();
  else if (head_dim <= 64) f.template operator()<64>();
  else f.template operator()<128>();
}

}  // namespace kava
