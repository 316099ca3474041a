#include "engine/error.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace kava {

namespace {
std::string compose(const std::string& where, const std::string& what, const std::string& remedy) {
  std::string line = where.empty() ? what : where + ": " + what;
  if (!remedy.empty()) line += "; " + remedy;
  return line;
}
}  // namespace

int utf8_length(std::string_view s, std::size_t i, std::size_t* part) {
  auto byte = [&](std::size_t k) { return k < s.size() ? static_cast<unsigned char>(s[k]) : 0u; };
  const unsigned lead = byte(i);
  if (part) *part = 1;
  if (lead < 0x80) return 1;
  const int length = lead >= 0xC2 && lead <= 0xDF ? 2 : (lead & 0xF0) == 0xE0 ? 3 : lead >= 0xF0 && lead <= 0xF4 ? 4 : 0;
  unsigned low = 0x80, high = 0xBF;  // bounds of the second byte: no overlong forms, no surrogates, at most U+10FFFF
  if (lead == 0xE0) low = 0xA0;
  if (lead == 0xED) high = 0x9F;
  if (lead == 0xF0) low = 0x90;
  if (lead == 0xF4) high = 0x8F;
  for (int k = 1; k < length; ++k, low = 0x80, high = 0xBF) {
    const unsigned b = byte(i + static_cast<std::size_t>(k));
    if (b < low || b > high) return 0;
    if (part) ++*part;
  }
  return length;
}

Error::Error(Exit code, std::string where, std::string what, std::string remedy)
    : std::runtime_error(compose(where, what, remedy)), code_(code), where_(std::move(where)) {}

std::string escaped(std::string_view text, std::size_t most) {
  std::string out;
  for (std::size_t i = 0; i < text.size();) {
    if (out.size() >= most) return out + "...";
    int n = utf8_length(text, i);
    unsigned char c = static_cast<unsigned char>(text[i]);
    if (n == 0) {
      out += fmt::format("\\x{:02x}", c);
      ++i;
    } else if (n == 1) {
      if (c == '\n') out += "\\n";
      else if (c == '\t') out += "\\t";
      else if (c == '\r') out += "\\r";
      else if (c < 0x20 || c == 0x7F) out += fmt::format("\\x{:02x}", c);
      else out += text[i];
      ++i;
    } else if (n == 2 && c == 0xC2 && static_cast<unsigned char>(text[i + 1]) < 0xA0) {  // C1 control characters
      out += fmt::format("\\u{:04x}", static_cast<unsigned char>(text[i + 1]));
      i += 2;
    } else {
      out += text.substr(i, static_cast<std::size_t>(n));
      i += static_cast<std::size_t>(n);
    }
  }
  return out;
}

std::string shown_path(const std::filesystem::path& path) { return path.empty() ? "\"\"" : escaped(path.string(), 4096); }

std::size_t invalid_utf8(std::string_view s) {
  for (std::size_t i = 0; i < s.size();) {
    // Eight ASCII bytes at once: nearly all of a data file.
    if (uint64_t word; i + 8 <= s.size() && (std::memcpy(&word, s.data() + i, 8), (word & 0x8080808080808080u) == 0)) {
      i += 8;
      continue;
    }
    int n = utf8_length(s, i);
    if (n == 0) return i;
    i += static_cast<std::size_t>(n);
  }
  return std::string_view::npos;
}

std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      std::size_t up = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1])});
      diagonal = up;
    }
  }
  return row[b.size()];
}

void broken_contract(const char* condition, std::string message, std::source_location at) {
  throw Error(Exit::internal, fmt::format("{}:{}", at.file_name(), at.line()), fmt::format("{} ({})", message, condition),
              "this is a defect of the program");
}

}  // namespace kava
