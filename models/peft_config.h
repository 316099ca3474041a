// adapter_config.json of an adapter in PEFT's format, read as PEFT 0.21 does.
#pragma once
#include <cstdint>
#include <string>

#include "engine/config/config.h"

namespace kava {

/// Error(code data) naming the key where the file describes another adapter than the configuration's on a model of so many layers. Values
/// that change nothing are accepted: patterns of ranks and alphas equal to r and lora_alpha, layers_to_transform with every layer,
/// exclude_modules that excludes no target, target_modules by full names or as a pattern.
void check_peft_config(const RunConfig& config, std::int64_t layers, const std::string& path);

}  // namespace kava
