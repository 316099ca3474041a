// What the system says of a process in files under /proc and /sys.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace kava {

/// The number after `key` in a file, times `unit`; the first number of the file where the key is empty.
std::optional<int64_t> number_in(const std::string& path, const std::string& key, int64_t unit = 1);

struct ControlGroup {
  std::string folder;  // with a / at its end
  bool second;         // whether its files are those of version 2
};
/// The groups that may limit this process by `controller` ("memory", "cpu"): its own and every one on the way to the root, of both
/// versions' hierarchies.
std::vector<ControlGroup> control_groups(const std::string& controller);

}  // namespace kava
