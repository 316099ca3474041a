// rank_failures --rounds N [--bin DIR] [--transport mpi|tcp] [--seed S]: small training runs on several ranks of which one fails.
//
// Over MPI (mpirun, the cpu backend) or TCP (processes of the emulated cuda backend). In each round one failure comes at a random moment: a
// rank is killed or stopped, the disk is full under rank 0, a signal asks for a stop, or the launcher is ended or killed. All that is left
// of the ranks must end within the time that ranks wait for each other, with the codes of the contract; no checkpoint that was whole may be
// lost, and the run, gone on with on another number of ranks, must leave the bytes of one rank that nothing happened to. Where a rank is
// made ten times slower nothing fails. The last line is "N failures, L lost, equal" (or "different"), and ", W wrong" where ranks ended
// otherwise than they should; exit 0 where nothing is lost, different or wrong, 1, or 4: cannot run.
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <random>
#include <thread>

#include "engine/error.h"
#include "tests/folders.h"
#include "tests/ports.h"
#include "tests/rank_rounds.h"
#include "tests/run_snapshot.h"

namespace {

using namespace kava;
namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr double kCommTimeout = 8;  // seconds: longer than a busy machine takes to end a job
constexpr double kEnd = 30;         // seconds after a failure in which all must have ended

struct Options : RoundOptions {
  bool tcp = false;
};

enum class Failure { kill_rank, stop_rank, slow_rank, full_disk, ask_to_stop, end_launcher, kill_launcher };
constexpr const char* kNames[] = {"a rank is killed",    "a rank is stopped",     "a rank is slow",        "the disk is full",
                                  "a stop is asked for", "the launcher is ended", "the launcher is killed"};

void sleep_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

// What can be read of it: a process may end meanwhile.
std::string text_of(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::string text;
  char piece[4096];
  while (in.read(piece, sizeof piece) || in.gcount() > 0) text.append(piece, static_cast<std::size_t>(in.gcount()));
  return text;
}

// Processes whose program is kava_train and whose arguments name the folder.
std::vector<pid_t> trainers_in(const std::string& folder) {
  std::vector<pid_t> found;
  std::error_code failed;
  for (fs::directory_iterator entry("/proc", failed); !failed && entry != fs::directory_iterator(); entry.increment(failed)) {
    const int pid = std::atoi(entry->path().filename().c_str());
    if (pid <= 0) continue;
    const std::string line = text_of(entry->path() / "cmdline");
    if (line.substr(0, line.find('\0')).ends_with("/kava_train") && line.find(folder) != std::string::npos) found.push_back(pid);
  }
  std::ranges::sort(found);
  return found;
}

// The processes of one start: mpirun, or the ranks themselves.
class Ranks {
 public:
  Ranks(const Options& options, int n, const std::vector<std::string>& arguments, const std::string& fail, const fs::path& err) {
    const std::string program = options.bin / "kava_train", size = std::to_string(n);
    if (!options.tcp) {
      std::vector<std::string> line = {"mpirun", "--oversubscribe", "--bind-to", "none", "-n", size, program, "--device", "cpu"};
      line.insert(line.end(), arguments.begin(), arguments.end());
      children_.push_back(start(line, fail, err));
      return;
    }
    const std::string place = fmt::format("127.0.0.1:{}", free_ports(1)[0]);
    for (int r = 0; r < n; ++r) {
      std::vector<std::string> line = {program,        "--device", "cuda",         "--rank", std::to_string(r),
                                       "--world-size", size,       "--rendezvous", place};
      line.insert(line.end(), arguments.begin(), arguments.end());
      children_.push_back(start(line, r == 0 ? fail : "", err));
    }
  }
  ~Ranks() {
    for (pid_t child : children_)
      if (child > 0) ::kill(child, SIGKILL), ::waitpid(child, nullptr, 0);
  }

  const std::vector<pid_t>& children() const { return children_; }
  bool ended() {
    return std::ranges::all_of(children_, [](pid_t child) { return over(child); });
  }

  // Codes of the children, -SIGNAL where one ended it.
  std::vector<int> wait() {
    std::vector<int> codes;
    for (pid_t& child : children_) {
      int status = 0;
      ::waitpid(std::exchange(child, 0), &status, 0);
      codes.push_back(WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status));
    }
    return codes;
  }

