// What a run will be, printed before it starts or instead of it.
#pragma once
#include <span>
#include <string>

#include "engine/config/config.h"
#include "models/text.h"

namespace kava {

/// The model and its parameters, total and trainable, by group. Needs no weights.
std::string parameter_table(const RunConfig& config, const TextModel& text);

/// Samples, steps and lengths.
std::string run_summary(const RunConfig& config, std::span<const Sample> samples, int64_t dropped);

}  // namespace kava
