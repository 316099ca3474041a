#include "models/score.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "engine/data/data.h"

namespace kava {

namespace {

std::string without_commas(std::string_view text) {
  std::string out(text);
  std::erase(out, ',');
  return out;
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// The first number of a text without commas. `*at` is where to start and is left behind the number.
std::optional<double> next_number(std::string_view text, std::size_t* at) {
  std::size_t i = *at;
  while (i < text.size() && !is_digit(text[i])) ++i;
  if (i == text.size()) {
    *at = i;
    return std::nullopt;
  }
  const std::size_t start = i > *at && text[i - 1] == '-' ? i - 1 : i;
  while (i < text.size() && is_digit(text[i])) ++i;
  if (i < text.size() && text[i] == '.') {
    ++i;
    while (i < text.size() && is_digit(text[i])) ++i;
  }
  *at = i;
  // strtod and not from_chars: too small is 0, too large infinite.
  return std::strtod(std::string(text.substr(start, i - start)).c_str(), nullptr);
}

std::optional<double> if_finite(std::optional<double> number) { return number && std::isfinite(*number) ? number : std::nullopt; }

}  // namespace

std::optional<double> last_number(std::string_view text) {
  const std::string plain = without_commas(text);
  std::optional<double> last;
  for (std::size_t at = 0; auto number = next_number(plain, &at);) last = number;
  return if_finite(last);
}

std::optional<std::string> answer_of_chain(std::string_view text, std::string_view prompt) {
  const auto at = prompt.empty() ? 0 : text.rfind(prompt);
  if (at == std::string_view::npos) return std::nullopt;
  return std::string(stripped(text.substr(at + prompt.size())));
}

bool strict_match(std::string_view text, std::string_view gold) {
  const std::string a = without_commas(text), b = without_commas(gold);
  return stripped(a) == stripped(b);
}

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
  std::size_t start = 0;
  const auto a = if_finite(next_number(without_commas(text.substr(answer)), &start)), b = last_number(gold);
  return a && b && *a == *b;
}

bool gsm_hard_match(std::string_view text, std::string_view gold) {
  const auto a = last_number(text), b = last_number(gold);
  return a && b && std::abs(*a - *b) <= 1e-6 * std::abs(*b);
}

}  // namespace kava
