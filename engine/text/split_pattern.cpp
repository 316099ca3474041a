#include "engine/text/split_pattern.h"

#include <time.h>

#include <algorithm>
#include <stdexcept>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "engine/error.h"
#include "engine/text/unicode.h"

namespace kava {

namespace {
// Steps of one match attempt, and KiB of backtracking memory: an exploding pattern fails within a fraction of a second.
constexpr std::uint32_t kMatchLimit = 20'000'000;
constexpr std::uint32_t kHeapLimitKiB = 256 * 1024;
// PCRE2 does not count the characters that a step runs over, nor the starts that are tried. On a short text that does not matter; on a
// longer one the pattern calls back at each of its items, and the thread's processor time is the limit.
constexpr std::size_t kLongText = 1024;
constexpr std::uint32_t kCallsPerLook = 1024;
constexpr double kSecondsPerSearch = 1, kSecondsPerMegabyte = 4;

PCRE2_SPTR bytes(std::string_view s) { return reinterpret_cast<PCRE2_SPTR>(s.data()); }

double seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

std::string message(int code) {
  PCRE2_UCHAR text[160];
  pcre2_get_error_message(code, text, sizeof text);
  return reinterpret_cast<const char*>(text);
}

// In Oniguruma's dialect ^ and $ always match at lines. Null with the error's number when the pattern is wrong.
pcre2_code* compile(std::string_view pattern, std::uint32_t more_options, int& error) {
  std::unique_ptr<pcre2_compile_context, decltype(&pcre2_compile_context_free)> context(pcre2_compile_context_create(nullptr),
                                                                                        &pcre2_compile_context_free);
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  const std::uint32_t options = PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C | more_options;
  PCRE2_SIZE at = 0;
  pcre2_code* code = pcre2_compile(bytes(pattern), pattern.size(), options, &error, &at, context.get());
  if (code) pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);  // where there is no JIT the interpreter matches
  return code;
}
}  // namespace

bool pcre_compiles(std::string_view pattern) {
  int error = 0;
  pcre2_code* code = compile(pattern, 0, error);
  pcre2_code_free(code);
  return code != nullptr;
}

struct SplitPattern::Compiled {
  pcre2_code* code = nullptr;
  pcre2_code* code_of_long = nullptr;  // the same, calling back
  bool stand_ins = true;
  pcre2_match_context* limits = nullptr;
  ~Compiled() {
    pcre2_match_context_free(limits);
    pcre2_code_free(code_of_long);
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
  constexpr std::size_t kLongestPattern = std::size_t{64} << 10;  // some thousand times what tokenizers have
  if (pattern.size() > kLongestPattern) throw std::invalid_argument(fmt::format("it is longer than {} bytes", kLongestPattern));
  const std::string translated = pcre_pattern(pattern);
  SplitPattern p;
  p.text_ = pattern;
  p.compiled_ = std::make_unique<Compiled>();
  int error = 0;
  p.compiled_->code = compile(translated, 0, error);
  if (!p.compiled_->code) throw std::invalid_argument(message(error));
  p.compiled_->code_of_long = compile(translated, PCRE2_AUTO_CALLOUT, error);
  if (!p.compiled_->code_of_long) throw std::invalid_argument(message(error));
  // Two characters with one stand-in must not become equal for a back reference.
  std::uint32_t back_references = 0;
  pcre2_pattern_info(p.compiled_->code, PCRE2_INFO_BACKREFMAX, &back_references);
  p.compiled_->stand_ins = back_references == 0;
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

// One text being searched by one thread.
class SplitPattern::Search {
 public:
  Search(const SplitPattern& pattern, std::string_view subject)
      : pattern_(pattern),
        subject_(subject),
        data_(pcre2_match_data_create(1, nullptr)),
        limits_(subject.size() > kLongText ? pcre2_match_context_copy(pattern.compiled_->limits) : nullptr) {
    if (!limits_) return;
    latest_ = seconds() + kSecondsPerSearch + kSecondsPerMegabyte * 1e-6 * static_cast<double>(subject.size());
    pcre2_set_match_limit(limits_, ~std::uint32_t{0});
    pcre2_set_callout(limits_, &Search::look_at_time, this);
  }
  ~Search() {
    pcre2_match_context_free(limits_);
    pcre2_match_data_free(data_);
  }
  Search(const Search&) = delete;
  Search& operator=(const Search&) = delete;

  /// The first match that begins at `from` or behind.
  bool find(std::size_t from, std::size_t& begin, std::size_t& end) {
    int rc = match(from, 0);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) rc = match(from, PCRE2_NO_JIT);
    if (rc == PCRE2_ERROR_NOMATCH) return false;
    if (rc < 0)
      throw Error(Exit::data, "tokenizer.json",
                  fmt::format("the split pattern \"{}\" fails on a text of {} bytes: {}", escaped(pattern_.text_), subject_.size(),
                              rc == PCRE2_ERROR_CALLOUT ? "it takes too long" : message(rc)),
                  "use a pattern without nested repetition");
    begin = pcre2_get_ovector_pointer(data_)[0];
    end = pcre2_get_ovector_pointer(data_)[1];
    return true;
  }

 private:
  int match(std::size_t from, std::uint32_t options) {
    return pcre2_match(limits_ ? pattern_.compiled_->code_of_long : pattern_.compiled_->code, bytes(subject_), subject_.size(), from,
                       PCRE2_NO_UTF_CHECK | options, data_, limits_ ? limits_ : pattern_.compiled_->limits);
  }

  static int look_at_time(pcre2_callout_block*, void* search) {
    auto* self = static_cast<Search*>(search);
    return ++self->calls_ % kCallsPerLook == 0 && seconds() > self->latest_ ? PCRE2_ERROR_CALLOUT : 0;
  }

  const SplitPattern& pattern_;
  std::string_view subject_;
  pcre2_match_data* data_;
  pcre2_match_context* limits_;  // of a long text; a short one takes the pattern's, which threads share
  std::uint32_t calls_ = 0;
  double latest_ = 0;  // processor time
};

void SplitPattern::find_regex(std::string_view text, std::vector<Stretch>& out) const {
  std::string replaced;
  Search search(*this, compiled_->stand_ins && replace_by_stand_ins(text, replaced) ? std::string_view(replaced) : text);
  std::size_t behind = 0;    // end of the last stretch
  bool after_match = false;  // a match ended at `from`: another, empty one there is skipped
  std::size_t begin, end;
  for (std::size_t from = 0; from <= text.size() && search.find(from, begin, end);) {
    if (begin > end || begin < behind)
      throw Error(Exit::data, "tokenizer.json", fmt::format("the split pattern \"{}\" moves its match's start", escaped(text_)),
                  "remove \\K");
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
