// Collectives, on ranks that are threads: what each rank gets, and how a rank that is gone or late is told of.
#include <algorithm>
#include <atomic>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cmath>
#include <map>
#include <thread>

#include "engine/device/comm_threads.h"
#include "engine/device/host.h"
#include "engine/device/ordered_sum.h"
#include "engine/device/world.h"
#include "engine/error.h"
#include "tests/rank_threads.h"

using namespace kava;
using Catch::Matchers::ContainsSubstring;

namespace {

std::string failure_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& e) {
    return fmt::format("{} {}", static_cast<int>(e.code()), e.what());
  }
  return "";
}

}  // namespace

TEST_CASE("a collective gives every rank what all ranks brought") {
  for (int n : {1, 2, 3, 5}) {
    INFO(n);
    std::vector<std::vector<std::string>> texts(static_cast<std::size_t>(n));
    std::vector<std::string> said(texts.size()), failed = on_rank_threads(n, 60, [&](Comm&comm) {
                                                   const auto r = static_cast<std::size_t>(comm.rank());
                                                   texts[r] = comm.gather(std::string(r * 3, static_cast<char>('a' + r)), "gathering");
                                                   said[r] = comm.broadcast(fmt::format("of rank {}", r), "saying");
                                                   if (comm.any(false, "asking")) throw Error(Exit::internal, "", "nobody said so");
                                                   if (!comm.any(comm.rank() == n - 1, "asking"))
                                                     throw Error(Exit::internal, "", "the last rank said so");
                                                 });
    for (const std::string& f : failed) CHECK(f == "");
    for (const auto& t : texts) {
      CHECK(t == texts[0]);
      REQUIRE(t.size() == static_cast<std::size_t>(n));
      for (std::size_t r = 0; r < t.size(); ++r) CHECK(t[r] == std::string(r * 3, static_cast<char>('a' + r)));
    }
    for (const std::string& s : said) CHECK(s == "of rank 0");
  }
}

TEST_CASE("texts of any length go between ranks, and nothing of them where a process is alone") {
  const std::string text((std::size_t{70} << 20) + 13, 'x');
  for (int n : {1, 2}) {
    INFO(n);
    std::vector<char> right(static_cast<std::size_t>(n));
    for (const std::string& f : on_rank_threads(n, 60, [&](Comm& comm) {
           const std::vector<std::string> all = comm.gather(comm.leads() ? text : "short", "gathering");
           right[static_cast<std::size_t>(comm.rank())] =
               comm.broadcast(comm.leads() ? text : "", "saying") == text && all[0] == text &&
               std::ranges::all_of(all.begin() + 1, all.end(), [](const std::string& t) { return t == "short"; });
         }))
      CHECK(f == "");
    CHECK(std::ranges::count(right, 1) == n);
  }
}

TEST_CASE("parts are added in the order of the ranks, whatever their number and length") {
  // Sums that depend on their order: large, small and cancelling values.
  for (const int64_t length : {int64_t{1}, int64_t{1000}, (int64_t{5} << 19) + 17}) {
    INFO(length);
    constexpr int kParts = 6;
    auto value = [](int part, int64_t i) {
      return static_cast<float>((part % 2 ? -1 : 1) * (1e7 / (part + 1)) + 0.37 * static_cast<double>(i % 101));
    };
    std::vector<double> expected(static_cast<std::size_t>(length));
    for (int64_t i = 0; i < length; ++i) {
      float sum = value(0, i);
      for (int p = 1; p < kParts; ++p) sum += value(p, i);
      expected[static_cast<std::size_t>(i)] = sum;
    }
    for (int n : {1, 2, 3, 4}) {
      INFO(n);
      std::vector<std::vector<double>> totals(static_cast<std::size_t>(n));
      const auto failed = on_rank_threads(n, 60, [&](Comm& comm) {
        const auto ops = make_cpu_ops(1);
        Arena arena(*ops);
        const Tensor total = arena.alloc(DType::f32, 1, length), part = arena.alloc(DType::f32, 1, length);
        OrderedSum sum(comm, *ops, arena, total, part, "adding");
        for (int first = 0; first < kParts; first += n) {
          const int mine = first + comm.rank();
          sum.begin(std::min(n, kParts - first), first == 0);
          // What is sent later is made later.
          for (const auto& [begin, end] : {std::pair(length / 3, length), {int64_t{0}, length / 3}}) {
            for (int64_t i = begin; i < end; ++i) part.as<float>()[i] = mine < kParts ? value(mine, i) : std::nanf("");
            if (begin < end) sum.send(part.col_range(begin, end));
          }
          sum.finish();
        }
        totals[static_cast<std::size_t>(comm.rank())] = to_host(*ops, total);
      });
      for (const std::string& f : failed) CHECK(f == "");
      for (const auto& t : totals) CHECK(t == expected);
    }
  }
}

