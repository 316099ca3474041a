#include "engine/split_pattern.h"

#include <stdexcept>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "engine/error.h"
#include "engine/unicode.h"

namespace kava {

namespace {
// Steps of one match attempt, and KiB of backtracking memory: an exploding pattern fails within a fraction of a second.
constexpr std::uint32_t kMatchLimit = 20'000'000;
constexpr std::uint32_t kHeapLimitKiB = 256 * 1024;

PCRE2_SPTR bytes(std::string_view s) { return reinterpret_cast<PCRE2_SPTR>(s.data()); }

std::string message(int code) {
  PCRE2_UCHAR text[160];
  pcre2_get_error_message(code, text, sizeof text);
  return reinterpret_cast<const char*>(text);
}

// In Oniguruma's dialect ^ and $ always match at lines. Null with the error's number when the pattern is wrong.
pcre2_code* compile(std::string_view pattern, int& error) {
  std::unique_ptr<pcre2_compile_context, decltype(&pcre2_compile_context_free)> context(pcre2_compile_context_create(nullptr),
                                                                                        &pcre2_compile_context_free);
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  PCRE2_SIZE at = 0;
  return pcre2_compile(bytes(pattern), pattern.size(), PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &error, &at,
                       context.get());
}
}  // namespace

bool pcre_compiles(std::string_view pattern) {
  int error = 0;
  pcre2_code* code = compile(pattern, error);
  pcre2_code_free(code);
  return code != nullptr;
}

struct SplitPattern::Compiled {
  pcre2_code* code = nullptr;
  bool stand_ins = true;
  pcre2_match_context* limits = nullptr;
  ~Compiled() {
    pcre2_match_context_free(limits);
    pcre2_code_free(code);
  }
};

SplitPattern::SplitPattern() = default;
SplitPattern::SplitPattern(SplitPattern&&) noexcept = default;
SplitPattern& SplitPattern::operator=(SplitPattern&&) noexcept = default;
SplitPattern::~SplitPattern() = default;

SplitPattern SplitPattern::literal(std::string_view text) {
  if (text.empty()) return regex("");
  SplitPattern p;
  p.text_ = text;
  return p;
}

SplitPattern SplitPattern::regex(std::string_view pattern) {
  const std::string translated = pcre_pattern(pattern);
  SplitPattern p;
  p.text_ = pattern;
  p.compiled_ = std::make_unique<Compiled>();
  int error = 0;
  p.compiled_->code = compile(translated, error);
  if (!p.compiled_->code) throw std::invalid_argument(message(error));
  // Two characters with one stand-in must not become equal for a back reference.
  std::uint32_t back_references = 0;
  pcre2_pattern_info(p.compiled_->code, PCRE2_INFO_BACKREFMAX, &back_references);
  p.compiled_->stand_ins = back_references == 0;
  pcre2_jit_compile(p.compiled_->code, PCRE2_JIT_COMPLETE);  // where there is no JIT the interpreter matches
  p.compiled_->limits = pcre2_match_context_create(nullptr);
  pcre2_set_match_limit(p.compiled_->limits, kMatchLimit);
  pcre2_set_heap_limit(p.compiled_->limits, kHeapLimitKiB);
  return p;
}

void SplitPattern::find_all(std::string_view text, std::vector<Stretch>& out) const {
  if (compiled_) return find_regex(text, out);
  std::size_t behind = 0;
  for (std::size_t at; (at = text.find(text_, behind)) != std::string_view::npos; behind = at + text_.size()) {
    if (at > behind) out.push_back({behind, at, false});
    out.push_back({at, at + text_.size(), true});
  }
  if (behind < text.size()) out.push_back({behind, text.size(), false});
}

void SplitPattern::find_regex(std::string_view text, std::vector<Stretch>& out) const {
  std::string replaced;
  const std::string_view subject = compiled_->stand_ins && replace_by_stand_ins(text, replaced) ? std::string_view(replaced) : text;
  std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> data(pcre2_match_data_create(1, nullptr), &pcre2_match_data_free);
  const PCRE2_SIZE* found = pcre2_get_ovector_pointer(data.get());
  std::size_t behind = 0;     // end of the last stretch
  bool after_match = false;   // a match ended at `from`: another, empty one there is skipped
  for (std::size_t from = 0; from <= text.size();) {
    int rc = pcre2_match(compiled_->code, bytes(subject), subject.size(), from, PCRE2_NO_UTF_CHECK, data.get(), compiled_->limits);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
      rc = pcre2_match(compiled_->code, bytes(subject), subject.size(), from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data.get(),
                       compiled_->limits);
    if (rc == PCRE2_ERROR_NOMATCH) break;
    if (rc < 0)
      throw Error(Exit::data, "tokenizer.json", fmt::format("the split pattern \"{}\" fails on a text of {} bytes: {}", escaped(text_), text.size(),
                                                            message(rc)),
                  "use a pattern without nested repetition");
    const std::size_t begin = found[0], end = found[1];
    if (begin > end || begin < behind) throw Error(Exit::data, "tokenizer.json", "the split pattern moves its own match's start", "remove \\K");
    if (begin == end && after_match && end == from) {
      if (from == text.size()) break;
      ++from;
      while (from < text.size() && (static_cast<unsigned char>(text[from]) & 0xC0) == 0x80) ++from;
      after_match = false;
      continue;
    }
    if (begin > behind) out.push_back({behind, begin, false});
    out.push_back({begin, end, true});
    behind = from = end;
    after_match = true;
  }
  if (behind < text.size()) out.push_back({behind, text.size(), false});
}

}  // namespace kava
