// Ranks over MPI, by a module of its own beside the engine: libkava_mpi.so is loaded where a launcher of MPI has started the process and
// nowhere else, so that no program needs MPI to run.
#pragma once
#include <memory>
#include <string>

#include "engine/device/comm.h"

namespace kava {

/// How ranks wait for each other.
struct CommOptions {
  double timeout = 600;  // seconds that a collective may take
  pid_t launcher = 0;    // process that started this one; 0: none to watch
  double meeting = 120;  // seconds until all have to be there
};

/// This process among the ranks that MPI's launcher has started. Error(code usage) where this build has no module for it, (code comm) where
/// MPI does not start or counts other ranks than `rank` and `size`.
std::unique_ptr<Comm> make_mpi_comm(int rank, int size, const CommOptions& options);

/// What the module exports under the name kava_mpi_comm.
using MpiCommFactory = Comm*(int rank, int size, const CommOptions& options);

}  // namespace kava
