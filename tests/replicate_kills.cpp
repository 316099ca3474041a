// replicate_kills --kills N [--seeds LIST] [--bin DIR]: configs/tables/tiny_smoke.toml run whole, and again with kill -9 at N random
// moments and once while its tables are written.
//
// Each time the same command goes on; what was finished must stay as it was, byte for byte, no run may be left behind, and the tables at
// the end must equal those of the run that was not killed. The last line is "N kills, M works, tables equal" (or "different"); exit 0 or 1.
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "engine/cores.h"
#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/files/json.h"
#include "tests/folders.h"

namespace {

using namespace kava;
namespace fs = std::filesystem;

constexpr std::size_t kMost = std::size_t{1} << 26;
constexpr const char* kTables[] = {"table.json", "table.md", "table.tex", "table.csv"};

struct Options {
  int kills = 5;
  std::string seeds = "42,43";
  fs::path bin = "build/cpu/bin";
};

class Replicate {
 public:
  Replicate(const Options& options, std::string out) : options_(options), out_(std::move(out)) {}

  // The exit code, or -SIGNAL. With a delay it is killed after it.
  int run(const char* fail = nullptr, double kill_after = 0) const {
    const std::string program = options_.bin / "replicate", log = out_ + ".log", jobs = usable_cores() > 1 ? "2" : "1";
    const char* argv[] = {program.c_str(), KAVA_SOURCE_DIR "/configs/tables/tiny_smoke.toml",
                          "--out",         out_.c_str(),
                          "--jobs",        jobs.c_str(),
                          "--device",      "cpu",
                          "--seeds",       options_.seeds.c_str(),
                          nullptr};
    const pid_t child = ::fork();
    if (child == 0) {
      ::dup2(::open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600), 1);
      ::dup2(1, 2);
      if (fail) ::setenv("KAVA_FAIL", fail, 1);
      ::execv(argv[0], const_cast<char**>(argv));
      ::_exit(127);
    }
    if (kill_after > 0) {
      std::this_thread::sleep_for(std::chrono::duration<double>(kill_after));
      ::kill(child, SIGKILL);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }

  std::map<std::string, std::string> states() const {
    std::map<std::string, std::string> all;
    std::error_code none;
    for (const auto& entry : fs::directory_iterator(fs::path(out_) / "state", none))
      if (entry.path().extension() == ".json") all[entry.path().filename()] = read_file(entry.path(), kMost);
    return all;
  }

  std::string file(const char* name) const { return read_file(out_ + "/" + name, kMost); }
  std::string log() const { return read_file(out_ + ".log", kMost); }

 private:
  const Options& options_;
  const std::string out_;
};

bool kept(const std::map<std::string, std::string>& before, const std::map<std::string, std::string>& after) {
  for (const auto& [name, bytes] : before)
    if (!after.contains(name) || after.at(name) != bytes) return fmt::print("{} was done and is not as it was\n", name), false;
  return true;
}

int check(const Options& options) {
  const TempFolder folder;
  const Replicate whole(options, folder / "whole"), killed(options, folder / "killed");
  const auto start = std::chrono::steady_clock::now();
  if (const int code = whole.run(); code != 0) return fmt::print("{}the run that is not killed ended with {}\n", whole.log(), code), 1;
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  fmt::print("not killed: {:.1f} s\n", seconds);
  if (!fs::exists(folder / "whole/report.html") || whole.file("report.html").find("Questions right by row") == std::string::npos)
    return fmt::print("{}no page, or one without the questions of the table\n", whole.log()), 1;
  std::random_device device;
  const unsigned seed = device();
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> delay(0.05, seconds / options.kills);
  int kills = 0;
  bool good = true;
  std::map<std::string, std::string> done;
  for (int i = 0; i < options.kills; ++i) {
    const double after = delay(random);
    const int code = killed.run(nullptr, after);
    kills += code == -SIGKILL;
    const auto now = killed.states();
    good = kept(done, now) && good;
    fmt::print("kill after {:.2f} s: {} works done (seed {})\n", after, now.size(), seed);
    done = now;
  }
  if (const int code = killed.run("rename:999:kill"); code != 0) return fmt::print("{}went on and ended with {}\n", killed.log(), code), 1;
  good = kept(done, killed.states()) && good;
  done = killed.states();
  for (const char* name : kTables) fs::remove(folder / "killed/" + name);
  kills += killed.run("rename:2:kill") == -SIGKILL;
  good = good && kills > 0 && !fs::exists(folder / "killed/table.csv") && killed.run() == 0 && kept(done, killed.states());
  for (const char* name : kTables)
    if (whole.file(name) != killed.file(name)) good = false, fmt::print("{} differs\n", name);
  fmt::print("{} kills, {} works, tables {}\n", kills, done.size(), good ? "equal" : "different");
  return good ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i], value = argv[i + 1];
    if (name == "--kills") options.kills = std::max(1, std::atoi(value.c_str()));
    else if (name == "--seeds") options.seeds = value;
    else if (name == "--bin") options.bin = value;
    else return fmt::print(stderr, "error: {}: unknown option\n", name), 2;
  }
  try {
    return check(options);
  } catch (const std::exception& e) {
    fmt::print(stderr, "error: {}\n", e.what());
    return 1;
  }
}
