// Lines of a program's report, seen as soon as they are said.
#pragma once
#include <cstdio>
#include <string>

namespace kava {

inline void say(const std::string& text) {
  std::fputs((text + "\n").c_str(), stdout);
  std::fflush(stdout);
}

}  // namespace kava
