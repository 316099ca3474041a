#include "engine/files/cache.h"

#include <cstdlib>
#include <string>

namespace kava {

namespace fs = std::filesystem;

fs::path cache_folder() {
  const auto value = [](const char* name) {
    const char* text = std::getenv(name);
    return std::string(text ? text : "");
  };
  if (const std::string own = value("KAVA_CACHE"); !own.empty()) return own;
  if (const std::string cache = value("XDG_CACHE_HOME"); !cache.empty()) return fs::path(cache) / "kava";
  const std::string home = value("HOME");
  return home.empty() ? fs::path() : fs::path(home) / ".cache" / "kava";
}

}  // namespace kava
