#include "engine/cli.h"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <new>
#include <stdexcept>
#include <system_error>

#include "commit.h"  // made by the build
#include "engine/cores.h"
#include "engine/device/cuda_module.h"
#include "engine/error.h"
#include "engine/files/disk.h"
#include "engine/files/parts.h"
#include "engine/libraries.h"
#include "kernels/gpu_error.h"

namespace kava {

namespace {

// A signal handler can reach nothing but a global.
volatile std::sig_atomic_t g_stop = 0, g_checkpoint = 0;
std::atomic<std::int64_t> g_stop_time = 0;  // milliseconds
static_assert(std::atomic<std::int64_t>::is_always_lock_free);
constexpr std::int64_t kSameStop = 2000;  // milliseconds

void end_by(int signal) {
  remove_unfinished();
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

void on_stop(int signal) {
  timespec now = {};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  const std::int64_t time = std::int64_t{now.tv_sec} * 1000 + now.tv_nsec / 1'000'000;
  if (!g_stop) {
    g_stop_time = time;
    g_stop = 1;
  } else if (time - g_stop_time >= kSameStop) {
    end_by(signal);
  }
}

void on_checkpoint(int) { g_checkpoint = 1; }

// Handlers of this thread run on a stack of their own: oneDNN's products (2.6.3) keep numbers where a handler on theirs would write, and a
// signal then ends a run by a segmentation fault, or worse.
void give_handlers_a_stack() {
  static char memory[1 << 16];
  stack_t now = {};
  if (::sigaltstack(nullptr, &now) == 0 && (now.ss_flags & SS_DISABLE) == 0) return;
  const stack_t own = {.ss_sp = memory, .ss_flags = 0, .ss_size = sizeof memory};
  if (::sigaltstack(&own, nullptr) != 0) throw std::system_error(errno, std::generic_category(), "sigaltstack");
}

void handle(int signal, void (*handler)(int)) {
  struct sigaction action = {};
  if (::sigaction(signal, nullptr, &action) == 0 && action.sa_handler == SIG_IGN) return;
  action = {};
  action.sa_handler = handler;
  action.sa_flags = SA_ONSTACK;
  // One handler at a time: which stop signal came first must be certain.
  ::sigfillset(&action.sa_mask);
  ::sigaction(signal, &action, nullptr);
}

// A reader that went away is no full disk. The error number of the write that failed is lost by now; the pipe still tells.
bool reader_is_gone() {
  pollfd out = {STDOUT_FILENO, 0, 0};
  return ::poll(&out, 1, 0) == 1 && (out.revents & POLLERR) != 0;
}

// A closed descriptor 0, 1 or 2 would be given to the next file that is opened, and a message would land in it. The stand-ins fail on use.
void occupy_standard_descriptors() {
  for (int descriptor = 0; descriptor <= 2; ++descriptor)
    if (::fcntl(descriptor, F_GETFD) == -1 && errno == EBADF) (void)!::open("/dev/null", descriptor == 0 ? O_WRONLY : O_RDONLY);
}

Error stdout_failed() {
  if (reader_is_gone())
    return {Exit::write, "standard output", "its reader has closed it (broken pipe)", "read it to its end, or redirect it to a file"};
  return {Exit::write, "standard output", "could not write", "free some space or redirect it elsewhere"};
}

int report(Exit code, const std::string& line) {
  std::fflush(stdout);
  print_note("error: " + escaped(line, 16384));
  return static_cast<int>(code);
}

int report_system_error(const std::system_error& e) {
  if (std::ferror(stdout)) return report(Exit::write, stdout_failed().what());
  const int number = e.code().value();
  const auto* file = dynamic_cast<const std::filesystem::filesystem_error*>(&e);
  const std::string where = file && !file->path1().empty() ? file->path1().string() : "system", what = where + ": " + e.code().message();
  if (std::error_code gone; file && number == ENOENT && std::filesystem::current_path(gone).empty())
    return report(Exit::usage, "the working folder: " + gone.message() + "; change to another folder");
  if (number == EAGAIN || number == ENOMEM) return report(Exit::preflight, what + "; use fewer threads or a larger machine");
  if (number == EMFILE || number == ENFILE) return report(Exit::preflight, what + "; raise the limit of open files (ulimit -n)");
  if (number == ENOSPC || number == EDQUOT || number == EIO || number == EROFS)
    return report(Exit::write, what + "; free some space or check the disk");
  // A path is a user's or a file's.
  if (file) return report(Exit::data, what + "; check the path and its permissions");
  return report(Exit::internal, what + "; this is a defect of the program");
}

int report_gpu_error(const GpuError& e) {
  switch (e.failure()) {
    case GpuFailure::memory:
      return report(Exit::preflight, std::string("device memory: ") + e.what() + "; use a smaller batch or model");
    case GpuFailure::no_device:
      return report(Exit::preflight, std::string("device: ") + e.what() + "; check the driver, or use --device cpu");
    case GpuFailure::fault:
      break;
  }
  return report(Exit::comm, std::string("device: ") + e.what() + "; start again, training with --resume");
}

constexpr const char* kNoMemory = "memory: not enough for this; use a smaller batch, a smaller model or a larger machine";

std::string cpu_model() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.starts_with("model name"))
      if (const auto colon = line.find(": "); colon != std::string::npos) return line.substr(colon + 2);
  return "unknown model";
}

}  // namespace

