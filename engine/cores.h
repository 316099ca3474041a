// The cores that this process may use.
#pragma once
#include <vector>

namespace kava {

/// The numbers of those that it is bound to (by taskset, Slurm or mpirun), ascending; all of the machine where nothing binds it.
std::vector<int> allowed_cores();

/// How many threads run at once: on those, or where its control groups give it less time than they have (as a container's may), in that
/// time, in whole cores and rounded up. At least 1.
int usable_cores();

}  // namespace kava
