// The command line of a program: CLI11's parsing inside run_program, so that its faults look like all others.
#pragma once
#include <CLI/CLI.hpp>
#include <functional>

#include "engine/cli.h"
#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/files/paths.h"

namespace kava {

/// Parses argv by `app` (whose name is the program's) and runs `body`. --help and --version print on stdout and give 0; a fault of the
/// command line is `error: PROGRAM: what; remedy` and exit 2. A ~ that a shell leaves in quotes and in --name=~/x is the home folder.
int command_main(int argc, char** argv, CLI::App& app, const std::function<int()>& body);

/// A number above 0.
CLI::Validator above_zero();

/// The option --set of programs that read a configuration, and --keys, which prints all keys and ends.
void add_set_option(CLI::App& app, std::vector<std::string>& sets);

}  // namespace kava
