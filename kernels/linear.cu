// The gradient of a bias: a sum over rows. All else of a linear map is a sum of products: gemm.cu.
#include "kernels/column_sums.h"

namespace kava {

namespace {

template <class T, bool kAligned>
struct BiasTerms {
  static constexpr int kSums = 1, kLanes = kWarpSize, kLoads = 4;
  Rows<const T> dy;
  int cols;
  using Loaded = Columns;
  __device__ __forceinline__ Columns load(int64_t r, int first) const { return load_columns<T, kAligned>(dy[r], first, cols); }
  __device__ __forceinline__ void add(Columns (&sums)[kSums], const Columns& row) const {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sums[0].at[i] += row.at[i];
  }
};

}  // namespace

template <class T>
void bias_bwd(Stream stream, float* dbias, float* workspace, Rows<const T> dy, int rows, int cols) {
  if (rows == 0 || cols == 0) return;
  dispatch_aligned(chunked(dy, cols), [&]<bool kAligned>() {
    column_sums(stream, SumsOf<1>{dbias}, workspace, BiasTerms<T, kAligned>{dy, cols}, rows, cols);
  });
}
template void bias_bwd(Stream, float*, float*, Rows<const float>, int, int);
template void bias_bwd(Stream, float*, float*, Rows<const bf16>, int, int);

}  // namespace kava
