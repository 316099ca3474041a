#include "engine/data/equation.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>

namespace kava {

namespace {

constexpr int kDeepestEquation = 100;

// expression = term {(+|-) term}; term = factor {(*|/) factor}; factor = [+|-] factor | number | ( expression ).
// `decimals` is left at those of the last number read.
class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  std::optional<double> whole_text() {
    const double value = expression(0);
    return good_ && peek() == '\0' && at_ == text_.size() ? std::optional(value) : std::nullopt;
  }
  int decimals() const { return decimals_; }

 private:
  char peek() {
    while (at_ < text_.size() && text_[at_] == ' ') ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }

  double expression(int depth) {
    double value = term(depth);
    for (char c; good_ && ((c = peek()) == '+' || c == '-');) {
      ++at_;
      const double right = term(depth);
      value = c == '+' ? value + right : value - right;
    }
    return value;
  }

  double term(int depth) {
    double value = factor(depth);
    for (char c; good_ && ((c = peek()) == '*' || c == '/');) {
      ++at_;
      const double right = factor(depth);
      value = c == '*' ? value * right : value / right;
    }
    return value;
  }

  double factor(int depth) {
    const char c = peek();
    if (depth > kDeepestEquation) good_ = false;
    if (!good_) return 0;
    if (c == '-' || c == '+') {
      ++at_;
      const double value = factor(depth + 1);
      return c == '-' ? -value : value;
    }
    if (c == '(') {
      ++at_;
      const double value = expression(depth + 1);
      good_ = good_ && peek() == ')';
      ++at_;
      return value;
    }
    return number();
  }

  double number() {
    auto digits = [&] {
      const std::size_t start = at_;
      while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') ++at_;
      return at_ - start;
    };
    const std::size_t start = at_, before = digits();
    std::size_t behind = 0;
    if (at_ < text_.size() && text_[at_] == '.') {
      ++at_;
      behind = digits();
    }
    good_ = good_ && before + behind > 0 && at_ - start < 300;
    decimals_ = static_cast<int>(behind);
    return good_ ? std::strtod(std::string(text_.substr(start, at_ - start)).c_str(), nullptr) : 0;
  }

  std::string_view text_;
  std::size_t at_ = 0;
  int decimals_ = 0;
  bool good_ = true;
};

bool is_exact_whole(double x) { return std::abs(x) < 0x1p53 && x == std::trunc(x); }

}  // namespace

Verdict judge_equation(std::string_view step, std::optional<int64_t> modulo) {
  if (!step.starts_with("<<") || !step.ends_with(">>") || step.size() < 4) return Verdict::unreadable;
  step = step.substr(2, step.size() - 4);
  const auto equals = step.rfind('=');
  if (equals == std::string_view::npos) return Verdict::unreadable;
  Parser left_text(step.substr(0, equals)), right_text(step.substr(equals + 1));
  const auto left = left_text.whole_text(), right = right_text.whole_text();
  if (!left || !right || !std::isfinite(*left) || !std::isfinite(*right)) return Verdict::unreadable;
  if (modulo) {
    if (!is_exact_whole(*left) || !is_exact_whole(*right)) return Verdict::unreadable;
    return (static_cast<int64_t>(*left) - static_cast<int64_t>(*right)) % *modulo == 0 ? Verdict::holds : Verdict::fails;
  }
  const double last = std::pow(10.0, -right_text.decimals()), slack = 1e-9 * std::max(1.0, std::abs(*right));
  const bool rounded = std::abs(*left - *right) <= 0.5 * last + slack;
  // Digits left away: nearer to zero by less than one of the last place.
  const bool cut = *left * *right >= 0 && std::abs(*left) >= std::abs(*right) && std::abs(*left) - std::abs(*right) < last - slack;
  return rounded || cut ? Verdict::holds : Verdict::fails;
}

Verdict judge_answer(std::string_view step, std::string_view answer, std::optional<int64_t> modulo) {
  if (judge_equation(step, modulo) == Verdict::unreadable) return Verdict::unreadable;
  std::string given(answer);
  std::erase_if(given, [](char c) { return c == ',' || c == '$'; });
  const auto equals = step.rfind('=') + 1;
  const std::string_view result = step.substr(equals, step.size() - 2 - equals);
  const Verdict by_result = judge_equation("<<" + std::string(result) + "=" + given + ">>", modulo);
  return by_result == Verdict::fails ? judge_equation(std::string(step.substr(0, equals)) + given + ">>", modulo) : by_result;
}

}  // namespace kava
