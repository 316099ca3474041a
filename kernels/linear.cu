// The gradient of a bias. All else of a linear map is a sum of products: gemm.cu.
#include "kernels/gpu.h"
#include "kernels/kernels.h"

namespace kava {

namespace {

constexpr int kBiasRows = 8;  // rows that a block sums side by side

/// dbias[c] += sum_n dy[n, c]. A block owns 32 columns; warp w sums the rows w, w + 8, .., then the eight sums are added in order.
template <class T>
__global__ void __launch_bounds__(kBiasRows* kWarpSize) bias_bwd_kernel(float* dbias, Rows<const T> dy, int rows, int cols) {
  float* part = dynamic_smem<float>();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int col = static_cast<int>(blockIdx.x) * kWarpSize + lane;
  float sum = 0;
  for (int n = warp; n < rows && col < cols; n += kBiasRows) sum += to_float(dy[n][col]);
  part[threadIdx.x] = sum;
  __syncthreads();  // all parts are there
  if (warp != 0 || col >= cols) return;
  for (int w = 1; w < kBiasRows; ++w) sum += part[w * kWarpSize + lane];
  dbias[col] += sum;
}

}  // namespace

template <class T>
void bias_bwd(Stream stream, float* dbias, Rows<const T> dy, int rows, int cols) {
  if (rows == 0 || cols == 0) return;
  launch(stream, bias_bwd_kernel<T>, static_cast<unsigned>(div_up(cols, kWarpSize)), kBiasRows * kWarpSize,
         kBiasRows * kWarpSize * sizeof(float), dbias, dy, rows, cols);
}
template void bias_bwd(Stream, float*, Rows<const float>, int, int);
template void bias_bwd(Stream, float*, Rows<const bf16>, int, int);

}  // namespace kava
