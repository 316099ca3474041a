#include "engine/device/library_search.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <sstream>

namespace kava {

namespace fs = std::filesystem;

namespace {

/// The folders in `folder` whose name begins so, in the order of their names.
std::vector<fs::path> folders_in(const fs::path& folder, const std::string& beginning) {
  std::vector<fs::path> found;
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error))
    if (it->path().filename().string().starts_with(beginning)) found.push_back(it->path());
  std::ranges::sort(found);
  return found;
}

}  // namespace

std::vector<std::string> library_places(const std::string& name, const std::function<const char*(const char*)>& environment) {
  auto value = [&](const char* variable) {
    const char* text = environment(variable);
    return std::string(text ? text : "");
  };
  std::vector<fs::path> folders;
  auto toolkit = [&](const fs::path& root) {
    for (const char* lib : {"lib64", "lib", "targets/x86_64-linux/lib"}) folders.push_back(root / lib);
  };
  for (const char* variable : {"CUDA_PATH", "CUDA_HOME"})
    if (const std::string root = value(variable); !root.empty()) toolkit(root);
  toolkit("/usr/local/cuda");
  for (const fs::path& root : folders_in("/usr/local", "cuda-")) toolkit(root);

  std::vector<fs::path> environments;
  // Not resolved: the interpreter of an environment is a link to one that has other packages. Of one without a folder PATH tells.
  if (const fs::path python = value("KAVA_PYTHON"); python.has_parent_path())
    environments.push_back(fs::absolute(python).parent_path().parent_path());
  for (const char* variable : {"VIRTUAL_ENV", "CONDA_PREFIX"})
    if (const std::string root = value(variable); !root.empty()) environments.emplace_back(root);
  std::istringstream path(value("PATH"));
  for (std::string folder; std::getline(path, folder, ':');)
    if (fs::path(folder).is_absolute()) environments.push_back(fs::path(folder).parent_path());
  if (const std::string home = value("HOME"); !home.empty()) environments.push_back(fs::path(home) / ".local");
  for (const fs::path& root : environments)
    for (const fs::path& python : folders_in(root / "lib", "python3"))
      for (const char* packages : {"site-packages", "dist-packages"})
        for (const fs::path& package : folders_in(python / packages / "nvidia", "")) folders.push_back(package / "lib");

  std::vector<std::string> places = {name};
  for (const fs::path& folder : folders) {
    std::error_code error;
    const std::string file = (folder / name).string();
    if (fs::exists(file, error) && std::ranges::find(places, file) == places.end()) places.push_back(file);
  }
  return places;
}

void* open_library(const std::string& name) {
  for (const std::string& place : library_places(name, [](const char* variable) -> const char* { return std::getenv(variable); }))
    if (void* library = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
  return nullptr;
}

}  // namespace kava
