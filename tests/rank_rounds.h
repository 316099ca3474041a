// What the programs share that make ranks fail round by round.
#pragma once
#include <charconv>
#include <chrono>
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

/// Error(code usage) where `value` is no whole number from `least` on.
inline int rounds_number(const std::string& name, const std::string& value, int least, const std::string& usage) {
  int n = 0;
  const char* end = value.data() + value.size();
  const auto [stop, failed] = std::from_chars(value.data(), end, n);
  if (failed != std::errc() || stop != end || n < least)
    throw Error(Exit::usage, name, "\"" + escaped(value) + "\" is no whole number from " + std::to_string(least) + " on", usage);
  return n;
}

/// --rounds N, --seed S, --bin DIR (default: `bin`); `own` takes an option of the program's own with its value, and says whether it is one.
/// Error(code usage), naming `usage`, for any other.
inline RoundOptions round_options(int argc, char** argv, const char* bin, const std::string& usage,
                                  const std::function<bool(const std::string& name, const std::string& value)>& own = {}) {
  RoundOptions options{.bin = bin};
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i], value = i + 1 < argc ? argv[i + 1] : "";
    if (name == "--rounds" && !value.empty()) options.rounds = rounds_number(name, value, 1, usage);
    else if (name == "--seed" && !value.empty()) options.seed = static_cast<unsigned>(rounds_number(name, value, 0, usage));
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
