#include "engine/files/disk.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <optional>

#include "engine/error.h"
#include "engine/files/retried.h"

namespace kava::disk {

namespace {

enum Kind : std::size_t { kOpen, kWrite, kSync, kRename, kKinds };

#ifdef KAVA_FAILPOINTS

constexpr std::array<const char*, kKinds> kNames = {"open", "write", "fsync", "rename"};

enum class Action { count, kill, signal, error, shorten };

struct Failpoint {
  Action action = Action::count;
  int error = 0;
  std::size_t kind = kKinds;
  long number = 0;
};

struct NamedAction {
  const char* name;
  Action action;
  int error;
};
constexpr NamedAction kActions[] = {{"kill", Action::kill, 0},         {"term", Action::signal, 0},     {"eio", Action::error, EIO},
                                    {"enospc", Action::error, ENOSPC}, {"erofs", Action::error, EROFS}, {"emfile", Action::error, EMFILE},
                                    {"eintr", Action::error, EINTR},   {"short", Action::shorten, 0}};

std::optional<Failpoint> parse(const std::string& text) {
  if (text == "count") return Failpoint{};
  const std::size_t first = text.find(':'), last = text.rfind(':');
  if (first == text.npos || first == last) return std::nullopt;
  Failpoint point;
  point.kind = static_cast<std::size_t>(std::find(kNames.begin(), kNames.end(), text.substr(0, first)) - kNames.begin());
  const char *begin = text.data() + first + 1, *end = text.data() + last;
  const auto [stop, failed] = std::from_chars(begin, end, point.number);
  const auto action =
      std::find_if(std::begin(kActions), std::end(kActions), [&](const NamedAction& a) { return a.name == text.substr(last + 1); });
  if (point.kind == kKinds || stop != end || failed != std::errc() || point.number < 1 || action == std::end(kActions)) return std::nullopt;
  point.action = action->action, point.error = action->error;
  return point;
}

// Nothing where KAVA_FAIL is not given or malformed.
const std::optional<Failpoint>& chosen() {
  static const std::optional<Failpoint> point = [] {
    const char* text = std::getenv("KAVA_FAIL");
    return text ? parse(text) : std::nullopt;
  }();
  return point;
}

std::atomic<long> g_calls[kKinds];

[[noreturn]] void end_at_once() {
  ::kill(::getpid(), SIGKILL);
  for (;;) ::pause();
}

// Whether this call of a kind fails, with errno set. `most`: of a write, the bytes it may take.
bool fails(Kind kind, int descriptor = -1, const void* bytes = nullptr, std::size_t* most = nullptr) {
  const long number = ++g_calls[kind];
  const std::optional<Failpoint>& point = chosen();
  if (!point || point->action == Action::count || point->kind != kind || point->number != number) return false;
  if (point->action == Action::kill) {
    if (most) (void)!::write(descriptor, bytes, *most / 2);
    end_at_once();
  }
  if (point->action == Action::signal) {
    ::raise(SIGTERM);
    return false;
  }
  if (point->action == Action::shorten) {
    if (most) *most = (*most + 1) / 2;
    return false;
  }
  errno = point->error;
  return true;
}

#else

bool fails(Kind, int = -1, const void* = nullptr, std::size_t* = nullptr) { return false; }

#endif

}  // namespace

int open(const std::string& path, int flags) {
  return retried([&] { return fails(kOpen) ? -1 : ::open(path.c_str(), flags | O_CLOEXEC, 0666); });
}

ssize_t write(int descriptor, const void* bytes, std::size_t count) {
  return retried([&] {
    std::size_t most = std::min(count, std::size_t{1} << 30);
    return fails(kWrite, descriptor, bytes, &most) ? -1 : ::write(descriptor, bytes, most);
  });
}

int sync(int descriptor) {
  const int result = retried([&] { return fails(kSync) ? -1 : ::fsync(descriptor); });
  return result == -1 && (errno == EINVAL || errno == ENOTSUP) ? 0 : result;
}

int rename(const std::string& from, const std::string& to) {
  return retried([&] { return fails(kRename) ? -1 : ::rename(from.c_str(), to.c_str()); });
}

int exchange(const std::string& a, const std::string& b) {
  return retried([&] { return fails(kRename) ? -1 : ::renameat2(AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), RENAME_EXCHANGE); });
}

#ifdef KAVA_FAILPOINTS

void check_failpoints() {
  if (const char* text = std::getenv("KAVA_FAIL"); text && !chosen())
    throw Error(Exit::usage, "KAVA_FAIL", fmt::format("\"{}\" is no failpoint", escaped(text)),
                "give KIND:K:ACTION of open, write, fsync, rename and kill, term, eio, enospc, erofs, emfile, eintr, short; or count");
}

void report_failpoints() {
  if (!chosen() || chosen()->action != Action::count) return;
  std::string line = "failpoints:";
  for (std::size_t kind = 0; kind < kKinds; ++kind) line += fmt::format(" {} 1..{}", kNames[kind], g_calls[kind].load());
  std::fprintf(stderr, "%s\n", line.c_str());
}

#endif

}  // namespace kava::disk
