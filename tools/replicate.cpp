// replicate: plans, runs, resumes and aggregates a table of results.
#include <fmt/core.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <sstream>
#include <thread>

#include "engine/cli.h"
#include "engine/files/files.h"
#include "engine/files/parts.h"
#include "tools/command.h"
#include "tools/replicate_plan.h"
#include "tools/replicate_results.h"
#include "tools/replicate_run.h"
#include "tools/replicate_slurm.h"
#include "tools/replicate_work.h"
#include "tools/say.h"

namespace {

using namespace kava;
namespace fs = std::filesystem;

struct ReplicateCommand {
  std::string table, out;
  std::vector<std::string> only;
  std::vector<int64_t> seeds;
  std::string keep = "best";
  std::optional<double> rate;
  std::optional<int64_t> task;
  bool plan = false, dry_run = false, status = false, times = false, slurm = false;
  RunOptions run;
};

Selection selection_of(const ReplicateCommand& command, const ReplicaTable& table) {
  for (int64_t seed : command.seeds)
    if (std::ranges::find(table.seeds, seed) == table.seeds.end())
      throw Error(Exit::usage, "--seeds", fmt::format("{} is no seed of the table", seed), "add it to the table's seeds");
  return {command.only, command.seeds};
}

// A task waits for another that writes the tables, or for the replicate that submits it.
constexpr auto kTaskPatience = std::chrono::minutes(10);

std::unique_ptr<PathLock> lock_folder(const fs::path& out, PathLock::Kind kind, std::chrono::seconds patience = {}) {
  const auto start = std::chrono::steady_clock::now();
  auto lock = std::make_unique<PathLock>(out, kind, false);
  while (lock->error() == EWOULDBLOCK && std::chrono::steady_clock::now() - start < patience && !stop_requested()) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    lock = std::make_unique<PathLock>(out, kind, false);
  }
  const std::string where = "--out " + shown_path(out);
  if (lock->error() == EWOULDBLOCK && stop_requested())
    throw Error(Exit::stopped, where, "stopped while another replicate works in this folder", "give the same command again to go on");
  if (lock->error() == EWOULDBLOCK)
    throw Error(Exit::preflight, where, "another replicate works in this folder", "wait for it; --status shows it");
  if (lock->error() != 0)
    throw Error(Exit::preflight, where, std::string("could not be locked: ") + std::strerror(lock->error()), "choose another folder");
  return lock;
}

void make_folders(const fs::path& out) {
  for (const char* name : {"state", "runs"}) {
    std::error_code failed;
    fs::create_directories(out / name, failed);
    require_disk(out.string(), failed.value());
    if (failed)
      throw Error(Exit::preflight, "--out " + shown_path(out), "could not make the folder: " + failed.message(), "choose another folder");
  }
  if (::access(out.c_str(), W_OK | X_OK) == 0) return;
  require_disk(out.string(), errno);
  throw Error(Exit::preflight, "--out " + shown_path(out), "cannot be written", "choose another folder");
}

// What cannot be looked into may hold all that was done.
void require_seen(const fs::path& out) {
  std::error_code failed;
  const fs::directory_iterator state(out / "state", failed);
  if (failed && (failed != std::errc::no_such_file_or_directory || is_there(out / "state")))
    throw Error(Exit::preflight, "--out " + shown_path(out), "could not look into it: " + failed.message(), "choose another folder");
}

void tell_tables(const ReplicaTable& table, const fs::path& out, const ReplicateCommand& command) {
  write_tables(table, out, command.times);
  say(fmt::format("written {}", shown_path(out / "table.md")));
  ChildProcess report({"kava_report", out.string(), "--out", (out / "report.html").string()}, out / "runs" / "report.log", {});
  std::optional<int> code;
  while (!(code = report.ended())) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  if (*code != 0) say("no report.html: " + report.last_words());
}

// One of several tasks on one folder: the last one to end writes the tables.
int run_task(const ReplicateCommand& command, const ReplicaTable& table, const std::vector<Work>& works, const fs::path& out) {
  int code = 0;
  {
    const auto lock = lock_folder(out, PathLock::Kind::shared, kTaskPatience);
    code = run_works(table, task_works(table, works, *command.task), out, command.run);
  }
  const PathLock alone(out, PathLock::Kind::exclusive, false);
  if (alone.error() == 0) tell_tables(table, out, command);
  return code;
}

