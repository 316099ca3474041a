// rank_links [--rounds N] [--bin DIR] [--seed S]: ranks of the emulated cuda backend, each in a network namespace of its own, whose only
// way to each other is through this program, which cuts, delays, drops and changes their packets.
//
// In each round two or three ranks train, their gradients summed by NCCL's twin or through the host. A link that is cut ends every rank
// with 6 and one line that names the operation, within the time that ranks wait for each other; the run, gone on with over whole links, has
// the bytes of one that nothing happened to. Packets that come late, or only when they are sent again, change no byte. Packets that were
// changed on their way, so that TCP notices or so that it does not, give the same bytes or 6. The last line is "N rounds, W wrong"; exit 0,
// 1, or 4 where it cannot run, with the reason.
#include <arpa/inet.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstring>
#include <fstream>
#include <mutex>
#include <random>
#include <thread>

#include "engine/error.h"
#include "tests/folders.h"
#include "tests/rank_rounds.h"
#include "tests/run_snapshot.h"

namespace {

using namespace kava;
namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr int kMostRanks = 3, kSteps = 6;
constexpr double kCommTimeout = 15;  // seconds: longer than packets are ever late
constexpr double kEnd = 30;          // seconds on top of it in which all must have ended

struct Skip {
  std::string why;
};

std::string text_of(const fs::path& path) { return fs::exists(path) ? read_file(path.string(), std::size_t{1} << 24) : ""; }

// What happens to a packet.
struct Fault {
  double drop = 0, flip = 0, swap = 0;  // probabilities
  int late_ms = 0;                      // at most
  int cut = -1;                         // the rank whose packets go nowhere
};

// Namespaces with a tun device each; what one sends is handed to the one that it is for.
class Network {
 public:
  Network() {
    const int own = ::open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    for (int r = 0; r < kMostRanks; ++r) {
      if (::unshare(CLONE_NEWNET) != 0) throw Skip{fmt::format("no network namespace can be made here: {}", std::strerror(errno))};
      spaces_.push_back(::open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC));
      devices_.push_back(make_device(r));
    }
    ::setns(own, CLONE_NEWNET);
    ::close(own);
    carrier_ = std::thread([this] { carry(); });
  }
  ~Network() {
    over_ = true;
    carrier_.join();
    for (int fd : devices_) ::close(fd);
    for (int fd : spaces_) ::close(fd);
  }
  static std::string address(int rank) { return fmt::format("10.77.0.{}", rank + 1); }
  /// Of the calling process, which has one thread.
  void enter(int rank) const { ::setns(spaces_[static_cast<std::size_t>(rank)], CLONE_NEWNET); }
  void set(const Fault& fault) {
    const std::scoped_lock lock(mutex_);
    fault_ = fault;
  }

 private:
  struct Packet {
    Clock::time_point due;
    int to;
    std::vector<char> bytes;
  };

