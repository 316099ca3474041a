#include "engine/text/unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <iterator>
#include <vector>

#include "engine/error.h"

namespace kava {

namespace {

struct StandIn {
  char32_t first, last, stand_in;
};

// Code points whose category changed between Unicode 14.0 and 16.0, and U+180E. Made by tests/golden/make_unicode_tables.py.
constexpr StandIn kStandIns[] = {
    {0x897, 0x897, 0x20D0},      {0xCF3, 0xCF3, 0x903},       {0xECE, 0xECE, 0x20D0},      {0x180E, 0x180E, 0x2060},
    {0x1B4E, 0x1B4F, 0x2E2E},    {0x1B7F, 0x1B7F, 0x2E2E},    {0x1C89, 0x1C89, 0x1E00},    {0x1C8A, 0x1C8A, 0x1E01},
    {0x2427, 0x2429, 0x2195},    {0x2FFC, 0x2FFF, 0x2195},    {0x31E4, 0x31E5, 0x2195},    {0x31EF, 0x31EF, 0x2195},
    {0xA7CB, 0xA7CC, 0x1E00},    {0xA7CD, 0xA7CD, 0x1E01},    {0xA7DA, 0xA7DA, 0x1E00},    {0xA7DB, 0xA7DB, 0x1E01},
    {0xA7DC, 0xA7DC, 0x1E00},    {0x105C0, 0x105F3, 0x10300}, {0x10D40, 0x10D49, 0x104A0}, {0x10D4A, 0x10D4D, 0x10300},
    {0x10D4E, 0x10D4E, 0x16B40}, {0x10D4F, 0x10D4F, 0x10300}, {0x10D50, 0x10D65, 0x10400}, {0x10D69, 0x10D6D, 0x1D167},
    {0x10D6E, 0x10D6E, 0x10EAD}, {0x10D6F, 0x10D6F, 0x16B40}, {0x10D70, 0x10D85, 0x10428}, {0x10D8E, 0x10D8F, 0x1D6C1},
    {0x10EC2, 0x10EC4, 0x10300}, {0x10EFC, 0x10EFF, 0x1D167}, {0x1123F, 0x11240, 0x10300}, {0x11241, 0x11241, 0x1D167},
    {0x11380, 0x11389, 0x10300}, {0x1138B, 0x1138B, 0x10300}, {0x1138E, 0x1138E, 0x10300}, {0x11390, 0x113B5, 0x10300},
    {0x113B7, 0x113B7, 0x10300}, {0x113B8, 0x113BA, 0x1D165}, {0x113BB, 0x113C0, 0x1D167}, {0x113C2, 0x113C2, 0x1D165},
    {0x113C5, 0x113C5, 0x1D165}, {0x113C7, 0x113CA, 0x1D165}, {0x113CC, 0x113CD, 0x1D165}, {0x113CE, 0x113CE, 0x1D167},
    {0x113CF, 0x113CF, 0x1D165}, {0x113D0, 0x113D0, 0x1D167}, {0x113D1, 0x113D1, 0x10300}, {0x113D2, 0x113D2, 0x1D167},
    {0x113D3, 0x113D3, 0x10300}, {0x113D4, 0x113D5, 0x10100}, {0x113D7, 0x113D8, 0x10100}, {0x113E1, 0x113E2, 0x1D167},
    {0x116D0, 0x116E3, 0x104A0}, {0x1171E, 0x1171E, 0x1D165}, {0x11B00, 0x11B09, 0x10100}, {0x11BC0, 0x11BE0, 0x10300},
    {0x11BE1, 0x11BE1, 0x10100}, {0x11BF0, 0x11BF9, 0x104A0}, {0x11F00, 0x11F01, 0x1D167}, {0x11F02, 0x11F02, 0x10300},
    {0x11F03, 0x11F03, 0x1D165}, {0x11F04, 0x11F10, 0x10300}, {0x11F12, 0x11F33, 0x10300}, {0x11F34, 0x11F35, 0x1D165},
    {0x11F36, 0x11F3A, 0x1D167}, {0x11F3E, 0x11F3F, 0x1D165}, {0x11F40, 0x11F40, 0x1D167}, {0x11F41, 0x11F41, 0x1D165},
    {0x11F42, 0x11F42, 0x1D167}, {0x11F43, 0x11F4F, 0x10100}, {0x11F50, 0x11F59, 0x104A0}, {0x11F5A, 0x11F5A, 0x1D167},
    {0x1342F, 0x1342F, 0x10300}, {0x13439, 0x1343F, 0xE0001}, {0x13440, 0x13440, 0x1D167}, {0x13441, 0x13446, 0x10300},
    {0x13447, 0x13455, 0x1D167}, {0x13460, 0x143FA, 0x10300}, {0x16100, 0x1611D, 0x10300}, {0x1611E, 0x16129, 0x1D167},
    {0x1612A, 0x1612C, 0x1D165}, {0x1612D, 0x1612F, 0x1D167}, {0x16130, 0x16139, 0x104A0}, {0x16D40, 0x16D42, 0x16B40},
    {0x16D43, 0x16D6A, 0x10300}, {0x16D6B, 0x16D6C, 0x16B40}, {0x16D6D, 0x16D6F, 0x10100}, {0x16D70, 0x16D79, 0x104A0},
    {0x18CFF, 0x18CFF, 0x10300}, {0x1B132, 0x1B132, 0x10300}, {0x1B155, 0x1B155, 0x10300}, {0x1CC00, 0x1CCEF, 0x1D100},
    {0x1CCF0, 0x1CCF9, 0x104A0}, {0x1CD00, 0x1CEB3, 0x1D100}, {0x1D2C0, 0x1D2D3, 0x10107}, {0x1DF25, 0x1DF2A, 0x10428},
    {0x1E030, 0x1E06D, 0x16B40}, {0x1E08F, 0x1E08F, 0x1D167}, {0x1E4D0, 0x1E4EA, 0x10300}, {0x1E4EB, 0x1E4EB, 0x16B40},
    {0x1E4EC, 0x1E4EF, 0x1D167}, {0x1E4F0, 0x1E4F9, 0x104A0}, {0x1E5D0, 0x1E5ED, 0x10300}, {0x1E5EE, 0x1E5EF, 0x1D167},
    {0x1E5F0, 0x1E5F0, 0x10300}, {0x1E5F1, 0x1E5FA, 0x104A0}, {0x1E5FF, 0x1E5FF, 0x10100}, {0x1F6DC, 0x1F6DC, 0x1D100},
    {0x1F774, 0x1F776, 0x1D100}, {0x1F77B, 0x1F77F, 0x1D100}, {0x1F7D9, 0x1F7D9, 0x1D100}, {0x1F8B2, 0x1F8BB, 0x1D100},
    {0x1F8C0, 0x1F8C1, 0x1D100}, {0x1FA75, 0x1FA77, 0x1D100}, {0x1FA87, 0x1FA89, 0x1D100}, {0x1FA8F, 0x1FA8F, 0x1D100},
    {0x1FAAD, 0x1FAAF, 0x1D100}, {0x1FABB, 0x1FABF, 0x1D100}, {0x1FAC6, 0x1FAC6, 0x1D100}, {0x1FACE, 0x1FACF, 0x1D100},
    {0x1FADA, 0x1FADC, 0x1D100}, {0x1FADF, 0x1FADF, 0x1D100}, {0x1FAE8, 0x1FAE9, 0x1D100}, {0x1FAF7, 0x1FAF8, 0x1D100},
    {0x1FBCB, 0x1FBEF, 0x1D100}, {0x2B739, 0x2B739, 0x10300}, {0x2EBF0, 0x2EE5D, 0x20000}, {0x31350, 0x323AF, 0x20000},
};

struct Range {
  char32_t first, last;
};

// Combining marks that are younger than the tables of the library's NFC: it neither reorders nor composes them. (U+11930 is no mark: the
// pair that it ends is younger. U+11A7 is none either: utf8proc 2.8 takes it for a final Hangul consonant and drops it.) Made by
// tests/golden/make_unicode_tables.py.
constexpr Range kInertInNfc[] = {
    {0x7FD, 0x7FD},     {0x898, 0x89F},     {0x8CA, 0x8D3},     {0x9FE, 0x9FE},     {0xC3C, 0xC3C},     {0xD3B, 0xD3C},
    {0xEBA, 0xEBA},     {0x11A7, 0x11A7},   {0x1715, 0x1715},   {0x1ABF, 0x1ACE},   {0x1DF6, 0x1DFA},   {0xA82C, 0xA82C},
    {0x10D24, 0x10D27}, {0x10EAB, 0x10EAC}, {0x10EFD, 0x10EFF}, {0x10F46, 0x10F50}, {0x10F82, 0x10F85}, {0x11070, 0x11070},
    {0x1133B, 0x1133B}, {0x1145E, 0x1145E}, {0x11839, 0x1183A}, {0x11930, 0x11930}, {0x1193D, 0x1193E}, {0x11943, 0x11943},
    {0x119E0, 0x119E0}, {0x11A34, 0x11A34}, {0x11A47, 0x11A47}, {0x11A99, 0x11A99}, {0x11D42, 0x11D42}, {0x11D44, 0x11D45},
    {0x11D97, 0x11D97}, {0x11F41, 0x11F42}, {0x16FF0, 0x16FF1}, {0x1E08F, 0x1E08F}, {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE},
    {0x1E2EC, 0x1E2EF}, {0x1E4EC, 0x1E4EF},
};

// In N* in Unicode 17.0 and not in 16.0.
constexpr Range kYoungNumerics[] = {{0x11DE0, 0x11DE9}, {0x16FF4, 0x16FF6}};

// The range that holds c, or null. Ranges are sorted.
template <class T, std::size_t n>
const T* find_range(const T (&ranges)[n], char32_t c) {
  const T* it = std::partition_point(std::begin(ranges), std::end(ranges), [c](const T& r) { return r.last < c; });
  return it != std::end(ranges) && it->first <= c ? it : nullptr;
}

}  // namespace

char32_t next_code_point(std::string_view text, std::size_t& i) {
  auto byte = [&] { return static_cast<char32_t>(static_cast<unsigned char>(text[i++])); };
  const char32_t lead = byte();
  if (lead < 0x80) return lead;
  int more = lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : 1;
  char32_t c = lead & (0x3Fu >> more);
  while (more-- > 0) c = c << 6 | (byte() & 0x3Fu);
  return c;
}

void append_utf8(std::string& out, char32_t c) {
  utf8proc_uint8_t bytes[4];
  const auto n = utf8proc_encode_char(static_cast<utf8proc_int32_t>(c), bytes);
  out.append(reinterpret_cast<const char*>(bytes), static_cast<std::size_t>(n));
}

std::string lossy_utf8(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size());
  for (std::size_t i = 0, part; i < bytes.size();) {
    if (const int n = utf8_length(bytes, i, &part); n > 0) out += bytes.substr(i, static_cast<std::size_t>(n));
    else out += "\xEF\xBF\xBD";
    i += part;
  }
  return out;
}

