// Which of how many ranks this process is, as the options or the launcher say it: torchrun, mpirun or srun.
#pragma once
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "engine/choice.h"
#include "engine/device/comm.h"

namespace kava {

KAVA_CHOICE(Launcher, none, options, torchrun, mpirun, srun)

/// What the options say of the ranks, as text, so that a fault is reported in the words of the other errors.
struct RankOptions {
  std::optional<std::string> rank, world_size, local_rank, rendezvous, rendezvous_timeout, comm_timeout;
};

struct World {
  Launcher launcher = Launcher::none;
  int rank = 0, size = 1, local_rank = 0;
  bool mpi = false;  // a launcher of MPI has started it
  std::string host;  // of rank 0, where the launcher or --rendezvous says it
  int port = 0;      // of --rendezvous; 0: one of the 16 above base_port
  int base_port = 0;
  std::string job;                                      // the same on all ranks of one start, and on those of no other
  double rendezvous_timeout = 120, comm_timeout = 600;  // seconds
  std::string note;                                     // something a person wants to know
};

using Environment = std::function<const char*(const char* name)>;  // like getenv

/// From the options where they name ranks, else torchrun, else mpirun, else a step of srun; else this process is alone. Error(code usage)
/// for a number that is none, or ranks that cannot be.
World find_world(const RankOptions& options, const Environment& environment);

/// This process among its ranks. `on_cpu`: MPI is what moves data. Error(code usage) where there is no MPI for that, (code comm) where the
/// ranks do not find each other.
std::unique_ptr<Comm> join(const World& world, bool on_cpu);

}  // namespace kava
