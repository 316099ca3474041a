// How much memory this process may still use.
#pragma once
#include <cstdint>

namespace kava {

/// Bytes: the least of what the machine has available (/proc/meminfo), what the process's control groups leave, and what its limit on
/// address space leaves to data. The largest number where nothing is known.
int64_t available_memory();
/// The same without the limit on address space.
int64_t available_physical_memory();
/// By how much less that may be in the next process: pages that each core charges to a control group ahead of their use.
int64_t uncertain_memory();

/// Bytes that the process's limit on address space leaves; the largest number without a limit.
int64_t address_space_left();

/// Bytes of memory that the machine has.
int64_t machine_memory();
/// Bytes of this process that are in memory now.
int64_t resident_memory();
/// The most that there were.
int64_t peak_resident_memory();

}  // namespace kava
