// JSON from files that may be hostile: parsed by nlohmann-json, refused where it would guess.
#pragma once
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace kava {

using Json = nlohmann::json;

/// Parses one JSON value. Throws Error(code data, `where`) on a syntax error (with the byte), broken UTF-8, a lone surrogate, a key given
/// twice in one object, or nesting deeper than 64. A BOM at the start is ignored.
Json parse_json(std::string_view text, const std::string& where);

/// Reads and parses a file of at most `most_bytes`; a missing, unreadable or larger one is Error(code data).
Json read_json(const std::string& path, std::size_t most_bytes = std::size_t{256} << 20);

}  // namespace kava
