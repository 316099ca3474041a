#include "engine/device/socket.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>

namespace kava {

namespace {

using Addresses = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

Addresses addresses_of(const char* host, int port, bool passive) {
  addrinfo hints = {}, *found = nullptr;
  hints.ai_family = AF_UNSPEC, hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV | (passive ? AI_PASSIVE : 0);
  if (::getaddrinfo(host, std::to_string(port).c_str(), &hints, &found) != 0) found = nullptr;
  return {found, freeaddrinfo};
}

Socket open_socket(const addrinfo& a) {
  Socket s(::socket(a.ai_family, a.ai_socktype | SOCK_CLOEXEC | SOCK_NONBLOCK, a.ai_protocol));
  const int on = 1;
  if (s) ::setsockopt(s.fd(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  return s;
}

// Whether the descriptor became ready by then.
bool wait_for(int fd, short events, Clock::time_point deadline, const std::function<void()>& idle) {
  constexpr int64_t kSlice = 200;  // milliseconds
  for (;;) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    pollfd p = {fd, events, 0};
    const int ready = ::poll(&p, 1, static_cast<int>(std::clamp<int64_t>(left + 1, 0, kSlice)));
    if (ready > 0) return true;
    if (ready < 0 && errno != EINTR) return true;  // the next call on it tells
    if (left <= 0) return false;
    if (idle) idle();
  }
}

}  // namespace

Socket::~Socket() {
  if (fd_ >= 0) ::close(fd_);
}

Transfer Socket::send(const void* data, std::size_t bytes, Clock::time_point deadline, const std::function<void()>& idle) const {
  for (std::size_t at = 0; at < bytes;) {
    const ssize_t n = ::send(fd_, static_cast<const char*>(data) + at, bytes - at, MSG_NOSIGNAL);
    if (n > 0) at += static_cast<std::size_t>(n);
    else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      if (!wait_for(fd_, POLLOUT, deadline, idle)) return Transfer::late;
    } else if (errno != EINTR) {
      return Transfer::gone;
    }
  }
  return Transfer::done;
}

Transfer Socket::receive(void* data, std::size_t bytes, Clock::time_point deadline, const std::function<void()>& idle) const {
  for (std::size_t at = 0; at < bytes;) {
    const ssize_t n = ::recv(fd_, static_cast<char*>(data) + at, bytes - at, 0);
    if (n > 0) at += static_cast<std::size_t>(n);
    else if (n == 0) return Transfer::gone;
    else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      if (!wait_for(fd_, POLLIN, deadline, idle)) return Transfer::late;
    } else if (errno != EINTR) {
      return Transfer::gone;
    }
  }
  return Transfer::done;
}

bool Socket::peek(void* data, std::size_t bytes) const { return ::recv(fd_, data, bytes, MSG_PEEK) == static_cast<ssize_t>(bytes); }

bool Socket::hung_up() const {
  char byte = 0;
  const ssize_t n = ::recv(fd_, &byte, 1, MSG_PEEK);
  return n == 0 || (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR);
}

Socket connect_to(const std::string& host, int port, Clock::time_point deadline, const std::function<void()>& idle) {
  const Addresses addresses = addresses_of(host.c_str(), port, false);
  for (const addrinfo* a = addresses.get(); a; a = a->ai_next) {
    Socket s = open_socket(*a);
    if (!s) continue;
    if (::connect(s.fd(), a->ai_addr, a->ai_addrlen) != 0) {
      if (errno != EINPROGRESS || !wait_for(s.fd(), POLLOUT, deadline, idle)) continue;
      int failed = 0;
      socklen_t size = sizeof failed;
      if (::getsockopt(s.fd(), SOL_SOCKET, SO_ERROR, &failed, &size) != 0 || failed != 0) continue;
    }
    return s;
  }
  return {};
}

Socket listen_on(const std::string& host, int port, std::string& why) {
  why = "it has no address";
  const bool itself = host == "localhost" || host == "::1" || host.starts_with("127.");
  const Addresses addresses = addresses_of(itself ? host.c_str() : nullptr, port, true);
  for (const addrinfo* a = addresses.get(); a; a = a->ai_next) {
    Socket s = open_socket(*a);
    const int on = 1;
    if (s) ::setsockopt(s.fd(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (s && ::bind(s.fd(), a->ai_addr, a->ai_addrlen) == 0 && ::listen(s.fd(), 1024) == 0) return s;
    why = std::strerror(errno);
  }
  return {};
}

Socket accept_from(const Socket& listener, Clock::time_point deadline, const std::function<void()>& idle) {
  while (wait_for(listener.fd(), POLLIN, deadline, idle)) {
    Socket s(::accept4(listener.fd(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    const int on = 1;
    if (s) ::setsockopt(s.fd(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (s) return s;
    // A caller that went again is no matter; without descriptors the next one fails as well.
    if (errno == EMFILE || errno == ENFILE) return {};
  }
  return {};
}

uint64_t check_of(const void* data, std::size_t bytes) {
  // FNV-1a on words, the rest on bytes.
  constexpr uint64_t kPrime = 0x100000001b3;
  uint64_t h = 0xcbf29ce484222325 ^ bytes;
  const char* p = static_cast<const char*>(data);
  for (; bytes >= 8; p += 8, bytes -= 8) {
    uint64_t word = 0;
    std::memcpy(&word, p, 8);
    h = (h ^ word) * kPrime;
    h ^= h >> 29;
  }
  for (; bytes > 0; ++p, --bytes) h = (h ^ static_cast<unsigned char>(*p)) * kPrime;
  return h;
}

}  // namespace kava
