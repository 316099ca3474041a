// Scorers of a generated answer against the gold one. Each is a pure function of the decoded text (EOS left out) and the gold answer;
// a missing number is wrong. The programs report them side by side.
#pragma once
#include <optional>
#include <string>
#include <string_view>

namespace kava {

/// Without commas, and without white space at both ends.
std::string strict_form(std::string_view text);

/// Equal in that form: after commas are removed and white space is stripped from both ends.
bool strict_match(std::string_view text, std::string_view gold);

/// Equal as they are (PCCoT's test).
bool raw_match(std::string_view text, std::string_view gold);

/// The last numbers of both texts are equal as doubles (CODI's test).
bool codi_match(std::string_view text, std::string_view gold);

/// For a written chain of thought: the first number after the last "The answer is:" or "####" equals the last number of gold. Here and in
/// gsm_hard_match a sign (- or U+2212), blanks, a currency sign and digits are one number.
bool gsm8k_match(std::string_view text, std::string_view gold);

/// GSM-Hard: the last numbers differ by at most 1e-6 of gold's magnitude, since its targets are doubles up to 9.3e12.
bool gsm_hard_match(std::string_view text, std::string_view gold);

/// The last -?digits[.digits] of the text with commas removed, or nothing. ASCII digits only; one too large for a double is nothing.
std::optional<double> last_number(std::string_view text);

/// What a written chain says after its last `prompt`, stripped of white space; nothing where the prompt does not occur. An empty prompt
/// gives the whole text.
std::optional<std::string> answer_of_chain(std::string_view text, std::string_view prompt);

}  // namespace kava