// What each task of a Slurm job is to do as this command would.
std::vector<std::string> task_options(const ReplicateCommand& command) {
  const RunOptions& run = command.run;
  std::vector<std::string> out = {
      "--jobs", fmt::format("{}", run.jobs), "--retries", fmt::format("{}", run.retries), "--keep", command.keep, "--device", run.device};
  if (run.budget_hours > 0) out.insert(out.end(), {"--budget-hours", fmt::format("{}", run.budget_hours)});
  if (!command.only.empty()) out.insert(out.end(), {"--only", fmt::format("{}", fmt::join(command.only, ","))});
  if (!command.seeds.empty()) out.insert(out.end(), {"--seeds", fmt::format("{}", fmt::join(command.seeds, ","))});
  if (command.times) out.push_back("--times");
  return out;
}

int replicate(ReplicateCommand& command) {
  std::signal(SIGCHLD, SIG_DFL);  // ignored, as a caller may leave it, no child's end would be told
  const ReplicaTable table = read_table(command.table);
  const fs::path out = fs::absolute(command.out.empty() ? fs::path("runs") / table.name : fs::path(command.out)).lexically_normal();
  if (::chdir(table.folder.c_str()) != 0) throw Error(Exit::usage, shown_path(table.folder), "is no folder to work in");
  command.run.keep_all = command.keep == "all";
  require_outside_checkpoints("--out", out.string());
  require_seen(out);
  const std::vector<Work> works = works_of(table, selection_of(command, table), out);
  if (command.status) return print_status(table, works, out);
  if (command.dry_run) return print_commands(works, out, command.run);
  if (command.plan) print_counts(works, out);
  require_files(table, works, out);
  if (command.plan) return print_plan(table, works, out, command.run, command.rate);
  require_same_contents(table, out);             // the tables hold all rows, those that are not asked for too
  command.run.fewer = command.task.has_value();  // the cores of a task are known when it begins
  if (!command.slurm) (void)shares_for(command.run);
  make_folders(out);
  catch_signals();
  if (command.task) return run_task(command, table, works, out);
  const auto lock = lock_folder(out, PathLock::Kind::exclusive);
  if (command.slurm) return submit_to_slurm(table, works, out, task_options(command));
  const int code = run_works(table, works, out, command.run);
  tell_tables(table, out, command);
  return code;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Plans, runs, resumes and aggregates a table of results", "replicate");
  app.footer(
      "Examples:\n  replicate configs/tables/tiny_smoke.toml --out runs/tiny_smoke\n"
      "  replicate configs/tables/tiny_smoke.toml --out runs/tiny_smoke --status\n"
      "  replicate configs/tables/tiny.toml --dry-run");
  ReplicateCommand c;
  app.add_option("TABLE", c.table, "The table (TOML): rows, columns, seeds, published numbers")->required();
  app.add_option("--out", c.out, "Folder of the runs and tables (default: runs/ and the table's name)");
  app.add_option("--only", c.only, "Names or groups of rows, separated by commas (default: all)")->delimiter(',')->allow_extra_args(false);
  app.add_option("--seeds", c.seeds, "Some of the table's seeds, separated by commas (default: all)")
      ->delimiter(',')
      ->allow_extra_args(false);
  app.add_option("--jobs", c.run.jobs, "Runs at a time, each with a part of the cores or a GPU of its own")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app.add_option("--retries", c.run.retries, "How often a run that failed is tried again")
      ->check(CLI::Range(0, 100))
      ->capture_default_str();
  app.add_option("--budget-hours", c.run.budget_hours, "Stop after so many hours, with checkpoints; exit 75")->check(above_zero());
  app.add_option("--keep", c.keep, "Checkpoints of a run that is evaluated: best or all")
      ->check(CLI::IsMember({"best", "all"}))
      ->capture_default_str();
  app.add_option("--device", c.run.device, "cpu, cuda or auto, of every run")
      ->check(CLI::IsMember({"cpu", "cuda", "auto"}))
      ->capture_default_str();
  app.add_flag("--plan", c.plan, "Print runs, hours, disk and end, and do nothing");
  app.add_option("--rate", c.rate, "TFLOP/s that a run reaches, for --plan")->check(above_zero());
  app.add_flag("--dry-run", c.dry_run, "Print the command of every run that is not done");
  app.add_flag("--status", c.status, "Print what is done, running and failed; from any shell");
  app.add_flag("--times", c.times, "Put milliseconds into the tables, which differ between equal runs");
  app.add_flag("--slurm", c.slurm, "Submit one array job in place of running here");
  app.add_option("--task", c.task, "The runs of one task of that job")->check(CLI::Range(int64_t{0}, int64_t{1} << 30));
  return command_main(argc, argv, app, [&] { return replicate(c); });
}
