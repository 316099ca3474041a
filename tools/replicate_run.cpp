#include "tools/replicate_run.h"

#include <sched.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <sstream>
#include <thread>

#include "engine/cli.h"
#include "engine/cores.h"
#include "engine/device/cuda_module.h"
#include "engine/error.h"
#include "engine/files/checkpoint.h"
#include "engine/files/files.h"
#include "engine/files/parts.h"
#include "tools/replicate_plan.h"
#include "tools/say.h"
#include "tools/terminal.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

constexpr auto kBetweenLooks = std::chrono::milliseconds(20);
constexpr auto kOrphanPatience = std::chrono::seconds(10);

// As CUDA_VISIBLE_DEVICES names them; none where no run takes one.
std::vector<std::string> gpus_for(const RunOptions& options) {
  std::string why;
  if (options.device == "cpu" || options.jobs == 1 || cuda_is_emulated()) return {};
  return gpu_names(std::getenv("CUDA_VISIBLE_DEVICES"), cuda_devices(why));
}

// A failure that the same command gives again.
bool is_final(int code) { return code == 2 || code == 3 || code == 4 || code == 7 || code == 127; }

int exit_code_of(int ended) {
  if (ended >= 0) return ended == 127 ? static_cast<int>(Exit::internal) : ended;
  return static_cast<int>(ended == -SIGKILL ? Exit::comm : Exit::internal);  // killed from outside, or crashed
}

std::string reason_of(int ended, const std::string& words) {
  if (ended == 127) return "the program could not be started";
  if (ended < 0) return fmt::format("ended by signal {}{}", -ended, words.empty() ? "" : "; its last line: " + words);
  return words;
}

// What ended with a replicate that was killed holds its folder for a moment longer.
void wait_for_orphans(const fs::path& run) {
  std::error_code ignored;
  if (!fs::exists(run, ignored)) return;
  const auto start = std::chrono::steady_clock::now();
  while (PathLock(run, PathLock::Kind::exclusive, false).error() == EWOULDBLOCK &&
         std::chrono::steady_clock::now() - start < kOrphanPatience)
    std::this_thread::sleep_for(kBetweenLooks);
}

// Leaves the best checkpoint of a run that is done, or its last where there is no best, and what somebody reads.
void prune(const fs::path& run) {
  std::optional<std::int64_t> kept = linked_step(run, "best");
  if (!kept) kept = linked_step(run, "last");
  if (!kept) return;
  prune_checkpoints(run, std::numeric_limits<std::int64_t>::max(), 0, {*kept});
  std::error_code failed;
  if (!fs::exists(run / "last", failed)) fs::remove(run / "last", failed);
}

class Runner {
 public:
  Runner(const ReplicaTable& table, const std::vector<Work>& works, const fs::path& out, const RunOptions& options)
      : table_(table),
        works_(works),
        out_(out),
        options_(options),
        shares_(shares_for(options)),
        jobs_(shares_.size()),
        items_(works.size()) {
    for (std::size_t i = 0; i < works.size(); ++i) {
      items_[i].state = read_state(out, works[i]).value_or(WorkState{});
      items_[i].stage = items_[i].state.done ? Stage::done : Stage::open;
      done_ += items_[i].state.done;
      items_[i].state.fingerprint = works[i].fingerprint;
    }
  }

  int run() {
    for (std::size_t i = 0; i < works_.size(); ++i)
      if (items_[i].stage == Stage::done) tidy(works_[i]);  // a kill may have come between
    say(fmt::format("{}: {} of {} works done, {} at a time", table_.title, done_, works_.size(), jobs_.size()));
    for (;;) {
      const bool ran = reap();
      if (should_stop()) stop_all();
      else start_ready();
      if (std::ranges::all_of(jobs_, [](const auto& job) { return !job.process; })) break;
      if (!ran) std::this_thread::sleep_for(kBetweenLooks);
    }
    tell_left();
    if (stopping_ && done_ < works_.size()) {
      say(fmt::format("stopped with {} of {} works done; the same command goes on", done_, works_.size()));
      return static_cast<int>(Exit::stopped);
    }
    if (first_failure_ != 0) print_note("error: " + first_reason_);
    return first_failure_;
  }

