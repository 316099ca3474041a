// A program that runs beside this one, with its output in a log. It ends with this process, however that ends.
#pragma once
#include <sys/types.h>

#include <chrono>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace kava {

/// What one of several runs at a time has to itself.
struct Share {
  std::vector<int> cores;  // empty: all
  int threads = 0;         // 0: as many as those run at once
  std::string gpu;         // of CUDA_VISIBLE_DEVICES; empty: as it is
};

/// The folder of this program, where the others are.
std::filesystem::path program_folder();

class ChildProcess {
 public:
  /// arguments[0] names a program beside this one. The log is appended to, and locked (flock, shared) while the program runs. Error(code
  /// write) where it cannot be, (code comm) without a process.
  ChildProcess(const std::vector<std::string>& arguments, const std::filesystem::path& log, const Share& share);
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;
  /// Kills it where it still runs.
  ~ChildProcess();

  /// Its exit code, -SIGNAL where one ended it; nothing while it runs.
  std::optional<int> ended();
  void send(int signal) const;
  double seconds() const;
  /// What it wrote last that says why it ended: its last line "error: ...", else its last line.
  std::string last_words() const;

 private:
  pid_t pid_ = 0;
  std::filesystem::path log_;
  std::uintmax_t log_begin_ = 0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace kava
