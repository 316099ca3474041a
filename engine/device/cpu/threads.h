// Persistent threads. A parallel loop hands out task numbers; what a task computes must depend on its number alone, so that results do not
// depend on how many threads there are.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace kava {

class Threads {
 public:
  /// count: threads in all, the caller's included. std::system_error where the system gives fewer.
  explicit Threads(int count);
  ~Threads();
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  int count() const { return static_cast<int>(workers_.size()) + 1; }

  /// Runs body(task) for every task in 0..tasks-1 and returns when all are done; the first exception is rethrown. Not to be nested. Who
  /// did not come to a loop is not waited for: on a busy machine the caller does the work of threads that get no core.
  void run(int64_t tasks, const std::function<void(int64_t)>& body);

  /// The same with the number of the thread, 0..count()-1, for what a thread keeps to itself; nothing that it computes may depend on it.
  void run(int64_t tasks, const std::function<void(int64_t, int)>& body);

  /// body(begin, end) over the rows 0..rows-1 in blocks of `block` rows.
  void blocks(int64_t rows, int64_t block, const std::function<void(int64_t, int64_t)>& body);

 private:
  void work(int worker);
  void open_loop(const std::function<void(int64_t, int)>* body, int64_t tasks);
  void take_tasks(int worker);
  void stop();

  int spins_ = 0;  // looks for work before a thread sleeps
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int64_t, int)>* body_ = nullptr;
  int64_t tasks_ = 0;
  // In lines of the cache of their own: each is written while threads read what stands before it.
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint64_t> loop_{0};  // its parts: threads.cpp
  std::exception_ptr failure_;
};

}  // namespace kava
