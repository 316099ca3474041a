// The table that kava_eval prints.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "models/evaluate.h"

namespace kava {

/// A row for each data file, by name, and what lines say of it below: intervals, controls, sweeps. documents: the same results as JSON.
void print_results(const std::vector<std::pair<std::string, EvalResult>>& results, const Json& documents);

}  // namespace kava
