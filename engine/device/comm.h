// Ranks: the processes that train or evaluate together, each with a copy of the model. Rank 0 writes what a run leaves and says what it
// prints. Every rank calls the same collectives in the same order; each returns the same on all ranks. A Comm as such is a rank alone.
#pragma once
#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/device/ops.h"

namespace kava {

class Comm {
 public:
  Comm() = default;
  virtual ~Comm() = default;
  Comm(const Comm&) = delete;
  Comm& operator=(const Comm&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  bool alone() const { return size_ == 1; }
  bool leads() const { return rank_ == 0; }
  /// "rank R of N"
  std::string name() const;

  /// Where in the run the ranks are ("step 12"); it stands in the error of a collective that fails, beside `what`.
  void set_place(std::string place) { place_ = std::move(place); }

  // Each of these throws Error(code comm) naming the operation, and the rank that is at fault where it is known, when a rank is gone or
  // does not come within the time that the ranks wait for each other.

  /// all[r] = mine of rank r, `bytes` each.
  void gather(void* all, const void* mine, int64_t bytes, const char* what);
  std::vector<std::string> gather(std::string_view mine, const char* what);
  /// Rank 0's, on every rank.
  std::string broadcast(std::string_view text, const char* what);
  void broadcast(void* data, int64_t bytes, const char* what);
  bool any(bool mine, const char* what);
  void barrier(const char* what);
  /// Ends the ranks' time together, once all have come here. A rank that goes without it has failed, to the others.
  void close();

  /// all [N, n] = the rows mine [1, n] of the ranks, of any type.
  void gather(Ops& ops, const Tensor& all, const Tensor& mine, const char* what);
  /// total = part of rank 0 + part of rank 1 + ... of the first `parts` ranks, on top of what total holds unless `fresh`. Every rank adds
  /// them one after the other in this order, so the sum has the bytes of one rank that makes the parts itself. total and part [1, n].
  void add_in_order(Ops& ops, Arena& arena, const Tensor& total, const Tensor& part, int parts, bool fresh, const char* what);

 protected:
  Comm(int rank, int size, double timeout);

  virtual void do_gather(void* all, const void* mine, int64_t bytes);
  virtual void do_broadcast(void* data, int64_t bytes);
  virtual void do_close() {}

  double timeout() const { return timeout_; }
  /// What this rank does before its first collective.
  void set_what(const char* what) { what_ = what; }
  /// Error(code comm): `why` is "rank 2 has gone" or the like.
  [[noreturn]] void fail(const std::string& why) const;
  [[noreturn]] void fail_late(const std::string& who = "another rank") const;
  /// To be asked while waiting: fails where the launcher that started this process is gone, as nobody ends what is left of the ranks then.
  void require_launcher() const;
  void watch_launcher(pid_t parent) { launcher_ = parent; }

 private:
  void begin(const char* what);

  int rank_ = 0, size_ = 1;
  double timeout_ = 600;  // seconds that a collective may take
  pid_t launcher_ = 0;    // 0: there is none to watch
  std::string place_, what_;
};

}  // namespace kava
