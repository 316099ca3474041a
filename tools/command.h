// The command line of a program: CLI11's parsing inside run_program, so that its faults look like all others.
#pragma once
#include <CLI/CLI.hpp>
#include <functional>
#include <iostream>

#include "engine/cli.h"
#include "engine/error.h"

namespace kava {

/// Parses argv by `app` (whose name is the program's) and runs `body`. --help and --version print on stdout and give 0; a fault of the
/// command line is `error: PROGRAM: what; remedy` and exit 2.
inline int command_main(int argc, char** argv, CLI::App& app, const std::function<int()>& body) {
  return run_program([&] {
    app.set_version_flag(
        "--version", [&] { return version_text(app.get_name()); }, "Print version, commit, compiler and devices");
    try {
      app.parse(argc, argv);
    } catch (const CLI::CallForHelp&) {
      std::cout << app.help();
      return 0;
    } catch (const CLI::CallForVersion& version) {
      std::cout << version.what() << "\n";
      return 0;
    } catch (const CLI::ParseError& e) {
      throw Error(Exit::usage, app.get_name(), escaped(e.what(), 400), "see " + app.get_name() + " --help");
    }
    return body();
  });
}

}  // namespace kava
