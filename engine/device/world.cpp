#include "engine/device/world.h"

#include <unistd.h>

#include <charconv>

#include "engine/device/comm_mpi.h"
#include "engine/device/comm_tcp.h"
#include "engine/error.h"

namespace kava {

namespace {

constexpr int kMostRanks = 65536;
constexpr int kPorts = 16;  // above the base, of which rank 0 takes one
constexpr int kMostPort = 65535 - kPorts;

[[noreturn]] void refuse(const std::string& where, const std::string& text, const std::string& what, const std::string& remedy) {
  throw Error(Exit::usage, where, "\"" + escaped(text) + "\" is no " + what, remedy);
}

int whole(const std::string& where, const std::string& text, int least, int most) {
  int n = 0;
  const char* end = text.data() + text.size();
  const auto [stop, failed] = std::from_chars(text.data(), end, n);
  if (failed != std::errc() || stop != end || n < least || n > most)
    refuse(where, text, fmt::format("whole number from {} to {}", least, most), "give one");
  return n;
}

double seconds(const std::string& where, const std::string& text) {
  double s = 0;
  const char* end = text.data() + text.size();
  const auto [stop, failed] = std::from_chars(text.data(), end, s);
  if (failed != std::errc() || stop != end || !(s > 0) || s > 1e7) refuse(where, text, "time", "give seconds above 0");
  return s;
}

class Finder {
 public:
  Finder(const RankOptions& options, const Environment& environment) : options_(options), environment_(environment) {}

  World find() {
    if (options_.rank || options_.world_size) by_options();
    else if (has("TORCHELASTIC_RUN_ID") && has("RANK") && has("WORLD_SIZE")) by_torchrun();
    else if (has("OMPI_COMM_WORLD_RANK") && has("OMPI_COMM_WORLD_SIZE")) by_mpirun();
    else if (has("SLURM_STEP_ID") && has("SLURM_PROCID")) by_srun();
    else if (has("RANK") && has("WORLD_SIZE") && whole("WORLD_SIZE", text("WORLD_SIZE"), 1, kMostRanks) > 1)
      w_.note = fmt::format(
          "one rank: RANK and WORLD_SIZE ({}) are set, but not by torchrun; give --rank and --world-size, or start it by torchrun",
          text("WORLD_SIZE"));
    else if (has("SLURM_NTASKS") && whole("SLURM_NTASKS", text("SLURM_NTASKS"), 1, kMostRanks) > 1)
      w_.note = fmt::format("one rank: the job has {} tasks, and this was not started by srun; start it by srun", text("SLURM_NTASKS"));
    if (w_.rank >= w_.size)
      throw Error(Exit::usage, name_of(w_.launcher), fmt::format("rank {} of {} cannot be", w_.rank, w_.size), "ranks count from 0");
    if (options_.local_rank) w_.local_rank = whole("--local-rank", *options_.local_rank, 0, kMostRanks);
    if (options_.rendezvous) by_rendezvous(*options_.rendezvous);
    if (options_.rendezvous_timeout) w_.rendezvous_timeout = seconds("--rendezvous-timeout", *options_.rendezvous_timeout);
    if (options_.comm_timeout) w_.comm_timeout = seconds("--comm-timeout", *options_.comm_timeout);
    return w_;
  }

 private:
  bool has(const char* name) const { return environment_(name) != nullptr; }
  std::string text(const char* name) const {
    const char* value = environment_(name);
    return value ? value : "";
  }
  int number(const char* name, int least = 0) const { return whole(name, text(name), least, kMostRanks); }

  void by_options() {
    if (!options_.rank || !options_.world_size)
      throw Error(Exit::usage, options_.rank ? "--rank" : "--world-size", "needs both --rank and --world-size", "give both");
    w_.launcher = Launcher::options;
    w_.rank = w_.local_rank = whole("--rank", *options_.rank, 0, kMostRanks - 1);
    w_.size = whole("--world-size", *options_.world_size, 1, kMostRanks);
    w_.job = "options";
    w_.host = text("MASTER_ADDR"), w_.base_port = has("MASTER_PORT") ? whole("MASTER_PORT", text("MASTER_PORT"), 1, kMostPort) : 0;
    if (w_.size > 1 && !options_.rendezvous && (w_.host.empty() || w_.base_port == 0))
      throw Error(Exit::usage, "--world-size", "needs --rendezvous HOST:PORT, where rank 0 listens",
                  "give it, or MASTER_ADDR and MASTER_PORT, the same on all ranks");
  }

