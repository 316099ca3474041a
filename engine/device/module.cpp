#include "engine/device/module.h"

#include <dlfcn.h>

#include <filesystem>

#include "engine/error.h"

namespace kava {

LoadedModule load_module(const std::string& name, bool everywhere) {
  LoadedModule m;
  Dl_info here{};
  // Any address of the engine tells where its library lies.
  dladdr(reinterpret_cast<void*>(&load_module), &here);
  const std::filesystem::path file = std::filesystem::path(here.dli_fname ? here.dli_fname : "").parent_path() / name;
  std::error_code error;
  if (!std::filesystem::exists(file, error)) {
    m.why = fmt::format("this build has no {}", name);
    return m;
  }
  m.library = dlopen(file.c_str(), RTLD_NOW | (everywhere ? RTLD_GLOBAL : RTLD_LOCAL));
  if (m.library) return m;
  const char* text = dlerror();
  m.why = fmt::format("{} cannot be loaded: {}", name, escaped(text ? text : ""));
  return m;
}

void* LoadedModule::find(const char* name) {
  if (!library) return nullptr;
  void* found = dlsym(library, name);
  if (!found) why = "it is of another version";
  return found;
}

}  // namespace kava
