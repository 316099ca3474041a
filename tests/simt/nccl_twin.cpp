// NCCL's calls for the emulated cuda backend, over TCP between processes or threads of a machine: libkava_nccl.so, loaded as NCCL would
// be. It is as strict as NCCL may be. Nothing waits: what a group holds lies on its stream only after it was asked whether the group is
// done; every rank has to make the same calls, in the same groups, with the same counts and types, and all of a communicator on one stream,
// or all of them fail; a rank that has gone is waited for without end, as NCCL does within a machine. Bytes that were changed on their way
// fail the communicator, as a network adapter's checks would. Sums begin at another rank in each piece, as a ring's do. Ranks meet at the
// address of the interface that NCCL_SOCKET_IFNAME names, else at 127.0.0.1.
//
// KAVA_NCCL_FAIL=fail:K   the K-th call of this process fails, of those that NCCL may refuse: CommInitRankConfig, GroupStart, AllReduce,
//                         Broadcast, GroupEnd
//                hang:K   it goes on without end
//                stuck:K  the same, and so does CommAbort
//                count    prints how many there were, when the communicator ends
//                wrong    the first element of a sum is not what it should be
//                old      it is of a version before the oldest that can be used
#include <arpa/inet.h>
#include <fmt/format.h>
#include <ifaddrs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <numeric>
#include <string_view>
#include <thread>
#include <vector>

#include "engine/device/socket.h"
#include "gpu_emulated.h"

using kava::Clock;
using kava::Socket;
using kava::Transfer;

namespace {

enum Result : int { kSuccess = 0, kSystemError = 2, kInvalidUsage = 5, kInProgress = 7 };
enum Type : int { kFloat32 = 7, kFloat64 = 8, kBfloat16 = 9 };
constexpr int kVersion = 22809, kTooOld = 21705;

struct UniqueId {
  int magic, port;
  char host[120];
};
constexpr int kMagic = 0x6b6e636c;

struct Config {
  std::size_t size;
  unsigned magic, version;
  int blocking;
};

thread_local std::string last_error;
std::atomic<int> calls{0};

bool fails(std::string_view how) {
  const char* given = std::getenv("KAVA_NCCL_FAIL");
  return given && given == how;
}

// What is to happen at this call.
enum class Fate { none, fail, hang };
Fate fate() {
  const char* given = std::getenv("KAVA_NCCL_FAIL");
  const std::string text = given ? given : "";
  const std::size_t colon = text.find(':');
  const int n = ++calls;
  if (colon == text.npos || std::atoi(text.c_str() + colon + 1) != n) return Fate::none;
  return text.starts_with("fail") ? Fate::fail : Fate::hang;
}

// A call, as it has to be on every rank.
struct Call {
  int kind = 0, type = 0, root = 0, group = 0;  // kind: 0 all-reduce, 1 broadcast; group: number of the group
  uint64_t count = 0;
  bool operator==(const Call&) const = default;
  std::string text() const {
    return fmt::format("{} of {} elements of type {} in group {}", kind == 0 ? "AllReduce" : "Broadcast", count, type, group);
  }
};
std::size_t size_of(int type) { return type == kFloat64 ? 8 : type == kFloat32 ? 4 : 2; }

struct Job {
  Call call;
  const void* send = nullptr;
  void* receive = nullptr;
  std::vector<char> bytes;  // a copy of what is sent, then the result
  bool started = false, hangs = false;
  std::atomic<bool> over{false};
};

struct Aborted {};

}  // namespace

/// A communicator.
struct ncclComm {
  ncclComm(int rank, int size, const UniqueId& id, Socket listener)
      : rank_(rank), size_(size), port_(id.port), host_(id.host), listener_(std::move(listener)) {
    worker_ = std::thread([this] { work(); });
  }
  ~ncclComm() {
    abort();
    worker_.join();
  }
  void abort() {
    const std::scoped_lock lock(mutex_);
    aborted_ = true;
    changed_.notify_all();
  }

  void add(const std::shared_ptr<Job>& job, CUstream_st* stream) {
    if (stream_ && stream_ != stream) return fail("calls of a communicator on two streams");
    if (state_ == kInProgress) return fail("a call before the last one was done");
    stream_ = stream;
    job->call.group = groups_;
    group_.push_back(job);
  }

