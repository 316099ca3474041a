// Configurations written, read and refused.
#pragma once
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <string>
#include <utility>
#include <vector>

#include "engine/config/config.h"
#include "tests/folders.h"
#include "tests/io/refused.h"

namespace kava::test {

// Writes run.toml and gives its path.
inline std::string written(const TempFolder& folder, const std::string& text) {
  overwrite(folder / "run.toml", text);
  return folder / "run.toml";
}

inline RunConfig load(const std::string& text, const std::vector<std::string>& sets = {}) {
  TempFolder folder;
  return load_config(written(folder, text), sets);
}

// The refusal of a configuration; its exit code must be 2.
inline std::string refusal(const std::string& text, const std::vector<std::string>& sets = {}) {
  return refused(Exit::usage, [&] { load(text, sets); });
}

/// Each --set is refused, in words that hold the text beside it.
inline void check_refused_sets(const std::vector<std::pair<std::string, std::string>>& sets) {
  for (const auto& [set, text] : sets) {
    CAPTURE(set);
    CHECK_THAT(refusal("", {set}), Catch::Matchers::ContainsSubstring(text));
  }
}

}  // namespace kava::test