 private:
  static bool over(pid_t child) {
    siginfo_t info = {};
    return ::waitid(P_PID, static_cast<id_t>(child), &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid == child;
  }

  static pid_t start(const std::vector<std::string>& line, const std::string& fail, const fs::path& err) {
    std::vector<const char*> argv;
    for (const std::string& a : line) argv.push_back(a.c_str());
    argv.push_back(nullptr);
    const pid_t child = ::fork();
    if (child != 0) return child;
    ::setpgid(0, 0);
    ::dup2(::open("/dev/null", O_WRONLY), 1);
    ::dup2(::open(err.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600), 2);
    for (const char* name : {"OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"}) ::setenv(name, "1", 1);
    if (!fail.empty()) ::setenv("KAVA_FAIL", fail.c_str(), 1);
    ::execvp(argv[0], const_cast<char**>(argv.data()));
    ::_exit(127);
  }

  std::vector<pid_t> children_;
};

class Harness {
 public:
  explicit Harness(const Options& options) : options_(options), random_(options.seed), config_(work_ / "c.toml"), out_(work_ / "run") {
    const std::string golden = std::string(KAVA_SOURCE_DIR "/tests/golden");
    overwrite(config_,
              fmt::format("[model]\npath = \"{0}/models/llama\"\ndtype = \"f32\"\n[data]\ntrain = [\"{0}/data/rows.jsonl\"]\n[train]\n"
                          "batch = 4\nmicro_batch = 1\nmax_steps = {1}\nlr = 0.01\ncheckpoint_every = 4\nkeep_checkpoints = 1\n"
                          "[lora]\nrank = 2\n[latent]\ncount = 3\niterations = 1\n",
                          golden, steps_));
  }

  int run() {
    const std::vector<int> codes = Ranks(options_, 1, arguments(false), "", err()).wait();
    if (codes != std::vector{0}) throw Error(Exit::data, "kava_train", "does not run: " + text_of(err()));
    whole_ = snapshot(out_);
    for (int round = 0; round < options_.rounds; ++round) fail_once();
    fmt::print("{} failures, {} lost, {}{}\n", failures_, lost_, different_ == 0 ? "equal" : "different",
               wrong_ == 0 ? "" : fmt::format(", {} wrong", wrong_));
    return lost_ + different_ + wrong_ == 0 ? 0 : 1;
  }

 private:
  fs::path err() const { return work_.path() / "err"; }
  std::vector<std::string> arguments(bool resume) const {
    const std::string seconds = fmt::format("{}", kCommTimeout);
    std::vector<std::string> a = {config_, "--threads", "1", "--out", out_, "--comm-timeout", seconds, "--rendezvous-timeout", seconds};
    if (resume) a.push_back("--resume");
    return a;
  }
  int draw(int least, int most) { return std::uniform_int_distribution<int>(least, most)(random_); }
  void complain(const std::string& what) { fmt::print(stderr, "{}; the ranks said:\n{}\n", what, text_of(err())); }

  // Whether the run gets that far before it ends.
  bool reaches(Ranks& ranks, int lines) const {
    const Clock::time_point start = Clock::now();
    while (!ranks.ended() && seconds_since(start) < 120) {
      const std::string text = text_of(fs::path(out_) / "metrics.jsonl");
      if (std::ranges::count(text, '\n') >= lines) return true;
      sleep_ms(1);
    }
    return false;
  }

  void fail_once() {
    fs::remove_all(out_);
    fs::remove(err());
    const auto kind = static_cast<Failure>(draw(0, options_.tcp ? 4 : 6));
    const int n = draw(2, 4);
    const std::string what = fmt::format("round {}: {} ranks, {}", failures_, n, kNames[static_cast<int>(kind)]);
    const std::string fail = kind == Failure::full_disk ? fmt::format("write:{}:enospc", draw(1, 60)) : "";
    Ranks ranks(options_, n, arguments(false), fail, err());
    bool struck = kind == Failure::full_disk;
    // Before a line is there a process may have no handler yet.
    const int lines = draw(kind == Failure::ask_to_stop ? 1 : 0, steps_ - 1);
    // Or while it starts.
    const bool early = lines == 0 && (kind == Failure::kill_rank || kind == Failure::stop_rank);
    const int wait = draw(0, early ? 500 : 5);
    if (!struck && reaches(ranks, lines)) sleep_ms(wait), struck = strike(ranks, kind);
    ++failures_;
    const Clock::time_point start = Clock::now();
    while (!ranks.ended() && seconds_since(start) < (kind == Failure::full_disk ? 120 : kEnd)) sleep_ms(5);
    if (!ranks.ended()) ++wrong_, complain(what + ": does not end");
    else if (const std::vector<int> codes = ranks.wait(); !right(kind, struck, codes))
      ++wrong_, complain(fmt::format("{}: ends with {}", what, fmt::join(codes, ", ")));
    while (!trainers_in(out_).empty() && seconds_since(start) < kEnd) sleep_ms(5);
    for (pid_t left : trainers_in(out_)) ++wrong_, complain(what + ": a rank is left"), ::kill(left, SIGKILL);
    go_on(what);
  }

  bool strike(Ranks& ranks, Failure kind) {
    const pid_t launcher = ranks.children()[0];
    const std::vector<pid_t> trainers = trainers_in(out_);
    auto one = [&] { return trainers[static_cast<std::size_t>(draw(0, static_cast<int>(trainers.size()) - 1))]; };
    switch (kind) {
      case Failure::kill_rank:
      case Failure::stop_rank:
        return !trainers.empty() && strike_rank(one(), kind == Failure::stop_rank);
      case Failure::slow_rank:
        return !trainers.empty() && slow_down(ranks, one());
      case Failure::ask_to_stop:
        if (options_.tcp && trainers.empty()) return false;
        ::kill(options_.tcp ? one() : launcher, SIGUSR1);
        return true;
      case Failure::end_launcher:
        ::kill(launcher, SIGTERM);
        return true;
      case Failure::kill_launcher:
        ::kill(launcher, SIGKILL);
        return true;
      case Failure::full_disk:
        break;
    }
    return false;
  }