  // The group's calls lie on the stream once it was asked for twice whether they do.
  void end_group() {
    ++groups_;
    asked_ = 0;
    if (state_ == kSuccess) state_ = kInProgress;
  }
  int state() {
    if (hangs_) return kInProgress;
    if (state_ != kInProgress || !ready_) return state_;
    if (!group_.empty() && ++asked_ >= 2) {
      for (const auto& job : group_) stream_->queue_until([self = shared_, job] { return self->go_on(job); });
      group_.clear();
    }
    if (group_.empty()) state_ = kSuccess;
    return state_;
  }
  void hang() { hangs_ = true; }
  void fail(const std::string& why) {
    last_error = why;
    state_ = kInvalidUsage;
  }

  std::string error() {
    const std::scoped_lock lock(mutex_);
    return error_;
  }

  std::shared_ptr<ncclComm> shared_;  // until it is aborted; what is queued on streams keeps it alive longer

 private:
  // On the stream: whether the job is over.
  bool go_on(const std::shared_ptr<Job>& job) {
    if (aborted_) return true;
    if (job->hangs) return false;
    if (!job->started) {
      const auto* send = static_cast<const char*>(job->send);
      job->bytes.assign(send, send + job->call.count * size_of(job->call.type));
      job->started = true;
      const std::scoped_lock lock(mutex_);
      jobs_.push_back(job);
      changed_.notify_all();
      return false;
    }
    if (!job->over) return false;
    std::memcpy(job->receive, job->bytes.data(), job->bytes.size());
    return true;
  }

