// JSON from files that may be hostile: parsed by nlohmann-json, refused where it would guess.
#pragma once
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace kava {

using Json = nlohmann::json;

constexpr std::size_t kMostJson = std::size_t{256} << 20;
/// Keys from the root down.
using JsonPath = std::vector<std::string>;

/// Parses one JSON value. Throws Error(code data, `where`) on a syntax error (with the byte), broken UTF-8, a lone surrogate, a key given
/// twice in one object, or nesting deeper than 64. A BOM at the start is ignored. The object at `listed`, where that is given, becomes one
/// of a single key, "", and an array of its keys and values in turn: as the file has them, with equal keys. (A tree of a tokenizer's tokens
/// takes as long to build as all else that is read.)
Json parse_json(std::string_view text, const std::string& where, const JsonPath& listed = {});

/// Reads and parses a file of at most `most_bytes`; a missing, unreadable or larger one is Error(code data).
Json read_json(const std::string& path, std::size_t most_bytes = kMostJson, const JsonPath& listed = {});

}  // namespace kava