int run_program(const std::function<int()>& body) {
  occupy_standard_descriptors();
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);  // a limit on file sizes is then an error of write()
  try {
    give_handlers_a_stack();
    for (int signal : {SIGTERM, SIGINT, SIGHUP}) handle(signal, end_by);
#ifdef KAVA_FAILPOINTS
    disk::check_failpoints();
#endif
    const int code = body();
#ifdef KAVA_FAILPOINTS
    disk::report_failpoints();
#endif
    if (code == 0) require_printed();
    return code;
  } catch (const Error& e) {
    return report(e.code(), e.what());
  } catch (const GpuError& e) {
    return report_gpu_error(e);
  } catch (const std::bad_alloc&) {
    return report(Exit::preflight, kNoMemory);
  } catch (const std::length_error&) {  // of a container that no memory could hold
    return report(Exit::preflight, kNoMemory);
  } catch (const std::system_error& e) {
    return report_system_error(e);
  } catch (const std::exception& e) {
    // Texts of the standard library name its types, which say nothing to a user.
    const std::string text = e.what();
    const bool plain = text.find("::") == std::string::npos && text.find("bad_") == std::string::npos && text[0] != '[';
    return report(Exit::internal, (plain ? text : "an unexpected failure inside the program") + "; this is a defect of the program");
  }
}

void end_here(const Error& error) {
  report(error.code(), error.what());
  remove_unfinished();
  ::_exit(static_cast<int>(error.code()));
}

void require_printed() {
  std::cout.flush();
  if (std::fflush(stdout) != 0 || std::ferror(stdout) || !std::cout) throw stdout_failed();
}

bool next_line(std::string& line) {
  constexpr std::size_t kLongest = std::size_t{64} << 20;
  line.clear();
  for (int c; (c = std::getc(stdin)) != EOF; line += static_cast<char>(c)) {
    if (c == '\n') return true;
    if (line.size() == kLongest)
      throw Error(Exit::data, "standard input", fmt::format("a line is longer than {} bytes", kLongest), "check what is read");
  }
  if (std::ferror(stdin)) throw Error(Exit::data, "standard input", "could not read", "give a file or a pipe");
  return !line.empty();
}

std::string release_text(const std::string& program) { return fmt::format("{} {} (commit {})", program, KAVA_VERSION, KAVA_COMMIT); }

std::string version_text(const std::string& program) {
  const std::string name = cuda_name();
  std::string why;
  const int devices = cuda_devices(why);
  std::string cuda = devices == 0 ? fmt::format("\n  {}: {}", name.empty() ? "cuda" : name, why) : "";
  for (int d = 0; d < devices; ++d) cuda += fmt::format("\n  {}: {}", name, cuda_device_text(d));
  return fmt::format("{}\ncompiler: {} {}\nlibraries: {}\ndevices:\n  cpu: {}, {} threads{}", release_text(program),
#ifdef __clang__
                     "clang", __clang_version__,
#else
                     "g++", __VERSION__,
#endif
                     libraries_text(), cpu_model(), usable_cores(), cuda);
}

void catch_signals() {
  give_handlers_a_stack();
  for (int signal : {SIGTERM, SIGINT, SIGUSR1, SIGHUP}) handle(signal, on_stop);
  handle(SIGUSR2, on_checkpoint);
}

bool stop_requested() { return g_stop != 0; }

bool checkpoint_requested() {
  const bool asked = g_checkpoint != 0;
  if (asked) g_checkpoint = 0;
  return asked;
}

}  // namespace kava
