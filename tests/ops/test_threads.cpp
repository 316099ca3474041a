#include <sched.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <csignal>
#include <fstream>
#include <latch>
#include <limits>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "engine/cli.h"
#include "engine/device/cpu/ops_cpu.h"

using namespace kava;

TEST_CASE("every task of a parallel loop runs exactly once, in many small loops one after the other") {
  for (int count : {1, 2, 3, 5}) {
    Threads threads(count);
    REQUIRE(threads.count() == count);
    for (int loop = 0; loop < 2000; ++loop) {
      const int64_t tasks = loop % 9;
      std::vector<int> seen(static_cast<std::size_t>(tasks));  // plain ints: a task that ran twice would also be a race
      threads.run(tasks, [&](int64_t t) { ++seen[static_cast<std::size_t>(t)]; });
      REQUIRE(seen == std::vector<int>(static_cast<std::size_t>(tasks), 1));
    }
  }
}

TEST_CASE("a loop does not wait for threads that get no core") {
  cpu_set_t cores, one;
  CPU_ZERO(&one);
  REQUIRE(::sched_getaffinity(0, sizeof cores, &cores) == 0);
  for (int core = 0; core < CPU_SETSIZE && CPU_COUNT(&one) == 0; ++core)
    if (CPU_ISSET(core, &cores)) CPU_SET(core, &one);
  REQUIRE(::sched_setaffinity(0, sizeof one, &one) == 0);
  constexpr int kLoops = 1000;
  rusage before{}, after{};
  {
    Threads threads(2);  // who have the caller's core
    std::atomic<int> done = 0;
    ::getrusage(RUSAGE_THREAD, &before);
    for (int loop = 0; loop < kLoops; ++loop) threads.run(2, [&](int64_t) { ++done; });
    ::getrusage(RUSAGE_THREAD, &after);
    CHECK(done == 2 * kLoops);
  }
  CHECK(::sched_setaffinity(0, sizeof cores, &cores) == 0);
  CHECK(after.ru_nvcsw - before.ru_nvcsw < kLoops / 2);  // how often the caller gave its core up to wait
}

TEST_CASE("what the tasks wrote is seen after the loop, and what was written before it in the tasks") {
  Threads threads(3);
  std::vector<int64_t> value(64, 1);
  for (int loop = 0; loop < 200; ++loop) {
    threads.run(64, [&](int64_t t) { value[static_cast<std::size_t>(t)] *= 1 + t % 2; });
    for (int64_t& v : value) v = v % 1000003;
  }
  int64_t want = 1;
  for (int loop = 0; loop < 200; ++loop) want = want * 2 % 1000003;
  for (std::size_t t = 0; t < value.size(); ++t) REQUIRE(value[t] == (t % 2 ? want : 1));
}

TEST_CASE("blocks cover the rows once, the last block being shorter") {
  Threads threads(2);
  for (int64_t rows : {0, 1, 31, 32, 33, 100}) {
    std::vector<int> seen(static_cast<std::size_t>(rows));
    threads.blocks(rows, 32, [&](int64_t begin, int64_t end) {
      if (begin % 32 != 0 || end - begin > 32 || begin >= end) throw std::logic_error("a wrong block");
      for (int64_t r = begin; r < end; ++r) ++seen[static_cast<std::size_t>(r)];
    });
    REQUIRE(seen == std::vector<int>(static_cast<std::size_t>(rows), 1));
  }
}

TEST_CASE("an exception of a task reaches the caller, and the threads work on") {
  for (int count : {1, 2, 4}) {
    Threads threads(count);
    for (int loop = 0; loop < 100; ++loop) {
      const int64_t bad = loop % 20;
      try {
        threads.run(20, [&](int64_t t) {
          if (t >= bad) throw std::runtime_error("task " + std::to_string(t));
        });
        FAIL("nothing was thrown");
      } catch (const std::runtime_error& e) {
        REQUIRE(std::string(e.what()).starts_with("task "));
      }
      std::atomic<int64_t> sum = 0;
      threads.run(20, [&](int64_t t) { sum += t; });
      REQUIRE(sum == 190);
    }
  }
}

