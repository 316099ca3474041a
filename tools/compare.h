// kava_eval compare: two results on the same questions, question by question.
#pragma once
#include <cstdint>
#include <string>

namespace kava {

/// Two-sided exact McNemar test: the chance, were both equally good, of a split at least as uneven as `only_a` against `only_b`.
double mcnemar_p(int64_t only_a, int64_t only_b);

/// Prints a table. Error(code data) where a file is no result of kava_eval, or the questions differ.
int compare_results(const std::string& a, const std::string& b);

}  // namespace kava
