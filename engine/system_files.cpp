#include "engine/system_files.h"

#include <fmt/format.h>

#include <charconv>
#include <fstream>

namespace kava {

std::optional<int64_t> number_in(const std::string& path, const std::string& key, int64_t unit) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with(key)) continue;
    const auto digits = line.find_first_not_of(": \t", key.size());
    int64_t n = 0;
    if (digits == std::string::npos || std::from_chars(line.data() + digits, line.data() + line.size(), n).ec != std::errc())
      return std::nullopt;
    return n * unit;
  }
  return std::nullopt;
}

std::vector<ControlGroup> control_groups(const std::string& controller) {
  const std::string root = "/sys/fs/cgroup", first_root = root + "/" + controller;
  std::vector<ControlGroup> groups = {{first_root + "/", false}};
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {  // HIERARCHY:CONTROLLERS:/GROUP
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == line.npos) continue;
    const std::string controllers = fmt::format(",{},", line.substr(first + 1, second - first - 1));
    const bool of_second = controllers == ",,";
    if (!of_second && controllers.find("," + controller + ",") == controllers.npos) continue;
    std::string group = line.substr(second + 1);
    if (group == "/") group.clear();
    for (;; group.resize(group.rfind('/'))) {
      groups.push_back({(of_second ? root : first_root) + group + "/", of_second});
      if (group.find('/') == group.npos) break;
    }
  }
  return groups;
}

}  // namespace kava
