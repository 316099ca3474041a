// A system call again for as long as a signal interrupts it.
#pragma once
#include <cerrno>

namespace kava {

/// What the call returns, but for -1 with EINTR.
template <class Call>
auto retried(Call call) {
  decltype(call()) result;
  do result = call();
  while (result == -1 && errno == EINTR);
  return result;
}

}  // namespace kava