  void by_torchrun() {
    w_.launcher = Launcher::torchrun;
    w_.rank = number("RANK"), w_.size = number("WORLD_SIZE", 1);
    w_.local_rank = has("LOCAL_RANK") ? number("LOCAL_RANK") : w_.rank;
    w_.host = text("MASTER_ADDR"), w_.base_port = has("MASTER_PORT") ? whole("MASTER_PORT", text("MASTER_PORT"), 1, kMostPort) : 29500;
    // The run's id is "none" where the user gives none; the port is the agents' own then.
    w_.job = fmt::format("{} {} {}", text("TORCHELASTIC_RUN_ID"), w_.base_port, text("TORCHELASTIC_RESTART_COUNT"));
  }

  void by_mpirun() {
    w_.launcher = Launcher::mpirun, w_.mpi = true;
    w_.rank = number("OMPI_COMM_WORLD_RANK"), w_.size = number("OMPI_COMM_WORLD_SIZE", 1);
    w_.local_rank = has("OMPI_COMM_WORLD_LOCAL_RANK") ? number("OMPI_COMM_WORLD_LOCAL_RANK") : w_.rank;
    w_.job = text("PMIX_NAMESPACE");
  }

  void by_srun() {
    w_.launcher = Launcher::srun, w_.mpi = has("PMIX_RANK");
    w_.rank = number("SLURM_PROCID"), w_.size = number(has("SLURM_STEP_NUM_TASKS") ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS", 1);
    w_.local_rank = has("SLURM_LOCALID") ? number("SLURM_LOCALID") : w_.rank;
    w_.host = first_host(text(has("SLURM_STEP_NODELIST") ? "SLURM_STEP_NODELIST" : "SLURM_JOB_NODELIST"));
    const std::string job = text("SLURM_JOB_ID");
    // Job ids of arrays and of several clusters are numbers too.
    int tail = 0;
    for (char c : job)
      if (c >= '0' && c <= '9') tail = (tail * 10 + (c - '0')) % 10000;
    w_.base_port = 20000 + tail;
    w_.job = job + "." + text("SLURM_STEP_ID") + "." + text("SLURM_RESTART_COUNT");
  }

  // The first of a list like "node[03-05,9],login".
  static std::string first_host(const std::string& list) {
    const std::size_t open = list.find('['), comma = list.find(',');
    if (open == std::string::npos || comma < open) return list.substr(0, comma);
    const std::size_t close = list.find_first_of(",-]", open);
    const std::size_t end = list.find(']', open);
    const std::string after = end == std::string::npos ? "" : list.substr(end + 1, list.find(',', end) - end - 1);
    return list.substr(0, open) + list.substr(open + 1, close - open - 1) + after;
  }

  void by_rendezvous(const std::string& place) {
    const std::size_t colon = place.rfind(':');
    if (colon == std::string::npos || colon == 0) refuse("--rendezvous", place, "HOST:PORT", "give both");
    w_.host = place.substr(0, colon);
    if (w_.host.size() > 2 && w_.host.front() == '[' && w_.host.back() == ']') w_.host = w_.host.substr(1, w_.host.size() - 2);
    w_.port = whole("--rendezvous", place.substr(colon + 1), 1, 65535);
  }

  const RankOptions& options_;
  const Environment& environment_;
  World w_;
};

}  // namespace

World find_world(const RankOptions& options, const Environment& environment) { return Finder(options, environment).find(); }

std::unique_ptr<Comm> join(const World& world, bool on_cpu) {
  if (world.size == 1) return std::make_unique<Comm>();
  CommOptions options;
  options.timeout = world.comm_timeout, options.meeting = world.rendezvous_timeout;
  if (world.launcher == Launcher::mpirun || world.launcher == Launcher::torchrun || world.launcher == Launcher::srun)
    options.launcher = ::getppid();
  if (on_cpu && !world.mpi)
    throw Error(Exit::usage, "--device cpu",
                fmt::format("{} ranks on the CPU need MPI, and {} has started them", world.size,
                            world.launcher == Launcher::options ? "no launcher" : name_of(world.launcher)),
                "start them by mpirun, or by srun --mpi=pmix; on GPUs give --device cuda");
  if (world.mpi) return make_mpi_comm(world.rank, world.size, options);
  TcpPlace place{world.host, {}, world.job};
  if (world.port > 0) place.ports = {world.port};
  else
    for (int i = 1; i <= kPorts; ++i) place.ports.push_back(world.base_port + i);
  return make_tcp_comm(world.rank, world.size, place, options);
}

}  // namespace kava
