// Unicode as the Hugging Face `tokenizers` library sees it. Its parts follow different versions of the standard: split patterns 16.0,
// NFC the combining classes of 9.0, the Digits pre-tokenizer 17.0. PCRE2 and utf8proc of the system follow others (14.0 and 15.0 in
// Debian 12), so the code points that differ are treated here: ids are then the same whichever version is installed.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

namespace kava {

/// Code point at text[i] (valid UTF-8); moves i behind it.
char32_t next_code_point(std::string_view text, std::size_t& i);

void append_utf8(std::string& out, char32_t c);

/// Replaces broken sequences by U+FFFD, one for each maximal part that could have begun a character (as Rust and browsers do).
std::string lossy_utf8(std::string_view bytes);

/// The first bytes of valid UTF-8, at most so many, whole characters.
std::string beginning(std::string_view text, std::size_t most);

/// Whether the code point is in a category N*.
bool is_numeric(char32_t c);

bool is_white_space(char32_t c);

/// For matching by PCRE2: each code point whose category PCRE2 may not know, or that it counts as space and others do not (U+180E),
/// becomes an older one of the right category with equally many bytes, so offsets stay. False, with `out` untouched, when there is none.
bool replace_by_stand_ins(std::string_view text, std::string& out);

/// Normalization form C.
std::string nfc(std::string_view text);

}  // namespace kava
