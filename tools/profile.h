// --profile of kava_train: where the time of a run goes, op by op.
#pragma once
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "engine/device/comm.h"
#include "engine/device/op_observer.h"

namespace kava {

/// Every op is waited for, so that its time is its own; no byte of the run changes.
class Profile final : public OpObserver {
 public:
  /// Measures the machine's ceilings, then watches `ops`, and must outlive what is called of it. storage: of the run's products.
  Profile(Ops& ops, DType storage);
  void before(const OpCall&) override;
  void after(const OpCall& call) override;

  /// The ops by their time: calls, seconds, their share, FLOPs, bytes, and the share that is reached of the ceiling that is nearer: the
  /// rate of a large product, or that of a copy that no cache holds. Bytes are those of the tensors that an op names, each once.
  std::string table() const;
  /// What the ranks have exchanged, by operation, and how long sums of gradients were hidden behind other work, and exposed.
  static std::string table(const Comm& comm);
  /// The calls in Chrome's trace format (chrome://tracing, Perfetto), the first kMostEvents of them. Error(code write).
  void write_trace(const std::filesystem::path& file) const;

  static constexpr std::size_t kMostEvents = 200'000;

 private:
  using Clock = std::chrono::steady_clock;
  struct Total {
    int64_t calls = 0;
    double seconds = 0, flops = 0, bytes = 0;
  };
  struct Event {
    const char* name;
    double begin, seconds, flops, bytes;
  };

  double of_ceiling(double flops, double bytes, double seconds) const;

  Ops& ops_;
  DType storage_;
  double matrix_rate_, copy_rate_;  // per second
  Clock::time_point first_, begin_;
  std::map<std::string, Total> totals_;
  std::vector<Event> events_;
};

}  // namespace kava
