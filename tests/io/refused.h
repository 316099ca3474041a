// What a call is refused with.
#pragma once

#include <catch2/catch_test_macros.hpp>
#include <string>

#include "engine/error.h"

namespace kava::test {

/// The one line of the Error that a call ends with; its exit code must be this one. "accepted" where it returns.
template <class Call>
std::string refused(Exit code, Call call) {
  try {
    call();
  } catch (const Error& e) {
    CHECK(e.code() == code);
    CHECK(std::string(e.what()).find('\n') == std::string::npos);
    return e.what();
  }
  return "accepted";
}

}  // namespace kava::test
