// kill_resume --rounds N [--bin DIR] [--every-error]: small training runs that die and go on.
//
// Every failpoint of a run (engine/files/disk.h), from its start and from a checkpoint on that is written again: killed there, --resume
// must give the bytes of the run that was not, from a checkpoint no older than those that were whole before. With an error there, the
// program must end with 7 and one line, and leave what a run leaves that ends before. Then N runs that are killed at random moments until
// they end. The last line is "K kills, L lost, sha256 equal" (or "different"); exit 0 where nothing was lost and all is equal, 1, or 4:
// cannot run.
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "engine/error.h"
#include "engine/files/checkpoint.h"
#include "engine/files/files.h"
#include "engine/files/json.h"
#include "tests/folders.h"
#include "tests/run_snapshot.h"

namespace {

using namespace kava;
namespace fs = std::filesystem;

constexpr std::array<const char*, 4> kKinds = {"open", "write", "fsync", "rename"};
constexpr std::array<const char*, 4> kErrors = {"eio", "enospc", "erofs", "emfile"};

struct Options {
  int rounds = 10;
  fs::path bin = "build/cpu/bin";
  bool every_error = false;
};

struct Ended {
  int code = 0;  // -SIGNAL where one ended it
  std::string err;
};

using Arguments = std::vector<std::string>;

class Program {
 public:
  explicit Program(fs::path path) : path_(std::move(path)) {}

  Ended run(const Arguments& arguments, const std::string& fail = "", std::chrono::microseconds kill_after = {}) const {
    const TempFolder streams;
    const std::string err = streams / "err";
    std::vector<const char*> argv = {path_.c_str()};
    for (const std::string& a : arguments) argv.push_back(a.c_str());
    argv.push_back(nullptr);
    const pid_t child = ::fork();
    if (child == 0) {
      ::dup2(::open("/dev/null", O_WRONLY), 1);
      ::dup2(::open(err.c_str(), O_WRONLY | O_CREAT, 0600), 2);
      if (!fail.empty()) ::setenv("KAVA_FAIL", fail.c_str(), 1);
      ::execv(argv[0], const_cast<char**>(argv.data()));
      ::_exit(127);
    }
    if (kill_after.count() > 0) {
      std::this_thread::sleep_for(kill_after);
      ::kill(child, SIGKILL);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status), fs::exists(err) ? read_file(err, kMostCompared) : ""};
  }

 private:
  fs::path path_;
};

// A command that is killed at its failpoints, and goes on by another.
struct Scenario {
  std::string name;
  fs::path start;  // a run folder it begins with; empty: none
  Arguments first, again;
};

class Harness {
 public:
  Harness(const Options& options, const fs::path& golden)
      : options_(options), train_(options.bin / "kava_train"), config_(work_ / "c.toml") {
    overwrite(config_, fmt::format("[model]\npath = \"{0}/models/llama\"\ndtype = \"f32\"\n[data]\ntrain = [\"{0}/data/rows.jsonl\"]\n"
                                   "valid = \"{0}/data/rows.jsonl\"\n[train]\nbatch = 2\nmax_steps = 4\nlr = 0.01\ncheckpoint_every = 2\n"
                                   "keep_checkpoints = 1\nvalid_every = 1000\n[lora]\nrank = 2\n[latent]\ncount = 3\niterations = 1\n",
                                   golden.string()));
  }

  int run() {
    const Scenario fresh{"from the start", {}, {config_, "--threads", "1"}, {config_, "--threads", "1", "--resume"}};
    enumerate(fresh);
    // A validation that was not due before gives the checkpoint that a run goes on from another state: it is written again.
    Scenario rewrite{"from a checkpoint that is written again", after_first_checkpoint(fresh), {}, {}};
    rewrite.first = rewrite.again = {config_, "--threads", "1", "--resume", "--set", "train.valid_every=2"};
    enumerate(rewrite);
    for (int round = 0; round < options_.rounds; ++round) random_kills(fresh, static_cast<unsigned>(round));
    fmt::print("{} errors, {} of them not as they should be\n", errors_, wrong_errors_);
    fmt::print("{} kills, {} lost, sha256 {}\n", kills_, lost_, different_ == 0 ? "equal" : "different");
    return lost_ + different_ + wrong_errors_ == 0 ? 0 : 1;
  }

