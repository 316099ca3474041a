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
#include "engine/files/files.h"
#include "engine/files/paths.h"

namespace kava {

/// What no option or command of `app` takes, the first of the line first: it explains the faults that follow from it.
inline void refuse_unknown(int argc, char** argv, CLI::App& app) {
  const std::vector<std::string> unknown = app.remaining(true);
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (std::ranges::find(unknown, word) == unknown.end()) continue;
    const bool lacks_command = !app.get_subcommands({}).empty() && app.get_subcommands().empty();
    const bool option = word.starts_with('-');
    // A wrong command's name was taken for the first argument.
    const std::string first = argv[1];
    if (!option && lacks_command && i > 1 && !first.starts_with('-') && !is_there(first))
      throw Error(Exit::usage, app.get_name(), fmt::format("command {} is unknown", escaped(first, 100)),
                  "see " + app.get_name() + " --help");
    const char* kind = option ? "option" : lacks_command && i == 1 ? "command" : "argument";
    const std::string name = option ? word.substr(0, word.find('=')) : word;
    throw Error(Exit::usage, app.get_name(), fmt::format("{} {} is unknown", kind, escaped(name, 100)),
                "see " + app.get_name() + " --help");
  }
}

/// The arguments, the last first, with the ~ that a shell leaves in quotes and in --name=~/x.
inline std::vector<std::string> arguments_of(int argc, char** argv) {
  std::vector<std::string> arguments;
  for (int i = argc - 1; i > 0; --i) {
    const std::string word = argv[i];
    const auto value = word.starts_with("--") && word.find('=') != std::string::npos ? word.find('=') + 1 : 0;
    arguments.push_back(word.substr(0, value) + expand_home(word.substr(value)));
  }
  return arguments;
}

/// Parses argv by `app` (whose name is the program's) and runs `body`. --help and --version print on stdout and give 0; a fault of the
/// command line is `error: PROGRAM: what; remedy` and exit 2.
inline int command_main(int argc, char** argv, CLI::App& app, const std::function<int()>& body) {
  return run_program([&] {
    app.set_version_flag(
        "--version", [&] { return version_text(app.get_name()); }, "Print version, commit, compiler and devices");
    try {
      app.parse(arguments_of(argc, argv));
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
