// kava_eval compare: two results on the same questions, question by question.
#pragma once
#include <string>

namespace kava {

/// Prints a table. Error(code data) where a file is no result of kava_eval, or the questions differ.
int compare_results(const std::string& a, const std::string& b);

}  // namespace kava