 private:
  fs::path out() const { return work_.path() / "run"; }

  Ended train(Arguments arguments, const std::string& fail = "", std::chrono::microseconds kill_after = {}) const {
    arguments.push_back("--out");
    arguments.push_back(out().string());
    return train_.run(arguments, fail, kill_after);
  }

  void begin(const Scenario& scenario) const {
    fs::remove_all(out());
    if (!scenario.start.empty()) fs::copy(scenario.start, out(), fs::copy_options::recursive | fs::copy_options::copy_symlinks);
  }

  void complain(const std::string& what, const Ended& ended) const { fmt::print(stderr, "{}: code {}: {}\n", what, ended.code, ended.err); }

  // Goes on to the end; whether the run is that of `whole` then.
  void finish(const Scenario& scenario, const std::string& what) {
    const Ended ended = train(fs::exists(out()) ? scenario.again : scenario.first);
    if (ended.code != 0) return ++lost_, complain(what + ": cannot go on", ended);
    const auto now = snapshot(out());
    if (now == whole_) return;
    ++different_;
    for (const auto& [name, value] : now)
      if (!whole_.contains(name) || whole_.at(name) != value) complain(what + ": " + name + " differs", ended);
    for (const auto& [name, value] : whole_)
      if (!now.contains(name)) complain(what + ": " + name + " is missing", ended);
  }

  void enumerate(const Scenario& scenario) {
    begin(scenario);
    const Ended counted = train(scenario.first, "count");
    whole_ = snapshot(out());
    std::istringstream words(counted.err.substr(std::min(counted.err.find("failpoints:"), counted.err.size())));
    std::string word, range;
    words >> word;
    if (counted.code != 0 || word.empty())
      throw Error(Exit::usage, "kava_train", "counts no failpoints: " + counted.err, "build with KAVA_FAILPOINTS");
    fmt::print("{}:", scenario.name);
    for (const char* kind : kKinds) {
      words >> word >> range;
      const int last = std::stoi(range.substr(range.find("..") + 2));
      fmt::print(" {} {}", last, kind);
      std::fflush(stdout);
      std::int64_t before = -1;
      for (int k = 1; k <= last; ++k) {
        before = kill_at(scenario, fmt::format("{}:{}", kind, k), before);
        fail_at(scenario, kind, k);
      }
    }
    fmt::print("\n");
  }

  // Returns the newest whole checkpoint's step, which must not be below that of the failpoint before.
  std::int64_t kill_at(const Scenario& scenario, const std::string& point, std::int64_t before) {
    begin(scenario);
    const std::string what = scenario.name + ", killed at " + point;
    const Ended killed = train(scenario.first, point + ":kill");
    if (killed.code != -SIGKILL) return ++lost_, complain(what + ": was not killed", killed), before;
    ++kills_;
    const std::int64_t newest = newest_step(out());
    if (newest < before) ++lost_, complain(fmt::format("{}: step {} is lost", what, before), killed);
    finish(scenario, what);
    return std::max(newest, before);
  }

  void fail_at(const Scenario& scenario, const std::string& kind, int k) {
    for (std::size_t i = 0; i < kErrors.size(); ++i)
      if (options_.every_error || i == static_cast<std::size_t>(k) % kErrors.size())
        error_at(scenario, fmt::format("{}:{}:{}", kind, k, kErrors[i]));
    // What only delays is no failure.
    std::vector<const char*> harmless;
    if (options_.every_error || k % 8 == 3) harmless.push_back("eintr");
    if (kind == "write" && (options_.every_error || k % 4 == 1)) harmless.push_back("short");
    for (const char* action : harmless) {
      const std::string point = fmt::format("{}:{}:{}", kind, k, action);
      begin(scenario);
      const Ended ended = train(scenario.first, point);
      if (ended.code != 0 || snapshot(out()) != whole_) ++different_, complain(scenario.name + ", " + point, ended);
    }
  }

