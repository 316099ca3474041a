#include "engine/cores.h"

#include <sched.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <thread>

#include "engine/system_files.h"

namespace kava {

std::vector<int> allowed_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cores;
  if (::sched_getaffinity(0, sizeof set, &set) == 0) {
    for (int i = 0; i < CPU_SETSIZE; ++i)
      if (CPU_ISSET(i, &set)) cores.push_back(i);
  } else {  // a machine with more of them than the set has room for
    cores.resize(std::max(1u, std::thread::hardware_concurrency()));
    std::iota(cores.begin(), cores.end(), 0);
  }
  return cores;
}

int usable_cores() {
  int64_t cores = static_cast<int64_t>(allowed_cores().size());
  for (const ControlGroup& group : control_groups("cpu")) {
    // Microseconds of processor time in each period; "max", -1 or no file without a limit.
    const std::string file = group.folder + (group.second ? "cpu.max" : "cpu.cfs_quota_us");
    const int64_t quota = number_in(file, "").value_or(-1);
    if (quota <= 0) continue;
    const auto period = group.second ? number_in(file, std::to_string(quota)) : number_in(group.folder + "cpu.cfs_period_us", "");
    if (period && *period > 0) cores = std::min(cores, (quota + *period - 1) / *period);
  }
  return static_cast<int>(std::max<int64_t>(1, cores));
}

}  // namespace kava
