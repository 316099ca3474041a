#include "models/score.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <initializer_list>

#include "engine/data/data.h"

namespace kava {

namespace {

std::string without_commas(std::string_view text) {
  std::string out(text);
  std::erase(out, ',');
  return out;
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// Digits with what may stand in front of them: the sign of CODI's expression touches them.
struct Number {
  std::string_view before;  // from where the search began
  double value;             // without sign
};

// The first number of a text without commas. `*at` is where to start and is left behind the number.
std::optional<Number> next_digits(std::string_view text, std::size_t* at) {
  std::size_t i = *at;
  while (i < text.size() && !is_digit(text[i])) ++i;
  const std::size_t start = i;
  while (i < text.size() && is_digit(text[i])) ++i;
  if (i > start && i < text.size() && text[i] == '.') {
    ++i;
    while (i < text.size() && is_digit(text[i])) ++i;
  }
  const std::string_view before = text.substr(*at, start - *at);
  *at = i;
  if (i == start) return std::nullopt;
  // strtod and not from_chars: too small is 0, too large infinite.
  return Number{before, std::strtod(std::string(text.substr(start, i - start)).c_str(), nullptr)};
}

bool cut_end(std::string_view& text, std::initializer_list<std::string_view> ends) {
  for (std::string_view end : ends)
    if (text.ends_with(end)) return text.remove_suffix(end.size()), true;
  return false;
}

// As people write amounts: sign (- or U+2212), blanks, a currency sign ($ and its LaTeX form, pound, yen, U+20A0 to U+20CF), blanks.
double with_parted_sign(Number number) {
  std::string_view& text = number.before;
  auto cut_blanks = [&] {
    while (cut_end(text, {" ", "\t", "\xC2\xA0", "\xE2\x80\xAF"})) {
    }
  };
  cut_blanks();
  const auto last = text.size() >= 3 ? text.substr(text.size() - 3) : std::string_view{};
  if (last.starts_with("\xE2\x82") || last.starts_with("\xE2\x83")) {
    const auto code = (static_cast<unsigned char>(last[1]) - 0x80u) << 6 | (static_cast<unsigned char>(last[2]) & 0x3fu);
    if (code >= 0xA0 && code <= 0xCF) text.remove_suffix(3);
  } else {
    cut_end(text, {"\\$", "$", "\xC2\xA3", "\xC2\xA5"});
  }
  cut_blanks();
  return cut_end(text, {"-", "\xE2\x88\x92"}) ? -number.value : number.value;
}

double with_touching_sign(const Number& number) { return number.before.ends_with('-') ? -number.value : number.value; }

template <class Sign>
std::optional<double> first_number(std::string_view text, Sign sign) {
  std::size_t at = 0;
  const std::string plain = without_commas(text);
  const auto number = next_digits(plain, &at);
  return number && std::isfinite(number->value) ? std::optional(sign(*number)) : std::nullopt;
}

template <class Sign>
std::optional<double> last_number(std::string_view text, Sign sign) {
  const std::string plain = without_commas(text);
  std::optional<Number> last;
  for (std::size_t at = 0; auto number = next_digits(plain, &at);) last = number;
  return last && std::isfinite(last->value) ? std::optional(sign(*last)) : std::nullopt;
}

}  // namespace

std::optional<double> last_number(std::string_view text) { return last_number(text, with_touching_sign); }

std::optional<std::string> answer_of_chain(std::string_view text, std::string_view prompt) {
  const auto at = prompt.empty() ? 0 : text.rfind(prompt);
  if (at == std::string_view::npos) return std::nullopt;
  return std::string(stripped(text.substr(at + prompt.size())));
}

std::string strict_form(std::string_view text) { return std::string(stripped(without_commas(text))); }

bool strict_match(std::string_view text, std::string_view gold) { return strict_form(text) == strict_form(gold); }

bool raw_match(std::string_view text, std::string_view gold) { return text == gold; }

bool codi_match(std::string_view text, std::string_view gold) {
  const auto a = last_number(text), b = last_number(gold);
  return a && b && *a == *b;
}

bool gsm8k_match(std::string_view text, std::string_view gold) {
  std::size_t answer = std::string_view::npos;
  for (std::string_view mark : {"The answer is:", "####"})
    if (const auto at = text.rfind(mark); at != std::string_view::npos)
      answer = std::max(answer == std::string_view::npos ? 0 : answer, at + mark.size());
  if (answer == std::string_view::npos) return false;
  const auto a = first_number(text.substr(answer), with_parted_sign), b = last_number(gold, with_parted_sign);
  return a && b && *a == *b;
}

bool gsm_hard_match(std::string_view text, std::string_view gold) {
  const auto a = last_number(text, with_parted_sign), b = last_number(gold, with_parted_sign);
  return a && b && std::abs(*a - *b) <= 1e-6 * std::abs(*b);
}

}  // namespace kava
