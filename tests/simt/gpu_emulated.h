// kernels/gpu.h's vocabulary for the host compiler: CUDA's own words, and models of the wrappers of kernels/gpu_cuda.h.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

#include "kernels/bf16.h"
#include "kernels/bytes16.h"
#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__

using dim3 = simt::Dim3;
inline constinit thread_local simt::Dim3 threadIdx{0, 0, 0}, blockIdx{0, 0, 0}, blockDim{0, 0, 0}, gridDim{0, 0, 0};

/// A stream: what is launched on it runs when somebody waits for it. Without a stream a launch runs at once.
struct CUstream_st {
  virtual ~CUstream_st() = default;
  virtual void queue(std::function<void()> launch) = 0;
  /// What goes on beside the host: it is asked again and again until it is over, and what is queued behind it waits.
  virtual void queue_until(std::function<bool()> over) = 0;
  int cluster = 1;  // blocks of one, of the kernels that are queued from now on; it computes nothing
};

inline void __syncthreads(simt::Where where = simt::Where::current()) { simt::block_barrier(where); }

inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }

inline int __syncthreads_or(int value, simt::Where where = simt::Where::current()) { return simt::block_any(value != 0, where); }

namespace simt {
template <class T>
struct Exchange {
  T value, result;
  unsigned source;
};
template <class T>
T shuffle(std::uint32_t mask, T value, unsigned source, const Where& where) {
  Exchange<T> mine{value, value, source};
  warp_meet(
      mask, &mine,
      [](void* const(&slots)[32]) {
        for (void* slot : slots) {
          auto* e = static_cast<Exchange<T>*>(slot);
          if (!e) continue;
          if (!slots[e->source]) bad_shuffle(e->source);
          e->result = static_cast<Exchange<T>*>(slots[e->source])->value;
        }
      },
      where);
  return mine.result;
}
}  // namespace simt

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, simt::Where where = simt::Where::current()) {
  return simt::shuffle(mask, value, simt::lane() ^ static_cast<unsigned>(lanes), where);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, simt::Where where = simt::Where::current()) {
  return simt::shuffle(mask, value, static_cast<unsigned>(source) % 32, where);
}

namespace kava {

template <class... Params, class... Args>
void launch(CUstream_st* stream, void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t smem, Args... args) {
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> params;
  };
  auto work = [=, call = Call{kernel, {static_cast<Params>(args)...}}]() mutable {
    simt::run(
        grid, block, smem,
        [](void* p) {
          auto* c = static_cast<Call*>(p);
          std::apply(c->kernel, c->params);
        },
        &call, sizeof call, reinterpret_cast<const void*>(call.kernel));
  };
  if (stream) stream->queue(std::move(work));
  else work();
}

template <class T>
T* dynamic_smem() {
  return reinterpret_cast<T*>(simt::smem_base());
}
// Shared addresses start at 1024, so that a kernel that takes them for offsets fails.
constexpr std::uint32_t kSmemStart = 1024;
inline std::uint32_t smem_addr(const void* p) {
  return kSmemStart + static_cast<std::uint32_t>(static_cast<const unsigned char*>(p) - simt::smem_base());
}

// Of a type that the compiler does not take apart, so that the access is seen whole.
using FourWords [[gnu::vector_size(16), gnu::may_alias]] = std::uint32_t;
using TwoWords [[gnu::vector_size(8), gnu::may_alias]] = std::uint32_t;
template <class Words, class Bytes>
[[gnu::always_inline]] inline Bytes load_whole(const void* p, const simt::Where& where) {
  if (reinterpret_cast<std::uintptr_t>(p) % sizeof(Words) != 0) simt::misaligned(where);
  const Words words = *static_cast<const Words*>(p);
  Bytes bytes;
  std::memcpy(&bytes, &words, sizeof bytes);
  return bytes;
}
template <class Words, class Bytes>
[[gnu::always_inline]] inline void store_whole(void* p, const Bytes& bytes, const simt::Where& where) {
  if (reinterpret_cast<std::uintptr_t>(p) % sizeof(Words) != 0) simt::misaligned(where);
  Words words;
  std::memcpy(&words, &bytes, sizeof words);
  *static_cast<Words*>(p) = words;
}
[[gnu::always_inline]] inline Bytes16 load_16(const void* p, simt::Where where = simt::Where::current()) {
  return load_whole<FourWords, Bytes16>(p, where);
}
[[gnu::always_inline]] inline void store_16(void* p, const Bytes16& bytes, simt::Where where = simt::Where::current()) {
  store_whole<FourWords>(p, bytes, where);
}
[[gnu::always_inline]] inline Bytes8 load_8(const void* p, simt::Where where = simt::Where::current()) {
  return load_whole<TwoWords, Bytes8>(p, where);
}
[[gnu::always_inline]] inline void store_8(void* p, const Bytes8& bytes, simt::Where where = simt::Where::current()) {
  store_whole<TwoWords>(p, bytes, where);
}

