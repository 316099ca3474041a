#include "engine/config/toml_text.h"

#include <fmt/format.h>

#include <algorithm>

#include "engine/config/key_at.h"
#include "engine/error.h"
#include "engine/files/files.h"

namespace kava {

namespace {

constexpr std::size_t kMostTomlBytes = std::size_t{1} << 20;
constexpr std::size_t kMostDots = 4096;

[[noreturn]] void refuse_text(const std::string& where, const std::string& what, const std::string& remedy) {
  throw Error(Exit::usage, where, what, remedy);
}

// What toml++ is not safe with: it counts on there being few characters beyond ASCII outside strings and comments, all of which are errors,
// and frees the tables that dotted keys nest by recursion. To it a bare value goes on through brackets and quotes, and what follows a
// backslash and white space in a string is looked at as what stands outside.
struct Code {
  std::size_t dots = 0;
  std::size_t foreign = std::string_view::npos;  // the first byte beyond ASCII
};

bool is_one_of(char c, std::string_view of) { return of.find(c) != of.npos; }
bool is_foreign(char c) { return static_cast<unsigned char>(c) >= 0x80; }

// The first byte beyond ASCII behind a backslash and white space.
std::size_t foreign_escape(std::string_view text) {
  for (std::size_t i = text.find('\\'); i != text.npos; i = text.find('\\', i + 1)) {
    i = text.find_first_not_of(" \t\r\n", i + 1);
    if (i == text.npos || is_foreign(text[i])) return i;
  }
  return text.npos;
}

Code scan(std::string_view text) {
  Code code;
  char word = 0;  // the first character of the bare word, or the quote of the string, that may go on; 0: none
  const auto found = [&](std::size_t i) { code.foreign = std::min(code.foreign, i); };
  for (std::size_t i = text.starts_with("\xEF\xBB\xBF") ? 3 : 0; i < text.size();) {
    const char c = text[i];
    const bool after_dot = text.substr(0, i).ends_with('.') && !is_one_of(word, ".+-0123456789");  // of a dotted key
    if (c == '#') {
      i = std::min(text.find('\n', i), text.size());
    } else if (is_one_of(c, "\"'") && (!word || after_dot)) {
      const std::size_t end = std::min(end_of_toml_string(text, i), text.size());
      if (c == '"')
        if (const std::size_t at = foreign_escape(text.substr(i, end - i)); at != text.npos) found(i + at);
      word = text[end - 1] == '\n' ? 0 : c;
      i = end;
    } else {
      if (is_foreign(c)) found(i);
      code.dots += c == '.';
      if (is_one_of(c, " \t\r\n=,]}")) word = 0;
      else if (!word && !is_one_of(c, "[{")) word = c;
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
  const std::string text = read_file(file, kMostTomlBytes, Exit::usage), path = shown_path(file);
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
