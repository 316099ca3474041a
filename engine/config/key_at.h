// Which key a line of a TOML file belongs to, for faults that the parser finds before it knows.
#pragma once
#include <cstddef>
#include <string>
#include <string_view>

namespace kava {

/// The last key assigned at or above a line (from 1), with its section: "train.lr"; empty where none is to be seen.
std::string key_at(std::string_view text, std::size_t line);

}  // namespace kava
