// Ranks that are threads of one process, for tests.
#pragma once
#include <memory>
#include <vector>

#include "engine/device/comm.h"

namespace kava {

/// One Comm a rank, each for a thread of its own. `timeout`: seconds that a collective may take. A rank whose Comm is destroyed without
/// close() is gone to the others.
std::vector<std::unique_ptr<Comm>> make_thread_comms(int size, double timeout = 600);

}  // namespace kava
