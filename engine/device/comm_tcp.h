// Ranks over TCP: a star whose middle is rank 0. What several ranks share where no MPI has started them: their start, what they agree on,
// and the data of devices that have no library of their own for it.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "engine/device/comm_mpi.h"

namespace kava {

struct TcpPlace {
  std::string host;        // of rank 0
  std::vector<int> ports;  // rank 0 takes the first that is free; the others try them until one answers with the same job
  std::string job;         // tells the ranks of one start from those of others
};

/// This process among the ranks that meet there. Error(code comm) naming a rank that does not come in time, (code usage) where one counts
/// the ranks differently, on every rank that is there.
std::unique_ptr<Comm> make_tcp_comm(int rank, int size, const TcpPlace& place, const CommOptions& options);

}  // namespace kava
