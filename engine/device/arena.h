// A stack of tensors in one range of addresses of a backend. The step allocates forward and releases to a mark; a tensor's address depends
// on what is allocated below it alone, and memory, once there, is kept for the next step.
#pragma once
#include "engine/device/tensor.h"

namespace kava {

class Ops;

/// Addresses that a backend has set aside, with memory behind those that were committed.
struct AddressRange {
  char* begin = nullptr;
  int64_t bytes = 0;
};

class Arena {
 public:
  /// Addresses are reserved with the first tensor.
  explicit Arena(Ops& ops) : ops_(ops) {}
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  /// Uninitialised, 64-byte aligned, contiguous. Error(code preflight) where the device has too little memory.
  Tensor alloc(DType dtype, int64_t rows, int64_t cols);

  struct Mark {
    int64_t used = 0;
  };
  Mark mark() const { return {used_}; }
  void release(Mark m);

  /// The most that was ever in use, and the memory behind it: the same, rounded up to the pieces that memory is committed in.
  int64_t peak_bytes() const { return peak_; }
  int64_t committed_bytes() const { return committed_; }

  static constexpr int64_t kPiece = int64_t{2} << 20;

 private:
  void grow(int64_t bytes);

  Ops& ops_;
  AddressRange range_;
  int64_t used_ = 0, peak_ = 0, committed_ = 0;
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