 private:
  enum class Stage { open, running, done, failed };
  struct Item {
    Stage stage = Stage::open;
    WorkState state;
    int tries = 0;  // in this call
  };
  struct Job {
    std::unique_ptr<ChildProcess> process;
    std::size_t work = 0;
  };

  bool should_stop() const {
    const double hours = std::chrono::duration<double, std::ratio<3600>>(std::chrono::steady_clock::now() - start_).count();
    return stop_requested() || (options_.budget_hours > 0 && hours >= options_.budget_hours);
  }

  void stop_all() {
    if (std::exchange(stopping_, true)) return;
    say(stop_requested() ? "stopping: each run writes a checkpoint" : "stopping after --budget-hours: each run writes a checkpoint");
    for (const Job& job : jobs_)
      if (job.process) job.process->send(SIGTERM);
  }

  bool is_ready(std::size_t i) const {
    return items_[i].stage == Stage::open &&
           std::ranges::all_of(works_[i].needs, [&](std::size_t n) { return items_[n].stage == Stage::done; });
  }

  void start_ready() {
    for (std::size_t j = 0; j < jobs_.size(); ++j) {
      if (jobs_[j].process) continue;
      for (std::size_t i = 0; i < works_.size() && !jobs_[j].process; ++i)
        if (is_ready(i)) start(j, i);
    }
  }

  void start(std::size_t j, std::size_t i) {
    const Work& work = works_[i];
    std::vector<std::string> command = command_of(work, options_);
    if (work.kind != WorkKind::data && shares_[j].threads > 0)
      command.insert(command.end(), {"--threads", fmt::format("{}", shares_[j].threads)});
    if (work.kind == WorkKind::train) wait_for_orphans(work.run);
    // What a kill before its state left of an evaluation, which kava_eval would take for a file of the run.
    if (std::error_code ignored; work.kind == WorkKind::eval) fs::remove(work.result, ignored);
    items_[i].state.inputs = digests_of_inputs(table_, work, out_);
    jobs_[j].process = std::make_unique<ChildProcess>(command, work.log, shares_[j]);
    jobs_[j].work = i;
    items_[i].stage = Stage::running, ++items_[i].tries, ++items_[i].state.attempts;
    say(fmt::format("[{}/{}] {} begins", done_, works_.size(), work.id));
  }

  // Whether anything ended.
  bool reap() {
    bool any = false;
    for (Job& job : jobs_) {
      if (!job.process) continue;
      const std::optional<int> code = job.process->ended();
      if (!code) continue;
      any = true;
      const auto process = std::exchange(job.process, nullptr);
      finish(job.work, *code, *process);
    }
    return any;
  }

  void finish(std::size_t i, int ended, const ChildProcess& process) {
    const Work& work = works_[i];
    Item& item = items_[i];
    item.state.seconds += process.seconds();
    if (ended == static_cast<int>(Exit::stopped) || (stopping_ && ended < 0)) {
      item.stage = Stage::open, --item.tries;
      item.state.code = static_cast<int>(Exit::stopped), item.state.reason = "stopped";
      write_state(out_, work, item.state);  // its seconds and attempts count
      return;
    }
    if (ended != 0) return fail(i, exit_code_of(ended), reason_of(ended, process.last_words()), is_final(ended));
    try {
      if (work.kind == WorkKind::eval) item.state.result = evaluation_summary(work.result.string());
    } catch (const Error& e) {
      return fail(i, static_cast<int>(e.code()), e.what(), false);
    }
    item.state.done = true, item.state.code = 0, item.state.reason.clear();
    write_state(out_, work, item.state);
    item.stage = Stage::done, ++done_;
    say(fmt::format("[{}/{}] {} done in {}", done_, works_.size(), work.id, duration_text(process.seconds())));
    tidy(work);
  }

  // What only a run that is not finished needs.
  void tidy(const Work& work) const {
    std::error_code ignored;
    if (work.kind == WorkKind::eval) fs::remove(work.result, ignored);
    if (!options_.keep_all && work.kind != WorkKind::data && is_run_finished(work)) prune(work.run);
  }

