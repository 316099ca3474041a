// Folders that tests work in: a fresh one that goes away with its object, and the shared data beside the project where it exists.
#pragma once
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

namespace kava {

/// The project's folder, and the built programs'.
std::string source_dir();
std::string bin_dir();

class TempFolder {
 public:
  TempFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "kava_test_XXXXXX").string();
    path_ = ::mkdtemp(pattern.data());
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  ~TempFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::filesystem::path& path() const { return path_; }
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

/// Writes a file at once, without the durability of write_file.
inline void overwrite(const std::filesystem::path& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

/// A path in the shared data (environment variable KAVA_SHARED, else beside the project); "" where it is absent: SKIP then.
inline std::string shared_data(const std::string& name) {
  const char* given = std::getenv("KAVA_SHARED");
  const std::filesystem::path path = std::filesystem::path(given ? given : source_dir() + "/../shared") / name;
  return std::filesystem::exists(path) ? path.string() : "";
}

}  // namespace kava
