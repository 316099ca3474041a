#include "engine/device/comm.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "engine/error.h"

namespace kava {

namespace {
constexpr int64_t kMostBytes = int64_t{1} << 30;  // of one call of a transport
constexpr int64_t kChunk = int64_t{1} << 18;      // elements of a rank's part that are gathered at once
constexpr int64_t kMostText = int64_t{64} << 20;
}  // namespace

Comm::Comm(int rank, int size, double timeout) : rank_(rank), size_(size), timeout_(timeout) {
  KAVA_CHECK(0 <= rank && rank < size, "rank {} of {}", rank, size);
}

std::string Comm::name() const { return fmt::format("rank {} of {}", rank_, size_); }

template <class F>
void Comm::run(const char* what, int64_t bytes, F&& collective) {
  what_ = what;
  require_launcher();
  const auto start = std::chrono::steady_clock::now();
  collective();
  if (alone()) return;
  CommTime& t = times_[what];
  ++t.calls, t.bytes += bytes, t.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void Comm::require_launcher() const {
  if (launcher_ != 0 && ::getppid() != launcher_) fail("the launcher that started this rank has gone");
}

void Comm::fail(const std::string& why) const {
  if (link_) link_->abort();
  const std::string where = place_.empty() ? what_ : what_ + ", " + place_;
  throw Error(Exit::comm, name(), where + ": " + why, "the last checkpoint is whole: go on with --resume");
}

void Comm::fail_late(const std::string& who) const { fail(fmt::format("{} did not come within {:g} s (--comm-timeout)", who, timeout_)); }

void Comm::do_gather(void* all, const void* mine, int64_t bytes) {
  if (all != mine) std::memcpy(all, mine, static_cast<std::size_t>(bytes));
}

void Comm::do_broadcast(void*, int64_t) {}

void Comm::gather(void* all, const void* mine, int64_t bytes, const char* what) {
  KAVA_CHECK(bytes * size_ <= kMostBytes, "{} bytes of {} ranks", bytes, size_);
  run(what, bytes, [&] {
    if (bytes > 0) do_gather(all, mine, bytes);
  });
}

std::vector<std::string> Comm::gather(std::string_view mine, const char* what) {
  std::vector<int64_t> lengths(static_cast<std::size_t>(size_));
  const int64_t length = std::ssize(mine);
  gather(lengths.data(), &length, sizeof length, what);
  const int64_t most = std::ranges::max(lengths);
  if (std::ranges::min(lengths) < 0 || most > kMostText) fail("a message has no valid length");
  std::string padded(mine), all(static_cast<std::size_t>(most * size_), '\0');
  padded.resize(static_cast<std::size_t>(most));
  gather(all.data(), padded.data(), most, what);
  std::vector<std::string> texts;
  for (std::size_t r = 0; r < lengths.size(); ++r)
    texts.push_back(all.substr(r * static_cast<std::size_t>(most), static_cast<std::size_t>(lengths[r])));
  return texts;
}

void Comm::broadcast(void* data, int64_t bytes, const char* what) {
  run(what, bytes, [&] {
    for (int64_t at = 0; at < bytes; at += kMostBytes) do_broadcast(static_cast<char*>(data) + at, std::min(kMostBytes, bytes - at));
  });
}

std::string Comm::broadcast(std::string_view text, const char* what) {
  int64_t length = std::ssize(text);
  broadcast(&length, sizeof length, what);
  if (length < 0 || length > kMostText) fail("a message has no valid length");
  std::string out(text);
  out.resize(static_cast<std::size_t>(length));
  broadcast(out.data(), length, what);
  return out;
}

bool Comm::any(bool mine, const char* what) {
  std::vector<char> all(static_cast<std::size_t>(size_));
  const char byte = mine ? 1 : 0;
  gather(all.data(), &byte, 1, what);
  return std::ranges::find(all, 1) != all.end();
}

void Comm::barrier(const char* what) { any(false, what); }

void Comm::close() {
  barrier("the end of the run");
  do_close();
}

void Comm::gather(Ops& ops, const Tensor& all, const Tensor& mine, const char* what) {
  KAVA_CHECK(mine.rows == 1 && all.rows == size_ && all.cols == mine.cols && all.dtype == mine.dtype && all.contiguous(),
             "[{}, {}] from rows of {}", all.rows, all.cols, mine.cols);
  const int64_t bytes = mine.cols * size_of(mine.dtype);
  std::vector<char> host(static_cast<std::size_t>(bytes)), hosts(host.size() * static_cast<std::size_t>(size_));
  ops.download(host.data(), mine);
  gather(hosts.data(), host.data(), bytes, what);
  ops.upload(all, hosts.data());
}

void Comm::add_in_order(Ops& ops, Arena& arena, const Tensor& total, const Tensor& part, int parts, bool fresh, const char* what) {
  KAVA_CHECK(total.rows == 1 && part.rows == 1 && total.cols == part.cols && 1 <= parts && parts <= size_, "{} parts of {} for {}", parts,
             part.cols, total.cols);
  auto add = [&](const Tensor& to, const Tensor& from, bool first) { first ? ops.copy(to, from) : ops.add(to, from); };
  if (alone()) return add(total, part, fresh);
  for (int64_t at = 0; at < part.cols; at += kChunk) {
    const ArenaScope scope(arena);
    const int64_t end = std::min(part.cols, at + kChunk);
    const Tensor all = arena.alloc(part.dtype, size_, end - at);
    gather(ops, all, part.col_range(at, end), what);
    for (int r = 0; r < parts; ++r) add(total.col_range(at, end), all.row_range(r, r + 1), fresh && r == 0);
  }
}

DeviceLink::DeviceLink(Comm& comm) : comm_(comm) { comm.link_ = this; }
DeviceLink::~DeviceLink() { comm_.link_ = nullptr; }

void DeviceLink::look(const char* what, double waited) const {
  comm_.what_ = what;
  comm_.require_launcher();
  comm_.do_look();
  if (waited > comm_.timeout_) comm_.fail_late();
}

void DeviceLink::fail(const char* what, const std::string& why) const {
  comm_.what_ = what;
  comm_.fail(why);
}

}  // namespace kava
