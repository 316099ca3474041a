#include "tools/nvml.h"

#include <dlfcn.h>
#include <fmt/core.h>

namespace kava {

namespace {

// The parts of nvml.h that are used; its functions return 0 where they succeed.
using Device = void*;
constexpr int kClockSm = 1, kUncorrected = 1, kSinceLoaded = 0;

struct Library {
  void* handle = nullptr;
  ~Library() {
    if (handle) dlclose(handle);
  }

  template <class... A>
  bool call(const char* name, A... arguments) const {
    auto* f = reinterpret_cast<int (*)(A...)>(dlsym(handle, name));
    return f && f(arguments...) == 0;
  }
};

template <class V, class... A>
std::optional<V> asked(const Library& library, const char* name, A... arguments) {
  V value = {};
  if (!library.call(name, arguments..., &value)) return std::nullopt;
  return value;
}

GpuState state_of(const Library& library, unsigned index) {
  GpuState gpu;
  Device device = nullptr;
  if (!library.call("nvmlDeviceGetHandleByIndex_v2", index, &device)) return gpu;
  char name[96] = {};
  if (library.call("nvmlDeviceGetName", device, static_cast<char*>(name), static_cast<unsigned>(sizeof name))) gpu.name = name;
  int now = 0, pending = 0;
  if (library.call("nvmlDeviceGetEccMode", device, &now, &pending)) gpu.ecc = now != 0;
  gpu.uncorrected = asked<unsigned long long>(library, "nvmlDeviceGetTotalEccErrors", device, kUncorrected, kSinceLoaded);
  gpu.clock_mhz = asked<unsigned>(library, "nvmlDeviceGetClockInfo", device, kClockSm);
  gpu.most_clock_mhz = asked<unsigned>(library, "nvmlDeviceGetMaxClockInfo", device, kClockSm);
  return gpu;
}

}  // namespace

std::optional<DriverState> read_driver(std::string& why) {
  const Library library{dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL)};
  why = "libnvidia-ml.so.1 is not there: no NVIDIA driver is installed";
  if (!library.handle) return std::nullopt;
  why = "libnvidia-ml.so.1 does not reach the driver";
  if (!library.call("nvmlInit_v2")) return std::nullopt;
  DriverState driver;
  char version[96] = {};
  if (library.call("nvmlSystemGetDriverVersion", static_cast<char*>(version), static_cast<unsigned>(sizeof version)))
    driver.version = version;
  for (unsigned i = 0, n = asked<unsigned>(library, "nvmlDeviceGetCount_v2").value_or(0); i < n; ++i)
    driver.gpus.push_back(state_of(library, i));
  library.call("nvmlShutdown");
  return driver;
}

}  // namespace kava
