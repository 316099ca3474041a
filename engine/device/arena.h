// A stack of tensors in memory of one backend. The step allocates forward and releases to a mark; memory is kept for the next step.
#pragma once
#include <vector>

#include "engine/device/tensor.h"

namespace kava {

class Ops;

class Arena {
 public:
  explicit Arena(Ops& ops) : ops_(ops) {}
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  /// Uninitialised, 64-byte aligned, contiguous.
  Tensor alloc(DType dtype, int64_t rows, int64_t cols);

  struct Mark {
    std::size_t chunk = 0;
    int64_t used = 0, total = 0;
  };
  Mark mark() const { return {chunk_, used_, total_}; }
  void release(Mark m) { chunk_ = m.chunk, used_ = m.used, total_ = m.total; }
  int64_t peak_bytes() const { return peak_; }

 private:
  struct Chunk {
    void* data;
    int64_t bytes;
  };
  Ops& ops_;
  std::vector<Chunk> chunks_;
  std::size_t chunk_ = 0;  // the chunk in use
  int64_t used_ = 0;       // bytes used of it
  int64_t total_ = 0, peak_ = 0;
};

/// Releases what was allocated since its construction.
class ArenaScope {
 public:
  explicit ArenaScope(Arena& arena) : arena_(arena), mark_(arena.mark()) {}
  ~ArenaScope() { arena_.release(mark_); }
  ArenaScope(const ArenaScope&) = delete;
  ArenaScope& operator=(const ArenaScope&) = delete;

 private:
  Arena& arena_;
  Arena::Mark mark_;
};

}  // namespace kava
