// The command line of a program: CLI11's parsing inside run_program, so that its faults look like all others.
#pragma once
#include <CLI/CLI.hpp>
#include <algorithm>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

#include "engine/cli.h"
#include "engine/error.h"

namespace kava {

/// What no option or command of `app` takes, the first of the line first: it explains the faults that follow from it.
inline void refuse_unknown(int argc, char** argv, CLI::App& app) {
  const std::vector<std::string> unknown = app.remaining(true);
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (std::ranges::find(unknown, word) == unknown.end()) continue;
    const bool lacks_command = !app.get_subcommands({}).empty() && app.get_subcommands().empty();
    const char* kind = word.starts_with('-') ? "option" : lacks_command ? "command" : "argument";
    throw Error(Exit::usage, app.get_name(), fmt::format("{} {} is unknown", kind, escaped(word.substr(0, word.find('=')), 100)),
                "see " + app.get_name() + " --help");
  }
}

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
      refuse_unknown(argc, argv, app);
      throw Error(Exit::usage, app.get_name(), escaped(e.what(), 400), "see " + app.get_name() + " --help");
    }
    return body();
  });
}

}  // namespace kava
