#include "tools/device.h"

#include <algorithm>
#include <charconv>
#include <thread>

#include "engine/device/cuda_module.h"
#include "engine/error.h"

namespace kava {

void add_device_options(CLI::App& app, DeviceOptions& options) {
  app.add_option("--device", options.device, "cpu, cuda or auto")->capture_default_str();
  app.add_option("--threads", options.threads, "Threads of the cpu backend, 1..4096 (default: all cores)");
}

int thread_count(const DeviceOptions& options) {
  if (!options.threads) return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  const std::string& text = *options.threads;
  int n = 0;
  const char* end = text.data() + text.size();
  const auto [stop, failed] = std::from_chars(text.data(), end, n);
  if (failed != std::errc() || stop != end || n < 1 || n > 4096)
    throw Error(Exit::usage, "--threads", "\"" + escaped(text) + "\" is not a number of threads", "give one from 1 to 4096");
  return n;
}

std::unique_ptr<Ops> make_ops(const DeviceOptions& options, int number) {
  const int threads = thread_count(options);
  if (options.device == "cpu" || options.device == "auto") return make_cpu_ops(threads);
  if (options.device == "cuda") {
    std::string why;
    return make_cuda_ops(number % std::max(1, cuda_devices(why)));
  }
  throw Error(Exit::usage, "--device", "\"" + escaped(options.device) + "\" is no device", "give cpu, cuda or auto");
}

}  // namespace kava
