// kava_data: makes, checks, describes and converts data files.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <optional>
#include <set>

#include "engine/data/synth.h"
#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/files/parts.h"
#include "tools/choice_option.h"
#include "tools/command.h"
#include "tools/data_files.h"

namespace {

using namespace kava;
namespace fs = std::filesystem;

// CLI11 takes a larger number than 2^63-1 for that.
constexpr int64_t kLargestSeed = std::numeric_limits<int64_t>::max() - 1;

// Removes what this run wrote unless it comes to its end.
struct Undo {
  std::vector<fs::path> made;  // in the order of making
  bool done = false;
  void add(const fs::path& path) { made.push_back(path), tell_unfinished(path); }
  ~Undo() {
    std::error_code ignored;
    for (auto i = made.rbegin(); i != made.rend(); ++i) {
      if (!done) fs::remove(*i, ignored);  // a folder only when it is empty
      forget_unfinished(*i);
    }
  }
};

void make_folder(const fs::path& folder, const std::string& out, Undo& undo) {
  std::error_code error;
  if (fs::is_directory(folder, error)) return;
  if (folder.has_parent_path() && folder != folder.root_path()) make_folder(folder.parent_path(), out, undo);
  fs::create_directory(folder, error);
  require_disk(out, error.value());
  if (error)
    throw Error(Exit::preflight, "--out " + shown_path(out), "could not make the folder: " + error.message(), "name another folder");
  undo.add(folder);
}

int synth(const SynthOptions& options, const std::string& out) {
  require_outside_checkpoints("--out", out);
  const auto files = synthesize(options);
  const fs::path folder = fs::absolute(out).lexically_normal();
  Undo undo;
  make_folder(folder, out, undo);
  const PathLock alone(folder, PathLock::Kind::exclusive, false);
  if (alone.error() == EWOULDBLOCK)
    throw Error(Exit::preflight, "--out " + shown_path(out), "another process works in this folder", "wait for it, or name another folder");
  std::set<std::string> present;
  for (const auto& [name, bytes] : files) {
    const std::string path = (folder / name).string();
    std::error_code error;
    if (!fs::exists(fs::symlink_status(path, error))) continue;
    if (!fs::is_regular_file(path, error) || read_file(path, std::size_t{4} << 30) != bytes)
      throw Error(Exit::usage, "--out " + shown_path(out), fmt::format("{} is there and is another file", name),
                  "name a new folder, or remove it");
    present.insert(name);
  }
  make_folder(folder / "model", out, undo);
  if (::access(folder.c_str(), W_OK | X_OK) != 0 || ::access((folder / "model").c_str(), W_OK | X_OK) != 0) {
    require_disk(out, errno);
    throw Error(Exit::preflight, "--out " + shown_path(out), "the folder cannot be written to", "name another folder");
  }
  for (const auto& [name, bytes] : files) {
    if (present.contains(name)) continue;
    undo.add(folder / name);
    write_file((folder / name).string(), bytes);
  }
  for (const auto& [name, bytes] : files) {
    const auto rows = name.ends_with(".txt") ? fmt::format("{} rows", std::count(bytes.begin(), bytes.end(), '\n'))
                                             : fmt::format("{} bytes", bytes.size());
    fmt::print("{}: {}{}\n", shown_path(fs::path(out) / name), rows, present.contains(name) ? ", was there" : "");
  }
  require_printed();
  undo.done = true;
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Makes, checks, describes and converts data files", "kava_data");
  app.require_subcommand(0, 1);
  app.footer("Example:\n  kava_data synth --out runs/ring && kava_data check runs/ring/train.txt --against runs/ring/test.txt --modulo 10");

  SynthOptions options;
  std::string out;
  CLI::App* synth_command =
      app.add_subcommand("synth", "Make the embedded task: rows for training, validation and test, and a tiny model folder");
  synth_command->footer("Example:\n  kava_data synth --out runs/ring --rows 50000 --steps 3 --seed 42");
  synth_command->add_option("--out", out, "Folder to write to; a file of other content there is never replaced")->required();
  synth_command->add_option("--rows", options.rows, "Training rows")
      ->check(CLI::Range(int64_t{1}, int64_t{10'000'000}))
      ->capture_default_str();
  synth_command->add_option("--steps", options.steps, "Steps of a question")->check(CLI::Range(1, kRingNames - 1))->capture_default_str();
  synth_command->add_option("--seed", options.seed, "Seed of all that is drawn")
      ->check(CLI::Range(int64_t{0}, kLargestSeed))
      ->capture_default_str();

  const std::string format_help = "The form of the files, where it is not recognised: " + format_words();
  CheckCommand check;
  CLI::App* check_command = app.add_subcommand("check", "Check every row, the equations, and what two sets of files share");
  check_command->footer(
      "Example (after tools/quickstart.sh):\n  kava_data check runs/quickstart/data/test.txt --against runs/quickstart/data/train.txt "
      "--modulo 10");
  check_command->add_option("FILE", check.files, "Data files")->required();
  check_command->add_option("--against", check.against, "Files with which FILE should share no question (default: none)");
  check_command->add_option("--format", check.format, format_help);
  check_command->add_option("--modulo", check.modulo, "Equations hold modulo this number (default: as they are)")
      ->check(CLI::Range(int64_t{1}, int64_t{1'000'000'000}));

  StatsCommand stats;
  CLI::App* stats_command = app.add_subcommand("stats", "Describe the lengths of questions, chains and answers");
  stats_command->footer(
      "Example (after tools/quickstart.sh):\n  kava_data stats runs/quickstart/data/train.txt --tokenizer runs/quickstart/data/model "
      "--latents 14");
  stats_command->add_option("FILE", stats.files, "Data files")->required();
  stats_command->add_option("--tokenizer", stats.tokenizer, "A folder with tokenizer.json: lengths in tokens, and traces against latents");
  stats_command->add_option("--format", stats.format, format_help);
  CLI::Option* latents = stats_command->add_option("--latents", stats.latents, "M: traces shorter than this leave slots empty")
                             ->check(CLI::Range(1, 4096))
                             ->capture_default_str();
  CLI::Option* max_tokens =
      stats_command->add_option("--max-tokens", stats.max_tokens, "Rows above this are told, as data.max_tokens drops them")
          ->check(CLI::Range(1, 1'000'000))
          ->capture_default_str();
  CLI::Option* all_steps = stats_command->add_flag("--all-steps", stats.all_steps, "As with data.drop_last_step = false");

  ConvertCommand convert;
  CLI::App* convert_command = app.add_subcommand("convert", "Write a data file of any form as JSON lines or text");
  convert_command->footer("Example (after tools/quickstart.sh):\n  kava_data convert runs/quickstart/data/test.txt runs/test.jsonl");
  convert_command->add_option("IN", convert.in, "A data file")->required();
  convert_command->add_option("OUT", convert.out, "The file to write")->required();
  convert_command->add_option("--format", convert.format, format_help);
  convert_command->add_option("--to", convert.to, "jsonl or icot_text (default: icot_text for .txt, else jsonl)");
  convert_command->add_flag("--skip-malformed", convert.skip_malformed, "Leave malformed rows out and tell them on standard error");

  return command_main(argc, argv, app, [&] {
    if (*synth_command) return synth(options, out);
    if (*check_command) return check_data(check);
    for (const CLI::Option* option : {latents, max_tokens, all_steps})
      if (option->count() > 0) stats.of_tokens = option->get_name();
    if (*stats_command) return describe_data(stats);
    if (*convert_command) return convert_data(convert);
    throw Error(Exit::usage, "kava_data", "no command given", "use synth, check, stats or convert; see kava_data --help");
  });
}
