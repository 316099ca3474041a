// Which key a line of a TOML file belongs to, for faults that the parser finds before it knows.
#pragma once
#include <cstddef>
#include <string>
#include <string_view>

namespace kava {

/// The key whose value stands at a place (line and column from 1), with its section: "train.lr"; empty where none is to be seen.
std::string key_at(std::string_view text, std::size_t line, std::size_t column);

/// Where the string that begins at text[i], in any of TOML's quotes, has ended.
std::size_t end_of_toml_string(std::string_view text, std::size_t i);

}  // namespace kava
