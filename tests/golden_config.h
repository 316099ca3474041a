// The golden cases' configurations.
#pragma once
#include <string>
#include <vector>

#include "engine/config/config.h"
#include "tests/folders.h"

namespace kava {

/// tests/golden/cases/NAME.toml with other keys set. A value that begins with "../" leads from there, as in the file itself.
inline RunConfig golden_config(const std::string& name, std::vector<std::string> sets) {
  const std::string cases = source_dir() + "/tests/golden/cases/";
  for (std::string& set : sets)
    if (const std::size_t at = set.find("=../"); at != std::string::npos) set.insert(at + 1, cases);
  return load_config(cases + name + ".toml", sets);
}

}  // namespace kava
