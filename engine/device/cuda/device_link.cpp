#include "engine/device/cuda/device_link.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <future>
#include <thread>

#include "engine/cli.h"
#include "engine/clock.h"
#include "engine/device/buffer.h"
#include "engine/device/cuda/comm_nccl.h"
#include "engine/error.h"
#include "engine/no_signals.h"

namespace kava {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kAbortTime{10};
constexpr int kRanksShareADevice = 23000;  // version from which NCCL can be asked to let them

// Spins while an answer may be near, then leaves the core to others.
void pause(double waited) {
  if (waited > 100e-6) std::this_thread::sleep_for(std::chrono::microseconds(waited < 10e-3 ? 20 : 500));
}

class NcclLink final : public DeviceLink {
 public:
  NcclLink(Comm& comm, CudaOps& ops, std::unique_ptr<Nccl> nccl)
      : DeviceLink(comm), ops_(ops), runtime_(ops.runtime()), nccl_(std::move(nccl)) {}
  void start() {
    Nccl::Id id;
    guarded("starting NCCL", [&] {
      if (comm().leads()) id = nccl_->make_id();
    });
    comm().broadcast(id.bytes.data(), std::ssize(id.bytes), "starting NCCL");
    guarded("starting NCCL", [&] { nccl_->begin(comm().rank(), comm().size(), id); });
    settle();
    runtime_.set_watch([this] { watch(); });
    require_sums();
  }
  ~NcclLink() override {
    runtime_.set_watch({});
    if (!abort()) print_note(fmt::format("{}: NCCL does not end (ncclCommAbort, {} s)", comm().name(), kAbortTime.count()));
  }

  std::string text() const override {
    const int v = nccl_->version();
    return fmt::format("NCCL {}.{}.{}", v / 10000, v / 100 % 100, v % 100);
  }

  void sum(std::span<const Tensor> xs, const char* what) override {
    exchange(what, [&] {
      for (const Tensor& x : xs) {
        KAVA_CHECK(x.contiguous(), "a sum of rows with gaps");
        nccl_->all_reduce(x, runtime_.side());
      }
    });
  }

  void join() override {
    settle();
    joined_ = true;
    if (!measured_) return runtime_.join();
    end_mark();
    runtime_.mark(runtime_.stream());
    runtime_.join();
    runtime_.finish();
    // The begin and end of each exchange, and the end of what was computed beside them.
    const std::vector<double> at = runtime_.take_marks();
    double all = 0;
    for (std::size_t i = 0; i + 2 < at.size(); i += 2) all += at[i + 1] - at[i];
    const double exposed = at.size() < 3 ? 0 : std::clamp(at[at.size() - 2] - at.back(), 0.0, all);
    overlap_.exposed += exposed, overlap_.hidden += all - exposed;
  }
  void wait() override {
    while (!runtime_.joined()) watch();
  }

 private:
  // NCCL may wait there for ranks that have gone (NVIDIA/nccl, issues 863 and 1777): on a thread of its own, which keeps what it needs.
  bool abort() noexcept override {
    try {
      const NoSignals none;
      auto over = std::make_shared<std::promise<void>>();
      std::thread([nccl = nccl_, over] { nccl->abort(), over->set_value(); }).detach();
      return over->get_future().wait_for(kAbortTime) == std::future_status::ready;
    } catch (...) {  // no memory, no more threads
      return nccl_->abort(), true;
    }
  }

  template <class F>
  void guarded(const char* what, F&& call) {
    what_ = what;
    try {
      call();
    } catch (const NcclError& e) {
      fail(what, e.what());
    }
  }

  template <class F>
  void exchange(const char* what, F&& calls) {
    settle();
    end_mark();
    guarded(what, [&] {
      runtime_.fork();
      if (measured_) runtime_.mark(runtime_.side()), open_ = true;
      nccl_->group_start();
      calls();
      nccl_->group_end();
    });
    began_.reset();
    joined_ = false;
  }

  // Behind the last exchange, which lies on its stream now.
  void end_mark() {
    if (std::exchange(open_, false)) runtime_.mark(runtime_.side());
  }

  // Until the last call is done, so that what it has queued lies on its stream.
  void settle() {
    const Clock::time_point start = Clock::now();
    guarded(what_, [&] {
      while (!nccl_->done()) look_since(start);
    });
  }

