// kava_inspect file: checks and lists what training reads and writes.
#pragma once
#include <CLI/CLI.hpp>
#include <functional>

namespace kava {

/// Adds the subcommand; where it is given, `chosen` becomes what it does.
void add_file_command(CLI::App& app, std::function<int()>& chosen);

}  // namespace kava