TEST_CASE("a rank that goes without the others is named by them, one that is late is waited for and then told of") {
  auto failed = on_rank_threads(3, 60, [](Comm& comm) {
    comm.set_place("step 7");
    if (comm.rank() == 1) throw Error(Exit::write, "file", "the disk is full");
    comm.barrier("adding gradients");
  });
  CHECK(failed[1] == "7 file: the disk is full");
  for (std::size_t r : {0, 2})
    CHECK(failed[r] ==
          fmt::format("6 rank {} of 3: adding gradients, step 7: rank 1 has gone; the last checkpoint is whole: go on with --resume", r));
  std::atomic<bool> others_failed = false;
  failed = on_rank_threads(2, 0.2, [&](Comm& comm) {
    if (comm.rank() == 0) {
      const std::string mine = failure_of([&] { comm.barrier("agreeing"); });
      others_failed = true;
      throw Error(Exit::comm, "", mine);
    }
    while (!others_failed) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
  CHECK_THAT(failed[0], ContainsSubstring("6 rank 0 of 2: agreeing: another rank did not come within 0.2 s (--comm-timeout)"));
  CHECK_THAT(failed[1], ContainsSubstring("rank 0 has gone"));
}

namespace {

World world_of(const std::map<std::string, std::string>& environment, const RankOptions& options = {}) {
  return find_world(options, [&](const char* name) {
    const auto found = environment.find(name);
    return found == environment.end() ? nullptr : found->second.c_str();
  });
}

}  // namespace

TEST_CASE("ranks are those of the options, else of torchrun, mpirun, a step of srun") {
  const std::map<std::string, std::string> mpirun = {{"OMPI_COMM_WORLD_RANK", "1"},
                                                     {"OMPI_COMM_WORLD_SIZE", "4"},
                                                     {"OMPI_COMM_WORLD_LOCAL_RANK", "0"},
                                                     {"PMIX_RANK", "1"},
                                                     {"PMIX_NAMESPACE", "77"}};
  World w = world_of(mpirun);
  CHECK((w.launcher == Launcher::mpirun && w.mpi && w.rank == 1 && w.size == 4 && w.local_rank == 0 && w.job == "77"));
  std::map<std::string, std::string> torchrun = mpirun;
  torchrun.insert({{"TORCHELASTIC_RUN_ID", "x"},
                   {"TORCHELASTIC_RESTART_COUNT", "2"},
                   {"RANK", "2"},
                   {"WORLD_SIZE", "3"},
                   {"LOCAL_RANK", "0"},
                   {"MASTER_ADDR", "localhost"},
                   {"MASTER_PORT", "29400"}});
  w = world_of(torchrun);
  CHECK((w.launcher == Launcher::torchrun && !w.mpi && w.rank == 2 && w.size == 3 && w.host == "localhost" && w.base_port == 29400));
  CHECK(w.job == "x 29400 2");
  RankOptions options;
  options.rank = "0", options.world_size = "2", options.rendezvous = "[::1]:4000", options.comm_timeout = "2.5";
  w = world_of(torchrun, options);
  CHECK((w.launcher == Launcher::options && w.rank == 0 && w.size == 2 && w.host == "::1" && w.port == 4000 && w.comm_timeout == 2.5));
  std::map<std::string, std::string> slurm = {
      {"SLURM_PROCID", "0"}, {"SLURM_LOCALID", "0"}, {"SLURM_NTASKS", "2"}, {"SLURM_JOB_ID", "123456"}};
  w = world_of(slurm);
  CHECK((w.launcher == Launcher::none && w.size == 1));
  CHECK_THAT(w.note, ContainsSubstring("start it by srun"));
  slurm.insert({{"SLURM_STEP_ID", "0"}, {"SLURM_STEP_NUM_TASKS", "2"}, {"SLURM_STEP_NODELIST", "gpu[07-09,12].cluster,x"}});
  w = world_of(slurm);
  CHECK((w.launcher == Launcher::srun && w.size == 2 && w.host == "gpu07.cluster" && w.base_port == 23456 && w.note.empty()));
  slurm["SLURM_STEP_NODELIST"] = "one,two";
  CHECK(world_of(slurm).host == "one");
  CHECK(world_of({}).size == 1);
  w = world_of({{"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "localhost"}, {"MASTER_PORT", "29400"}});
  CHECK((w.launcher == Launcher::none && w.size == 1));
  CHECK_THAT(w.note, ContainsSubstring("give --rank and --world-size"));
  CHECK(world_of({{"RANK", "0"}, {"WORLD_SIZE", "1"}}).note.empty());
}

TEST_CASE("ranks that cannot be are refused with the name of what says so") {
  auto refusal = [](const std::map<std::string, std::string>& environment, const RankOptions& options = {}) {
    return failure_of([&] { world_of(environment, options); });
  };
  RankOptions o;
  o.rank = "1";
  CHECK_THAT(refusal({}, o), ContainsSubstring("2 --rank: needs both"));
  o.world_size = "1", o.rendezvous = "h:1";
  CHECK_THAT(refusal({}, o), ContainsSubstring("rank 1 of 1 cannot be"));
  o.world_size = "two";
  CHECK_THAT(refusal({}, o), ContainsSubstring("2 --world-size: \"two\""));
  o.world_size = "2", o.rendezvous = "nowhere";
  CHECK_THAT(refusal({}, o), ContainsSubstring("2 --rendezvous: \"nowhere\" is no HOST:PORT"));
  o.rendezvous = "host:70000";
  CHECK_THAT(refusal({}, o), ContainsSubstring("2 --rendezvous: \"70000\""));
  o.rendezvous = "host:70", o.comm_timeout = "-1";
  CHECK_THAT(refusal({}, o), ContainsSubstring("2 --comm-timeout: \"-1\""));
  CHECK_THAT(refusal({{"OMPI_COMM_WORLD_RANK", "x"}, {"OMPI_COMM_WORLD_SIZE", "2"}}), ContainsSubstring("2 OMPI_COMM_WORLD_RANK: \"x\""));
}
