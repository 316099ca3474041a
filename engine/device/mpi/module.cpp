// Ranks over MPI (engine/device/comm_mpi.h). Data moves by all-gather and broadcast alone: a reduction of MPI sums in an order that depends
// on lengths and on the number of ranks. Calls are started and then polled, so that a wait has an end.
#include <mpi.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "engine/cli.h"
#include "engine/clock.h"
#include "engine/device/comm_mpi.h"
#include "engine/error.h"
#include "engine/no_signals.h"

namespace kava {

namespace {

// Ends the process with 6 where a call of MPI that cannot be polled does not return, as when a rank stands still; or where the launcher has
// gone meanwhile.
class Watch {
 public:
  Watch(std::string where, std::string what, const char* option, double seconds, pid_t launcher)
      : where_(std::move(where)), what_(std::move(what)), option_(option), seconds_(seconds), launcher_(launcher) {
    const NoSignals none;
    thread_ = std::thread([this] { watch(); });
  }
  ~Watch() {
    {
      const std::scoped_lock lock(mutex_);
      over_ = true;
    }
    changed_.notify_one();
    thread_.join();
  }
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

 private:
  void watch() {
    using Clock = std::chrono::steady_clock;
    const Clock::time_point start = Clock::now();
    std::unique_lock lock(mutex_);
    while (!changed_.wait_for(lock, std::chrono::milliseconds(200), [this] { return over_; })) {
      if (launcher_ != 0 && ::getppid() != launcher_) end("the launcher that started this rank has gone");
      if (seconds_since(start) > seconds_) end(fmt::format("another rank did not come within {:g} s ({})", seconds_, option_));
    }
  }
  [[noreturn]] void end(const std::string& why) const { end_here(Error(Exit::comm, where_, what_ + ": " + why, "start all ranks again")); }

  const std::string where_, what_;
  const char* const option_;
  const double seconds_;
  const pid_t launcher_;
  bool over_ = false;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::thread thread_;
};

class MpiComm final : public Comm {
 public:
  MpiComm(int rank, int size, const CommOptions& options) : Comm(rank, size, options.timeout), launcher_(options.launcher) {
    watch_launcher(options.launcher);
    const Watch watch(name(), "meeting the other ranks", "--rendezvous-timeout", options.meeting, launcher_);
    int given = 0;
    if (MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &given) != MPI_SUCCESS || given < MPI_THREAD_FUNNELED)
      throw Error(Exit::comm, name(), "MPI does not start", "check mpirun and its log");
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    int r = -1, n = -1;
    MPI_Comm_rank(MPI_COMM_WORLD, &r);
    MPI_Comm_size(MPI_COMM_WORLD, &n);
    if (r != rank || n != size)
      throw Error(Exit::comm, name(), fmt::format("MPI counts this as rank {} of {}", r, n), "start all ranks by one mpirun");
  }

 private:
  void do_gather(void* all, const void* mine, int64_t bytes) override {
    MPI_Request request;
    const int n = static_cast<int>(bytes);
    require(MPI_Iallgather(mine, n, MPI_BYTE, all, n, MPI_BYTE, MPI_COMM_WORLD, &request));
    wait_for(request);
  }

  void do_begin_gather(void* all, const void*, int64_t bytes) override {
    const int n = static_cast<int>(bytes);
    MPI_Request request;
    require(MPI_Iallgather(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, all, n, MPI_BYTE, MPI_COMM_WORLD, &request));
    begun_.push_back(request);
  }

  bool do_end_gather(bool wait) override {
    int done = 0;
    if (wait) wait_for(begun_.front());
    else require(MPI_Test(&begun_.front(), &done, MPI_STATUS_IGNORE));
    if (!wait && !done) return false;
    begun_.pop_front();
    return true;
  }

  void do_broadcast(void* data, int64_t bytes) override {
    MPI_Request request;
    require(MPI_Ibcast(data, static_cast<int>(bytes), MPI_BYTE, 0, MPI_COMM_WORLD, &request));
    wait_for(request);
  }

  void do_close() override {
    std::fflush(stdout);
    const Watch watch(name(), "the end of the run", "--comm-timeout", timeout(), launcher_);
    MPI_Finalize();
  }

  void require(int code) const {
    if (code == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING] = {};
    int length = 0;
    MPI_Error_string(code, text, &length);
    fail("MPI: " + escaped(std::string_view(text, static_cast<std::size_t>(length)), 200));
  }

  // Spins while an answer may be near, then leaves the core to others: there may be more ranks than cores.
  void wait_for(MPI_Request& request) const {
    using Clock = std::chrono::steady_clock;
    const Clock::time_point start = Clock::now();
    for (int64_t polls = 0;; ++polls) {
      int done = 0;
      require(MPI_Test(&request, &done, MPI_STATUS_IGNORE));
      if (done) return;
      const double waited = seconds_since(start);
      if (waited < 100e-6) continue;
      if (waited > timeout()) fail_late();
      if (polls % 256 == 0) require_launcher();
      std::this_thread::sleep_for(std::chrono::microseconds(waited < 10e-3 ? 20 : 500));
    }
  }

  const pid_t launcher_;
  std::deque<MPI_Request> begun_;  // gathers
};

}  // namespace

}  // namespace kava

extern "C" kava::Comm* kava_mpi_comm(int rank, int size, const kava::CommOptions& options) {
  return new kava::MpiComm(rank, size, options);
}
