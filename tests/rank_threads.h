// Runs a body as each of some ranks, on threads.
#pragma once
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "engine/device/comm_threads.h"
#include "engine/error.h"

namespace kava {

/// Returns for each rank the code and line of the Error that ended it, or "".
inline std::vector<std::string> on_rank_threads(int ranks, double timeout, const std::function<void(Comm&)>& body) {
  auto comms = make_thread_comms(ranks, timeout);
  std::vector<std::string> failed(comms.size());
  std::vector<std::thread> threads;
  for (std::size_t r = 0; r < comms.size(); ++r)
    threads.emplace_back([&, r] {
      try {
        body(*comms[r]);
        comms[r]->close();
      } catch (const Error& e) {
        failed[r] = fmt::format("{} {}", static_cast<int>(e.code()), e.what());
      }
      comms[r].reset();
    });
  for (std::thread& t : threads) t.join();
  return failed;
}

}  // namespace kava
