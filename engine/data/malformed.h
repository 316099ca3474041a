// Reading data files in which some rows are broken.
#pragma once
#include <cstdint>
#include <vector>

#include "engine/data/data.h"
#include "engine/error.h"

namespace kava {

/// Rows that could not be read.
struct MalformedRows {
  int64_t count = 0;
  std::vector<Error> first;  // at most 5
};

/// read_rows, but malformed rows are left out and told in `malformed`; none may be left.
RowFile read_wellformed_rows(const std::string& path, std::optional<DataFormat> format, MalformedRows& malformed);

}  // namespace kava