  bool is_run_finished(const Work& work) const {
    for (std::size_t i = 0; i < works_.size(); ++i)
      if (works_[i].run == work.run && items_[i].stage != Stage::done) return false;
    return true;
  }

  void fail(std::size_t i, int code, const std::string& reason, bool final) {
    const Work& work = works_[i];
    Item& item = items_[i];
    item.state.code = code, item.state.reason = reason;
    write_state(out_, work, item.state);
    const bool again = !final && item.tries <= options_.retries && !stopping_;
    item.stage = again ? Stage::open : Stage::failed;
    if (!again && first_failure_ == 0)
      first_failure_ = code, first_reason_ = fmt::format("{}: {}; log: {}", work.id, reason, shown_path(work.log));
    say(fmt::format("[{}/{}] {} failed ({}): {}; log: {}{}", done_, works_.size(), work.id, code, reason, shown_path(work.log),
                    again ? "; tried again" : ""));
  }

  void tell_left() const {
    for (std::size_t i = 0; i < works_.size(); ++i) {
      if (items_[i].stage != Stage::open || stopping_) continue;
      for (std::size_t need : works_[i].needs)
        if (items_[need].stage != Stage::done) say(fmt::format("{} waits for {}", works_[i].id, works_[need].id));
    }
  }

  const ReplicaTable& table_;
  const std::vector<Work>& works_;
  const fs::path& out_;
  const RunOptions& options_;
  const std::vector<Share> shares_;
  std::vector<Job> jobs_;
  std::vector<Item> items_;
  std::size_t done_ = 0;
  int first_failure_ = 0;
  std::string first_reason_;
  bool stopping_ = false;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace

std::vector<std::string> gpu_names(const char* visible, int count) {
  std::vector<std::string> names;
  std::istringstream words(visible ? visible : "");
  for (std::string word; std::ssize(names) < count && std::getline(words, word, ',');) names.push_back(word);
  for (int i = 0; !visible && i < count; ++i) names.push_back(fmt::format("{}", i));
  return names;
}

std::vector<Share> shares_of(int jobs, const std::vector<int>& cores, int usable, const std::vector<std::string>& gpus) {
  if (!gpus.empty() && jobs > std::ssize(gpus))
    throw Error(Exit::usage, "--jobs", fmt::format("{} runs at a time, but {} GPUs", jobs, gpus.size()),
                fmt::format("give at most {}, or --device cpu", gpus.size()));
  if (gpus.empty() && jobs > usable)
    throw Error(Exit::usage, "--jobs", fmt::format("{} runs at a time, but {} {}", jobs, usable, usable == 1 ? "core" : "cores"),
                fmt::format("give at most {}", usable));
  std::vector<Share> out(static_cast<std::size_t>(jobs));
  if (jobs == 1) return out;
  const std::size_t each = cores.size() / out.size();
  for (std::size_t i = 0; i < out.size(); ++i) {
    const auto begin = cores.begin() + static_cast<std::ptrdiff_t>(i * each);
    out[i].cores.assign(begin, begin + static_cast<std::ptrdiff_t>(each));
    out[i].threads = std::max(1, usable / jobs);
    if (!gpus.empty()) out[i].gpu = gpus[i];
  }
  return out;
}

std::vector<Share> shares_for(const RunOptions& options) {
  const std::vector<std::string> gpus = gpus_for(options);
  const int jobs = options.fewer && gpus.empty() ? std::min(options.jobs, usable_cores()) : options.jobs;
  return shares_of(jobs, allowed_cores(), usable_cores(), gpus);
}

std::vector<std::string> command_of(const Work& work, const RunOptions& options) {
  std::vector<std::string> command = work.arguments;
  if (work.kind == WorkKind::data) return command;
  if (work.kind == WorkKind::train && is_there(work.run / "config.toml")) command.push_back("--resume");
  command.insert(command.end(), {"--device", options.device});
  return command;
}

int run_works(const ReplicaTable& table, const std::vector<Work>& works, const fs::path& out, const RunOptions& options) {
  return Runner(table, works, out, options).run();
}

}  // namespace kava
