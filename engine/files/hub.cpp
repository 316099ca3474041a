#include "engine/files/hub.h"

#include <algorithm>
#include <cstdlib>

#include "engine/files/files.h"
#include "engine/files/paths.h"

namespace kava {

namespace {

namespace fs = std::filesystem;

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value ? expand_home(value) : "";
}

fs::path hub_cache() {
  for (const char* name : {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"})
    if (const std::string given = variable(name); !given.empty()) return given;
  if (const std::string home = variable("HF_HOME"); !home.empty()) return fs::path(home) / "hub";
  if (const std::string cache = variable("XDG_CACHE_HOME"); !cache.empty()) return fs::path(cache) / "huggingface" / "hub";
  const std::string home = expand_home("~");
  return home == "~" ? fs::path() : fs::path(home) / ".cache" / "huggingface" / "hub";
}

// "model" or "org/model" of letters, digits, '-', '_' and '.', as the hub allows.
bool is_hub_name(const std::string& name) {
  if (name.empty() || name.size() > 96 || std::ranges::count(name, '/') > 1 || name.find("--") != std::string::npos) return false;
  const std::size_t slash = name.find('/');
  for (std::size_t begin : {std::size_t{0}, slash == std::string::npos ? std::size_t{0} : slash + 1})
    if (begin == name.size() || name[begin] == '/' || name[begin] == '.' || name[begin] == '-') return false;
  return std::ranges::all_of(name, [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_' || c == '.' || c == '/';
  });
}

// The snapshot that refs/main of a cached model names; empty where the cache does not hold the model.
std::string snapshot_of(const std::string& name) {
  const fs::path cache = hub_cache();
  if (cache.empty() || !is_hub_name(name)) return "";
  std::string stored = name;
  if (const std::size_t slash = stored.find('/'); slash != std::string::npos) stored.replace(slash, 1, "--");
  const fs::path folder = cache / ("models--" + stored);
  std::error_code failed;
  if (!fs::is_directory(folder, failed)) return "";
  const std::string where = shown_path(folder), remedy = "download the model again, or give a folder";
  if (!is_there(folder / "refs" / "main")) throw Error(Exit::data, where, "the hub's cache holds no branch main of the model", remedy);
  std::string commit = read_file((folder / "refs" / "main").string(), 4096);
  while (!commit.empty() && (commit.back() == '\n' || commit.back() == '\r' || commit.back() == ' ')) commit.pop_back();
  const bool plain_name = !commit.empty() && std::ranges::all_of(commit, [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_';
  });
  const fs::path snapshot = folder / "snapshots" / commit;
  if (!plain_name || !fs::is_directory(snapshot, failed))
    throw Error(Exit::data, where, "the hub's cache holds no snapshot of the model's branch main", remedy);
  return fs::absolute(snapshot).string();
}

}  // namespace

void require_no_hub_name(const fs::path& missing) {
  const fs::path org = missing.parent_path();
  const std::string name = (org.filename() / missing.filename()).string();
  const bool alone = name == missing, behind = missing.is_absolute() && is_there(org.parent_path());
  if (name.find('/') == std::string::npos || !is_hub_name(name) || !(alone || behind) || is_there(org)) return;
  if (org.filename() == "weights" || org.filename() == "runs" || std::ranges::find(missing, fs::path("..")) != missing.end()) return;
  throw Error(
      Exit::data, shown_path(missing),
      std::string("is no folder, and ") + (alone ? "" : name + " ") + "not in the hub's local cache " + shown_path(hub_cache()),
      "check the path, or get the model by tools/fetch.sh model " + name + " --from URL and give weights/" + missing.filename().string());
}

std::string model_folder(const std::string& given) { return model_folder(fs::path(), given); }

std::string model_folder(const fs::path& folder, const std::string& given) {
  const std::string path = (folder / expand_home(given)).string();
  if (given.empty() || is_there(path)) return path;
  const std::string snapshot = snapshot_of(given);
  return snapshot.empty() ? path : snapshot;
}

}  // namespace kava
