#include "engine/device/cuda_module.h"

#include <cstdlib>
#include <filesystem>

#include "engine/device/comm.h"
#include "engine/device/module.h"
#include "engine/error.h"
#include "engine/files/paths.h"
#include "engine/memory.h"

namespace kava {

namespace {

struct Loaded {
  const CudaModule* module = nullptr;
  std::string why;  // it is not there
};

Loaded load() {
  LoadedModule library = load_module("libkava_cuda.so");
  const auto* module = static_cast<const CudaModule*>(library.find("kava_cuda_module"));
  return {module, library.why};
}

const Loaded& loaded() {
  static const Loaded m = load();
  return m;
}

}  // namespace

std::string cuda_name() { return loaded().module ? loaded().module->name : ""; }
bool cuda_is_emulated() { return loaded().module && loaded().module->emulated; }

int cuda_devices(std::string& why) {
  const Loaded& m = loaded();
  if (m.module) return m.module->devices(why);
  why = m.why;
  return 0;
}

std::string cuda_device_text(int device) {
  std::string why;
  return cuda_devices(why) > 0 ? loaded().module->device_text(device) : why;
}

std::unique_ptr<Ops> make_cuda_ops(int number, int threads) {
  std::string why;
  const int count = cuda_devices(why);
  if (count == 0) throw Error(Exit::preflight, "--device", why, "use --device cpu");
  return std::unique_ptr<Ops>(loaded().module->ops(number % count, threads));
}

std::unique_ptr<Ops> make_dry_cuda_ops() { return std::unique_ptr<Ops>(loaded().module ? loaded().module->dry_ops() : nullptr); }

CudaInside cuda_inside(Ops& ops) {
  const CudaModule* cuda = loaded().module;
  return cuda && ops.name() == cuda->name ? cuda->inside(ops) : CudaInside{};
}

std::string device_address(const Ops& ops) {
  const CudaModule* cuda = loaded().module;
  return cuda && ops.name() == cuda->name && !ops.dry() ? cuda->address(ops) : "";
}

int64_t free_memory(const Ops& ops) {
  const CudaModule* cuda = loaded().module;
  return cuda && ops.name() == cuda->name ? cuda->free_memory(ops) : available_memory();
}

int64_t taken_memory(Ops& ops) {
  const CudaModule* cuda = loaded().module;
  return cuda && ops.name() == cuda->name ? cuda->taken_memory(ops) : 0;
}

std::unique_ptr<DeviceLink> link_devices(Comm& comm, Ops& ops, const std::string& log_folder, std::string& why) {
  const CudaModule* cuda = loaded().module;
  if (comm.alone()) return nullptr;
  const std::vector<std::string> names = comm.gather(ops.name(), "comparing devices");
  for (std::size_t r = 0; r < names.size(); ++r)
    if (names[r] != names[0])
      throw Error(Exit::usage, "--device", fmt::format("rank {} computes on {}, rank 0 on {}", r, names[r], names[0]),
                  "give all ranks the same --device");
  if (!cuda || ops.name() != cuda->name) return nullptr;
  // NCCL would write to standard output what a variable or a file of settings asks it for.
  std::error_code ignored;
  if (std::getenv("NCCL_DEBUG") || std::getenv("NCCL_CONF_FILE") || std::filesystem::exists(expand_home("~/.nccl.conf"), ignored) ||
      std::filesystem::exists("/etc/nccl.conf", ignored)) {
    std::filesystem::create_directories(log_folder, ignored);
    ::setenv("NCCL_DEBUG_FILE", (log_folder + "/nccl.%h.%p.log").c_str(), 0);
  }
  return std::unique_ptr<DeviceLink>(cuda->link(comm, ops, why));
}

}  // namespace kava
