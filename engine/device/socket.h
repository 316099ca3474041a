// Frames over TCP connections, every wait with an end.
#pragma once
#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>

namespace kava {

using Clock = std::chrono::steady_clock;
inline Clock::time_point after(double seconds) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

/// What happened to a transfer.
enum class Transfer { done, late, gone };

class Socket {
 public:
  Socket() = default;
  explicit Socket(int descriptor) : fd_(descriptor) {}
  ~Socket();
  Socket(Socket&& from) noexcept : fd_(std::exchange(from.fd_, -1)) {}
  Socket& operator=(Socket&& from) noexcept {
    std::swap(fd_, from.fd_);
    return *this;
  }
  explicit operator bool() const { return fd_ >= 0; }
  int fd() const { return fd_; }

  /// `idle` is called about five times a second while nothing moves; it may throw.
  Transfer send(const void* data, std::size_t bytes, Clock::time_point deadline, const std::function<void()>& idle = {}) const;
  Transfer receive(void* data, std::size_t bytes, Clock::time_point deadline, const std::function<void()>& idle = {}) const;
  /// What was received next, and stays so; false where there is not as much yet.
  bool peek(void* data, std::size_t bytes) const;
  /// The other side has closed, and everything it sent was read.
  bool hung_up() const;

 private:
  int fd_ = -1;
};

/// A connection to one of the addresses of a name; an empty socket where none answers by then.
Socket connect_to(const std::string& host, int port, Clock::time_point deadline, const std::function<void()>& idle = {});

/// Listens on this machine alone where the host is a name of itself (localhost), else on all its addresses; an empty socket with the reason
/// in `why` where that cannot be.
Socket listen_on(const std::string& host, int port, std::string& why);

/// The next connection; an empty socket where none comes by then.
Socket accept_from(const Socket& listener, Clock::time_point deadline, const std::function<void()>& idle);

enum class Frame : uint32_t { hello, welcome, go, refusal, failure, gather, gathered, broadcast };

struct FrameHead {
  uint32_t magic = kMagic;
  Frame kind = Frame::hello;
  uint64_t number = 0;  // of the collective
  uint64_t bytes = 0;
  uint64_t check = 0;  // of the bytes
  static constexpr uint32_t kMagic = 0x6b617661;
};

/// Tells apart what was sent from what the way has made of it.
uint64_t check_of(const void* data, std::size_t bytes);

}  // namespace kava
