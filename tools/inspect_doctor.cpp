#include "tools/inspect_doctor.h"

#include <fmt/core.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <sstream>
#include <thread>

#include "engine/clock.h"
#include "engine/cores.h"
#include "engine/device/arena.h"
#include "engine/device/buffer.h"
#include "engine/device/cuda_module.h"
#include "engine/device/host.h"
#include "engine/device/linear_group.h"
#include "engine/device/module.h"
#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/libraries.h"
#include "engine/memory.h"
#include "kernels/gpu_error.h"
#include "tools/device.h"
#include "tools/nvml.h"

namespace kava {

namespace {

namespace fs = std::filesystem;

struct DoctorCommand {
  DeviceOptions device;
  std::string folder = ".";
};

class Report {
 public:
  void ok(const std::string& name, const std::string& what) { line("ok", name, what, "nothing to do"); }
  void warn(const std::string& name, const std::string& what, const std::string& remedy) { line("warn", name, what, remedy); }
  /// needed: by the device that was asked for.
  void missing(const std::string& name, const std::string& what, const std::string& remedy, bool needed) {
    line("missing", name, what, remedy);
    lacking_ = lacking_ || needed;
  }
  int code() const { return static_cast<int>(lacking_ ? Exit::preflight : Exit::ok); }

 private:
  static void line(const char* kind, const std::string& name, const std::string& what, const std::string& remedy) {
    fmt::print("{} {}: {}; {}\n", kind, name, escaped(what, 400), escaped(remedy, 400));
  }
  bool lacking_ = false;
};

std::string first_line(const std::string& path) {
  try {
    const std::string text = read_file(path, std::size_t{1} << 20);
    return text.substr(0, text.find('\n'));
  } catch (const Error&) {
    return "";
  }
}

bool on_path(const std::string& program) {
  const char* path = std::getenv("PATH");
  std::istringstream folders(path ? path : "");
  for (std::string folder; std::getline(folders, folder, ':');)
    if (::access((fs::path(folder) / program).c_str(), X_OK) == 0) return true;
  return false;
}

void check_processor(Report& report) {
  const int cores = usable_cores(), all = static_cast<int>(std::thread::hardware_concurrency());
  const std::string threads = cores < all ? fmt::format("{} of {} threads may be used", cores, all) : fmt::format("{} threads", cores);
  const char* built = nullptr;
  bool has_more = false;
#if defined(__AVX512BF16__)
  built = "AVX-512 with bf16 products";
#elif defined(__AVX512F__)
  built = "AVX-512";
#elif defined(__AVX2__)
  built = "AVX2";
  has_more = __builtin_cpu_supports("avx512f");
#endif
  const char* remedy = "a build on this machine with KAVA_NATIVE=ON is faster";
  if (!built) report.warn("cpu", threads + ", built without AVX2", remedy);
  else if (has_more) report.warn("cpu", fmt::format("{}, built for {}, on a processor with AVX-512", threads, built), remedy);
  else report.ok("cpu", fmt::format("{}, built for {}", threads, built));
}

void check_memory(Report& report) {
  const double free = static_cast<double>(available_memory()) / 0x1p30, all = static_cast<double>(machine_memory()) / 0x1p30;
  const std::string what = fmt::format("{:.1f} GiB may be used, the machine has {:.1f}", free, all);
  if (free >= 2) report.ok("memory", what);
  else report.warn("memory", what, "close other programs or raise the limit: a small real model trains in 2 GiB");

  const std::string huge = first_line("/sys/kernel/mm/transparent_hugepage/enabled");
  if (huge.find("[always]") != std::string::npos || huge.find("[madvise]") != std::string::npos) report.ok("huge_pages", huge);
  else
    report.warn("huge_pages", huge.empty() ? "the kernel has no transparent huge pages" : huge,
                "write madvise into /sys/kernel/mm/transparent_hugepage/enabled for faster first steps");
}

void check_disk(Report& report, const std::string& folder) {
  const fs::path file = fs::path(folder) / fmt::format(".kava_doctor.{}", ::getpid());
  const auto begin = std::chrono::steady_clock::now();
  std::error_code ignored;
  try {
    for (int i = 0; i < 2; ++i) write_file(file.string(), std::string(std::size_t{1} << 20, 'k'));
    fs::remove(file, ignored);
  } catch (const Error& e) {
    fs::remove(file, ignored);
    return report.missing("disk", fmt::format("{} cannot be written, flushed and renamed in: {}", folder, e.what()),
                          "name a folder for runs with --folder DIR", true);
  }
  const double seconds = seconds_since(begin);
  const auto space = fs::space(folder, ignored);
  const double free = ignored ? 0 : static_cast<double>(space.available) / 0x1p30;
  const std::string what =
      fmt::format("{:.1f} GiB free in {}; two files of 1 MiB written, flushed and renamed in {:.0f} ms", free, folder, 1000 * seconds);
  if (free >= 1) report.ok("disk", what);
  else report.warn("disk", what, "free some space: a checkpoint of a small real model takes 0.3 GiB");
}

// The largest error of a product in bf16, as a share of the largest that rounding x, W and y and summing in f32 allow.
double product_error(Ops& ops) {
  constexpr int64_t n = 64, in = 256, outs = 96;
  const Buffer x(ops, DType::bf16, n, in), w(ops, DType::bf16, outs, in), y(ops, DType::bf16, n, outs);
  auto value = [](int64_t i, int64_t j) { return std::sin(static_cast<double>(7 * i + 3 * j + i * j % 11)); };
  for (const Buffer* b : {&x, &w}) {
    std::vector<double> host;
    for (int64_t i = 0; i < b->tensor().rows; ++i)
      for (int64_t j = 0; j < in; ++j) host.push_back(value(i + (b == &w ? 1000 : 0), j));
    from_host(ops, b->tensor(), host);
  }
  Arena arena(ops);
  ops.linear_group_fwd(arena, y.tensor(), x.tensor(), LinearGroup::plain(w.tensor()));
  const std::vector<double> a = to_host(ops, x.tensor()), b = to_host(ops, w.tensor()), c = to_host(ops, y.tensor());
  double worst = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t o = 0; o < outs; ++o) {
      double exact = 0, size = 0;
      for (int64_t k = 0; k < in; ++k) {
        const double term = a[static_cast<std::size_t>(i * in + k)] * b[static_cast<std::size_t>(o * in + k)];
        exact += term, size += std::fabs(term);
      }
      // Half a unit of bf16 in the result, and in sums of f32 at most one of its units for each term.
      const double allowed = std::fabs(exact) * 0x1p-8 + size * static_cast<double>(in) * 0x1p-24;
      const double error = std::fabs(c[static_cast<std::size_t>(i * outs + o)] - exact) / allowed;
      worst = error <= worst ? worst : error;  // NaN is worst
    }
  return worst;
}

void check_product(Report& report, const std::string& name, Ops& ops, bool needed) {
  const double error = product_error(ops);
  const std::string what = fmt::format("a bf16 product on {} is within {:.2f} of the rounding that f64 allows it", ops.name(), error);
  if (error <= 1) report.ok(name, what);
  else report.missing(name, what, "do not train here: check the build and the hardware", needed);
}

void check_cuda(Report& report, bool needed) {
  std::string why;
  if (cuda_devices(why) == 0)
    return report.missing("cuda", why, "use --device cpu, or build the preset cuda where a GPU and its driver are", needed);
  try {
    const std::unique_ptr<Ops> ops = make_cuda_ops();
    report.ok("cuda", fmt::format("{} devices of the backend {}", cuda_devices(why), ops->name()));
    check_product(report, "cuda_product", *ops, needed);
  } catch (const Error& e) {
    report.missing("cuda", e.what(), "check the driver", needed);
  } catch (const GpuError& e) {
    report.missing("cuda", e.what(), "check the driver", needed);
  }
}

void check_driver(Report& report, bool needed) {
  std::string why;
  const std::optional<DriverState> driver = read_driver(why);
  if (!driver) return report.missing("driver", why, "install NVIDIA's driver to use a GPU", needed);
  report.ok("driver", fmt::format("NVIDIA {}, {} GPUs", driver->version, driver->gpus.size()));
  for (std::size_t i = 0; i < driver->gpus.size(); ++i) {
    const GpuState& gpu = driver->gpus[i];
    const std::string name = fmt::format("gpu{}", i);
    std::string what = gpu.name;
    if (gpu.clock_mhz && gpu.most_clock_mhz) what += fmt::format(", {} of at most {} MHz", *gpu.clock_mhz, *gpu.most_clock_mhz);
    what += gpu.ecc ? (*gpu.ecc ? ", ECC on" : ", ECC off") : ", ECC not told";
    if (gpu.uncorrected.value_or(0) > 0)
      report.warn(name, fmt::format("{}, {} uncorrected memory errors", what, *gpu.uncorrected), "reset the GPU or take it out of use");
    else if (gpu.ecc == false) report.warn(name, what, "switch ECC on: a flipped bit is not seen without it");
    else report.ok(name, what);
  }
}

void check_launchers(Report& report) {
  LoadedModule mpi = load_module("libkava_mpi.so", true);
  if (!mpi.library) report.missing("mpi", mpi.why, "install openmpi-bin (to build: libopenmpi-dev); ranks meet over TCP without it", false);
  else if (!on_path("mpirun")) report.warn("mpi", "libkava_mpi.so loads, but mpirun is not on PATH", "install openmpi-bin");
  else report.ok("mpi", "libkava_mpi.so loads and mpirun is on PATH");
  const char* job = std::getenv("SLURM_JOB_ID");
  if (job) report.ok("slurm", fmt::format("in job {}", job));
  else if (on_path("srun")) report.ok("slurm", "srun is on PATH");
  else report.missing("slurm", "srun is not on PATH", "nothing is lost on one machine", false);
}

int examine(const DoctorCommand& command) {
  const std::string device = command.device.device.value_or("auto");
  if (device != "cpu" && device != "cuda" && device != "auto")
    throw Error(Exit::usage, "--device", "\"" + escaped(device) + "\" is no device", "give cpu, cuda or auto");
  Report report;
  const bool cuda = device == "cuda";
  check_processor(report);
  report.ok("libraries", libraries_text());
  check_memory(report);
  check_disk(report, command.folder);
  check_product(report, "cpu_product", *make_cpu_ops(thread_count(command.device)), true);
  check_cuda(report, cuda);
  // The emulated backend has no driver below it.
  std::string why;
  check_driver(report, cuda && !(cuda_devices(why) > 0));
  check_launchers(report);
  return report.code();
}

}  // namespace

void add_doctor_command(CLI::App& app, std::function<int()>& chosen) {
  auto command = std::make_shared<DoctorCommand>();
  CLI::App* doctor = app.add_subcommand("doctor", "Checks what this machine has of what the programs need");
  doctor->footer(
      "Lines `ok|warn|missing NAME: what; remedy`; exit 3 where something is missing that --device needs.\n"
      "Example:\n  kava_inspect doctor --device cpu --folder .");
  add_device_options(*doctor, command->device);
  doctor->add_option("--folder", command->folder, "Where runs are to lie")->capture_default_str();
  doctor->callback([command, &chosen] { chosen = [command] { return examine(*command); }; });
}

}  // namespace kava