bool is_numeric(char32_t c) {
  if (c < 0x80) return c >= '0' && c <= '9';
  if (find_range(kYoungNumerics, c)) return true;
  if (const StandIn* s = find_range(kStandIns, c)) c = s->stand_in;
  const auto category = utf8proc_category(static_cast<utf8proc_int32_t>(c));
  return category == UTF8PROC_CATEGORY_ND || category == UTF8PROC_CATEGORY_NL || category == UTF8PROC_CATEGORY_NO;
}

bool is_white_space(char32_t c) {
  return (c >= 0x9 && c <= 0xD) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 ||
         c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

bool replace_by_stand_ins(std::string_view text, std::string& out) {
  bool found = false;
  for (std::size_t i = 0; i < text.size();) {
    if (static_cast<unsigned char>(text[i]) < 0xE0) {  // one or two bytes: below U+0800
      ++i;
      continue;
    }
    const std::size_t start = i;
    const StandIn* s = find_range(kStandIns, next_code_point(text, i));
    if (!s) continue;
    if (!found) out.assign(text);
    found = true;
    utf8proc_encode_char(static_cast<utf8proc_int32_t>(s->stand_in), reinterpret_cast<utf8proc_uint8_t*>(out.data() + start));
  }
  return found;
}

namespace {

// Decomposes canonically, sorts runs of marks and composes, for one stretch without inert code points. utf8proc's own one-call form
// sorts marks by exchange, quadratic in the length of a run.
void normalize_stretch(const std::vector<char32_t>& points, std::string& out) {
  std::vector<utf8proc_int32_t> buffer;
  buffer.reserve(points.size());
  for (char32_t c : points) {
    utf8proc_int32_t parts[8];
    int boundary = 0;
    const auto n = utf8proc_decompose_char(static_cast<utf8proc_int32_t>(c), parts, 8, UTF8PROC_DECOMPOSE, &boundary);
    KAVA_CHECK(n > 0 && n <= 8, "no canonical decomposition of U+{:04X}", static_cast<std::uint32_t>(c));
    buffer.insert(buffer.end(), parts, parts + n);
  }
  auto mark_class = [](utf8proc_int32_t c) { return utf8proc_get_property(c)->combining_class; };
  for (std::size_t i = 0; i < buffer.size();) {
    if (mark_class(buffer[i]) == 0) {
      ++i;
      continue;
    }
    std::size_t end = i;
    while (end < buffer.size() && mark_class(buffer[end]) != 0) ++end;
    std::stable_sort(buffer.begin() + static_cast<std::ptrdiff_t>(i), buffer.begin() + static_cast<std::ptrdiff_t>(end),
                     [&](auto a, auto b) { return mark_class(a) < mark_class(b); });
    i = end;
  }
  const auto length = utf8proc_normalize_utf32(buffer.data(), static_cast<utf8proc_ssize_t>(buffer.size()),
                                               static_cast<utf8proc_option_t>(UTF8PROC_COMPOSE | UTF8PROC_STABLE));
  for (utf8proc_ssize_t i = 0; i < length; ++i) append_utf8(out, static_cast<char32_t>(buffer[static_cast<std::size_t>(i)]));
}

}  // namespace

std::string nfc(std::string_view text) {
  // Below U+0300 every string is its own NFC; 0xCC is the lead byte of U+0300.
  if (std::none_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) >= 0xCC; })) return std::string(text);
  std::string out;
  out.reserve(text.size());
  std::vector<char32_t> stretch;
  for (std::size_t i = 0; i < text.size();) {
    const char32_t c = next_code_point(text, i);
    if (!find_range(kInertInNfc, c)) {
      stretch.push_back(c);
      continue;
    }
    normalize_stretch(stretch, out);
    stretch.clear();
    append_utf8(out, c);
  }
  normalize_stretch(stretch, out);
  return out;
}

std::string beginning(std::string_view text, std::size_t most) {
  if (text.size() <= most) return std::string(text);
  while (most > 0 && (static_cast<unsigned char>(text[most]) & 0xC0u) == 0x80u) --most;
  return std::string(text.substr(0, most));
}

}  // namespace kava