  static int make_device(int rank) {
    const int fd = ::open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) throw Skip{fmt::format("/dev/net/tun: {}", std::strerror(errno))};
    ifreq r = {};
    std::strcpy(r.ifr_name, "tun0");
    r.ifr_flags = IFF_TUN | IFF_NO_PI;
    if (::ioctl(fd, TUNSETIFF, &r) != 0) throw Skip{fmt::format("no tun device can be made here: {}", std::strerror(errno))};
    const int s = ::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    auto set_address = [&](unsigned long call, const std::string& text) {
      auto* a = reinterpret_cast<sockaddr_in*>(&r.ifr_addr);
      *a = {};
      a->sin_family = AF_INET;
      ::inet_pton(AF_INET, text.c_str(), &a->sin_addr);
      return ::ioctl(s, call, &r) == 0;
    };
    bool up = set_address(SIOCSIFADDR, address(rank)) && set_address(SIOCSIFNETMASK, "255.255.255.0");
    for (const char* name : {"tun0", "lo"}) {
      std::strcpy(r.ifr_name, name);
      r.ifr_flags = IFF_UP | IFF_RUNNING;
      up = up && ::ioctl(s, SIOCSIFFLAGS, &r) == 0;
    }
    ::close(s);
    if (!up) throw Skip{fmt::format("the tun device cannot be set up: {}", std::strerror(errno))};
    return fd;
  }

  void carry() {
    std::mt19937 random(1);
    std::vector<Packet> late;
    while (!over_) {
      std::vector<pollfd> ready;
      for (int fd : devices_) ready.push_back({fd, POLLIN, 0});
      ::poll(ready.data(), ready.size(), late.empty() ? 20 : 1);
      for (int r = 0; r < kMostRanks; ++r)
        while (take(r, random, late)) {
        }
      std::stable_sort(late.begin(), late.end(), [](const Packet& a, const Packet& b) { return a.due < b.due; });
      std::size_t sent = 0;
      for (; sent < late.size() && late[sent].due <= Clock::now(); ++sent)
        if (::write(devices_[static_cast<std::size_t>(late[sent].to)], late[sent].bytes.data(), late[sent].bytes.size()) < 0) continue;
      late.erase(late.begin(), late.begin() + static_cast<std::ptrdiff_t>(sent));
    }
  }

  // The next packet of a rank, if there is one.
  bool take(int from, std::mt19937& random, std::vector<Packet>& late) {
    constexpr int kIp = 20, kDestination = 16, kMost = 65536;
    std::vector<char> bytes(kMost);
    const ssize_t n = ::read(devices_[static_cast<std::size_t>(from)], bytes.data(), bytes.size());
    if (n <= 0) return false;
    bytes.resize(static_cast<std::size_t>(n));
    const int to = n < kIp || (bytes[0] >> 4) != 4 ? -1 : bytes[kDestination + 3] - 1;  // IPv6 goes nowhere
    if (to < 0 || to >= kMostRanks) return true;
    Fault fault;
    {
      const std::scoped_lock lock(mutex_);
      fault = fault_;
    }
    auto happens = [&](double share) { return share > 0 && std::uniform_real_distribution<>(0, 1)(random) < share; };
    if (fault.cut == from || fault.cut == to || happens(fault.drop)) return true;
    // Where TCP's data begins.
    const int header = kIp + (n > kIp + 12 ? ((bytes[kIp + 12] >> 4) & 15) * 4 : n);
    auto place = [&] {
      return static_cast<std::size_t>(header + 2 * std::uniform_int_distribution<int>(0, (static_cast<int>(n) - header) / 2 - 1)(random));
    };
    if (n >= header + 4 && happens(fault.flip)) bytes[place()] ^= 1;
    // The sum that TCP makes over its words is the same in any order.
    if (n >= header + 4 && happens(fault.swap)) {
      const std::size_t a = place(), b = place();
      std::swap_ranges(bytes.begin() + static_cast<std::ptrdiff_t>(a), bytes.begin() + static_cast<std::ptrdiff_t>(a) + 2,
                       bytes.begin() + static_cast<std::ptrdiff_t>(b));
    }
    const int ms = fault.late_ms > 0 ? std::uniform_int_distribution<int>(0, fault.late_ms)(random) : 0;
    late.push_back({Clock::now() + std::chrono::milliseconds(ms), to, std::move(bytes)});
    return true;
  }

  std::vector<int> spaces_, devices_;
  std::thread carrier_;
  std::atomic<bool> over_{false};
  std::mutex mutex_;
  Fault fault_;
};

enum class Kind { cut, late, dropped, changed, changed_unseen };
constexpr const char* kNames[] = {"a link is cut", "packets come late", "packets are dropped", "packets are changed",
                                  "packets are changed as TCP does not see"};

