#include "engine/memory.h"

#include <fmt/format.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <limits>
#include <optional>
#include <string>

namespace kava {

namespace {

constexpr int64_t kUnknown = std::numeric_limits<int64_t>::max();

// The number after `key` in a file, times `unit`; the first number of the file where the key is empty.
std::optional<int64_t> number_in(const std::string& path, const std::string& key, int64_t unit = 1) {
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

// The files of a hierarchy of control groups.
struct Groups {
  std::string root;
  const char *limit, *usage, *cache;  // of the last: its key in memory.stat
};
const Groups kFirst = {"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"},
             kSecond = {"/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"};

// What a control group leaves: its limit less what it uses, without the file cache that it can drop, and less what nobody plans but counts
// there: tables of pages, stacks, the system's buffers. A group that is full by a page ends its process.
int64_t left_in_group(const Groups& groups, const std::string& group) {
  const std::string folder = groups.root + group + "/";
  const auto limit = number_in(folder + groups.limit, ""), usage = number_in(folder + groups.usage, "");
  if (!limit || !usage) return kUnknown;
  constexpr int64_t kUnplanned = int64_t{16} << 20;
  return *limit - *limit / 64 - kUnplanned - *usage + number_in(folder + "memory.stat", groups.cache).value_or(0);
}

int64_t left_in_groups() {
  int64_t least = left_in_group(kFirst, "");
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {  // HIERARCHY:CONTROLLERS:/GROUP
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == line.npos) continue;
    const std::string controllers = fmt::format(",{},", line.substr(first + 1, second - first - 1));
    if (controllers != ",," && controllers.find(",memory,") == controllers.npos) continue;
    const Groups& groups = controllers == ",," ? kSecond : kFirst;
    // Every group on the way to the root may have a limit.
    std::string group = line.substr(second + 1);
    if (group == "/") group.clear();
    for (;; group.resize(group.rfind('/'))) {
      least = std::min(least, left_in_group(groups, group));
      if (group.find('/') == group.npos) break;
    }
  }
  return least;
}

}  // namespace

int64_t address_space_left() {
  rlimit limit = {};
  if (::getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return kUnknown;
  const int64_t used = number_in("/proc/self/status", "VmSize", 1024).value_or(0);
  return std::max<int64_t>(0, static_cast<int64_t>(limit.rlim_cur) - used);
}

int64_t available_physical_memory() {
  const int64_t machine = number_in("/proc/meminfo", "MemAvailable", 1024).value_or(kUnknown);
  return std::max<int64_t>(0, std::min(machine, left_in_groups()));
}

int64_t available_memory() { return std::min(available_physical_memory(), address_space_left() / 4 * 3); }

int64_t machine_memory() { return sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE); }

int64_t resident_memory() { return number_in("/proc/self/status", "VmRSS", 1024).value_or(0); }

int64_t peak_resident_memory() {
  rusage use = {};
  ::getrusage(RUSAGE_SELF, &use);
  return static_cast<int64_t>(use.ru_maxrss) << 10;
}

}  // namespace kava
