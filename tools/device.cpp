#include "tools/device.h"

#include <algorithm>
#include <charconv>

#include "engine/cli.h"
#include "engine/cores.h"
#include "engine/device/cuda_module.h"
#include "engine/error.h"
#include "kernels/gpu_error.h"

namespace kava {

void add_device_options(CLI::App& app, DeviceOptions& options) {
  app.add_option("--device", options.device, "cpu, cuda or auto (default: auto, cuda where a device works)");
  app.add_option("--threads", options.threads, "Threads of the cpu backend, 1..4096 (default: all cores that it may use)");
}

int thread_count(const DeviceOptions& options) {
  if (!options.threads) return usable_cores();
  const std::string& text = *options.threads;
  int n = 0;
  const char* end = text.data() + text.size();
  const auto [stop, failed] = std::from_chars(text.data(), end, n);
  if (failed != std::errc() || stop != end || n < 1 || n > 4096)
    throw Error(Exit::usage, "--threads", "\"" + escaped(text) + "\" is not a number of threads", "give one from 1 to 4096");
  return n;
}

namespace {
/// Null where the cpu is to be taken; `why` says why.
std::unique_ptr<Ops> working_cuda_ops(int number, int threads, std::string& why) {
  if (cuda_is_emulated()) {
    why = cuda_name() + " runs for tests alone, with --device cuda";
    return nullptr;
  }
  if (cuda_devices(why) == 0) return nullptr;
  try {
    return make_cuda_ops(number, threads);
  } catch (const Error& e) {
    why = e.what();
  } catch (const GpuError& e) {
    why = e.what();
  }
  return nullptr;
}
}  // namespace

bool takes_cuda(const DeviceOptions& options) {
  std::string why;
  const std::string device = options.device.value_or("auto");
  return device == "cuda" || (device == "auto" && !cuda_is_emulated() && cuda_devices(why) > 0);
}

std::unique_ptr<Ops> make_ops(const DeviceOptions& options, int number) {
  const int threads = thread_count(options);
  const std::string device = options.device.value_or("auto");
  if (device == "cpu") return make_cpu_ops(threads);
  if (device == "cuda") return make_cuda_ops(number, threads);
  if (device != "auto") throw Error(Exit::usage, "--device", "\"" + escaped(device) + "\" is no device", "give cpu, cuda or auto");
  std::string why;
  if (auto ops = working_cuda_ops(number, threads, why)) return ops;
  if (options.device || (!cuda_name().empty() && !cuda_is_emulated())) print_note("device cpu: " + why);
  return make_cpu_ops(threads);
}

}  // namespace kava
