#include "engine/config/key_at.h"

#include <algorithm>
#include <vector>

namespace kava {

std::size_t end_of_toml_string(std::string_view text, std::size_t i) {
  const char quote = text[i];
  const std::string fence(3, quote);
  const bool lines = text.substr(i).starts_with(fence);
  for (i += lines ? 3 : 1; i < text.size(); ++i) {
    if (quote == '"' && text[i] == '\\') ++i;
    else if (lines && text.substr(i).starts_with(fence)) {
      // The string itself may end in one or two quotes.
      const auto end = std::min(text.find_first_not_of(quote, i), text.size());
      return std::min(end, i + 5);
    } else if (!lines && (text[i] == quote || text[i] == '\n')) return i + 1;
  }
  return text.size();
}

namespace {

// The names in force at the end of a text: of the section, and of the key at each depth of arrays and inline tables.
class KeyNames {
 public:
  std::string read(std::string_view text) {
    for (std::size_t i = 0; i < text.size();) {
      const char c = text[i];
      if (c == '#') {
        i = std::min(text.find('\n', i), text.size());
      } else if (c == '"' || c == '\'') {
        const std::size_t end = std::min(end_of_toml_string(text, i), text.size());
        name_ += text.substr(i + 1, std::max(end, i + 2) - i - 2);
        i = end;
      } else {
        take(c);
        ++i;
      }
    }
    std::string all = section_;
    for (const std::string& key : keys_)
      if (!key.empty()) all += (all.empty() ? "" : ".") + key;
    return keys_[0].empty() ? "" : all;
  }

 private:
  void take(char c) {
    const bool outside = keys_.size() == 1;
    if (c == '=') {
      keys_.back() = name_, name_.clear();
    } else if (c == '[' && outside && keys_[0].empty()) {
      in_header_ = true, name_.clear();
    } else if (c == '[' || c == '{') {
      keys_.emplace_back(), name_.clear();
    } else if (c == ']' && in_header_) {
      if (!name_.empty()) section_ = name_;
      name_.clear();
    } else if (c == ']' || c == '}') {
      if (!outside) keys_.pop_back();
      name_.clear();
    } else if (c == ',' && !outside) {
      keys_.back().clear(), name_.clear();
    } else if (c == '\n') {
      if (outside) keys_[0].clear();
      in_header_ = false, name_.clear();
    } else if (c != ' ' && c != '\t' && c != '\r') {
      name_ += c;
    }
  }

  std::string section_, name_;
  std::vector<std::string> keys_ = {""};
  bool in_header_ = false;
};

}  // namespace

std::string key_at(std::string_view text, std::size_t line, std::size_t column) {
  std::size_t begin = text.starts_with("\xEF\xBB\xBF") ? 3 : 0;
  text.remove_prefix(begin);
  begin = 0;
  for (std::size_t number = 1; number < line && begin < text.size(); ++number)
    begin = std::min(text.find('\n', begin), text.size() - 1) + 1;
  const std::size_t end = std::min(text.find('\n', begin), text.size());
  return KeyNames().read(text.substr(0, std::min(end, begin + column - 1)));
}

}  // namespace kava
