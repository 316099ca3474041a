// kava_data: makes and checks data files.
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <optional>
#include <set>
#include <unordered_set>

#include "engine/data/data.h"
#include "engine/data/equation.h"
#include "engine/data/synth.h"
#include "engine/error.h"
#include "engine/files/files.h"
#include "tools/choice_option.h"
#include "tools/command.h"

namespace {

using namespace kava;
namespace fs = std::filesystem;

// CLI11 takes a larger number than 2^63-1 for that.
constexpr int64_t kLargestSeed = std::numeric_limits<int64_t>::max() - 1;

// Removes what this run wrote unless it comes to its end.
struct Undo {
  std::vector<fs::path> made;  // in the order of making
  bool done = false;
  ~Undo() {
    std::error_code ignored;
    if (!done)
      for (auto i = made.rbegin(); i != made.rend(); ++i) fs::remove(*i, ignored);  // a folder only when it is empty
  }
};

void make_folder(const fs::path& folder, const std::string& out, Undo& undo) {
  std::error_code error;
  if (fs::is_directory(folder, error)) return;
  if (folder.has_parent_path() && folder != folder.root_path()) make_folder(folder.parent_path(), out, undo);
  fs::create_directory(folder, error);
  if (error)
    throw Error(Exit::preflight, "--out " + escaped(out, 4096), "could not make the folder: " + error.message(), "name another folder");
  undo.made.push_back(folder);
}

int synth(const SynthOptions& options, const std::string& out) {
  if (out.empty()) throw Error(Exit::usage, "--out", "is empty", "name a folder");
  const auto files = synthesize(options);
  const fs::path folder = fs::absolute(out).lexically_normal();
  std::set<std::string> present;
  for (const auto& [name, bytes] : files) {
    const std::string path = (folder / name).string();
    std::error_code error;
    if (!fs::exists(fs::symlink_status(path, error))) continue;
    if (!fs::is_regular_file(path, error) || read_file(path, std::size_t{4} << 30) != bytes)
      throw Error(Exit::usage, "--out " + escaped(out, 4096), fmt::format("{} is there and is another file", name),
                  "name a new folder, or remove it");
    present.insert(name);
  }
  Undo undo;
  make_folder(folder, out, undo);
  make_folder(folder / "model", out, undo);
  if (::access(folder.c_str(), W_OK | X_OK) != 0 || ::access((folder / "model").c_str(), W_OK | X_OK) != 0)
    throw Error(Exit::preflight, "--out " + escaped(out, 4096), "the folder cannot be written to", "name another folder");
  for (const auto& [name, bytes] : files) {
    if (present.contains(name)) continue;
    write_file((folder / name).string(), bytes);
    undo.made.push_back(folder / name);
  }
  for (const auto& [name, bytes] : files) {
    const auto rows = name.ends_with(".txt") ? fmt::format("{} rows", std::count(bytes.begin(), bytes.end(), '\n'))
                                             : fmt::format("{} bytes", bytes.size());
    fmt::print("{}: {}{}\n", escaped((fs::path(out) / name).string(), 4096), rows, present.contains(name) ? ", was there" : "");
  }
  require_printed();
  undo.done = true;
  return 0;
}

// Keys by which rows are compared: the question and the whole trace, as text or as ids.
std::string question_key(const Row& row) {
  return row.is_ids ? fmt::format("ids {}", fmt::join(row.question_ids, " ")) : "text " + row.question;
}

std::optional<std::string> trace_key(const Row& row) {
  if (row.is_ids) return row.trace_ids.empty() ? std::nullopt : std::optional(fmt::format("ids {}", fmt::join(row.trace_ids, " ")));
  return row.steps.empty() ? std::nullopt : std::optional(fmt::format("text {}", fmt::join(row.steps, "\n")));
}

struct Equations {
  int64_t hold = 0, fail = 0, unreadable = 0;
  std::vector<std::string> first_false;
};

Equations judge(const RowFile& file, std::optional<int64_t> modulo) {
  constexpr std::size_t kShown = 5;
  Equations out;
  for (const Row& row : file.rows)
    for (const std::string& step : row.steps) {
      if (!step.starts_with("<<")) continue;
      switch (judge_equation(step, modulo)) {
        case Verdict::holds:
          ++out.hold;
          break;
        case Verdict::unreadable:
          ++out.unreadable;
          break;
        case Verdict::fails:
          if (++out.fail <= static_cast<int64_t>(kShown)) out.first_false.push_back(fmt::format("{}: {}", file.where(row), escaped(step)));
      }
    }
  return out;
}

void print_summary(const RowFile& file, std::optional<int64_t> modulo) {
  int64_t steps = 0, without = 0, duplicates = 0;
  std::unordered_set<std::string> questions;
  for (const Row& row : file.rows) {
    steps += static_cast<int64_t>(row.is_ids ? row.trace_ids.size() : row.steps.size());
    without += !trace_key(row);
    duplicates += !questions.insert(question_key(row)).second;
  }
  fmt::print("{}: {}, {} rows, {} {}, {} rows without a trace, {} repeated questions\n", escaped(file.path, 4096), name_of(file.format),
             file.rows.size(), steps, file.format == DataFormat::ids ? "trace ids" : "steps", without, duplicates);
  const Equations equations = judge(file, modulo);
  if (equations.hold + equations.fail + equations.unreadable == 0) return;
  fmt::print("  equations{}: {} hold, {} are false, {} of another form\n", modulo ? fmt::format(" modulo {}", *modulo) : "", equations.hold,
             equations.fail, equations.unreadable);
  for (const std::string& line : equations.first_false) fmt::print("  false: {}\n", line);
  if (equations.fail > static_cast<int64_t>(equations.first_false.size()))
    fmt::print("  and {} more\n", equations.fail - static_cast<int64_t>(equations.first_false.size()));
}

int check(const std::vector<std::string>& paths, const std::vector<std::string>& against, std::optional<DataFormat> format,
          std::optional<int64_t> modulo) {
  std::vector<RowFile> files, others;
  for (const std::string& path : paths) print_summary(files.emplace_back(read_rows(path, format)), modulo);
  if (against.empty()) return 0;
  for (const std::string& path : against) print_summary(others.emplace_back(read_rows(path, format)), modulo);

  std::unordered_set<std::string> questions, traces;
  for (const RowFile& file : others)
    for (const Row& row : file.rows) {
      questions.insert(question_key(row));
      if (auto trace = trace_key(row)) traces.insert(*std::move(trace));
    }
  int64_t by_question = 0, by_trace = 0;
  std::string first;
  for (const RowFile& file : files)
    for (const Row& row : file.rows) {
      const auto trace = trace_key(row);
      const bool question_there = questions.contains(question_key(row)), trace_there = trace && traces.contains(*trace);
      by_question += question_there;
      by_trace += trace_there;
      if (first.empty() && (question_there || trace_there)) first = file.where(row);
    }
  fmt::print("overlap: {} by question, {} by trace\n", by_question, by_trace);
  if (!first.empty())
    throw Error(Exit::data, first,
                fmt::format("{} rows share their question and {} their trace with the files of --against", by_question, by_trace),
                "remove them from one side");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Makes and checks data files", "kava_data");
  app.require_subcommand(0, 1);
  app.footer("Example:\n  kava_data synth --out ring && kava_data check ring/train.txt --against ring/test.txt --modulo 10");

  SynthOptions options;
  std::string out;
  CLI::App* synth_command =
      app.add_subcommand("synth", "Make the embedded task: rows for training, validation and test, and a tiny model folder");
  synth_command->footer("Example:\n  kava_data synth --out ring --rows 50000 --steps 3 --seed 42");
  synth_command->add_option("--out", out, "Folder to write to; a file of other content there is never replaced")->required();
  synth_command->add_option("--rows", options.rows, "Training rows")
      ->check(CLI::Range(int64_t{1}, int64_t{10'000'000}))
      ->capture_default_str();
  synth_command->add_option("--steps", options.steps, "Steps of a question")->check(CLI::Range(1, kRingNames - 1))->capture_default_str();
  synth_command->add_option("--seed", options.seed, "Seed")->check(CLI::Range(int64_t{0}, kLargestSeed))->capture_default_str();

  std::vector<std::string> files, against;
  std::optional<int64_t> modulo;
  CLI::App* check_command = app.add_subcommand("check", "Check every row, the equations, and what two sets of files share");
  check_command->footer("Example:\n  kava_data check train.txt --against test.txt");
  check_command->add_option("FILE", files, "Data files")->required();
  check_command->add_option("--against", against, "Files with which FILE should share no question and no trace");
  std::optional<std::string> format;
  check_command->add_option("--format", format, "The form of all files, where it is not recognised: " + format_words());
  check_command->add_option("--modulo", modulo, "Equations hold modulo this number")->check(CLI::Range(int64_t{1}, int64_t{1'000'000'000}));

  for (const char* name : {"stats", "convert"}) app.add_subcommand(name, "Not built yet")->allow_extras();

  return command_main(argc, argv, app, [&] {
    if (*synth_command) return synth(options, out);
    if (*check_command) return check(files, against, choice_option<DataFormat>("--format", format), modulo);
    if (app.get_subcommands().empty())
      throw Error(Exit::usage, "kava_data", "no command given", "use synth or check; see kava_data --help");
    throw Error(Exit::usage, "kava_data", app.get_subcommands().front()->get_name() + " is not built yet", "use synth or check");
  });
}
