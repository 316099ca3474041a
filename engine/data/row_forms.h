// The forms of a data row: under which keys question, chain and answer stand, and what a number looks like (docs/formats.md section 1).
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include "engine/data/data.h"
#include "engine/error.h"
#include "engine/files/json.h"

namespace kava {

constexpr std::size_t kLargestDataFile = std::size_t{4} << 30;  // bytes
constexpr std::string_view kSpace = " \t\n\v\f\r";

/// Where a row stands, and how a fault in it is reported.
struct RowPlace {
  const std::string& file;  // escaped
  int64_t line;
  std::string text() const { return fmt::format("{}:{}", file, line); }
  [[noreturn]] void refuse(const std::string& what, const std::string& remedy = "correct the row") const {
    throw Error(Exit::data, text(), what, remedy);
  }
};

/// Whether a question may stand under this key.
bool names_question(std::string_view key);

/// The form of the rows that begin with this one.
DataFormat recognised_format(const Json& row);

Row parse_text_row(std::string_view line, const RowPlace& place);
Row parse_json_row(const Json& row, DataFormat format, const RowPlace& place);

/// The keys of an object for a message: "question, answer, ...".
std::string key_list(const Json& row);

}  // namespace kava
