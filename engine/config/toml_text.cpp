#include "engine/config/toml_text.h"

#include <fmt/format.h>

#include <algorithm>

#include "engine/config/key_at.h"
#include "engine/error.h"
#include "engine/files/files.h"

namespace kava {

namespace {

constexpr std::size_t kMostBytes = std::size_t{1} << 20;
constexpr std::size_t kMostDots = 4096;

[[noreturn]] void refuse_text(const std::string& where, const std::string& what, const std::string& remedy) {
  throw Error(Exit::usage, where, what, remedy);
}

// What lies outside strings and comments, where toml++ is not safe: it counts on there being few characters beyond ASCII, all of which are
// errors, and frees the tables that dotted keys nest by recursion. It asks the same of what follows a backslash and white space in a
// string, and of what it takes for a string right behind a number.
struct Code {
  std::size_t dots = 0;
  std::size_t foreign = std::string_view::npos;  // the first byte beyond ASCII
};

Code scan(std::string_view text) {
  Code code;
  const std::size_t start = text.starts_with("\xEF\xBB\xBF") ? 3 : 0;
  for (std::size_t i = start; i < text.size();) {
    const char c = text[i];
    if (c == '#') i = std::min(text.find('\n', i), text.size());
    else if ((c == '"' || c == '\'') && (i == start || std::string_view(" \t\r\n=[{,.").find(text[i - 1]) != std::string_view::npos)) {
      const std::size_t begin = i;
      i = std::min(end_of_toml_string(text, i), text.size());
      for (std::size_t at = begin; c == '"' && at < i; ++at) {
        if (text[at] != '\\') continue;
        at = std::min(text.find_first_not_of(" \t\r\n", at + 1), text.size());
        if (at < text.size() && static_cast<unsigned char>(text[at]) >= 0x80) code.foreign = std::min(code.foreign, at);
      }
    } else {
      if (static_cast<unsigned char>(c) >= 0x80) code.foreign = std::min(code.foreign, i);
      code.dots += c == '.';
      ++i;
    }
  }
  return code;
}

}  // namespace

std::string at(const std::string& path, const toml::source_region& region) {
  return fmt::format("{}:{}:{}", path, region.begin.line, region.begin.column);
}

bool is_safe_toml(std::string_view text) {
  const Code code = scan(text);
  return code.dots <= kMostDots && code.foreign == std::string::npos;
}

toml::table parse_toml_file(const std::string& file) {
  const std::string text = read_file(file, kMostBytes, Exit::usage), path = shown_path(file);
  if (text.find('\0') != std::string::npos) refuse_text(path, "holds a NUL character", "name a TOML file");
  const Code code = scan(text);
  if (code.dots > kMostDots) refuse_text(path, fmt::format("holds more than {} dots in keys and values", kMostDots), "make it shorter");
  if (code.foreign != std::string::npos) {
    const auto line = 1 + std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(code.foreign), '\n');
    refuse_text(fmt::format("{}:{}", path, line),
                "not valid TOML: there are characters beyond ASCII outside strings and comments, or behind a backslash",
                "put them in quotes");
  }
  try {
    return toml::parse(text, path);
  } catch (const toml::parse_error& e) {
    const std::string key = key_at(text, e.source().begin.line, e.source().begin.column);
    refuse_text(at(path, e.source()), fmt::format("not valid TOML{}: {}", key.empty() ? "" : " at " + key, escaped(e.description(), 200)),
                "correct the file");
  }
}

}  // namespace kava
