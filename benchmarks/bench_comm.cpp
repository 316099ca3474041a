#include "benchmarks/bench_comm.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <thread>

#include "benchmarks/bench_rank_steps.h"
#include "engine/clock.h"
#include "engine/device/buffer.h"
#include "engine/device/comm_threads.h"
#include "engine/device/cuda_module.h"
#include "engine/device/ordered_sum.h"
#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/files/json.h"

namespace kava {

namespace {

constexpr int kRanks = 2, kRounds = 5;

std::string size_text(int64_t bytes) { return bytes >= 1 << 20 ? fmt::format("{} MiB", bytes >> 20) : fmt::format("{} KiB", bytes >> 10); }

// A rank of this process, on a backend of its own.
std::vector<CommRate> on_backend(Comm& comm, bool cuda, std::string& why) {
  const std::unique_ptr<Ops> ops = cuda ? make_cuda_ops(comm.rank()) : make_cpu_ops(1);
  const std::unique_ptr<DeviceLink> link = link_devices(comm, *ops, ".", why);
  if (cuda && !link) return {};
  std::vector<CommRate> rates = bench_comm(comm, *ops, !cuda ? "threads" : link->text() + (cuda_is_emulated() ? " (emulated)" : ""));
  comm.barrier("the end of the bench");  // a link that ends takes with it what another rank still waits for
  return rates;
}

}  // namespace

std::vector<CommRate> bench_comm(Comm& comm, Ops& ops, const std::string& way) {
  std::vector<CommRate> rates;
  Arena arena(ops);
  for (int64_t bytes = 64 << 10; bytes <= 64 << 20; bytes *= 4) {
    const int64_t n = bytes / 4;
    const Buffer total(ops, DType::f32, 1, n), part(ops, DType::f32, 1, n);
    ops.fill(part.tensor(), 0), ops.fill(total.tensor(), 0);
    const ArenaScope scope(arena);
    OrderedSum sum(comm, ops, arena, total.tensor(), part.tensor(), "adding");
    std::vector<double> seconds;
    for (int round = 0; round <= kRounds; ++round) {
      ops.finish();
      comm.barrier("beginning together");
      const auto start = std::chrono::steady_clock::now();
      if (DeviceLink* link = comm.link()) link->sum(std::array{part.tensor()}, "adding"), link->join();
      else sum.begin(comm.size(), true), sum.send(part.tensor()), sum.finish();
      ops.finish();
      // The first round meets memory that nobody has touched.
      if (round > 0) seconds.push_back(seconds_since(start));
    }
    std::ranges::nth_element(seconds, seconds.begin() + kRounds / 2);
    const double s = seconds[kRounds / 2], ranks = comm.size();
    rates.push_back({fmt::format("comm {} {} ranks {}", way, comm.size(), size_text(bytes)), bytes, s,
                     2 * (ranks - 1) / ranks * static_cast<double>(bytes) / s * 1e-9});
  }
  return rates;
}

std::vector<CommRate> bench_comm_here(bool cuda, std::string& why) {
  std::string ignored;
  if (cuda && cuda_devices(ignored) < kRanks) {
    why = "there is one device, and two are needed";
    return {};
  }
  auto comms = make_thread_comms(kRanks);
  std::vector<std::vector<CommRate>> rates(kRanks);
  std::vector<std::string> whys(kRanks), failed(kRanks);
  std::vector<std::thread> threads;
  for (std::size_t r = 0; r < kRanks; ++r)
    threads.emplace_back([&, r] {
      try {
        rates[r] = on_backend(*comms[r], cuda, whys[r]);
        comms[r]->close();
      } catch (const std::exception& e) {
        failed[r] = e.what();
      }
      comms[r].reset();
    });
  for (std::thread& t : threads) t.join();
  for (const std::string& f : failed)
    if (!f.empty()) throw Error(Exit::comm, "comm", f);
  why = whys[0];
  return rates[0];
}

std::string text_of(const CommRate& r) {
  return fmt::format("{:<40} {:>10.3f} ms {:>9.2f} GB/s on the bus", r.name, r.seconds * 1e3, r.rate);
}

int bench_ranks(Comm& comm, const World& world, const DeviceOptions& device, const RanksBench& what) {
  const std::unique_ptr<Ops> ops = make_ops(device, world.local_rank);
  const bool steps = what.steps && ops->name() == "cpu";
  if (!what.exchanges && !steps)
    throw Error(Exit::usage, "--filter", "finds neither comm nor, on the cpu, step, which are all that several ranks measure", "give comm");
  std::string why;
  const std::unique_ptr<DeviceLink> link = link_devices(comm, *ops, ".", why);
  Json out = Json::array();
  const auto add = [&](const std::string& name, double seconds, double rate, const char* unit) {
    out.push_back({{"name", name}, {"device", ops->name()}, {"seconds", seconds}, {"rate", rate}, {"unit", unit}});
  };
  if (what.exchanges)
    for (const CommRate& r : bench_comm(comm, *ops, link ? link->text() : world.mpi ? "mpi" : "tcp")) {
      fmt::print("{}\n", text_of(r));
      add(r.name, r.seconds, r.rate, "GB/s");
    }
  if (steps) {
    const int threads = thread_count(device);
    const RankSteps s = bench_rank_steps(comm, threads, *what.shapes);
    const std::string name = fmt::format("step {} ranks of {} threads", comm.size(), threads);
    const double samples = static_cast<double>(s.samples), rate = samples / s.ranks;
    fmt::print("{:<40} {:>10.3f} s {:>9.3f} samples/s, {:.3f} of one rank of {} threads\n", name, s.ranks, rate, s.of_alone(),
               threads * comm.size());
    fmt::print("gradients: exposed {:.4f} s ({:.2f} % of the step), hidden {:.4f} s\n", s.exposed, 100 * s.exposed_share, s.hidden);
    add(name, s.ranks, rate, "samples/s");
    out.back().update({{"of_alone", s.of_alone()}, {"exposed_share", s.exposed_share}});
  }
  comm.barrier("the end of the bench");  // a link that ends takes with it what another rank still waits for
  if (what.json && comm.leads()) write_file(*what.json, out.dump(2) + "\n");
  return 0;
}

}  // namespace kava
