// kava_train as a program that runs beside the test, and what its runs are compared by.
#pragma once
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <thread>

#include "engine/files/json.h"
#include "tests/model/train_rig.h"
#include "tests/programs/programs.h"

namespace kava {

namespace fs = std::filesystem;

// A kava_train that runs beside the test; its code is -signal where it was killed.
class Running {
 public:
  struct Limits {
    rlim_t file_bytes = RLIM_INFINITY, address_space = RLIM_INFINITY, open_files = 0;  // 0: as they are
    const char* out_to = nullptr;
    std::string working_folder, control_group;
    std::vector<int> ignored;  // signals, of those that a program may take; whoever started the tests may ignore others
  };

  explicit Running(std::vector<std::string> arguments) : Running(std::move(arguments), Limits()) {}
  Running(std::vector<std::string> arguments, Limits limits) {
    arguments.insert(arguments.begin(), bin_dir() + "/kava_train");
    std::vector<char*> argv;
    for (std::string& a : arguments) argv.push_back(a.data());
    argv.push_back(nullptr);
    const std::string out = limits.out_to ? limits.out_to : folder_ / "out", err = folder_ / "err";
    child_ = ::fork();
    REQUIRE(child_ >= 0);
    if (child_ > 0) return;
    ::dup2(::open(out.c_str(), O_WRONLY | O_CREAT, 0600), 1);
    ::dup2(::open(err.c_str(), O_WRONLY | O_CREAT, 0600), 2);
    const rlimit file = {limits.file_bytes, limits.file_bytes}, space = {limits.address_space, limits.address_space};
    ::setrlimit(RLIMIT_FSIZE, &file);
    ::setrlimit(RLIMIT_AS, &space);
    const rlimit files = {limits.open_files, limits.open_files};
    if (limits.open_files > 0) ::setrlimit(RLIMIT_NOFILE, &files);
    if (!limits.control_group.empty()) std::ofstream(limits.control_group + "/cgroup.procs") << "0";
    for (int signal : {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2}) ::signal(signal, SIG_DFL);
    for (int signal : limits.ignored) ::signal(signal, SIG_IGN);
    if (!limits.working_folder.empty() && ::chdir(limits.working_folder.c_str()) != 0) ::_exit(126);
    ::execv(argv[0], argv.data());
    ::_exit(127);
  }
  Running(const Running&) = delete;
  ~Running() {
    if (child_ > 0) ::kill(child_, SIGKILL), ::waitpid(child_, nullptr, 0);
  }

  void send(int signal) const { ::kill(child_, signal); }

  Ended wait() {
    int status = 0;
    ::waitpid(std::exchange(child_, 0), &status, 0);
    auto text = [&](const char* name) { return fs::exists(folder_ / name) ? read_file(folder_ / name, 1 << 24) : ""; };
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status), text("out"), text("err")};
  }

  // Whether the file gets that many lines before the child ends (or a minute is over).
  bool reaches(const fs::path& file, std::size_t lines) const {
    for (int i = 0; i < 60000; ++i) {
      std::ifstream in(file);
      if (static_cast<std::size_t>(std::count(std::istreambuf_iterator<char>(in), {}, '\n')) >= lines) return true;
      siginfo_t info = {};
      if (::waitid(P_PID, static_cast<id_t>(child_), &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid == child_) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return false;
  }

 private:
  TempFolder folder_;
  pid_t child_ = 0;
};

inline Ended train(std::vector<std::string> arguments) { return Running(std::move(arguments)).wait(); }

inline void check_refusal(const Ended& run, int code, const std::string& about) {
  INFO(run.err);
  CHECK(run.code == code);
  CHECK(run.err.starts_with("error: "));
  CHECK(std::count(run.err.begin(), run.err.end(), '\n') == 1);
  CHECK(run.err.find(about) != std::string::npos);
  CHECK(run.err.find("kava::") == std::string::npos);
}

// metrics.jsonl without its times.
inline std::vector<Json> timeless(const fs::path& run) {
  std::vector<Json> lines;
  std::ifstream in(run / "metrics.jsonl");
  for (std::string line; std::getline(in, line);) {
    lines.push_back(Json::parse(line));
    for (const char* key : {"samples_per_s", "tokens_per_s", "mfu", "seconds", "memory_bytes", "device_bytes"}) lines.back().erase(key);
  }
  return lines;
}

inline std::string bytes(const fs::path& file) { return read_file(file.string(), 1 << 26); }

inline void check_same_run(const fs::path& a, const fs::path& b) {
  for (const char* name : {"adapter/adapter_model.safetensors", "adapter/kava.safetensors", "last/optimizer.safetensors",
                           "best/optimizer.safetensors", "config.toml"}) {
    INFO(name);
    // Methods without latents have nothing of kava's own.
    if (name == std::string_view("adapter/kava.safetensors") && !fs::exists(a / name)) CHECK(!fs::exists(b / name));
    else CHECK(bytes(a / name) == bytes(b / name));
  }
  CHECK(timeless(a) == timeless(b));
}

}  // namespace kava
