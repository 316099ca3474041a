// Files of rows made of a text, read and refused.
#pragma once

#include <optional>
#include <string>

#include "engine/data/data.h"
#include "tests/folders.h"
#include "tests/io/refused.h"

namespace kava::test {

inline RowFile read_text(const std::string& text, std::optional<DataFormat> format = std::nullopt) {
  TempFolder folder;
  overwrite(folder / "rows", text);
  return read_rows(folder / "rows", format);
}

// The refusal of a file; its exit code must be 4.
inline std::string refused_file(const std::string& path, std::optional<DataFormat> format = std::nullopt) {
  return refused(Exit::data, [&] { read_rows(path, format); });
}

inline std::string refused_text(const std::string& text, std::optional<DataFormat> format = std::nullopt) {
  TempFolder folder;
  overwrite(folder / "rows", text);
  return refused_file(folder / "rows", format);
}

}  // namespace kava::test
