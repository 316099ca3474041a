// Sums over rows for every column, in a fixed order: the gradients of gains and biases. A block of the first stage owns kGainRows rows and
// the columns of kLanes chunks; its lanes own chunks, and its groups of kLanes lanes take rows by turns. The second stage sums the blocks
// the same way.
#pragma once
#include "kernels/chunks.h"

namespace kava {

constexpr int kSumThreads = 256;
constexpr int kSumBlocks = 2;  // per SM at least

/// Terms have kSums sums, kLanes, kLoads rows that a lane loads before it adds the first, `Loaded load(row, first column)` and
/// `void add(Columns (&sums)[kSums], Loaded)`.
template <class Terms>
struct ColumnSums {
  static constexpr int kSums = Terms::kSums, kLanes = Terms::kLanes, kLoads = Terms::kLoads, kGroups = kSumThreads / kLanes,
                       kCols = kLanes * kChunk;
  // A group's sums lie in shared memory with all chunks' first halves first, so that neither side has two words of a bank at once.
  static constexpr int kHalf = kCols / 2 + 16, kPitch = 2 * kHalf;
  static constexpr std::size_t kShared = sizeof(float) * kSums * kGroups * kPitch;

  static __device__ __forceinline__ int place(int col) {
    return col / kHalfChunk % 2 * kHalf + col / kChunk * kHalfChunk + col % kHalfChunk;
  }

  /// out(sum, column) += of rows begin..end-1, for the columns from blockIdx.y * kCols on.
  template <class Out>
  static __device__ __forceinline__ void run(const Terms& terms, int64_t begin, int64_t end, int cols, Out&& out) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes, group = static_cast<int>(threadIdx.x) / kLanes;
    const int from = static_cast<int>(blockIdx.y) * kCols, first = from + lane * kChunk;
    Columns sums[kSums] = {};
    if (first < cols)
      for (int64_t r = begin + group; r < end; r += kGroups * kLoads) {
        typename Terms::Loaded loaded[kLoads];
#pragma unroll
        for (int j = 0; j < kLoads; ++j)
          if (r + j * kGroups < end) loaded[j] = terms.load(r + j * kGroups, first);
#pragma unroll
        for (int j = 0; j < kLoads; ++j)
          if (r + j * kGroups < end) terms.add(sums, loaded[j]);
      }
    float* const shared = dynamic_smem<float>();
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      float* const own = shared + (s * kGroups + group) * kPitch;
      const Columns& x = sums[s];
      store_columns<float, true>(own, lane * kHalfChunk, 0, ColumnsOf<kHalfChunk>{x.at[0], x.at[1], x.at[2], x.at[3]});
      store_columns<float, true>(own, kHalf + lane * kHalfChunk, 0, ColumnsOf<kHalfChunk>{x.at[4], x.at[5], x.at[6], x.at[7]});
    }
    __syncthreads();  // all groups' sums are there
    for (int i = static_cast<int>(threadIdx.x); i < kSums * kCols; i += kSumThreads) {
      const int s = i / kCols, col = i % kCols;
      if (from + col >= cols) continue;
      float total = 0;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) total += shared[(s * kGroups + g) * kPitch + place(col)];
      out(s, from + col, total);
    }
  }
};

/// partial[block of rows][sum][column]
template <class Terms>
__global__ void __launch_bounds__(kSumThreads, kSumBlocks)
    column_sums_kernel(float* partial, const __grid_constant__ Terms terms, int64_t rows, int cols) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kGainRows, end = begin + kGainRows < rows ? begin + kGainRows : rows;
  float* const out = partial + static_cast<int64_t>(blockIdx.x) * Terms::kSums * cols;
  ColumnSums<Terms>::run(terms, begin, end, cols, [&](int s, int col, float total) { out[static_cast<int64_t>(s) * cols + col] = total; });
}

/// The first stage's sums as terms of the second.
template <int kCount, bool kAligned>
struct PartialSums {
  static constexpr int kSums = kCount, kLanes = kWarpSize, kLoads = 4 / kCount;
  const float* partial;
  int cols;
  struct Loaded {
    Columns of[kSums];
  };
  __device__ __forceinline__ Loaded load(int64_t block, int first) const {
    Loaded x;
#pragma unroll
    for (int s = 0; s < kSums; ++s) x.of[s] = load_columns<float, kAligned>(partial + (block * kSums + s) * cols, first, cols);
    return x;
  }
  __device__ __forceinline__ void add(Columns (&sums)[kSums], const Loaded& x) const {
#pragma unroll
    for (int s = 0; s < kSums; ++s)
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sums[s].at[i] += x.of[s].at[i];
  }
};

template <int kCount>
struct SumsOf {
  float* at[kCount];
};

/// sums[s][column] += ...; a sum that is null is not wanted.
template <int kCount, bool kAligned>
__global__ void __launch_bounds__(kSumThreads, kSumBlocks)
    column_totals_kernel(const __grid_constant__ SumsOf<kCount> sums, const __grid_constant__ PartialSums<kCount, kAligned> terms,
                         int64_t blocks, int cols) {
  ColumnSums<PartialSums<kCount, kAligned>>::run(terms, 0, blocks, cols, [&](int s, int col, float total) {
    if (sums.at[s]) sums.at[s][col] += total;
  });
}

/// sums[s][c] += the sum of term s over rows, for the columns c < cols. partial: column_sums_workspace(rows, Terms::kSums * cols) floats.
template <class Terms>
void column_sums(Stream stream, const SumsOf<Terms::kSums>& sums, float* partial, const Terms& terms, int64_t rows, int cols) {
  const int64_t blocks = div_up(rows, int64_t{kGainRows});
  constexpr int kCount = Terms::kSums;
  launch(stream, column_sums_kernel<Terms>,
         dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(div_up(cols, ColumnSums<Terms>::kCols))), kSumThreads,
         ColumnSums<Terms>::kShared, partial, terms, rows, cols);
  dispatch_aligned(chunked(Rows<const float>{partial, cols}, cols), [&]<bool kAligned>() {
    using Second = PartialSums<kCount, kAligned>;
    launch(stream, column_totals_kernel<kCount, kAligned>, dim3(1, static_cast<unsigned>(div_up(cols, ColumnSums<Second>::kCols))),
           kSumThreads, ColumnSums<Second>::kShared, sums, Second{partial, cols}, blocks, cols);
  });
}

}  // namespace kava
