#include "engine/memory.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <limits>

#include "engine/system_files.h"

namespace kava {

namespace {

constexpr int64_t kUnknown = std::numeric_limits<int64_t>::max();

// What a control group leaves: its limit less what it uses, without the file cache that it can drop, and less what nobody plans but counts
// there: tables of pages, stacks, the system's buffers. A group that is full by a page ends its process.
int64_t left_in(const ControlGroup& group) {
  const auto limit = number_in(group.folder + (group.second ? "memory.max" : "memory.limit_in_bytes"), ""),
             usage = number_in(group.folder + (group.second ? "memory.current" : "memory.usage_in_bytes"), "");
  if (!limit || !usage) return kUnknown;
  constexpr int64_t kUnplanned = int64_t{16} << 20;
  const char* cache = group.second ? "inactive_file" : "total_inactive_file";
  return *limit - *limit / 64 - kUnplanned - *usage + number_in(group.folder + "memory.stat", cache).value_or(0);
}

int64_t left_in_groups() {
  int64_t least = kUnknown;
  for (const ControlGroup& group : control_groups("memory")) least = std::min(least, left_in(group));
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

int64_t uncertain_memory() {
  constexpr int64_t kPagesAhead = 64;  // MEMCG_CHARGE_BATCH of Linux
  return kPagesAhead * sysconf(_SC_PAGESIZE) * sysconf(_SC_NPROCESSORS_ONLN);
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
