// kava_inspect tokens: text to token ids and back, line by line.
#pragma once
#include <CLI/CLI.hpp>
#include <functional>

namespace kava {

/// Adds the subcommand; where it is given, `chosen` becomes what it does.
void add_tokens_command(CLI::App& app, std::function<int()>& chosen);

}  // namespace kava
