#include "tools/replicate_process.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <sstream>

#include "engine/clock.h"
#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/files/parts.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

constexpr std::size_t kMostRead = std::size_t{1} << 16;

// In the child, between fork and exec.
void become(const Share& share, int log, pid_t parent) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != parent) ::_exit(127);
  ::setpgid(0, 0);  // a terminal's signals reach it through its parent alone
  ::dup2(::open("/dev/null", O_RDONLY), 0);
  ::dup2(log, 1);
  ::dup2(log, 2);
  ::unsetenv("KAVA_FAIL");
  if (!share.gpu.empty()) ::setenv("CUDA_VISIBLE_DEVICES", share.gpu.c_str(), 1);
  if (share.cores.empty()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int core : share.cores) CPU_SET(core, &set);
  ::sched_setaffinity(0, sizeof set, &set);
}

}  // namespace

fs::path program_folder() {
  std::error_code failed;
  const fs::path self = fs::read_symlink("/proc/self/exe", failed);
  if (failed) throw Error(Exit::preflight, "/proc/self/exe", "cannot be read: " + failed.message(), "mount /proc");
  return self.parent_path();
}

ChildProcess::ChildProcess(const std::vector<std::string>& arguments, const fs::path& log, const Share& share) : log_(log) {
  std::error_code failed;
  fs::create_directories(log.parent_path(), failed);
  const int descriptor = ::open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (descriptor < 0) fail_write(log.string(), errno);
  log_begin_ = fs::file_size(log, failed);
  (void)::flock(descriptor, LOCK_SH);  // the child's output holds it until the child has ended; --status has it for a moment
  const std::string program = (program_folder() / arguments[0]).string();
  std::vector<char*> argv;
  for (const std::string& a : arguments) argv.push_back(const_cast<char*>(a.c_str()));
  argv.push_back(nullptr);
  const pid_t parent = ::getpid();
  pid_ = ::fork();
  if (pid_ == 0) {
    become(share, descriptor, parent);
    ::execv(program.c_str(), argv.data());
    ::_exit(127);
  }
  const int error = errno;
  ::close(descriptor);
  if (pid_ < 0) throw Error(Exit::comm, shown_path(program), fmt::format("could not be started: {}", std::strerror(error)));
}

ChildProcess::~ChildProcess() {
  if (pid_ <= 0) return;
  ::kill(pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
}

std::optional<int> ChildProcess::ended() {
  int status = 0;
  if (::waitpid(pid_, &status, WNOHANG) != pid_) return std::nullopt;
  pid_ = 0;
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

void ChildProcess::send(int signal) const {
  if (pid_ > 0) ::kill(pid_, signal);
}

double ChildProcess::seconds() const { return seconds_since(start_); }

std::string ChildProcess::last_words() const {
  std::string text, last, error;
  try {
    const FileReader file(log_.string());
    const std::uint64_t begin = std::max<std::uint64_t>(log_begin_, file.size() > kMostRead ? file.size() - kMostRead : 0);
    text.resize(file.size() > begin ? file.size() - begin : 0);
    text.resize(file.read_some(begin, text.data(), text.size()));
  } catch (const Error& e) {
    return e.what();
  }
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("error: ")) error = line.substr(7);
    if (!line.empty()) last = line;
  }
  return escaped(error.empty() ? last : error, 1000);
}

}  // namespace kava
