// Where the rows of a JSON file lie: in a list, or in a list inside one object.
#pragma once
#include <functional>
#include <optional>
#include <string>
#include <string_view>

#include "engine/data/row_forms.h"

namespace kava {

/// Cuts a JSON list into its elements without reading them, so that a fault in one is reported with its line: take(element, its line).
/// `line` is that of the text's first byte. Error(code data, FILE:LINE) where the text is no list.
void each_element(std::string_view list, const std::string& file, int64_t line,
                  const std::function<void(std::string_view element, int64_t line)>& take);

/// A list of rows inside an object that is all of a file, {"data": [..]} or {"features": [..], "rows": [..]}; or the object itself, where
/// it is one row over several lines.
struct WholeObject {
  std::optional<std::string_view> list;
  int64_t line = 1;  // of the list or the object
};
/// Nothing where the text is more than one object, or none. Error(code data, FILE) where several lists hold objects.
std::optional<WholeObject> whole_object(std::string_view text, const std::string& file);

/// The row itself of what a hub's server hands out, {"row_idx": 0, "row": {..}, "truncated_cells": []}; any other as it is. Error(code
/// data) where the server cut cells off.
Json unwrapped(Json row, const RowPlace& place);

}  // namespace kava
