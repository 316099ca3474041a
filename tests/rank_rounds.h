// What the programs share that make ranks fail round by round.
#pragma once
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <string>

#include "engine/error.h"

namespace kava {

struct RoundOptions {
  int rounds = 10;
  unsigned seed = 0;
  std::filesystem::path bin;  // absolute
};

/// --rounds N, --seed S, --bin DIR (default: `bin`); `own` takes an option of the program's own with its value, and says whether it is one.
/// Error(code usage), naming `usage`, for any other.
inline RoundOptions round_options(int argc, char** argv, const char* bin, const std::string& usage,
                                  const std::function<bool(const std::string& name, const std::string& value)>& own = {}) {
  RoundOptions options{.bin = bin};
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i], value = i + 1 < argc ? argv[i + 1] : "";
    if (name == "--rounds" && !value.empty()) options.rounds = std::atoi(value.c_str());
    else if (name == "--seed" && !value.empty()) options.seed = static_cast<unsigned>(std::atoi(value.c_str()));
    else if (name == "--bin" && !value.empty()) options.bin = value;
    else if (!own || value.empty() || !own(name, value)) throw Error(Exit::usage, argv[0], "unknown argument " + escaped(name), usage);
  }
  options.bin = std::filesystem::absolute(options.bin);
  return options;
}

inline double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace kava
