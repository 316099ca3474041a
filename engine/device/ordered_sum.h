// Sums among ranks with the bytes of one rank that makes all parts itself: every rank adds the parts one after the other, in the order of
// the ranks. Parts are exchanged in pieces, and the next pieces may be sent while the others are under way.
#pragma once
#include <deque>
#include <vector>

#include "engine/device/comm.h"

namespace kava {

class OrderedSum {
 public:
  /// Room for the pieces that are under way, [1, n] in all: a part has `count` elements.
  static Tensor room(Arena& arena, DType dtype, int64_t count, int ranks);

  /// total and part [1, n], contiguous; total may be read and part changed between finish() and the next begin(). The room is the arena's
  /// from now on until what was allocated before is released. All must outlive it.
  OrderedSum(Comm& comm, Ops& ops, Arena& arena, const Tensor& total, const Tensor& part, const char* what);

  /// total = the parts of the first `parts` ranks, on top of what it holds unless `fresh`.
  void begin(int parts, bool fresh);
  /// These elements of part, [1, n] within it, are whole. All ranks send the same ones in the same order, each once; those of a rank that
  /// has no part count for nothing.
  void send(const Tensor& elements);
  /// Adds what has arrived; does not wait.
  void advance();
  /// Once all was sent: waits for the rest.
  void finish();

 private:
  struct Piece {
    int64_t begin, end;  // of part
    Tensor all;          // [ranks, end - begin]
    char* host;          // the same where MPI and sockets reach it
  };

  void send(int64_t begin, int64_t end);
  void add_first();

  Comm& comm_;
  Ops& ops_;
  const Tensor total_, part_, room_;
  const char* what_;
  std::vector<char> host_;  // the room's, of a backend with memory of its own
  std::deque<Piece> under_way_;
  int64_t next_ = 0;  // place in the room
  int parts_ = 0;
  bool fresh_ = false;
};

}  // namespace kava
