// What the driver's management library tells of the GPUs; loaded at run time, so that nothing is linked against it.
#pragma once
#include <optional>
#include <string>
#include <vector>

namespace kava {

struct GpuState {
  std::string name;
  std::optional<bool> ecc;                            // nothing where the GPU does not say
  std::optional<unsigned long long> uncorrected;      // memory errors since the driver was loaded
  std::optional<unsigned> clock_mhz, most_clock_mhz;  // of the multiprocessors, now and at most
};

struct DriverState {
  std::string version;
  std::vector<GpuState> gpus;
};

/// Nothing, and `why` in a line, where the library is not there or does not answer.
std::optional<DriverState> read_driver(std::string& why);

}  // namespace kava