class Harness {
 public:
  explicit Harness(const RoundOptions& options) : options_(options), random_(options.seed), config_(work_ / "c.toml") {
    overwrite(config_,
              fmt::format("[model]\npath = \"{0}/models/llama\"\ndtype = \"f32\"\n[data]\ntrain = [\"{0}/data/rows.jsonl\"]\n[train]\n"
                          "batch = 3\nmicro_batch = 1\nmax_steps = {1}\nlr = 0.01\ncheckpoint_every = 2\nkeep_checkpoints = 1\n"
                          "[lora]\nrank = 2\n[latent]\ncount = 3\niterations = 1\n",
                          KAVA_SOURCE_DIR "/tests/golden", kSteps));
  }

  int run() {
    for (int round = 0; round < options_.rounds; ++round) one_round(round);
    fmt::print("{} rounds, {} wrong\n", options_.rounds, wrong_);
    return wrong_ == 0 ? 0 : 1;
  }

 private:
  int draw(int least, int most) { return std::uniform_int_distribution<int>(least, most)(random_); }
  fs::path err(int rank) const { return work_.path() / fmt::format("err{}", rank); }

  std::vector<pid_t> start(int ranks, bool linked, const std::string& out, bool resume) {
    std::vector<pid_t> children;
    for (int r = 0; r < ranks; ++r) {
      fs::remove(err(r));
      std::vector<std::string> line = {options_.bin / "kava_train",
                                       config_,
                                       "--device",
                                       "cuda",
                                       "--threads",
                                       "1",
                                       "--out",
                                       out,
                                       "--rank",
                                       std::to_string(r),
                                       "--world-size",
                                       std::to_string(ranks),
                                       "--rendezvous",
                                       fmt::format("{}:29000", Network::address(0)),
                                       "--comm-timeout",
                                       fmt::format("{}", kCommTimeout)};
      if (resume) line.push_back("--resume");
      children.push_back(start_one(line, r, linked ? ranks : 1));
    }
    return children;
  }

  pid_t start_one(const std::vector<std::string>& line, int rank, int devices) {
    std::vector<const char*> argv;
    for (const std::string& a : line) argv.push_back(a.c_str());
    argv.push_back(nullptr);
    const std::string to = err(rank), count = std::to_string(devices);
    const pid_t child = ::fork();
    if (child != 0) return child;
    network_.enter(rank);
    ::dup2(::open("/dev/null", O_WRONLY), 1);
    ::dup2(::open(to.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600), 2);
    ::setenv("KAVA_EMULATED_DEVICES", count.c_str(), 1);
    ::setenv("NCCL_SOCKET_IFNAME", "tun0", 1);
    ::execvp(argv[0], const_cast<char**>(argv.data()));
    ::_exit(127);
  }

