#include "engine/device/cuda_module.h"

#include <dlfcn.h>

#include <filesystem>

#include "engine/error.h"

namespace kava {

namespace {

struct Module {
  CudaDevices* devices = nullptr;
  CudaOpsFactory* ops = nullptr;
  std::string why;  // it is not there
};

Module load() {
  Module m;
  Dl_info here{};
  // Any address of the engine tells where its library lies.
  dladdr(reinterpret_cast<void*>(&cuda_devices), &here);
  const std::filesystem::path file = std::filesystem::path(here.dli_fname ? here.dli_fname : "").parent_path() / "libkava_cuda.so";
  std::error_code error;
  if (!std::filesystem::exists(file, error)) {
    m.why = "this build has no CUDA backend (libkava_cuda.so)";
    return m;
  }
  void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* text = dlerror();
    m.why = "libkava_cuda.so cannot be loaded: " + escaped(text ? text : "");
    return m;
  }
  m.devices = reinterpret_cast<CudaDevices*>(dlsym(library, "kava_cuda_devices"));
  m.ops = reinterpret_cast<CudaOpsFactory*>(dlsym(library, "kava_cuda_ops"));
  if (!m.devices || !m.ops) m.why = "libkava_cuda.so is of another version";
  return m;
}

const Module& module() {
  static const Module m = load();
  return m;
}

}  // namespace

int cuda_devices(std::string& why) {
  const Module& m = module();
  if (m.why.empty()) return m.devices(why);
  why = m.why;
  return 0;
}

std::unique_ptr<Ops> make_cuda_ops(int device) {
  std::string why;
  if (cuda_devices(why) == 0) throw Error(Exit::preflight, "--device", why, "use --device cpu");
  return std::unique_ptr<Ops>(module().ops(device));
}

}  // namespace kava
