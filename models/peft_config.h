// adapter_config.json of an adapter in PEFT's format, read as PEFT 0.21 does.
#pragma once
#include <cstdint>
#include <set>
#include <string>

#include "engine/config/config.h"
#include "models/config.h"

namespace kava {

/// Error(code data) naming the key where the file describes another adapter than the configuration's on this model. Values
/// that change nothing are accepted: patterns of ranks and alphas equal to r and lora_alpha, layers_to_transform with every layer,
/// exclude_modules that excludes no target, target_modules by full names or as a pattern.
/// Where the architecture stores its linears transposed, fan_in_fan_out may be either: PEFT finds out by itself. read_elsewhere: keys that
/// may say anything, since the caller reads the tensors that they speak of.
void check_peft_config(const RunConfig& config, const ModelConfig& shape, const std::string& path,
                       const std::set<std::string>& read_elsewhere = {});

/// Error(code data): the adapter's file is not of the run's configuration.
[[noreturn]] void mismatch(const std::string& file, const std::string& what);
/// Error(code data): PEFT knows what the file describes, and kava does not.
[[noreturn]] void unsupported(const std::string& file, const std::string& what);

}  // namespace kava
