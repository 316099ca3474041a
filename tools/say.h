// Lines of a program's report, and commands that it names in them.
#pragma once
#include <cerrno>
#include <cstdio>
#include <string>

namespace kava {

/// Seen as soon as it is said.
inline void say(const std::string& text) {
  std::fputs((text + "\n").c_str(), stdout);
  std::fflush(stdout);
}

/// Another of the programs, called as this one was.
inline std::string program_beside(const std::string& name) {
  const std::string self = program_invocation_name;
  return self.substr(0, self.rfind('/') + 1) + name;
}

/// A word as a shell reads it back.
inline std::string shell_word(const std::string& word) {
  if (!word.empty() && word.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_@%+=:,./-") == word.npos)
    return word;
  std::string quoted = "'";
  for (const char c : word) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return quoted + "'";
}

}  // namespace kava
