// The project's programs, run as a user runs them.
#pragma once
#include <fmt/format.h>
#include <sys/wait.h>

#include <catch2/catch_test_macros.hpp>
#include <cstdlib>
#include <optional>

#include "engine/files/files.h"
#include "tests/folders.h"

namespace kava {

struct Ended {
  int code;
  std::string out, err;
};

/// Runs a line of the shell that begins with a program's name, in `folder`, with variables ("NAME=VALUE") in its environment. What the line
/// leads elsewhere is not in `out` and `err`. Several threads may: it makes no assertion, and throws where a signal ended the shell.
inline Ended run_command(const std::string& line, const std::filesystem::path& folder = ".", const std::string& variables = "") {
  const TempFolder streams;
  const int status = std::system(
      fmt::format("cd '{}' && ( {} '{}'/{} ) >'{}' 2>'{}'", folder.string(), variables, bin_dir(), line, streams / "out", streams / "err")
          .c_str());
  if (!WIFEXITED(status)) throw std::runtime_error("ended by a signal: " + line);
  return {WEXITSTATUS(status), read_file(streams / "out", 1 << 24), read_file(streams / "err", 1 << 24)};
}

inline Ended kava_data(const std::string& arguments, const TempFolder& folder) {
  return run_command("kava_data " + arguments, folder.path());
}

/// A variable of the environment, for the programs that are run while this object lives.
class WithVariable {
 public:
  WithVariable(const char* name, const std::string& value) : name_(name) {
    if (const char* given = std::getenv(name)) before_ = given;
    ::setenv(name, value.c_str(), 1);
  }
  ~WithVariable() {
    if (before_) ::setenv(name_, before_->c_str(), 1);
    else ::unsetenv(name_);
  }
  WithVariable(const WithVariable&) = delete;
  WithVariable& operator=(const WithVariable&) = delete;

 private:
  const char* name_;
  std::optional<std::string> before_;
};

/// Whether the programs' --device cuda is the emulated one.
inline bool programs_emulate_cuda() { return run_command("kava_inspect --version").out.find("\n  cuda (emulated): ") != std::string::npos; }
/// Why a test of it is skipped.
constexpr const char* kNoEmulatedCuda = "the programs of this build have no emulated cuda backend (preset emulated)";

}  // namespace kava