  // Asked by whoever waits for the backend. The ranks' time for each other counts from when this one has made its own part.
  void watch() {
    if (nccl_->ended()) return pause(1e-3);
    guarded(what_, [&] { (void)nccl_->done(); });
    if (joined_ && runtime_.joined()) {  // the exchange is over: what is waited for is this rank's own
      look(what_, 0);
      return pause(1e-3);
    }
    if (!began_ && runtime_.forked()) began_ = Clock::now();
    look_since(began_.value_or(Clock::now()));
  }

  void look_since(Clock::time_point start) {
    const double waited = seconds_since(start);
    look(what_, waited);
    pause(waited);
  }

  // A broadcast and a sum of numbers whose result is known, before anything depends on them.
  void require_sums() {
    constexpr int64_t kCount = 1024;
    const Buffer a(ops_, DType::f32, 1, kCount), b(ops_, DType::f32, 1, kCount);
    std::vector<float> sent(kCount), wanted(kCount), got[2] = {sent, sent};
    const auto ranks = static_cast<float>(comm().size()), own = static_cast<float>(comm().rank());
    for (std::size_t i = 0; i < sent.size(); ++i)
      sent[i] = static_cast<float>(i) + own, wanted[i] = ranks * static_cast<float>(i) + ranks * (ranks - 1) / 2;
    ops_.upload(a.tensor(), sent.data()), ops_.upload(b.tensor(), sent.data());
    exchange("trying NCCL", [&] {
      nccl_->all_reduce(a.tensor(), runtime_.side());
      nccl_->broadcast(b.tensor(), runtime_.side());
    });
    join();
    ops_.download(got[0].data(), a.tensor()), ops_.download(got[1].data(), b.tensor());
    for (std::size_t i = 0; i < sent.size(); ++i)
      if (got[0][i] != wanted[i] || got[1][i] != static_cast<float>(i))
        fail(what_,
             fmt::format("element {} of a sum is {} and not {}, of a broadcast {} and not {}", i, got[0][i], wanted[i], got[1][i], i));
  }

  CudaOps& ops_;
  GpuRuntime& runtime_;
  std::shared_ptr<Nccl> nccl_;
  const char* what_ = "starting NCCL";
  std::optional<Clock::time_point> began_;
  bool joined_ = true;  // the stream waits for the last exchange
  bool open_ = false;   // an exchange has its first mark and not its last
};

// Why ranks with these devices have no NCCL; "" where they have. devices: "HOST ADDRESS" of each, "" and the reason where one has no
// library.
std::string obstacle(const std::vector<std::string>& devices, const std::vector<std::string>& reasons, const std::vector<int>& versions) {
  const char* shared = std::getenv("NCCL_MULTI_RANK_GPU_ENABLE");
  for (std::size_t r = 0; r < devices.size(); ++r) {
    if (!reasons[r].empty()) return fmt::format("rank {}: {}", r, reasons[r]);
    if (versions[r] != versions[0]) return fmt::format("rank {} has NCCL {}, rank 0 has {}", r, versions[r], versions[0]);
    const auto first = static_cast<std::size_t>(std::ranges::find(devices, devices[r]) - devices.begin());
    if (first != r && (versions[r] < kRanksShareADevice || !shared || std::strcmp(shared, "1") != 0))
      return fmt::format("ranks {} and {} share a device", first, r);
  }
  return "";
}

}  // namespace

std::unique_ptr<DeviceLink> make_device_link(Comm& comm, CudaOps& ops, std::string& why) {
  std::string reason;
  std::unique_ptr<Nccl> nccl = Nccl::open(reason);
  char host[256] = {};
  ::gethostname(host, sizeof host - 1);
  const std::vector<std::string> devices = comm.gather(fmt::format("{} {}", host, ops.runtime().info().address), "naming the devices"),
                                 reasons = comm.gather(reason, "looking for NCCL");
  std::vector<int> versions(devices.size());
  const int version = nccl ? nccl->version() : 0;
  comm.gather(versions.data(), &version, sizeof version, "comparing NCCL");
  why = obstacle(devices, reasons, versions);
  if (!why.empty()) return nullptr;
  auto link = std::make_unique<NcclLink>(comm, ops, std::move(nccl));
  link->start();
  return link;
}

}  // namespace kava
