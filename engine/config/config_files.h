// The files that make a configuration.
#pragma once
#include <string>
#include <vector>

namespace kava {

/// `path` and, where it includes one, the included file: what load_config reads. Error(code usage) as there.
std::vector<std::string> config_files(const std::string& path);

}  // namespace kava
