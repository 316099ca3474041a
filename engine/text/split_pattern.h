// A split pattern of a tokenizer.json. The Hugging Face library reads patterns by Oniguruma (Ruby's dialect), this engine matches by
// PCRE2: a pattern is translated where the two dialects differ, and refused where it cannot be.
#pragma once
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace kava {

// What stays different from Oniguruma: \p{Alphabetic} and \p{Lowercase} are those of the installed PCRE2 (Unicode 14 lacks some 150 marks
// and modifier letters of 16), a new script's letters count as an older one's, a new symbol is no \p{Emoji}, and (?i) folds no character
// into two.

/// A stretch of a text: matched by the pattern, or between two matches.
struct Stretch {
  std::size_t begin, end;
  bool matched;
};

class SplitPattern {
 public:
  /// Compiles; anything PCRE2 does not take, or that means something else there, is std::invalid_argument with the reason.
  static SplitPattern regex(std::string_view pattern);
  /// Matches exactly these bytes.
  static SplitPattern literal(std::string_view text);

  SplitPattern(SplitPattern&&) noexcept;
  SplitPattern& operator=(SplitPattern&&) noexcept;
  ~SplitPattern();

  /// Appends the stretches that cover `text` (valid UTF-8) in order. Matches may be empty; the stretches between them are not.
  /// Safe to call from several threads. Throws Error(code data) when the pattern exceeds the match limit.
  void find_all(std::string_view text, std::vector<Stretch>& out) const;

 private:
  struct Compiled;
  class Search;
  SplitPattern();
  void find_regex(std::string_view text, std::vector<Stretch>& out) const;
  std::unique_ptr<Compiled> compiled_;  // null for a literal
  std::string text_;                    // the pattern as given, or the literal
};

/// The same pattern in PCRE2's dialect. std::invalid_argument when there is none.
std::string pcre_pattern(std::string_view oniguruma);

/// Whether PCRE2 takes the pattern.
bool pcre_compiles(std::string_view pattern);

}  // namespace kava