  // Codes of all, -SIGNAL where one ended it; those that do not end by then are killed.
  static std::vector<int> wait(const std::vector<pid_t>& children, double seconds) {
    const Clock::time_point begin = Clock::now();
    std::vector<int> codes;
    for (pid_t child : children) {
      int status = 0;
      while (::waitpid(child, &status, WNOHANG) == 0) {
        if (seconds_since(begin) > seconds) ::kill(child, SIGKILL);
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
      }
      codes.push_back(WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status));
    }
    return codes;
  }

  void complain(const std::string& what, int ranks) {
    ++wrong_;
    fmt::print(stderr, "{}\n", what);
    for (int r = 0; r < ranks; ++r) fmt::print(stderr, "rank {} said: {}", r, text_of(err(r)));
  }

  static Fault fault_of(Kind kind, int rank) {
    Fault f;
    if (kind == Kind::cut) f.cut = rank;
    if (kind == Kind::late) f.late_ms = 60;
    if (kind == Kind::dropped) f.drop = 0.05, f.late_ms = 2;
    if (kind == Kind::changed) f.flip = 0.05;
    if (kind == Kind::changed_unseen) f.swap = 0.02;
    return f;
  }

  void one_round(int round) {
    const auto kind = static_cast<Kind>(round % 5);
    const bool linked = round / 5 % 2 == 0;
    const int ranks = draw(2, kMostRanks), lines = draw(1, kSteps - 2), struck = draw(0, ranks - 1);
    const std::string what = fmt::format("round {}: {} ranks, gradients summed by {}, {}", round, ranks,
                                         linked ? "NCCL's twin" : "the host", kNames[static_cast<int>(kind)]);
    const std::string out = work_ / fmt::format("run{}", round);
    if (!whole(ranks, linked)) return;
    const std::vector<pid_t> children = start(ranks, linked, out, false);
    const Clock::time_point begin = Clock::now();
    while (std::ranges::count(text_of(fs::path(out) / "metrics.jsonl"), '\n') < lines && seconds_since(begin) < 120)
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    network_.set(fault_of(kind, struck));
    const std::vector<int> codes = wait(children, kind == Kind::cut ? kCommTimeout + kEnd : 300);
    network_.set({});
    const bool fails = std::ranges::all_of(codes, [](int c) { return c == 6; });
    const bool ends = std::ranges::all_of(codes, [](int c) { return c == 0; });
    const bool may_fail = kind == Kind::cut || kind == Kind::changed_unseen, may_end = kind != Kind::cut;
    if (!(fails && may_fail) && !(ends && may_end)) complain(fmt::format("{}: the ranks end with {}", what, fmt::join(codes, ", ")), ranks);
    for (int r = 0; r < ranks && fails; ++r) {
      const std::string said = text_of(err(r));
      if (std::ranges::count(said, '\n') != 1 || said.find(", step ") == said.npos)
        complain(what + ": no one line that names the operation", ranks);
    }
    if (!ends) {
      const std::vector<int> on = wait(start(ranks, linked, out, true), 300);
      if (std::ranges::any_of(on, [](int c) { return c != 0; })) return complain(what + ": cannot go on", ranks);
    }
    if (snapshot(out) != whole_.at({ranks, linked})) complain(what + ": the bytes differ", ranks);
    fmt::print("{}: {}\n", what, ends ? "equal" : "6, then equal");
    std::fflush(stdout);
    fs::remove_all(out);
  }

  // The run that nothing happens to.
  bool whole(int ranks, bool linked) {
    if (whole_.contains({ranks, linked})) return true;
    const std::string out = work_ / "whole";
    const std::vector<int> codes = wait(start(ranks, linked, out, false), 300);
    if (std::ranges::any_of(codes, [](int c) { return c != 0; })) return complain("kava_train does not run", ranks), false;
    whole_[{ranks, linked}] = snapshot(out);
    fs::remove_all(out);
    return true;
  }

  const RoundOptions options_;
  std::mt19937 random_;
  const TempFolder work_;
  const std::string config_;
  Network network_;
  std::map<std::pair<int, bool>, std::map<std::string, std::string>> whole_;
  int wrong_ = 0;
};

// Root of a namespace of this process's own, where it is not root anyway.
void become_root() {
  if (::geteuid() == 0) return;
  const unsigned user = ::getuid(), group = ::getgid();
  if (::unshare(CLONE_NEWUSER) != 0) throw Skip{fmt::format("no user namespace can be made here: {}", std::strerror(errno))};
  std::ofstream("/proc/self/setgroups") << "deny";
  std::ofstream("/proc/self/uid_map") << fmt::format("0 {} 1", user);
  std::ofstream("/proc/self/gid_map") << fmt::format("0 {} 1", group);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const RoundOptions options = round_options(argc, argv, "build/emulated/bin", "rank_links [--rounds N] [--bin DIR] [--seed S]");
    for (const char* name : {"kava_train", "libkava_cuda.so", "libkava_nccl.so"})
      if (!fs::exists(options.bin / name)) throw Skip{(options.bin / name).string() + " is not there"};
    become_root();
    return Harness(options).run();
  } catch (const Skip& skip) {
    fmt::print("skipped: {}\n", skip.why);
    return 4;
  } catch (const std::exception& e) {
    fmt::print(stderr, "error: {}\n", e.what());
    return 1;
  }
}
