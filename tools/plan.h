// What a run will be, printed before it starts or instead of it.
#pragma once
#include <optional>
#include <span>
#include <string>

#include "engine/config/config.h"
#include "models/footprint.h"
#include "models/text.h"
#include "models/validation.h"

namespace kava {

/// The model and its parameters, total and trainable, by group. Needs no weights.
std::string parameter_table(const RunConfig& config, const TextModel& text);

/// Samples, steps and lengths.
std::string run_summary(const RunConfig& config, const ModelConfig& shape, std::span<const Sample> samples, const LeftOut& left_out);
std::string validation_summary(const RunConfig& config, const ModelConfig& shape, const Validator& valid);

struct PlanOptions {
  std::optional<std::string> json, memory, rate;
};

/// Bytes of `--memory`, FLOP/s of `--rate`. Error(code usage) for what is no such number.
std::optional<int64_t> memory_of(const PlanOptions& options);
std::optional<double> rate_of(const PlanOptions& options);

/// Prints a line "KEY  VALUE UNIT" for each number of the plan, and writes them as JSON where asked to. Error(code preflight) afterwards
/// where the run does not fit: in `available` bytes, or in those of --memory.
void print_plan(const PlanOptions& options, const MemoryPlanner& planner, const RunConfig& config, const ModelConfig& shape,
                int64_t available);

}  // namespace kava
