#include "tools/command.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "engine/config/key_help.h"
#include "tools/say.h"
#include "tools/terminal.h"

namespace kava {

namespace {

constexpr std::size_t kLeft = 30;       // columns of options, where their descriptions stand beside them
constexpr std::int64_t kBeside = 70;    // the least columns for that
constexpr std::int64_t kWidest = 110;   // columns of text
constexpr std::size_t kUnbounded = 10;  // digits of a bound that says no more than that there is none

std::string wrapped(const std::string& text, std::size_t indent, std::size_t columns) {
  std::istringstream words(text);
  std::string out, line;
  for (std::string word; words >> word;) {
    if (!line.empty() && indent + line.size() + 1 + word.size() >= columns) out += line + "\n" + std::string(indent, ' '), line.clear();
    line += (line.empty() ? "" : " ") + word;
  }
  return out + line;
}

/// Options with their values, ranges and defaults in words, as wide as the terminal; examples that name the programs as this one was
/// called.
class HelpText final : public CLI::Formatter {
 public:
  std::string make_option(const CLI::Option* option, bool positional) const override {
    return entry(make_option_name(option, positional) + value_of(option, positional), described(option, positional));
  }

  std::string make_subcommand(const CLI::App* command) const override { return entry(command->get_name(), command->get_description()); }

  std::string make_description(const CLI::App* app) const override {
    return wrapped(app->get_description(), 0, static_cast<std::size_t>(columns_)) + "\n";
  }

  std::string make_footer(const CLI::App* app) const override {
    std::istringstream lines(app->get_footer());
    std::string out;
    for (std::string line; std::getline(lines, line);) out += (line.starts_with("  ") ? with_programs(line) : line) + "\n";
    return out;
  }

 private:
  std::int64_t columns_ = std::clamp<std::int64_t>(columns_of(stdout, kWidest), 30, kWidest);

  std::string entry(const std::string& left, const std::string& right) const {
    const bool beside = columns_ >= kBeside;
    const std::size_t indent = beside ? kLeft : 6;
    std::string out = "  " + left;
    if (beside && out.size() + 2 <= kLeft) out.resize(kLeft, ' ');
    else out += "\n" + std::string(indent, ' ');
    return out + wrapped(right, indent, static_cast<std::size_t>(columns_)) + "\n";
  }

  static bool several(const CLI::Option* option) { return option->get_expected_max() == CLI::detail::expected_max_vector_size; }

  static std::string value_of(const CLI::Option* option, bool positional) {
    if (option->get_type_size() == 0) return "";
    const std::string more = several(option) && option->get_allow_extra_args() ? "..." : "";
    if (positional) return more;
    const std::string type = option->get_type_name(), name = type.substr(0, type.find(':'));
    if (name.empty()) return more;
    return " " + (name == "INT" || name == "UINT" ? "N" : name == "FLOAT" ? "X" : name) + more;
  }

  // "1 to 4096" of CLI11's "INT:INT in [1 - 4096]".
  static std::string range_of(const std::string& type) {
    const std::size_t begin = type.find(" in ["), dash = type.find(" - ", begin == type.npos ? 0 : begin), end = type.rfind(']');
    if (begin == type.npos || dash == type.npos || end == type.npos) return type.ends_with(":POSITIVE") ? "above 0" : "";
    const std::string least = type.substr(begin + 5, dash - begin - 5), most = type.substr(dash + 3, end - dash - 3);
    return most.size() >= kUnbounded ? "from " + least + " on" : least + " to " + most;
  }

  static std::string described(const CLI::Option* option, bool positional) {
    std::string notes;
    const auto note = [&](const std::string& text) { notes += (notes.empty() ? " (" : "; ") + text; };
    if (option->get_required() && !positional) note("required");
    for (const CLI::Option* needed : option->get_needs()) note("with " + needed->get_name());
    if (const std::string range = range_of(option->get_type_name()); !range.empty()) note(range);
    if (!option->get_default_str().empty()) note("default: " + option->get_default_str());
    return option->get_description() + (notes.empty() ? "" : notes + ")");
  }