  // ---- on a thread of its own
  void work() {
    try {
      meet();
      ready_ = true;
      for (;;) {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return aborted_ || !jobs_.empty(); });
        if (aborted_) return;
        const std::shared_ptr<Job> job = jobs_.front();
        jobs_.pop_front();
        lock.unlock();
        if (run(*job)) job->over = true;
      }
    } catch (const Aborted&) {
    }
  }

  void look() const {
    if (aborted_) throw Aborted();
  }
  // Waits without end for who has gone.
  void require(Transfer how) const {
    while (how != Transfer::done) look(), std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  void send(const Socket& to, const void* data, std::size_t bytes) const {
    require(to.send(data, bytes, never(), [&] { look(); }));
  }
  void receive(const Socket& from, void* data, std::size_t bytes) const {
    require(from.receive(data, bytes, never(), [&] { look(); }));
  }
  static Clock::time_point never() { return kava::after(1e6); }

  // A part or a sum, with its check.
  void send(int to, const std::vector<char>& bytes) const {
    const uint64_t check = kava::check_of(bytes.data(), bytes.size());
    send(peers_[static_cast<std::size_t>(to)], bytes.data(), bytes.size());
    send(peers_[static_cast<std::size_t>(to)], &check, sizeof check);
  }
  // False where its bytes are others than were sent.
  bool receive(int from, std::vector<char>& bytes) {
    uint64_t check = 0;
    receive(peers_[static_cast<std::size_t>(from)], bytes.data(), bytes.size());
    receive(peers_[static_cast<std::size_t>(from)], &check, sizeof check);
    if (kava::check_of(bytes.data(), bytes.size()) == check) return true;
    const std::scoped_lock lock(mutex_);
    error_ = fmt::format("bytes of rank {} were changed on their way", from);
    state_ = kSystemError;
    return false;
  }

  void meet() {
    peers_.resize(static_cast<std::size_t>(size_));
    if (rank_ > 0) {
      while (!peers_[0]) {
        look();
        peers_[0] = kava::connect_to(host_, port_, kava::after(0.2));
        if (!peers_[0]) std::this_thread::sleep_for(std::chrono::milliseconds(5));
      }
      return send(peers_[0], &rank_, sizeof rank_);
    }
    for (int n = 1; n < size_; ++n) {
      Socket s = kava::accept_from(listener_, never(), [&] { look(); });
      int rank = 0;
      receive(s, &rank, sizeof rank);
      peers_.at(static_cast<std::size_t>(rank)) = std::move(s);
    }
  }

  // False where the ranks differ, or bytes were changed: it is never over then.
  bool run(Job& job) {
    if (rank_ > 0) {
      send(peers_[0], &job.call, sizeof job.call);
      char same = 0;
      receive(peers_[0], &same, 1);
      if (!same) return differ(0, job.call, "another call"), false;
      send(0, job.bytes);
      return receive(0, job.bytes);
    }
    std::vector<Call> all(peers_.size(), job.call);
    for (std::size_t r = 1; r < peers_.size(); ++r) receive(peers_[r], &all[r], sizeof all[r]);
    const auto other = std::ranges::find_if(all, [&](const Call& c) { return c != job.call; });
    const char same = other == all.end();
    for (std::size_t r = 1; r < peers_.size(); ++r) send(peers_[r], &same, 1);
    if (!same) return differ(static_cast<int>(other - all.begin()), job.call, other->text()), false;
    std::vector<std::vector<char>> parts(peers_.size(), job.bytes);
    for (std::size_t r = 1; r < peers_.size(); ++r)
      if (!receive(static_cast<int>(r), parts[r])) return false;
    if (job.call.kind == 0) add_up(job, parts);
    else job.bytes = parts.at(static_cast<std::size_t>(job.call.root));
    for (std::size_t r = 1; r < peers_.size(); ++r) send(static_cast<int>(r), job.bytes);
    return true;
  }

  void differ(int rank, const Call& own, const std::string& other) {
    const std::scoped_lock lock(mutex_);
    error_ = fmt::format("rank {} makes {}, rank {} {}", rank_, own.text(), rank, other);
    state_ = kInvalidUsage;
  }

  static void add_up(Job& job, const std::vector<std::vector<char>>& parts) {
    if (job.call.type == kFloat64) sum<double>(job, parts);
    if (job.call.type == kFloat32) sum<float>(job, parts);
    if (job.call.type == kBfloat16) sum<kava::bf16>(job, parts);
  }
  template <class T>
  static void sum(Job& job, const std::vector<std::vector<char>>& parts) {
    constexpr std::size_t kPiece = 1000;
    auto* to = reinterpret_cast<T*>(job.bytes.data());
    for (std::size_t i = 0; i < job.call.count; ++i) {
      auto value = [&](std::size_t n) { return reinterpret_cast<const T*>(parts[(i / kPiece + n) % parts.size()].data())[i]; };
      if constexpr (std::is_same_v<T, kava::bf16>) {
        float total = kava::to_float(value(0));
        for (std::size_t n = 1; n < parts.size(); ++n) total = kava::to_float(kava::to_bf16(total + kava::to_float(value(n))));
        to[i] = kava::to_bf16(total);
      } else {
        to[i] = value(0);
        for (std::size_t n = 1; n < parts.size(); ++n) to[i] += value(n);
      }
    }
    if (fails("wrong")) to[0] = T{};
  }

  const int rank_, size_, port_;
  const std::string host_;
  const Socket listener_;
  std::vector<Socket> peers_;  // of rank 0: the others; of the others: rank 0
  std::thread worker_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<Job>> jobs_;
  std::string error_;
  std::atomic<int> state_{kInProgress};
  std::atomic<bool> ready_{false}, hangs_{false}, aborted_{false};
  CUstream_st* stream_ = nullptr;
  std::vector<std::shared_ptr<Job>> group_;
  int groups_ = 0, asked_ = 0;
};

namespace {

// The listeners of ids that were made and not used yet.
std::mutex ids_mutex;
std::vector<std::pair<int, Socket>> listeners;

Socket listener_of(int port) {
  const std::scoped_lock lock(ids_mutex);
  const auto it = std::ranges::find(listeners, port, &std::pair<int, Socket>::first);
  if (it == listeners.end()) return {};
  Socket s = std::move(it->second);
  listeners.erase(it);
  return s;
}

std::string own_address() {
  const char* asked = std::getenv("NCCL_SOCKET_IFNAME");
  if (!asked) return "127.0.0.1";
  std::string address;
  ifaddrs* all = nullptr;
  if (::getifaddrs(&all) != 0) return "";
  for (const ifaddrs* i = all; i; i = i->ifa_next) {
    if (!i->ifa_addr || i->ifa_addr->sa_family != AF_INET || std::strcmp(i->ifa_name, asked) != 0) continue;
    char text[INET_ADDRSTRLEN] = {};
    ::inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(i->ifa_addr)->sin_addr, text, sizeof text);
    address = text;
  }
  ::freeifaddrs(all);
  return address;
}

// Of the group that the calling thread is in.
thread_local bool in_group = false;
thread_local ncclComm* group_comm = nullptr;
thread_local Fate group_fate = Fate::none;

int refuse(const std::string& why, int status = kInvalidUsage) {
  last_error = why;
  return status;
}

