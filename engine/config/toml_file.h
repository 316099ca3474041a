// A TOML file of a form that is not a run's configuration: its values, and where each stands.
#pragma once
#include <map>
#include <string>

#include "engine/files/json.h"

namespace kava {

struct TomlFile {
  std::string path;                           // as given
  Json value;                                 // an object; dates are refused
  std::map<std::string, std::string> places;  // "row[0].name" -> FILE:LINE:COL

  /// FILE:LINE:COL of a key's path, or of the nearest above it that has one.
  std::string where(std::string key) const;
};

/// Error(code usage) at FILE:LINE:COL for what is no TOML, or holds a date or a number that is not finite.
TomlFile read_toml(const std::string& path);

}  // namespace kava