  static std::string with_programs(std::string line) {
    for (const char* before : {"  ", "&& ", "| "})
      for (const char* name : {"kava_", "replicate "}) {
        const std::string word = std::string(before) + name;
        for (std::size_t at = 0; (at = line.find(word, at)) != line.npos; at += word.size())
          line.insert(at + std::string_view(before).size(), program_beside(""));
      }
    return line;
  }
};

/// Values of options and arguments with the ~ that a shell leaves in quotes and in --name=~/x; a question is no path.
void expand_home_in(CLI::App& app) {
  const CLI::Validator expand(
      [](std::string& value) {
        value = expand_home(value);
        return std::string();
      },
      "");
  for (CLI::Option* option : app.get_options())
    if (option->get_type_size() != 0 && option->get_name() != "QUESTION") option->transform(expand);
  for (CLI::App* command : app.get_subcommands({})) expand_home_in(*command);
}

std::vector<std::string> options_of(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options())
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  return names;
}

std::string hint_for(const std::string& name, const CLI::App& app) {
  // The command's own options, where one was named.
  const std::vector<CLI::App*> commands = app.get_subcommands();
  const CLI::App& asked = commands.empty() ? app : *commands.front();
  const std::vector<std::string> options = options_of(asked);
  const std::string hint = remedy_for_option(name, options, std::ranges::find(options, "--set") != options.end());
  const std::string help = fmt::format("{}{} --help", app.get_name(), commands.empty() ? "" : " " + asked.get_name());
  return hint.empty() ? "see " + help : hint + ", or see " + help;
}

/// CLI11's word for a fault; "[1 - 9]" of its newer versions is "1 to 9" of the older ones.
std::string fault_of(std::string text) {
  constexpr std::string_view kRange = " not in range [";
  const std::size_t range = text.find(kRange), dash = text.find(" - ", range), end = text.find(']', dash);
  if (range == text.npos || dash == text.npos || end == text.npos) return text;
  text.erase(end, 1).replace(dash, 3, " to ").erase(range + kRange.size() - 1, 1);
  return text;
}

/// What no option or command of `app` takes, the first of the line first: it explains the faults that follow from it.
void refuse_unknown(int argc, char** argv, CLI::App& app) {
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
    const bool after_set = i > 2 && argv[i - 2] == std::string_view("--set") && word.find('=') != word.npos;
    throw Error(Exit::usage, app.get_name(), fmt::format("{} {} is unknown", kind, escaped(name, 100)),
                option      ? hint_for(name, app)
                : after_set ? "give --set once for each value"
                            : "see " + app.get_name() + " --help");
  }
}

/// Nothing as an option's value is most often a variable of a shell that is not set, and no wish for the default.
void refuse_empty(const CLI::App& app) {
  for (const CLI::Option* option : app.get_options())
    if (!option->get_lnames().empty() && std::ranges::any_of(option->results(), &std::string::empty))
      throw Error(Exit::usage, option->get_name(), "is empty", "give a value");
  for (const CLI::App* command : app.get_subcommands()) refuse_empty(*command);
}

std::string help_of(const CLI::App& app) {
  std::string text = app.help();
  for (std::size_t at; (at = text.find("\n\n\n")) != text.npos;) text.erase(at, 1);
  return text;
}

}  // namespace

int command_main(int argc, char** argv, CLI::App& app, const std::function<int()>& body) {
  return run_program([&] {
    const auto help = std::make_shared<HelpText>();
    app.formatter(help);
    for (CLI::App* command : app.get_subcommands({})) command->formatter(help);
    expand_home_in(app);
    app.set_version_flag(
        "--version", [&] { return version_text(app.get_name()); }, "Print version, commit, compiler, libraries and devices");
    try {
      app.parse(argc, argv);
    } catch (const CLI::CallForHelp&) {
      std::cout << help_of(app);
      return 0;
    } catch (const CLI::CallForVersion& text) {
      std::cout << text.what() << "\n";
      return 0;
    } catch (const CLI::ParseError& e) {
      refuse_unknown(argc, argv, app);
      refuse_empty(app);
      throw Error(Exit::usage, app.get_name(), escaped(fault_of(e.what()), 400), "see " + app.get_name() + " --help");
    }
    refuse_empty(app);
    return body();
  });
}

CLI::Validator above_zero() {
  const auto check = [](const std::string& text) {
    double number = 0;
    return CLI::detail::lexical_cast(text, number) && number > 0 && std::isfinite(number) ? "" : escaped(text) + " is no number above 0";
  };
  return {check, "POSITIVE"};
}

void add_set_option(CLI::App& app, std::vector<std::string>& sets) {
  app.add_option("--set", sets, "Overrides a key of the configuration, as --set train.lr=1e-3; given once for each key")
      ->type_name("KEY=VALUE")
      ->allow_extra_args(false);
  app.add_flag_callback(
         "--keys", [] { throw CLI::CallForVersion(key_list(), 0); }, "Print every key with its default and range, and end")
      ->trigger_on_parse();
}

}  // namespace kava
