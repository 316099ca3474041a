// How much memory this process may still use.
#pragma once
#include <cstdint>

namespace kava {

/// Bytes: the least of what the machine has available (/proc/meminfo), what the process's control groups leave, and what its limit on
/// address space leaves. The largest number where nothing is known.
int64_t available_memory();

}  // namespace kava