int collective(int kind, const void* send, void* receive, std::size_t count, int type, int root, ncclComm* comm, CUstream_st* stream) {
  const Fate f = fate();
  if (f == Fate::fail) return refuse("KAVA_NCCL_FAIL", kSystemError);
  if (!in_group) return refuse("a call outside of a group");
  if (type < kFloat32 || type > kBfloat16) return refuse("a type that is not known here");
  auto job = std::make_shared<Job>();
  job->call = {kind, type, root, 0, count};
  job->send = send, job->receive = receive, job->hangs = f == Fate::hang;
  comm->add(job, stream);
  group_comm = comm;
  const int state = comm->state();
  return state == kInProgress || state == kSuccess ? kSuccess : state;
}

}  // namespace

extern "C" {

int ncclGetVersion(int* version) {
  *version = fails("old") ? kTooOld : kVersion;
  return kSuccess;
}
const char* ncclGetErrorString(int status) {
  return status == kSystemError ? "unhandled system error" : status == kInvalidUsage ? "invalid usage" : "no error";
}
const char* ncclGetLastError(ncclComm* comm) {
  if (comm && !comm->error().empty()) last_error = comm->error();
  return last_error.c_str();
}

int ncclGetUniqueId(UniqueId* id) {
  std::string why;
  const std::string host = own_address();
  if (host.empty()) return refuse("NCCL_SOCKET_IFNAME names no interface with an address");
  for (int port = 30000 + static_cast<int>(::getpid()) % 20000, last = port + 200; port < last; ++port) {
    Socket s = kava::listen_on(host, port, why);
    if (!s) continue;
    const std::scoped_lock lock(ids_mutex);
    listeners.emplace_back(port, std::move(s));
    *id = {kMagic, port, {}};
    host.copy(id->host, sizeof id->host - 1);
    return kSuccess;
  }
  return refuse("no port is free: " + why, kSystemError);
}

int ncclCommInitRankConfig(ncclComm** comm, int size, UniqueId id, int rank, void* given) {
  const Fate f = fate();
  if (f == Fate::fail) return refuse("KAVA_NCCL_FAIL", kSystemError);
  const auto* config = static_cast<const Config*>(given);
  if (id.magic != kMagic || rank < 0 || rank >= size) return refuse("no such rank, or an id of something else");
  if (config->magic != 0xcafebeef || config->size < sizeof(Config) || config->blocking != 0)
    return refuse("no configuration that does not block");
  auto made = std::make_shared<ncclComm>(rank, size, id, rank == 0 ? listener_of(id.port) : Socket());
  if (f == Fate::hang) made->hang();
  made->shared_ = made;
  *comm = made.get();
  return kInProgress;
}

int ncclCommGetAsyncError(ncclComm* comm, int* state) { return *state = comm->state(), kSuccess; }

int ncclCommAbort(ncclComm* comm) {
  const char* given = std::getenv("KAVA_NCCL_FAIL");
  if (given && std::strcmp(given, "count") == 0) fmt::print(stderr, "emulated NCCL: {} calls\n", calls.load());
  for (; given && std::strncmp(given, "stuck:", 6) == 0;) ::pause();
  comm->abort();
  comm->shared_.reset();
  return kSuccess;
}

int ncclGroupStart() {
  group_fate = fate();
  if (group_fate == Fate::fail) return refuse("KAVA_NCCL_FAIL", kSystemError);
  if (in_group) return refuse("a group within a group");
  in_group = true, group_comm = nullptr;
  return kSuccess;
}

int ncclGroupEnd() {
  const Fate f = fate();
  if (!in_group) return refuse("no group has begun");
  in_group = false;
  if (f == Fate::fail) return refuse("KAVA_NCCL_FAIL", kSystemError);
  if (!group_comm) return kSuccess;
  if (f == Fate::hang || group_fate == Fate::hang) group_comm->hang();
  group_comm->end_group();
  return kInProgress;
}

int ncclAllReduce(const void* send, void* receive, std::size_t count, int type, int op, ncclComm* comm, CUstream_st* stream) {
  if (op != 0) return refuse("an operation that is not known here");
  return collective(0, send, receive, count, type, 0, comm, stream);
}

int ncclBroadcast(const void* send, void* receive, std::size_t count, int type, int root, ncclComm* comm, CUstream_st* stream) {
  return collective(1, send, receive, count, type, root, comm, stream);
}

}  // extern "C"
