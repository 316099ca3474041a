// The part of the emulator that follows one launch's accesses (watch.h says what for).
#pragma once
#include <array>
#include <cstddef>
#include <memory>
#include <unordered_map>
#include <vector>

#include "shadow.h"
#include "watch.h"

namespace simt {

/// What lies where while a launch runs, and what it is.
struct WatchedLaunch {
  const void* kernel;
  const void* params;  // and where the emulator keeps its parameters
  std::size_t params_bytes, blocks;
  int threads;
  std::size_t stack_bytes, smem_bytes;
  const unsigned char* smem;
};

class Watcher {
 public:
  Watcher(const Watched& watched, const WatchedLaunch& launch);

  // ---- from the emulator
  void begin_block();
  void barrier();
  void thread(int number, const unsigned char* stack) {
    settle();
    thread_ = number;
    stack_ = reinterpret_cast<std::uintptr_t>(stack);
  }
  /// All live lanes of a warp have come as far as this: their requests are complete.
  void together(int warp);
  void ldmatrix(const void* code, const std::uint32_t (&rows)[32]);
  void copy(const void* code, std::uint32_t dst, const void* src, int bytes, int bytes_read);
  void copied(std::uint32_t dst, int bytes);
  /// A wait left a thread that many bytes under way.
  void waited(std::size_t bytes_left);
  void mma() { ++counts_.mma; }
  /// The emulator's own accesses, by which it models an operation of a warp.
  bool quiet = false;
  /// What was found first, empty: nothing.
  const std::string& problem();

  // ---- from the kernel
  template <bool write>
  void access(const void* code, std::uintptr_t address, unsigned bytes);

  LaunchCounts take();

 private:
  struct Event {
    const void* code;
    std::uintptr_t address;
    unsigned char lane, bytes;
    bool shared;
  };
  struct Page {
    std::uint32_t read_by[128] = {}, written_by[128] = {};  // the block that touched a sector last
    std::uint64_t read[64] = {}, written[64] = {};          // a bit for each byte
  };

  struct Range {
    std::uintptr_t begin, end;
  };
  static const std::vector<Range>& loaded_images();

  bool elsewhere(std::uintptr_t address);
  std::uint32_t place(const void* code) const;
  Shadow::Now now(const void* code, int thread, bool shared) const;
  void report(const Shadow::Found& found, const void* code, std::uintptr_t address, bool shared);
  void settle() {
    if (doubtful_.code) settle_doubtful();
  }
  void settle_doubtful();
  template <bool write, bool shared>
  void check(const void* code, std::uintptr_t address, unsigned bytes, int thread);
  void log(const void* code, std::uintptr_t address, unsigned bytes, bool shared);
  void touch(std::uintptr_t address, unsigned bytes, bool write);
  void count(const std::vector<const Event*>& request);

  const Watched watched_;
  const WatchedLaunch launch_;
  std::vector<Range> constant_;                     // what is no memory of the kernel's
  std::array<std::uintptr_t, 256> memory_pages_{};  // seen to hold nothing of these, by the ends of their numbers
  std::uintptr_t stack_ = 0;
  int thread_ = 0;
  std::uint32_t block_ = 0, epoch_ = 0, block_epoch_ = 0;
  std::vector<Shadow::Cell> shared_cells_;
  Shadow global_cells_;
  // A write that another thread made too in the epoch: whether it changes the value is seen once it is done.
  struct {
    Shadow::Found found;
    const void* code = nullptr;
    std::uintptr_t address = 0;
    unsigned bytes = 0;
    bool shared = false;
    unsigned char before[16];
  } doubtful_;
  std::string problem_;

  std::vector<std::vector<Event>> events_;  // by warp
  std::unordered_map<const void*, Traffic> lines_;
  std::unordered_map<std::uintptr_t, std::unique_ptr<Page>> pages_;
  std::vector<std::size_t> under_way_;  // by thread, in this block
  LaunchCounts counts_;
};

/// Of the block that this thread runs; null: nothing is watched.
extern thread_local Watcher* t_watcher;
const Watched& watched();
inline bool watching() { return watched().counts || watched().races; }
void keep_counts(LaunchCounts counts);

}  // namespace simt
