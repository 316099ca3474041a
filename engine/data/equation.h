// The equations of reasoning steps, for checking data.
#pragma once
#include <cstdint>
#include <optional>
#include <string_view>

namespace kava {

enum class Verdict { holds, fails, unreadable };

/// Judges a step `<<EXPRESSION=RESULT>>` of numbers, + - * / and brackets. A result holds when it is rounded or cut to its decimals,
/// to a whole number where it has none.
/// With `modulo`, both sides must be whole and are compared modulo it. Percentages, units, several = and all else are unreadable.
Verdict judge_equation(std::string_view step, std::optional<int64_t> modulo = std::nullopt);

/// Judges a row's answer by the equation of its last step: it holds where it is the result, or the expression's value, rounded or cut as
/// above. Commas and a currency sign in the answer are passed over.
Verdict judge_answer(std::string_view step, std::string_view answer, std::optional<int64_t> modulo = std::nullopt);

}  // namespace kava
