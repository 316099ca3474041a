// The vocabulary kernels are written in. One source, two compilers: nvcc takes the device's own words from gpu_cuda.h, the host compiler
// takes models of them from the emulator's gpu_emulated.h (tests/simt), found by the include path. Both give:
//
//   launch(stream, kernel, grid, block, smem, args...)
//                                      the only place that starts a kernel; smem: bytes of dynamic shared memory
//   dynamic_smem<T>(), smem_addr(p)    dynamic shared memory, and the 32-bit address of a place in it
//   load_16(p), store_16(p, bytes)     one access of 16 bytes, at a multiple of 16
//   load_8(p), store_8(p, bytes)       one of 8, at a multiple of 8
//   cp_async_16(dst, src, bytes)       starts a copy of 16 bytes to shared memory; only `bytes` of them are read, the rest is zero
//   cp_async_commit()                  closes a group of copies
//   cp_async_wait<N>()                 waits until at most N groups of this thread are open
//   ldmatrix_x4<trans>(r, addr)        four 8 x 8 matrices of 16 bits; the rows of matrix i at the addresses of lanes 8i..8i+7
//   mma_m16n8k16_bf16(d, a, b)         d [16, 8] += a [16, 16] b [16, 8], summed in f32
//   round_to_bf16(f), pack_bf16(low, high)
//                                      round to nearest even
//   fast_exp2(x)                       2^x to about 2 ulp, 0 for -infinity
//
// Warp operations are called by all 32 lanes of a warp together, barriers by all threads of a block that have not returned.
#pragma once
#if defined(__CUDACC__)
#include "kernels/gpu_cuda.h"
#else
#include "gpu_emulated.h"
#endif
#include <cstdint>

#include "kernels/bf16.h"

namespace kava {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

template <class A, class B>
constexpr auto div_up(A a, B b) {
  return (a + b - 1) / b;
}

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 2) return bf16{round_to_bf16(x)};
  else return x;
}

__device__ __forceinline__ float warp_sum(float v) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}

__device__ __forceinline__ float warp_max(float v) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, step));
  return v;
}

}  // namespace kava
