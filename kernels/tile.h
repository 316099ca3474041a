// Tiles of bf16 in shared memory and the tensor-core fragments read from them.
#pragma once
#include "kernels/gpu.h"

namespace kava {

/// A row-major tile of kRows x kCols. A row is cut into chunks of 8 columns (16 bytes); the chunks of a row are permuted by the row's
/// number, so that eight chunks in one column, as ldmatrix reads them, lie in eight different bank groups. kCols: a power of two from 16.
template <int kRows, int kCols>
struct Tile {
  static constexpr int kChunks = kCols / 8, kChunkCount = kRows * kChunks, kBytes = kRows * kCols * 2;
  uint32_t base;

  __device__ uint32_t chunk(int row, int chunk) const {
    constexpr int kPermuted = kChunks < 8 ? kChunks : 8;
    return base + static_cast<uint32_t>(row * kChunks + (chunk ^ (row / (8 / kPermuted) % kPermuted))) * 16;
  }
  __device__ uint32_t at(int row, int col) const { return chunk(row, col / 8); }
};

/// The place in dynamic shared memory of an address.
__device__ __forceinline__ uint32_t* smem_words(uint32_t addr) {
  unsigned char* base = dynamic_smem<unsigned char>();
  return reinterpret_cast<uint32_t*>(base + (addr - smem_addr(base)));
}

/// Columns 0..count of src (at most 8) and zeros after them, element by element.
__device__ __forceinline__ Bytes16 chunk_of(const bf16* src, int count) {
  Bytes16 bytes;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 2 * i < count ? src[2 * i].bits : 0u, high = 2 * i + 1 < count ? src[2 * i + 1].bits : 0u;
    bytes.word[i] = low | high << 16;
  }
  return bytes;
}

/// Puts them into the chunk at dst; complete for this thread at once.
__device__ __forceinline__ void put_chunk(uint32_t dst, const bf16* src, int count) { store_16(smem_words(dst), chunk_of(src, count)); }

/// Fills a tile from rows in global memory: row r from row(r), of which `cols` columns are there; a null row becomes zeros. All threads of
/// the block take part. kAligned: rows lie at multiples of 16 bytes and cols is a multiple of 8; then the copies are asynchronous, else
/// done at once; both are complete for a thread after its cp_async_wait. anywhere: any valid address, for the copies that read nothing.
template <int kThreads, bool kAligned, class TileType, class Row>
__device__ __forceinline__ void load_tile(TileType tile, int cols, const bf16* anywhere, Row row) {
  constexpr int kCount = TileType::kChunkCount, kRowStep = kThreads / TileType::kChunks;
  static_assert((kCount < kThreads || kCount % kThreads == 0) && kThreads % TileType::kChunks == 0);
  if (kCount < kThreads && static_cast<int>(threadIdx.x) >= kCount) return;
  const int first = static_cast<int>(threadIdx.x) / TileType::kChunks, c = static_cast<int>(threadIdx.x) % TileType::kChunks;
  const bool inside = c * 8 < cols;
  // Element by element one trip at a time: their loads side by side would take too many registers.
  constexpr int kTrips = div_up(kCount, kThreads);
  [[maybe_unused]] constexpr int kUnrolled = kAligned ? kTrips : 1;  // only nvcc heeds the pragma
#pragma unroll kUnrolled
  for (int j = 0; j < kTrips; ++j) {
    const int r = first + j * kRowStep;
    const bf16* src = row(r);
    if constexpr (kAligned) cp_async_16(tile.chunk(r, c), src && inside ? src + c * 8 : anywhere, src && inside ? 16 : 0);
    else put_chunk(tile.chunk(r, c), src + (src ? c * 8 : 0), src ? cols - c * 8 : 0);
  }
}

/// Operand A [16, 16] at (m, k), from a tile of rows m and columns k, or, transposed, of rows k and columns m.
template <bool kTransposed, class TileType>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], TileType tile, int m, int k) {
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (kTransposed) ldmatrix_x4<true>(a, tile.at(k + lane % 8 + lane / 16 * 8, m + lane / 8 % 2 * 8));
  else ldmatrix_x4<false>(a, tile.at(m + lane % 16, k + lane / 16 * 8));
}

/// Operands B [16, 8] at (k, n) and (k, n + 8), from a tile of rows n and columns k, or, transposed, of rows k and columns n.
template <bool kTransposed, class TileType>
__device__ __forceinline__ void load_b(uint32_t (&b)[2][2], TileType tile, int n, int k) {
  const int lane = threadIdx.x % kWarpSize;
  uint32_t r[4];
  if constexpr (kTransposed) ldmatrix_x4<true>(r, tile.at(k + lane % 16, n + lane / 16 * 8));
  else ldmatrix_x4<false>(r, tile.at(n + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * 8));
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

/// Two neighbouring accumulators of mma [16, 8] as operand A [16, 16] of the next product.
__device__ __forceinline__ void accumulators_to_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack_bf16(left[0], left[1]);
  a[1] = pack_bf16(left[2], left[3]);
  a[2] = pack_bf16(right[0], right[1]);
  a[3] = pack_bf16(right[2], right[3]);
}

/// Where this thread's accumulator i of an mma [16, 8] lies.
struct AccumulatorPlace {
  int lane = threadIdx.x % kWarpSize;
  __device__ int row(int i) const { return lane / 4 + i / 2 * 8; }
  __device__ int col(int i) const { return lane % 4 * 2 + i % 2; }
};

/// Of the four words of each of four lanes (4n to 4n + 3) word i of lane j becomes word j of lane i. So the pairs of columns that a thread
/// holds of four neighbouring mma [16, 8] become a chunk of eight columns of one of them.
__device__ __forceinline__ void transpose_words(uint32_t (&w)[4]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = threadIdx.x & static_cast<unsigned>(bit);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t other = __shfl_xor_sync(kAllLanes, upper ? w[i] : w[i + bit], bit);
      if (upper) w[i] = other;
      else w[i + bit] = other;
    }
  }
}

/// Stores what of the chunk at column `first` lies within `cols` to a row, which may be null; aligned: as load_tile's kAligned.
__device__ __forceinline__ void store_chunk(bf16* row, int first, int cols, bool aligned, const uint32_t (&w)[4]) {
  if (!row) return;
  if (aligned && first + 8 <= cols) return store_16(row + first, Bytes16{w[0], w[1], w[2], w[3]});
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (first + i < cols) row[first + i] = bf16{static_cast<uint16_t>(w[i / 2] >> (i % 2 * 16))};
}

/// Of two neighbouring numbers in memory, of which `count` are there: they become low and high, or these are added. One access where pairs
/// lie at multiples of 8 bytes.
template <bool kAdd>
__device__ __forceinline__ void store_pair(float* to, bool aligned, int count, float low, float high) {
  if (aligned && count >= 2) {
    if constexpr (kAdd) {
      const Bytes8 old = load_8(to);
      low += __uint_as_float(old.word[0]), high += __uint_as_float(old.word[1]);
    }
    return store_8(to, Bytes8{__float_as_uint(low), __float_as_uint(high)});
  }
  if (count >= 1) to[0] = kAdd ? to[0] + low : low;
  if (count >= 2) to[1] = kAdd ? to[1] + high : high;
}

}  // namespace kava