  void error_at(const Scenario& scenario, const std::string& point) {
    begin(scenario);
    const std::string what = scenario.name + ", " + point;
    const std::int64_t before = fs::exists(out()) ? newest_step(out()) : -1;
    const Ended ended = train(scenario.first, point);
    ++errors_;
    const bool one_line = ended.err.starts_with("error: ") && ended.err.find('\n') == ended.err.size() - 1;
    if (ended.code != 7 || !one_line) return ++wrong_errors_, complain(what, ended);
    if (fs::exists(out())) {
      if (newest_step(out()) < before) return ++lost_, complain(what + ": a checkpoint is lost", ended);
      if (fs::is_empty(out())) return ++wrong_errors_, complain(what + " leaves an empty folder", ended);
      for (const auto& entry : fs::recursive_directory_iterator(out()))
        if (entry.path().string().ends_with(".part") || (entry.is_directory() && fs::is_empty(entry.path())))
          return ++wrong_errors_, complain(what + " leaves " + entry.path().string(), ended);
    }
    if (options_.every_error || errors_ % 3 == 0) finish(scenario, what);
  }

  // The folder of a run that was killed as soon as it had a checkpoint.
  fs::path after_first_checkpoint(const Scenario& scenario) const {
    const fs::path kept = work_.path() / "kept";
    for (int k = 1;; ++k) {
      begin(scenario);
      if (train(scenario.first, fmt::format("rename:{}:kill", k)).code != -SIGKILL)
        throw Error(Exit::data, "kava_train", "writes no checkpoint");
      if (newest_step(out()) < 0 || !fs::is_symlink(out() / "last")) continue;
      fs::rename(out(), kept);
      return kept;
    }
  }

  void random_kills(const Scenario& scenario, unsigned seed) {
    std::mt19937 random(seed);
    begin(scenario);
    const auto start = std::chrono::steady_clock::now();
    train(scenario.first);
    whole_ = snapshot(out());
    const auto longest = std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - start);
    begin(scenario);
    for (int killed = 0; killed < 12;) {
      const auto after = std::chrono::microseconds(std::uniform_int_distribution<std::int64_t>(1, longest.count())(random));
      const std::int64_t before = fs::exists(out()) ? newest_step(out()) : -1;
      const Ended ended = train(fs::exists(out()) ? scenario.again : scenario.first, "", after);
      if (ended.code == 0) break;
      if (ended.code != -SIGKILL) return ++lost_, complain("killed at random", ended);
      ++kills_, ++killed;
      if (fs::exists(out()) && newest_step(out()) < before) ++lost_, complain("killed at random: a checkpoint is lost", ended);
    }
    finish(scenario, "killed at random");
  }

  const Options options_;
  const TempFolder work_;
  const Program train_;
  const std::string config_;
  std::map<std::string, std::string> whole_;
  int kills_ = 0, lost_ = 0, different_ = 0, errors_ = 0, wrong_errors_ = 0;
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const bool more = i + 1 < argc;
    if (name == "--every-error") options.every_error = true;
    else if (name == "--rounds" && more) options.rounds = std::atoi(argv[++i]);
    else if (name == "--bin" && more) options.bin = argv[++i];
    else throw Error(Exit::usage, "kill_resume", "unknown argument " + escaped(name), "kill_resume --rounds N [--bin DIR] [--every-error]");
  }
  options.bin = fs::absolute(options.bin);
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Options options = parse(argc, argv);
    const fs::path golden = KAVA_SOURCE_DIR "/tests/golden";
    if (!fs::exists(options.bin / "kava_train") || !fs::exists(golden)) {
      fmt::print("skipped: {} or {} is not there\n", (options.bin / "kava_train").string(), golden.string());
      return 4;
    }
    return Harness(options, golden).run();
  } catch (const std::exception& e) {
    fmt::print(stderr, "error: {}\n", e.what());
    return 1;
  }
}
