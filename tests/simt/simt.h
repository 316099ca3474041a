// A small SIMT machine on the CPU: the threads of a block are fibers of one OS thread, so that kernels run, line by line, under a debugger,
// the sanitizers and several schedules. It proves logic, not speed, memory ordering between blocks or the order of streams. watch.h: what
// it counts of a kernel's accesses, and the races that it finds.
//
// Found and reported as simt::Error with file and line: barriers that threads of a block reach at different lines or not at all, warp
// operations that lanes named in the mask do not reach together, shared addresses out of range or misaligned in ldmatrix and cp.async,
// misaligned accesses of 8 and 16 bytes, and copies that read more than they write.
// Plain accesses beyond dynamic shared memory or a fiber's stack hit a guard page. Dynamic shared memory starts as NaN.
#pragma once
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <stdexcept>

namespace simt {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Every schedule is one that a GPU may take; a kernel must give the same bytes under all of them.
struct Schedule {
  enum class Order { forward, reverse, random } order = Order::forward;
  unsigned seed = 0;
  bool greedy_warps = true;   // a warp runs on until all its lanes wait; else threads take turns at every wait
  bool eager_copies = false;  // cp.async copies at once; else at its wait, the latest moment allowed
  int workers = 0;            // OS threads that run blocks; 0: one per core
};
void set_schedule(const Schedule& schedule);

/// False under ThreadSanitizer, which does not know these fibers.
bool supported();

/// Runs body(arg) once per thread of every block. Throws the first Error; other exceptions of the kernel pass through. arg_bytes: that lie
/// at arg; kernel: what the launch is named by.
void run(Dim3 grid, Dim3 block, std::size_t smem_bytes, void (*body)(void*), void* arg, std::size_t arg_bytes, const void* kernel);

// ---- what a running thread may ask for; the vocabulary of gpu_emulated.h is written in it
using Where = std::source_location;

void block_barrier(const Where& where);
/// A barrier that tells whether any thread that reached it brought true.
bool block_any(bool value, const Where& where);
/// Meets the other lanes of `mask`; the last one to arrive runs op(slots) for all of them, slots[lane] being null outside the mask.
using WarpOp = void (*)(void* const (&slots)[32]);
void warp_meet(std::uint32_t mask, void* slot, WarpOp op, const Where& where);
/// An access at an address that is no multiple of its bytes.
[[noreturn]] void misaligned(const Where& where);
/// A shuffle that reads a lane which its mask does not name.
[[noreturn]] void bad_shuffle(unsigned source);
unsigned lane();
unsigned char* smem_base();
/// `bytes` bytes of dynamic shared memory at address addr, which must be in range and a multiple of `bytes`.
unsigned char* smem_at(std::uint32_t addr, std::size_t bytes, const Where& where);
void copy_async(std::uint32_t dst, const void* src, int bytes, int bytes_read, const Where& where);
void commit_copies();
void wait_copies(int pending);
/// For watch.h: what a warp operation read, by addresses of lanes, and that it was a product.
void saw_ldmatrix(const std::uint32_t (&rows)[32]);
void saw_mma();

}  // namespace simt
