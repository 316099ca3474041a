#include "engine/device/comm.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "engine/cli.h"
#include "engine/clock.h"
#include "engine/error.h"

namespace kava {

namespace {
constexpr int64_t kMostOfOneCall = int64_t{1} << 30;  // of one call of a transport
constexpr int64_t kPiece = int64_t{64} << 20;         // of the texts of all ranks, at once
constexpr int64_t kMostText = int64_t{1} << 31;       // of a rank; more is no length

}  // namespace

Comm::Comm(int rank, int size, double timeout) : rank_(rank), size_(size), timeout_(timeout) {
  KAVA_CHECK(0 <= rank && rank < size, "rank {} of {}", rank, size);
}

std::string Comm::name() const { return fmt::format("rank {} of {}", rank_, size_); }

// Returns the seconds that it took.
template <class F>
double Comm::run(const char* what, int64_t bytes, F&& collective) {
  what_ = what;
  require_launcher();
  const auto start = std::chrono::steady_clock::now();
  collective();
  const double seconds = seconds_since(start);
  if (alone()) return seconds;
  CommTime& t = times_[what];
  t.calls += bytes > 0, t.bytes += bytes, t.seconds += seconds;
  return seconds;
}

void Comm::require_launcher() const {
  if (launcher_ != 0 && ::getppid() != launcher_) fail("the launcher that started this rank has gone");
}

void Comm::fail(const std::string& why) const {
  const std::string where = place_.empty() ? what_ : what_ + ", " + place_;
  const Error error(Exit::comm, name(), where + ": " + why,
                    place_.empty() ? "start all ranks again" : "the last checkpoint is whole: go on with --resume");
  if (!abort_link()) end_here(error);  // the device's memory could not be given back either
  throw error;
}

bool Comm::abort_link() const noexcept { return !link_ || link_->abort(); }

void Comm::fail_late(const std::string& who) const { fail(fmt::format("{} did not come within {:g} s (--comm-timeout)", who, timeout_)); }

void Comm::do_gather(void* all, const void* mine, int64_t bytes) {
  if (all != mine) std::memcpy(all, mine, static_cast<std::size_t>(bytes));
}

void Comm::do_broadcast(void*, int64_t) {}

void Comm::gather(void* all, const void* mine, int64_t bytes, const char* what) {
  KAVA_CHECK(bytes * size_ <= kMostOfOneCall, "{} bytes of {} ranks", bytes, size_);
  run(what, bytes, [&] {
    if (bytes > 0) do_gather(all, mine, bytes);
  });
}

void Comm::begin_gather(void* all, int64_t bytes, const char* what) {
  KAVA_CHECK(0 < bytes && bytes * size_ <= kMostOfOneCall, "{} bytes of {} ranks", bytes, size_);
  if (begun_.empty()) first_begun_ = std::chrono::steady_clock::now(), exposed_ = 0;
  exposed_ += run(what, bytes, [&] { do_begin_gather(all, static_cast<char*>(all) + rank_ * bytes, bytes); });
  begun_.push_back(what);
}

bool Comm::end_gather(bool wait) {
  KAVA_CHECK(!begun_.empty(), "no gather was begun");
  bool done = false;
  exposed_ += run(begun_.front(), 0, [&] { done = do_end_gather(wait); });
  if (!done) return false;
  begun_.pop_front();
  if (begun_.empty()) overlap_.exposed += exposed_, overlap_.hidden += seconds_since(first_begun_) - exposed_;
  return true;
}

std::vector<std::string> Comm::gather(std::string_view mine, const char* what) {
  if (alone()) return {std::string(mine)};
  std::vector<int64_t> lengths(static_cast<std::size_t>(size_));
  const int64_t length = std::ssize(mine);
  gather(lengths.data(), &length, sizeof length, what);
  const int64_t most = std::ranges::max(lengths);
  if (std::ranges::min(lengths) < 0 || most > kMostText) fail("a message has no valid length");
  const int64_t piece = std::min(most, std::max<int64_t>(1, kPiece / size_));
  std::string padded(static_cast<std::size_t>(piece), '\0'), all(static_cast<std::size_t>(piece * size_), '\0');
  std::vector<std::string> texts(lengths.size());
  for (int64_t at = 0; at < most; at += piece) {
    if (at < length) mine.substr(static_cast<std::size_t>(at)).copy(padded.data(), padded.size());
    gather(all.data(), padded.data(), piece, what);
    for (std::size_t r = 0; r < texts.size(); ++r)
      texts[r].append(all, r * padded.size(), static_cast<std::size_t>(std::clamp<int64_t>(lengths[r] - at, 0, piece)));
  }
  return texts;
}

void Comm::broadcast(void* data, int64_t bytes, const char* what) {
  run(what, bytes, [&] {
    for (int64_t at = 0; at < bytes; at += kMostOfOneCall)
      do_broadcast(static_cast<char*>(data) + at, std::min(kMostOfOneCall, bytes - at));
  });
}

std::string Comm::broadcast(std::string_view text, const char* what) {
  if (alone()) return std::string(text);
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
