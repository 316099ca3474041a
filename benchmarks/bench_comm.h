// What ranks move between each other a second.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "benchmarks/bench_shapes.h"
#include "engine/device/world.h"
#include "tools/device.h"

namespace kava {

struct CommRate {
  std::string name;  // "comm mpi 2 ranks 4 MiB"
  int64_t bytes = 0;
  double seconds = 0;  // of a sum among all ranks, the median
  double rate = 0;     // bus bandwidth: 2 (N-1)/N bytes a second, in GB/s
};

/// Sums of 64 KiB to 64 MiB of f32 as a training step makes them; every rank calls it. `way` names what moves them.
std::vector<CommRate> bench_comm(Comm& comm, Ops& ops, const std::string& way);

/// The same on two ranks of this process: threads, on the cpu, or two devices linked by NCCL where this build has a cuda backend that is
/// asked for and there are two; without them nothing, and `why`.
std::vector<CommRate> bench_comm_here(bool cuda, std::string& why);

/// A line of it.
std::string text_of(const CommRate& rate);

struct RanksBench {
  bool exchanges = false, steps = false;
  const Shapes* shapes = nullptr;  // of the steps
  std::optional<std::string> json;
};

/// What several ranks that a launcher has started exchange, and their steps on the cpu. Prints it, and writes it to `json`.
int bench_ranks(Comm& comm, const World& world, const DeviceOptions& device, const RanksBench& what);

}  // namespace kava