  bool strike_rank(pid_t rank, bool stop) const {
    ::kill(rank, stop ? SIGSTOP : SIGKILL);
    if (!stop || !options_.tcp) return true;
    // Nobody but this test ends a stopped rank that has no launcher.
    const Clock::time_point start = Clock::now();
    while (trainers_in(out_).size() > 1 && seconds_since(start) < kEnd) sleep_ms(5);
    ::kill(rank, SIGKILL);
    return true;
  }

  // Until the end of the run.
  static bool slow_down(Ranks& ranks, pid_t rank) {
    constexpr int kStopped = 18, kRunning = 2;  // milliseconds
    const auto process = static_cast<int>(::syscall(SYS_pidfd_open, rank, 0));
    auto tell = [&](int signal) { return process >= 0 && ::syscall(SYS_pidfd_send_signal, process, signal, nullptr, 0) == 0; };
    const Clock::time_point start = Clock::now();
    while (!ranks.ended() && seconds_since(start) < 120 && tell(SIGSTOP)) {
      sleep_ms(kStopped);
      tell(SIGCONT);
      sleep_ms(kRunning);
    }
    ::close(process);
    return true;
  }

  // Whether the codes are those of the failure; a run that ended before it came has none.
  bool right(Failure kind, bool struck, const std::vector<int>& codes) const {
    if (std::ranges::all_of(codes, [](int c) { return c == 0; })) return true;
    if (!struck) return false;
    auto all = [&](std::initializer_list<int> of) {
      return std::ranges::all_of(codes, [&](int c) { return std::ranges::find(of, c) != of.end(); });
    };
    switch (kind) {
      case Failure::kill_rank:
        return options_.tcp ? all({6, -SIGKILL}) : all({128 + SIGKILL});
      case Failure::stop_rank:
        return options_.tcp ? all({6, -SIGKILL}) : all({6});
      case Failure::slow_rank:
        return false;
      case Failure::full_disk:
        return options_.tcp ? all({6, 7}) : all({7});
      case Failure::ask_to_stop:
        return all({75});
      case Failure::end_launcher:
        // While it begins or ends, mpirun has no handler.
        return all({1, 75, 128 + SIGTERM, -SIGTERM});
      case Failure::kill_launcher:
        return all({-SIGKILL});
    }
    return false;
  }

  void go_on(const std::string& what) {
    const std::int64_t before = fs::exists(out_) ? newest_step(out_) : -1;
    const std::string metrics = text_of(fs::path(out_) / "metrics.jsonl");
    // The checkpoint behind the last line may be written yet.
    const std::int64_t least = std::max<std::int64_t>(0, std::ranges::count(metrics, '\n') - 1) / 4 * 4;
    if (before < least && least > 0)
      ++lost_, complain(fmt::format("{}: the checkpoint of step {} is lost, {} is there", what, least, before));
    fs::remove(err());
    const std::vector<int> codes = Ranks(options_, draw(1, 4), arguments(fs::exists(out_)), "", err()).wait();
    if (std::ranges::any_of(codes, [](int c) { return c != 0; })) return ++lost_, complain(what + ": cannot go on");
    const auto now = snapshot(out_);
    if (now == whole_) return;
    ++different_;
    for (const auto& [name, value] : now)
      if (!whole_.contains(name) || whole_.at(name) != value) complain(what + ": " + name + " differs");
    for (const auto& [name, value] : whole_)
      if (!now.contains(name)) complain(what + ": " + name + " is missing");
  }

  const Options options_;
  std::mt19937 random_;
  const TempFolder work_;
  const int steps_ = options_.tcp ? 10 : 40;
  const std::string config_, out_;
  std::map<std::string, std::string> whole_;
  int failures_ = 0, lost_ = 0, different_ = 0, wrong_ = 0;
};

std::string missing(const Options& options) {
  const char* module = options.tcp ? "libkava_cuda.so" : "libkava_mpi.so";
  for (const char* name : {"kava_train", module})
    if (!fs::exists(options.bin / name)) return (options.bin / name).string() + " is not there";
  if (!options.tcp && std::system("command -v mpirun >/dev/null 2>&1") != 0) return "mpirun is not on PATH";
  return "";
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Options options;
    static_cast<RoundOptions&>(options) =
        round_options(argc, argv, "build/cpu/bin", "rank_failures --rounds N [--bin DIR] [--transport mpi|tcp] [--seed S]",
                      [&](const std::string& name, const std::string& value) {
                        if (name != "--transport" || (value != "mpi" && value != "tcp")) return false;
                        options.tcp = value == "tcp";
                        return true;
                      });
    if (const std::string what = missing(options); !what.empty()) {
      fmt::print("skipped: {}\n", what);
      return 4;
    }
    return Harness(options).run();
  } catch (const std::exception& e) {
    fmt::print(stderr, "error: {}\n", e.what());
    return 1;
  }
}