[[gnu::always_inline]] inline void cp_async_16(std::uint32_t dst, const void* src, int bytes, simt::Where where = simt::Where::current()) {
  simt::copy_async(dst - kSmemStart, src, 16, bytes, where);
}
inline void cp_async_commit() { simt::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  simt::wait_copies(kPending);
}

template <bool kTransposed>
[[gnu::always_inline]] inline void ldmatrix_x4(std::uint32_t (&r)[4], std::uint32_t addr, simt::Where where = simt::Where::current()) {
  struct Slot {
    std::uint32_t addr, *r;
    const simt::Where* where;
  } mine{addr - kSmemStart, r, &where};
  simt::warp_meet(
      0xffffffffu, &mine,
      [](void* const(&slots)[32]) {
        std::uint32_t rows[32];
        for (int lane = 0; lane < 32; ++lane) rows[lane] = static_cast<Slot*>(slots[lane])->addr;
        for (int matrix = 0; matrix < 4; ++matrix) {
          std::uint16_t m[8][8];
          for (int row = 0; row < 8; ++row) {
            auto* s = static_cast<Slot*>(slots[matrix * 8 + row]);
            std::memcpy(m[row], simt::smem_at(s->addr, 16, *s->where), 16);
          }
          for (int lane = 0; lane < 32; ++lane) {
            const int major = lane / 4, minor = lane % 4 * 2;
            std::uint32_t low = kTransposed ? m[minor][major] : m[major][minor];
            std::uint32_t high = kTransposed ? m[minor + 1][major] : m[major][minor + 1];
            static_cast<Slot*>(slots[lane])->r[matrix] = low | high << 16;
          }
        }
        simt::saw_ldmatrix(rows);
      },
      where);
}

inline void mma_m16n8k16_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                              simt::Where where = simt::Where::current()) {
  struct Slot {
    float* d;
    const std::uint32_t *a, *b;
  } mine{d, a, b};
  simt::warp_meet(
      0xffffffffu, &mine,
      [](void* const(&slots)[32]) {
        simt::saw_mma();
        auto half = [](std::uint32_t word, int h) { return to_float(bf16{static_cast<std::uint16_t>(word >> (16 * h))}); };
        float a[16][16], b[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          auto* s = static_cast<Slot*>(slots[lane]);
          const int group = lane / 4, pair = lane % 4 * 2;
          for (int i = 0; i < 4; ++i)
            for (int h = 0; h < 2; ++h) a[group + i % 2 * 8][pair + h + i / 2 * 8] = half(s->a[i], h);
          for (int i = 0; i < 2; ++i)
            for (int h = 0; h < 2; ++h) b[pair + h + i * 8][group] = half(s->b[i], h);
        }
        float d[16][8] = {};
        for (int m = 0; m < 16; ++m)
          for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
        for (int lane = 0; lane < 32; ++lane)
          for (int i = 0; i < 4; ++i) static_cast<Slot*>(slots[lane])->d[i] += d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
      },
      where);
}

inline std::uint16_t round_to_bf16(float f) { return to_bf16(f).bits; }
inline std::uint32_t pack_bf16(float low, float high) { return to_bf16(low).bits | static_cast<std::uint32_t>(to_bf16(high).bits) << 16; }
inline float fast_exp2(float x) { return std::exp2(x); }

}  // namespace kava
