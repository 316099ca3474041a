#include "engine/device/cuda/runtime.h"
#include "engine/error.h"

namespace kava {

std::string why_no_device(int driver, bool is_stub, bool shows_none, const char* status) {
  constexpr int kOldestDriver = 13000;
  if (is_stub) return "the library path holds the toolkit's link stub in the driver's place: take stubs/ out of it";
  if (driver == 0) return "no NVIDIA driver is loaded";
  if (driver < kOldestDriver)
    return fmt::format("the driver serves CUDA {}.{}, and {}.0 is needed (driver 580 or newer)", driver / 1000, driver % 1000 / 10,
                       kOldestDriver / 1000);
  return shows_none ? "the driver shows no device" : status;
}

void require_device(int device, int count, const std::string& why) {
  if (device >= count)
    throw Error(Exit::preflight, "--device", count == 0 ? why : fmt::format("device {} of {}", device, count), "use --device cpu");
}

void require_capability(const GpuInfo& info) {
  constexpr int kOldest = 80;
  if (info.compute_capability < kOldest)
    throw Error(Exit::preflight, "--device",
                fmt::format("{} has compute capability {}.{}, and the kernels need {}.0 or newer", info.name, info.compute_capability / 10,
                            info.compute_capability % 10, kOldest / 10),
                "use --device cpu");
}

}  // namespace kava
