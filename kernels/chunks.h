// Rows read and written in chunks of eight columns, for kernels that are bound by memory: 16 bytes of bf16, twice 16 bytes of f32. Where
// lanes of f32 lie side by side, chunks of four: 8 bytes of bf16, 16 of f32, so that a request leaves no gaps.
// kAligned: base and stride are multiples of 16 bytes and the columns whole chunks, so that a chunk is one access (eight in f32: two); else
// a chunk is read and written element by element and ends with the row. What lies beyond the row is read as zero.
#pragma once
#include <stdexcept>
#include <type_traits>

#include "kernels/gpu.h"
#include "kernels/kernels.h"

namespace kava {

constexpr int kChunk = 8, kHalfChunk = 4;

/// Columns of a chunk in f32.
template <int kCount>
struct ColumnsOf {
  float at[kCount];
};
using Columns = ColumnsOf<kChunk>;

template <class T, bool kAligned, int kCount = kChunk>
__device__ __forceinline__ ColumnsOf<kCount> load_columns(const T* row, int first, int cols) {
  ColumnsOf<kCount> x;
  if constexpr (!kAligned) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x.at[i] = first + i < cols ? to_float(row[first + i]) : 0.f;
  } else if constexpr (sizeof(T) == 2) {
    std::conditional_t<kCount == kChunk, Bytes16, Bytes8> bytes;
    if constexpr (kCount == kChunk) bytes = load_16(row + first);
    else bytes = load_8(row + first);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x.at[i] = to_float(bf16{static_cast<uint16_t>(bytes.word[i / 2] >> (i % 2 * 16))});
  } else {
#pragma unroll
    for (int quad = 0; quad < kCount; quad += 4) {
      const Bytes16 bytes = load_16(row + first + quad);
#pragma unroll
      for (int i = 0; i < 4; ++i) x.at[quad + i] = __uint_as_float(bytes.word[i]);
    }
  }
  return x;
}

template <class T, bool kAligned, int kCount>
__device__ __forceinline__ void store_columns(T* row, int first, int cols, const ColumnsOf<kCount>& x) {
  if constexpr (!kAligned) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (first + i < cols) row[first + i] = from_float<T>(x.at[i]);
  } else if constexpr (sizeof(T) == 2) {
    if constexpr (kCount == kChunk)
      store_16(row + first,
               Bytes16{pack_bf16(x.at[0], x.at[1]), pack_bf16(x.at[2], x.at[3]), pack_bf16(x.at[4], x.at[5]), pack_bf16(x.at[6], x.at[7])});
    else store_8(row + first, Bytes8{pack_bf16(x.at[0], x.at[1]), pack_bf16(x.at[2], x.at[3])});
  } else {
#pragma unroll
    for (int quad = 0; quad < kCount; quad += 4)
      store_16(row + first + quad, Bytes16{__float_as_uint(x.at[quad]), __float_as_uint(x.at[quad + 1]), __float_as_uint(x.at[quad + 2]),
                                           __float_as_uint(x.at[quad + 3])});
  }
}

/// Whether rows of `cols` columns can be read in whole chunks.
template <class T>
bool chunked(Rows<T> x, int64_t cols) {
  return !x.data || (rows_at_16(x) && cols % kChunk == 0);
}

/// Calls f.template operator()<kAligned>().
template <class F>
void dispatch_aligned(bool aligned, F&& f) {
  if (aligned) f.template operator()<true>();
  else f.template operator()<false>();
}

// ---- maps over all chunks of a matrix

constexpr int kMapThreads = 256, kMapLoads = 4;
constexpr int kMapBlocks = 2;  // per SM at least; without a number ptxas spills for occupancy

/// Chunks that a thread loads before it stores the first: kMapLoads, or Map::kLoads where a map's arithmetic needs more registers than that
/// leaves.
template <class Map>
constexpr int loads_of() {
  if constexpr (requires { Map::kLoads; }) return Map::kLoads;
  else return kMapLoads;
}

/// Columns of a map's chunks: kChunk, or Map::kColumns.
template <class Map>
constexpr int columns_of() {
  if constexpr (requires { Map::kColumns; }) return Map::kColumns;
  else return kChunk;
}

/// A map has `X load(row, first column)` and `void store(row, first column, X)`.
template <class Map>
__global__ void __launch_bounds__(kMapThreads, kMapBlocks)
    map_chunks_kernel(const __grid_constant__ Map map, uint32_t chunks, uint32_t chunks_per_row) {
  constexpr int kLoads = loads_of<Map>(), kColumns = columns_of<Map>();
  const uint32_t first = blockIdx.x * (kMapThreads * kLoads) + threadIdx.x;
  decltype(map.load(0, 0)) x[kLoads];
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    const uint32_t i = first + static_cast<uint32_t>(j) * kMapThreads;
    if (i < chunks) x[j] = map.load(static_cast<int64_t>(i / chunks_per_row), static_cast<int>(i % chunks_per_row) * kColumns);
  }
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    const uint32_t i = first + static_cast<uint32_t>(j) * kMapThreads;
    if (i < chunks) map.store(static_cast<int64_t>(i / chunks_per_row), static_cast<int>(i % chunks_per_row) * kColumns, x[j]);
  }
}

template <class Map>
void map_chunks(Stream stream, const Map& map, int64_t rows, int64_t cols) {
  const int64_t per_row = div_up(cols, int64_t{columns_of<Map>()}), chunks = rows * per_row;
  if (chunks == 0) return;
  if (chunks >= int64_t{1} << 31 || cols > kLongestRow)
    throw std::invalid_argument("a matrix of 2^31 chunks, or a row of more than 2^30 columns");
  const unsigned blocks = static_cast<unsigned>(div_up(chunks, int64_t{kMapThreads * loads_of<Map>()}));
  launch(stream, map_chunks_kernel<Map>, blocks, kMapThreads, 0, map, static_cast<uint32_t>(chunks), static_cast<uint32_t>(per_row));
}

// ---- reductions over a block

/// The sum of the v of the block's threads, in a fixed order, for all of them. scratch: one word for each warp.
template <class S, int kThreads>
__device__ __forceinline__ S block_sum(S v, S* scratch) {
  constexpr int kWarps = kThreads / kWarpSize;
  for (int step = kWarpSize / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  __syncthreads();  // the words of the sum before have been read
  if (lane == 0) scratch[warp] = v;
  __syncthreads();  // every warp's word is there
  S total = scratch[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) total += scratch[w];
  return total;
}

}  // namespace kava
