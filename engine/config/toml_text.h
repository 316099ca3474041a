// TOML as toml++ may be given it: its table, and files and values checked for what it is not safe on. Only the sources of this folder
// include this.
#pragma once
#include <string>
#include <string_view>

// toml++ 3.3 states some of what a file may break as assertions ("[ {": a bracket without a key), with which Debian's library is built:
// here they say nothing, and its own error follows.
#pragma push_macro("NDEBUG")
#undef NDEBUG
#undef TOML_HEADER_ONLY
#undef TOML_SHARED_LIB
#define TOML_HEADER_ONLY 1
#define TOML_ASSERT(expression) static_cast<void>(0)
#include <toml++/toml.h>
#pragma pop_macro("NDEBUG")

namespace kava {

/// "FILE:LINE:COL"
std::string at(const std::string& path, const toml::source_region& region);

/// Whether toml++ may parse this text: few dots, and nothing beyond ASCII outside strings and comments.
bool is_safe_toml(std::string_view text);

/// Error(code usage) at FILE:LINE:COL for what is no TOML.
toml::table parse_toml_file(const std::string& file);

}  // namespace kava
