// The parsers of strangers' bytes, each as a function that a fuzzer calls.
#pragma once
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace kava {

struct FuzzTarget {
  std::string name;
  std::vector<std::string> endings;  // of the files of a corpus that it begins from
  /// Returns for input that is read, throws Error for input that is refused; anything else is a defect. `room` is a folder of its own.
  std::function<void(const std::filesystem::path& room, std::string_view bytes)> run;
};

/// All of them. `models` is the folder of the golden models, which some need beside their input.
std::vector<FuzzTarget> fuzz_targets(const std::filesystem::path& models);

}  // namespace kava
