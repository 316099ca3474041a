// What serves the programs' --device cuda.
#pragma once
#include <regex>

#include "tests/programs/programs.h"

namespace kava {

/// Its name, "cuda" or "cuda (emulated)"; empty where there is no device.
inline std::string programs_cuda() {
  const std::string version = run_command("kava_inspect --version").out;
  std::smatch line;
  return std::regex_search(version, line, std::regex("\n  (cuda[^:\n]*): .* GiB")) ? line[1].str() : "";
}
/// Why a test of it is skipped.
constexpr const char* kNoCuda = "the programs have no cuda device, and not the preset emulated's";

}  // namespace kava
