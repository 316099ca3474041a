// Ranks: the processes that train or evaluate together, each with a copy of the model. Rank 0 writes what a run leaves and says what it
// prints. Every rank calls the same collectives in the same order; each returns the same on all ranks. A Comm as such is a rank alone.
#pragma once
#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/device/ops.h"

namespace kava {

class DeviceLink;

/// What an operation among the ranks has taken on this rank, its waiting for others included.
struct CommTime {
  int64_t calls = 0, bytes = 0;  // bytes: of this rank's part
  double seconds = 0;
};

/// Seconds that an exchange took beside other work, and those that other work waited for it.
struct OverlapTime {
  double hidden = 0, exposed = 0;
};

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
  /// A gather in place, beside what this rank does meanwhile: all[rank] holds its own bytes, `bytes` each. Nobody may touch all until it
  /// is done. Those that were begun are done one after the other.
  void begin_gather(void* all, int64_t bytes, const char* what);
  /// Whether the first of them that was not told done yet is; with `wait` it is once this returns.
  bool end_gather(bool wait);
  /// Rank 0's, on every rank.
  std::string broadcast(std::string_view text, const char* what);
  void broadcast(void* data, int64_t bytes, const char* what);
  bool any(bool mine, const char* what);
  void barrier(const char* what);
  /// Ends the ranks' time together, once all have come here. A rank that goes without it has failed, to the others.
  void close();

  /// What moves tensors between the ranks' devices; null where they go through the host.
  DeviceLink* link() const { return link_; }
  /// Where an error unwinds: ends what the link has under way, since a device's memory is not given back while a sum waits for a rank.
  /// False where it does not end.
  bool abort_link() const noexcept;

  /// By operation, as it was named. Of device tensors only what goes through the host.
  const std::map<std::string, CommTime>& times() const { return times_; }
  /// Of gathers that were begun: how long some were under way while this rank did other things, and how long it was busy with them or
  /// waited.
  const OverlapTime& overlap() const { return overlap_; }

 protected:
  Comm(int rank, int size, double timeout);

  virtual void do_gather(void* all, const void* mine, int64_t bytes);
  virtual void do_broadcast(void* data, int64_t bytes);
  /// A transport that cannot go on by itself gathers here and now.
  virtual void do_begin_gather(void* all, const void* mine, int64_t bytes) { do_gather(all, mine, bytes); }
  /// Whether the first that was begun is done, which is forgotten then.
  virtual bool do_end_gather(bool) { return true; }
  virtual void do_close() {}
  /// Fails where the transport knows that a rank has gone. Does not wait.
  virtual void do_look() {}

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
  friend class DeviceLink;
  template <class F>
  double run(const char* what, int64_t bytes, F&& collective);

  int rank_ = 0, size_ = 1;
  double timeout_ = 600;  // seconds that a collective may take
  pid_t launcher_ = 0;    // 0: there is none to watch
  std::string place_, what_;
  std::map<std::string, CommTime> times_;
  std::deque<const char*> begun_;                      // gathers, by what they are for
  std::chrono::steady_clock::time_point first_begun_;  // since when there are any
  double exposed_ = 0;                                 // since then
  OverlapTime overlap_;
  DeviceLink* link_ = nullptr;
};

/// Sums among the ranks' devices by a library of theirs, where there is one; it is a Comm's link() while it lives. What is queued here is
/// waited for by whoever waits for the backend: a rank that is gone, and the end of the ranks' time for each other, are seen then, and end
/// what the devices wait for before the Error(code comm) is thrown.
class DeviceLink {
 public:
  explicit DeviceLink(Comm& comm);
  virtual ~DeviceLink();
  DeviceLink(const DeviceLink&) = delete;
  DeviceLink& operator=(const DeviceLink&) = delete;

  /// What makes the sums: "NCCL 2.28.9".
  virtual std::string text() const = 0;
  /// Each of xs = the sum of the ranks' tensors of this place, contiguous and of the same shapes on all, f32, f64 or bf16. It is made once
  /// all that is queued now is done, and beside what is queued later; nobody may touch xs before join().
  virtual void sum(std::span<const Tensor> xs, const char* what) = 0;
  /// What is queued on the backend from now on comes after the sums.
  virtual void join() = 0;
  /// Waits, with an end, until what join() waits for is done: before so much is queued behind it that the backend itself would wait.
  virtual void wait() = 0;

  /// Counted once measure() was called, which makes join() wait.
  const OverlapTime& overlap() const { return overlap_; }
  void measure() { measured_ = true; }

 protected:
  friend class Comm;
  /// Ends what is going on, on this rank's device too. False where that does not end in some seconds.
  virtual bool abort() noexcept = 0;
  Comm& comm() const { return comm_; }
  /// To be asked while `what` is waited for, since so many seconds: fails where the ranks cannot come any more.
  void look(const char* what, double waited) const;
  [[noreturn]] void fail(const char* what, const std::string& why) const;

  bool measured_ = false;
  OverlapTime overlap_;

 private:
  Comm& comm_;
};

}  // namespace kava
