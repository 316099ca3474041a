// The project's programs, run as a user runs them.
#pragma once
#include <fmt/format.h>
#include <sys/wait.h>

#include <catch2/catch_test_macros.hpp>
#include <cstdlib>

#include "engine/files/files.h"
#include "tests/folders.h"

namespace kava {

struct Ended {
  int code;
  std::string out, err;
};

/// Runs a line of the shell that begins with a program's name, in `folder`, with variables ("NAME=VALUE") in its environment. What the line
/// leads elsewhere is not in `out` and `err`.
inline Ended run_command(const std::string& line, const std::filesystem::path& folder = ".", const std::string& variables = "") {
  const TempFolder streams;
  const int status = std::system(
      fmt::format("cd '{}' && ( {} '{}'/{} ) >'{}' 2>'{}'", folder.string(), variables, bin_dir(), line, streams / "out", streams / "err")
          .c_str());
  INFO(line);
  REQUIRE(WIFEXITED(status));
  return {WEXITSTATUS(status), read_file(streams / "out", 1 << 24), read_file(streams / "err", 1 << 24)};
}

}  // namespace kava
