// Ports for ranks that meet on this machine.
#pragma once
#include <unistd.h>

#include <atomic>
#include <string>
#include <vector>

#include "engine/device/socket.h"

namespace kava {

/// Ports that nothing listens on now. Neighbouring processes, as ctest starts them, begin 16 apart.
inline std::vector<int> free_ports(int count) {
  static std::atomic<int> next = 20000 + static_cast<int>(::getpid()) % 1250 * 16;
  std::vector<int> ports;
  while (static_cast<int>(ports.size()) < count) {
    std::string why;
    const int port = next++;
    if (listen_on("127.0.0.1", port, why)) ports.push_back(port);
  }
  return ports;
}

}  // namespace kava
