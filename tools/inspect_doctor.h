// kava_inspect doctor: what this machine has of what the programs need.
#pragma once
#include <CLI/CLI.hpp>
#include <functional>

namespace kava {

/// Adds the subcommand; where it is given, `chosen` becomes what it does.
void add_doctor_command(CLI::App& app, std::function<int()>& chosen);

}  // namespace kava
