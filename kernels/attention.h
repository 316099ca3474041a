// What the attention kernels share: the rows of a segment as one kv head sees them.
//
// A block works on (segment, kv head). The G = H/K query heads of the kv head are stacked: stacked row r is query r / G, head r % G of the
// group, so that one product serves the whole group. Query i of n sees the first key_count - n + 1 + i keys.
#pragma once
#include <stdexcept>

#include "kernels/gpu.h"
#include "kernels/kernels.h"
#include "kernels/tile.h"

namespace kava {

constexpr int kAttentionWarps = 4, kAttentionThreads = kAttentionWarps * kWarpSize;
constexpr int kAttentionBlocks = 2;  // per SM at least; without a number ptxas spills for occupancy
constexpr int kQueryTile = 64;       // stacked rows of a block, 16 per warp
constexpr int kKeyTile = 64;
constexpr int kFewRows = 16;  // up to as many stacked rows of a segment are served by the form for few

/// A segment as one kv head sees it.
struct HeadSegment {
  const int32_t* keys;
  int key_count, query_begin, queries, group, kv_head;
  uint32_t inverse;  // of the group, times 2^31, rounded up

  __device__ HeadSegment(const SegmentLists& s, const AttentionDims& dims, int segment, int kv_head_)
      : keys(s.keys + s.key_offsets[segment]),
        key_count(s.key_offsets[segment + 1] - s.key_offsets[segment]),
        query_begin(s.query_begin[segment]),
        queries(s.query_count[segment]),
        group(dims.heads / dims.kv_heads),
        kv_head(kv_head_),
        inverse(0x7fffffffu / static_cast<unsigned>(group) + 1) {}

  __device__ int stacked_rows() const { return queries * group; }
  /// The query of stacked row r: r / group, by a product, which is exact for r below 2^31 / group.
  __device__ int query_of(int r) const { return static_cast<int>(uint64_t{static_cast<uint32_t>(r)} * inverse >> 31); }
  __device__ int query_row(int r) const { return query_begin + query_of(r); }
  __device__ int head(int r) const { return kv_head * group + r - query_of(r) * group; }
  /// Whether the segment takes the form for few rows (attention_few.cu).
  __device__ bool few() const { return stacked_rows() <= kFewRows; }
  /// Keys that stacked row r sees.
  __device__ int seen(int r) const { return key_count - queries + 1 + query_of(r); }

  /// Keys that the last of the 16 stacked rows from first_row on sees, 0 where all are beyond the segment.
  __device__ int most_seen(int first_row) const {
    const int last = first_row + 15 < stacked_rows() ? first_row + 15 : stacked_rows() - 1;
    return first_row <= last ? seen(last) : 0;
  }

  /// Tiles of keys that a block of stacked rows from first_row on sees something of.
  __device__ int key_tiles(int first_row) const {
    const int last = first_row + kQueryTile < stacked_rows() ? first_row + kQueryTile - 1 : stacked_rows() - 1;
    return div_up(seen(last), kKeyTile);
  }

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

/// The two stacked rows of a warp's 16 that a thread's accumulators belong to. Rows beyond the segment see what its last row sees; they are
/// zero in shared memory and are not stored.
struct ThreadRows {
  int row[2], seen[2], rows;
  int least, most;  // keys that the warp's first row sees, and its last; most 0: it has none

  __device__ ThreadRows(const HeadSegment& seg, int warp_row)
      : rows(seg.stacked_rows()), least(seg.seen(warp_row)), most(seg.most_seen(warp_row)) {
    const AccumulatorPlace place;
    for (int h = 0; h < 2; ++h) {
      row[h] = warp_row + place.row(2 * h);
      seen[h] = seg.seen(valid(h) ? row[h] : rows - 1);
    }
  }
  __device__ bool valid(int h) const { return row[h] < rows; }
};

/// Stores to(x) for the sums x of a thread's row h, of a whole row of D columns by the four threads that share it; row: null, nothing.
template <bool kAligned, int kBlocks, class To>
__device__ __forceinline__ void store_sums(bf16* row, const float (&acc)[kBlocks][4], int h, int D, To to) {
  const int quarter = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int first = 0; first < kBlocks; first += 4) {
    uint32_t chunk[4] = {};
#pragma unroll
    for (int d = first; d < first + 4 && d < kBlocks; ++d) chunk[d - first] = pack_bf16(to(acc[d][2 * h]), to(acc[d][2 * h + 1]));
    transpose_words(chunk);
    store_chunk(row, (first + quarter) * 8, D, kAligned, chunk);
  }
}

/// Tiles of a segment's keys and values in shared memory, in two stages.
template <int kDim, bool kAligned>
struct KeyStages {
  using KTile = Tile<kKeyTile, kDim>;
  static constexpr int kBytes = 4 * KTile::kBytes;
  uint32_t base;

