#include "engine/config/key_at.h"

#include <algorithm>

namespace kava {

namespace {

// The name at the start of `s`: as the keys of a configuration are written.
std::string_view name_at_start(std::string_view s) {
  return s.substr(0, std::min(s.find_first_not_of("abcdefghijklmnopqrstuvwxyz_.0123456789"), s.size()));
}

std::string_view without_indent(std::string_view s) { return s.substr(std::min(s.find_first_not_of(" \t"), s.size())); }

}  // namespace

std::string key_at(std::string_view text, std::size_t line) {
  std::string section, key;
  for (std::size_t number = 1; number <= line && !text.empty(); ++number) {
    const auto end = std::min(text.find('\n'), text.size());
    const std::string_view s = without_indent(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
    if (s.starts_with('[')) {
      const std::string_view name = name_at_start(s.substr(1));
      if (!name.empty() && s.substr(1 + name.size()).starts_with(']')) section = std::string(name) + ".", key.clear();
    } else if (const std::string_view name = name_at_start(s); !name.empty() && without_indent(s.substr(name.size())).starts_with('=')) {
      key = section + std::string(name);
    }
  }
  return key;
}

}  // namespace kava
