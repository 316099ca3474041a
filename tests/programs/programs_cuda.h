// What serves the programs' --device cuda.
#pragma once
#include <regex>

#include "tests/programs/programs.h"

namespace kava {

/// Its name, "cuda" or "cuda (emulated)"; empty where there is no device, which KAVA_TEST_DEVICE=cuda makes a failure.
inline std::string programs_cuda() {
  const std::string version = run_command("kava_inspect --version").out;
  std::smatch line;
  if (std::regex_search(version, line, std::regex("\n  (cuda[^:\n]*): .* GiB"))) return line[1].str();
  if (const char* asked = std::getenv("KAVA_TEST_DEVICE"); asked && std::string(asked) == "cuda")
    FAIL("KAVA_TEST_DEVICE is cuda, and there is no device: " << version);
  return "";
}
/// Why a test of it is skipped.
constexpr const char* kNoCuda = "the programs have no cuda device, and not the preset emulated's";

}  // namespace kava
