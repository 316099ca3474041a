// The files that make a configuration.
#pragma once
#include <string>
#include <vector>

#include "engine/config/config.h"

namespace kava {

/// `path` and, where it includes one, the included file: what load_config reads. Error(code usage) as there.
std::vector<std::string> config_files(const std::string& path);

/// The model, adapter and data that a configuration names.
std::vector<std::string> contents_of(const RunConfig& config);
/// What a run reads: these, and its configuration with what that includes, or where `path` is a run's folder the run's own files.
std::vector<std::string> inputs_of(const std::string& path, const RunConfig& config);

}  // namespace kava
