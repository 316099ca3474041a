// cpu backend: memory.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>

#include "engine/device/cpu/ops_cpu.h"
#include "engine/memory.h"

#ifdef KAVA_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace kava {

namespace {

constexpr std::size_t kCacheLine = 64;
// From two of them on memory is aligned to large pages and the kernel is asked for them: a step touches gigabytes once each.
constexpr std::size_t kLargePage = std::size_t{2} << 20;
// What the machine has left is asked for again after this many bytes.
constexpr int64_t kUnchecked = int64_t{64} << 20;

[[noreturn]] void refuse(int64_t bytes) {
  throw Error(Exit::preflight, "memory", fmt::format("not enough for {} more MiB", (bytes + (1 << 20) - 1) >> 20),
              "use a smaller batch or train.micro_batch, or a smaller model");
}

// Advice only: where the kernel declines, small pages do.
void ask_for_large_pages(void* data, std::size_t bytes) { (void)madvise(data, bytes, MADV_HUGEPAGE); }

}  // namespace

void CpuOps::require_available(int64_t bytes) {
  if ((unchecked_ += bytes) < kUnchecked) return;
  unchecked_ = 0;
  // Linux gives memory that it does not have and ends the program when it is touched. What was given and not touched yet is still to be
  // taken from what is available.
  const int64_t untouched = std::max<int64_t>(0, held_bytes() - resident_memory());
  if (bytes > available_physical_memory() - untouched) refuse(bytes);
}

void* CpuOps::do_allocate(int64_t bytes) {
  const std::size_t size = std::max<std::size_t>(static_cast<std::size_t>(bytes), 1);
  const bool large = size >= 2 * kLargePage;
  void* data = nullptr;
  require_available(bytes);
  if (posix_memalign(&data, large ? kLargePage : kCacheLine, size) != 0) refuse(bytes);
  if (large) ask_for_large_pages(data, size);
  return data;
}

void CpuOps::do_release(void* data, int64_t) { std::free(data); }

AddressRange CpuOps::do_reserve() {
  // No step is larger than the machine. Where addresses are limited, some are left to everything else.
  const int64_t most = std::min(machine_memory(), address_space_left() / 4 * 3) / Arena::kPiece * Arena::kPiece;
  for (int64_t bytes = most; bytes >= Arena::kPiece; bytes = bytes / 2 / Arena::kPiece * Arena::kPiece) {
    // One piece more, to begin where a large page does.
    const auto size = static_cast<std::size_t>(bytes);
    void* data = mmap(nullptr, size + kLargePage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) continue;
    const std::size_t before = kLargePage - reinterpret_cast<std::uintptr_t>(data) % kLargePage;
    char* begin = static_cast<char*>(data) + before;
    munmap(data, before);
    if (before < kLargePage) munmap(begin + size, kLargePage - before);
    return {begin, bytes};
  }
  refuse(Arena::kPiece);
}

void CpuOps::do_commit(void* data, int64_t bytes) {
  require_available(bytes);
  if (mprotect(data, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE) != 0) refuse(bytes);
  ask_for_large_pages(data, static_cast<std::size_t>(bytes));
}

void CpuOps::do_unreserve(const AddressRange& range, int64_t committed) {
  do_in_use(range.begin, committed, true);
  munmap(range.begin, static_cast<std::size_t>(range.bytes));
}

void CpuOps::do_in_use(void* data, int64_t bytes, bool used) {
#ifdef KAVA_ASAN
  if (used) ASAN_UNPOISON_MEMORY_REGION(data, static_cast<std::size_t>(bytes));
  else ASAN_POISON_MEMORY_REGION(data, static_cast<std::size_t>(bytes));
#endif
}

}  // namespace kava