  __device__ KTile k(int tile) const { return {base + static_cast<uint32_t>(tile % 2 * 2 * KTile::kBytes)}; }
  __device__ KTile v(int tile) const { return {k(tile).base + KTile::kBytes}; }
  __device__ void load(int tile, const HeadSegment& seg, Rows<const bf16> k_rows, Rows<const bf16> v_rows, int D) const {
    const int first = tile * kKeyTile;
    load_tile<kAttentionThreads, kAligned>(k(tile), D, k_rows.data, [&](int r) { return seg.key(k_rows, first + r, D); });
    load_tile<kAttentionThreads, kAligned>(v(tile), D, v_rows.data, [&](int r) { return seg.key(v_rows, first + r, D); });
  }
};

/// One block per segment, tile of stacked rows and kv head; blocks beyond a segment's rows end at once. Segments and tiles share x: there
/// is room for 65,535 in y and z.
inline dim3 query_grid(const SegmentLists& s, const AttentionDims& dims, int tile_rows) {
  const unsigned rows = static_cast<unsigned>(s.most_queries) * static_cast<unsigned>(dims.heads / dims.kv_heads);
  return dim3(static_cast<unsigned>(s.count) * div_up(rows, static_cast<unsigned>(tile_rows)), static_cast<unsigned>(dims.kv_heads));
}

/// The place of a block in a query_grid.
struct QueryBlock {
  int segment, tile;

  __device__ explicit QueryBlock(const SegmentLists& s)
      : segment(static_cast<int>(blockIdx.x % static_cast<unsigned>(s.count))),
        tile(static_cast<int>(blockIdx.x / static_cast<unsigned>(s.count))) {}
};

/// Whether every row of x can be read in chunks of 16 bytes.
template <class T>
bool chunks_aligned(Rows<T> x, int head_dim) {
  return rows_at_16(x) && head_dim * static_cast<int>(sizeof(T)) % 16 == 0;
}

/// Whether there is work; throws where a kernel does not take the dimensions.
inline bool check_attention(const SegmentLists& s, const AttentionDims& dims) {
  if (dims.head_dim < 1 || dims.head_dim > 128 || dims.kv_heads < 1 || dims.heads < 1 || dims.heads % dims.kv_heads != 0)
    throw std::invalid_argument("attention kernels take head sizes up to 128 and whole groups of heads");
  return s.count > 0 && s.groups > 0 && s.most_queries > 0;
}

/// Whether a segment may have few stacked rows, or one more; and the most stacked rows of those with few.
inline bool some_few(const SegmentLists& s, const AttentionDims& dims) {
  return s.fewest_queries * (dims.heads / dims.kv_heads) <= kFewRows;
}
inline bool some_more(const SegmentLists& s, const AttentionDims& dims) { return s.most_queries * (dims.heads / dims.kv_heads) > kFewRows; }
inline int few_rows(const SegmentLists& s, const AttentionDims& dims) {
  return some_more(s, dims) ? kFewRows : s.most_queries * (dims.heads / dims.kv_heads);
}

/// attention_fwd of the segments with few stacked rows (attention_few.cu).
void attention_few_fwd(Stream stream, Rows<bf16> o, Rows<float> lse, float* workspace, Rows<const bf16> q, Rows<const bf16> k,
                       Rows<const bf16> v, const SegmentLists& segments, const AttentionDims& dims, bool aligned);

/// Calls f.template operator()<padded head size, kAligned>().
template <class F>
void dispatch_tiles(int head_dim, bool aligned, F&& f) {
  auto padded = [&]<int kDim>() {
    if (aligned) f.template operator()<kDim, true>();
    else f.template operator()<kDim, false>();
  };
  if (head_dim <= 16) padded.template operator()<16>();
  else if (head_dim <= 32) padded.template operator()<32>();
  else if (head_dim <= 64) padded.template operator()<64>();
  else padded.template operator()<128>();
}

// ---- f32: a warp owns a row; lanes own its columns

constexpr int kMostColumns = 4;  // of a lane: head_dim / 32

__device__ __forceinline__ float dot(const float* a, const float* b, int n) {
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

/// acc += x * row, a lane's columns
__device__ __forceinline__ void add_row(float (&acc)[kMostColumns], float x, const float* row, int lane, int D) {
#pragma unroll
  for (int c = 0; c < kMostColumns; ++c)
    if (lane + c * kWarpSize < D) acc[c] += x * row[lane + c * kWarpSize];
}

}  // namespace kava
