// kava_inspect step: one batch without an update, everything written out.
#pragma once
#include <CLI/CLI.hpp>
#include <functional>

namespace kava {

/// Adds the subcommand; where it is given, `chosen` becomes what it does.
void add_step_command(CLI::App& app, std::function<int()>& chosen);

}  // namespace kava
