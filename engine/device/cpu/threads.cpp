#include "engine/device/cpu/threads.h"

#include <algorithm>
#include <chrono>
#include <csignal>
#ifdef KAVA_ONEDNN
#include <omp.h>
#endif

#include "engine/cores.h"

namespace kava {

namespace {
// How often a thread looks for work before it sleeps: products of a step follow one another within microseconds.
constexpr int kSpins = 4000;

// Threads::loop_: the workers that entered the loop, whether it takes more, and its number. Where it is closed and has none at work, its
// parts are the caller's.
constexpr uint64_t kWorkers = (uint64_t{1} << 24) - 1, kOpen = uint64_t{1} << 24, kNumber = kOpen << 1;

uint64_t number_of(uint64_t loop) { return loop / kNumber; }

// oneDNN's own parallel loops stay on the thread that calls it.
void single_threaded_products() {
#ifdef KAVA_ONEDNN
  omp_set_num_threads(1);
#endif
}

// A handler must not run on the stack of a product (engine/cli.cpp). Faults are the thread's own and stay deliverable.
void take_no_signals() {
  sigset_t signals;
  ::sigfillset(&signals);
  for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) ::sigdelset(&signals, fault);
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);
}

// Until `met` says so. Without a limit of time it would be the one call here that GCC 11's library lacks (GLIBCXX_3.4.30), and with it the
// distributions that the archive is for.
template <class Condition>
void wait(std::condition_variable& told, std::unique_lock<std::mutex>& lock, const Condition& met) {
  while (!told.wait_for(lock, std::chrono::hours(1), met)) continue;
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}
}  // namespace

Threads::Threads(int count) {
  single_threaded_products();
  // Where threads outnumber cores, looking takes the time of those that work.
  spins_ = count <= usable_cores() ? kSpins : 0;
  try {
    for (int i = 1; i < count; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (...) {
    // The destructor does not run then, and those that did start wait for ever.
    stop();
    throw;
  }
}

Threads::~Threads() { stop(); }

void Threads::stop() {
  open_loop(nullptr, 0);
  for (std::thread& t : workers_) t.join();
}

// Of no tasks it is the last one, which workers return from.
void Threads::open_loop(const std::function<void(int64_t, int)>* body, int64_t tasks) {
  {
    std::lock_guard lock(mutex_);
    body_ = body;
    tasks_ = tasks;
    next_ = 0;
    loop_ += kNumber + kOpen;
  }
  wake_.notify_all();
}

void Threads::take_tasks(int worker) {
  for (int64_t task; (task = next_.fetch_add(1)) < tasks_;) {
    try {
      (*body_)(task, worker);
    } catch (...) {
      std::lock_guard lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
      next_ = tasks_;
    }
  }
}

void Threads::work(int worker) {
  take_no_signals();
  single_threaded_products();
  uint64_t seen = 0, loop = 0;
  const auto is_new = [&] { return loop = loop_, (loop & kOpen) && number_of(loop) != seen; };
  for (;;) {
    bool found = is_new();
    for (int i = 0; i < spins_ && !found; ++i) pause(), found = is_new();
    if (!found) {
      std::unique_lock lock(mutex_);
      const uint64_t last = number_of(loop_);
      // Of a loop that ended meanwhile the next one may follow soon: it is looked for again.
      if (!is_new()) wait(wake_, lock, [&] { return number_of(loop_) != last; });
      continue;
    }
    // It may have ended meanwhile; another may have begun.
    loop = loop_.fetch_add(1);
    if ((loop & kOpen) && number_of(loop) != seen) {
      seen = number_of(loop);
      if (tasks_ == 0) return;
      take_tasks(worker);
    }
    if ((--loop_ & (kWorkers | kOpen)) == 0) {
      std::lock_guard lock(mutex_);
      done_.notify_one();
    }
  }
}

void Threads::run(int64_t tasks, const std::function<void(int64_t)>& body) {
  run(tasks, [&](int64_t task, int) { body(task); });
}

void Threads::run(int64_t tasks, const std::function<void(int64_t, int)>& body) {
  if (tasks <= 0) return;
  if (workers_.empty() || tasks == 1) {
    for (int64_t t = 0; t < tasks; ++t) body(t, 0);
    return;
  }
  failure_ = nullptr;
  open_loop(&body, tasks);
  take_tasks(0);
  loop_ &= ~kOpen;
  for (int i = 0; i < spins_ && (loop_ & kWorkers) != 0; ++i) pause();
  if ((loop_ & kWorkers) != 0) {  // else without the lock, which one that wakes late may hold
    std::unique_lock lock(mutex_);
    wait(done_, lock, [&] { return (loop_ & kWorkers) == 0; });
  }
  if (failure_) std::rethrow_exception(failure_);
}

void Threads::blocks(int64_t rows, int64_t block, const std::function<void(int64_t, int64_t)>& body) {
  run((rows + block - 1) / block, [&](int64_t i) { body(i * block, std::min(rows, (i + 1) * block)); });
}

}  // namespace kava
