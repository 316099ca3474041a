// kava_inspect probe: what a report shows of a model.
#pragma once
#include <CLI/CLI.hpp>
#include <functional>

namespace kava {

void add_probe_command(CLI::App& app, std::function<int()>& chosen);

}  // namespace kava
