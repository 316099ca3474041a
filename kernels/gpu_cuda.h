// gpu.h's vocabulary on the device: PTX stands here and nowhere else. Each wrapper has its model in tests/simt/gpu_emulated.h.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>

#include "kernels/bytes16.h"
#include "kernels/gpu_error.h"
#include "kernels/launched.h"

namespace kava {

inline void check_gpu(cudaError_t status, const char* call) {
  if (status != cudaSuccess) throw GpuError(call, static_cast<int>(status), ((void)cudaGetLastError(), cudaGetErrorString(status)));
}

/// Lets a kernel have that much dynamic shared memory on the current device. Asked for where it grows: the call takes longer than a launch.
template <class Kernel>
void allow_smem(Kernel* kernel, std::size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, Kernel*>, std::size_t> allowed;
  int device = 0;
  check_gpu(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  std::size_t& now = allowed[{device, kernel}];
  if (bytes <= now) return;
  check_gpu(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), "cudaFuncSetAttribute");
  now = bytes;
}

template <class... Params, class... Args>
void launch(cudaStream_t stream, void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t smem, Args... args) {
  constexpr std::size_t kWithoutAsking = 48 * 1024;
  if (smem > kWithoutAsking) allow_smem(kernel, smem);
  kernel<<<grid, block, smem, stream>>>(static_cast<Params>(args)...);
  check_gpu(cudaGetLastError(), "kernel launch");
  ++launched;
}

template <class T>
__device__ __forceinline__ T* dynamic_smem() {
  extern __shared__ __align__(128) unsigned char smem_bytes[];
  return reinterpret_cast<T*>(smem_bytes);
}

__device__ __forceinline__ uint32_t smem_addr(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ Bytes16 load_16(const void* p) { return *static_cast<const Bytes16*>(p); }
__device__ __forceinline__ void store_16(void* p, const Bytes16& bytes) { *static_cast<Bytes16*>(p) = bytes; }
__device__ __forceinline__ Bytes8 load_8(const void* p) { return *static_cast<const Bytes8*>(p); }
__device__ __forceinline__ void store_8(void* p, const Bytes8& bytes) { *static_cast<Bytes8*>(p) = bytes; }

__device__ __forceinline__ void cp_async_16(uint32_t dst, const void* src, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

template <bool kTransposed>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t addr) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(addr)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(addr)
                 : "memory");
  }
}

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ uint16_t round_to_bf16(float f) { return __bfloat16_as_ushort(__float2bfloat16_rn(f)); }
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float fast_exp2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

}  // namespace kava
