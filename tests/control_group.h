// A control group of a test with a limit, in the hierarchy that has its controller.
#pragma once
#include <fmt/format.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <system_error>

namespace kava {

class ControlGroup {
 public:
  struct Limit {
    std::string file, value;
  };
  /// The limits as version 1 and as version 2 have them; nothing where no such group can be made.
  ControlGroup(const std::string& controller, const Limit& first, const Limit& second) {
    if (!make("/sys/fs/cgroup/" + controller, first)) make("/sys/fs/cgroup", second);
  }
  ControlGroup(const ControlGroup&) = delete;
  ~ControlGroup() {
    if (!path_.empty()) ::rmdir(path_.c_str());
  }
  const std::string& path() const { return path_; }

 private:
  bool make(const std::string& root, const Limit& limit) {
    namespace fs = std::filesystem;
    const fs::path folder = fmt::format("{}/kava_test_{}", root, ::getpid());
    std::error_code failed;
    if (!fs::is_directory(root, failed) || !fs::create_directory(folder, failed)) return false;
    if (fs::exists(folder / limit.file) && std::ofstream(folder / limit.file) << limit.value << std::flush) path_ = folder.string();
    else fs::remove(folder, failed);
    return !path_.empty();
  }

  std::string path_;
};

}  // namespace kava
