#include "engine/device/comm_threads.h"

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>

namespace kava {

namespace {

// What the ranks of one group share. A collective is two meetings: all have brought their bytes, and all have taken what they need.
struct Meeting {
  explicit Meeting(int ranks) : brought(static_cast<std::size_t>(ranks)) {}
  std::mutex mutex;
  std::condition_variable changed;
  int waiting = 0;
  int64_t round = 0;
  std::vector<const void*> brought;
  int gone = -1;  // the first rank that left without the others
};

class ThreadComm final : public Comm {
 public:
  ThreadComm(std::shared_ptr<Meeting> meeting, int rank, int size, double timeout)
      : Comm(rank, size, timeout), meeting_(std::move(meeting)) {}
  ~ThreadComm() override {
    const std::scoped_lock lock(meeting_->mutex);
    if (!closed_ && meeting_->gone < 0) meeting_->gone = rank();
    meeting_->changed.notify_all();
  }

 private:
  void meet() {
    std::unique_lock lock(meeting_->mutex);
    const int64_t round = meeting_->round;
    if (++meeting_->waiting == size()) {
      meeting_->waiting = 0, ++meeting_->round;
      meeting_->changed.notify_all();
      return;
    }
    auto over = [&] { return meeting_->round != round || meeting_->gone >= 0; };
    const bool in_time = meeting_->changed.wait_for(lock, std::chrono::duration<double>(timeout()), over);
    if (meeting_->round != round) return;
    --meeting_->waiting;  // who comes now does not meet this rank, whose bytes are no longer there
    if (!in_time) fail_late();
    fail(fmt::format("rank {} has gone", meeting_->gone));
  }

  void do_gather(void* all, const void* mine, int64_t bytes) override {
    meeting_->brought[static_cast<std::size_t>(rank())] = mine;
    meet();
    for (std::size_t r = 0; r < meeting_->brought.size(); ++r) {
      char* to = static_cast<char*>(all) + r * static_cast<std::size_t>(bytes);
      if (to != meeting_->brought[r]) std::memcpy(to, meeting_->brought[r], static_cast<std::size_t>(bytes));
    }
    meet();
  }

  void do_broadcast(void* data, int64_t bytes) override {
    meeting_->brought[static_cast<std::size_t>(rank())] = data;
    meet();
    if (!leads()) std::memcpy(data, meeting_->brought[0], static_cast<std::size_t>(bytes));
    meet();
  }

  void do_close() override { closed_ = true; }

  const std::shared_ptr<Meeting> meeting_;
  bool closed_ = false;
};

}  // namespace

std::vector<std::unique_ptr<Comm>> make_thread_comms(int size, double timeout) {
  const auto meeting = std::make_shared<Meeting>(size);
  std::vector<std::unique_ptr<Comm>> ranks;
  for (int r = 0; r < size; ++r) ranks.push_back(std::make_unique<ThreadComm>(meeting, r, size, timeout));
  return ranks;
}

}  // namespace kava