TEST_CASE("fast_exp is within 1.1 ulp of exp, has its limits, and keeps NaN") {
  double worst = 0;
  for (int64_t i = -1050000; i <= 890000; ++i) {
    const float x = static_cast<float>(static_cast<double>(i) * 1e-4);
    const double exact = std::exp(static_cast<double>(x));
    if (exact > std::numeric_limits<float>::max()) {
      REQUIRE(std::isinf(fast_exp(x)));
      continue;
    }
    int exponent;
    std::frexp(exact, &exponent);
    worst = std::max(worst, std::fabs(fast_exp(x) - exact) / std::ldexp(1.0, std::max(exponent - 24, -149)));
  }
  REQUIRE(worst < 1.1);
  const float infinity = std::numeric_limits<float>::infinity();
  REQUIRE(
      (fast_exp(0.f) == 1 && fast_exp(-0.f) == 1 && fast_exp(-104.f) == 0 && fast_exp(-infinity) == 0 && fast_exp(infinity) == infinity));
  REQUIRE(std::isnan(fast_exp(std::nanf(""))));
}

TEST_CASE("where the system gives fewer threads than asked for, those that started end") {
#if defined(KAVA_ASAN) || defined(KAVA_TSAN)
  SKIP("a sanitizer's own memory does not fit into a limited address space");
#else
  rlimit before = {};
  REQUIRE(getrlimit(RLIMIT_AS, &before) == 0);
  // Room for a few stacks of 8 MiB on top of what the process has mapped.
  std::ifstream pages("/proc/self/statm");
  rlim_t mapped = 0;
  REQUIRE(pages >> mapped);
  rlimit tight = before;
  tight.rlim_cur = mapped * static_cast<rlim_t>(sysconf(_SC_PAGESIZE)) + (rlim_t{100} << 20);
  REQUIRE(setrlimit(RLIMIT_AS, &tight) == 0);
  bool refused = false;
  try {
    Threads threads(4096);
  } catch (const std::system_error&) {
    refused = true;
  }
  REQUIRE(setrlimit(RLIMIT_AS, &before) == 0);
  CHECK(refused);
#endif
}

TEST_CASE("a signal's handler never runs on the stack of a product") {
#ifdef KAVA_TSAN
  SKIP("ThreadSanitizer puts handlers of its own before a program's");
#endif
  // In a child, whose handlers are nobody else's.
  const pid_t child = ::fork();
  if (child == 0) {
    catch_signals();
    bool good = true;
    for (int signal : {SIGTERM, SIGINT, SIGUSR1, SIGHUP, SIGUSR2}) {
      struct sigaction action = {};
      good = good && ::sigaction(signal, nullptr, &action) == 0 && (action.sa_handler == SIG_IGN || (action.sa_flags & SA_ONSTACK) != 0);
    }
    stack_t stack = {};
    good = good && ::sigaltstack(nullptr, &stack) == 0 && (stack.ss_flags & SS_DISABLE) == 0;
    ::raise(SIGUSR2);
    ::_exit(good && checkpoint_requested() ? 0 : 1);
  }
  int status = -1;
  ::waitpid(child, &status, 0);
  CHECK(status == 0);

  Threads threads(3);
  std::latch all(3);
  std::vector<int> open(3);  // on a worker, of the signals that a handler may be for
  threads.run(3, [&](int64_t task, int worker) {
    all.arrive_and_wait();  // so that each thread takes one
    if (worker == 0) return;
    sigset_t blocked;
    ::pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
    for (int signal : {SIGTERM, SIGINT, SIGUSR1, SIGHUP, SIGUSR2, SIGCHLD, SIGPROF, SIGALRM})
      open[static_cast<std::size_t>(task)] += ::sigismember(&blocked, signal) == 0;
  });
  CHECK(open == std::vector<int>(3));
}
