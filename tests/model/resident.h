// The highest memory that this process has had in a stretch of a test.
#pragma once
#include <cstdint>
#include <fstream>
#include <string>

namespace kava {

/// A line of /proc/self/status in bytes: VmRSS, VmHWM.
inline std::int64_t status_bytes(const std::string& key) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);)
    if (line.starts_with(key + ":")) return std::stoll(line.substr(key.size() + 1)) * 1024;
  return 0;
}

/// Makes VmHWM that of now, whatever other tests of the process have taken. False where /proc/self/clear_refs cannot be written.
inline bool forget_highest() {
  std::ofstream file("/proc/self/clear_refs");
  file << "5";
  file.flush();
  return file.good();
}

}  // namespace kava
