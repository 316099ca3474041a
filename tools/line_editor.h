// Lines that a person types: edited, with the earlier ones at hand.
#pragma once
#include <string>

namespace kava {

/// On a terminal the lines are edited by libedit (Debian's libedit2, loaded where it is there): arrow keys, the lines before by up and
/// down, searching them by Ctrl-R. Without that library, on a terminal that cannot move its cursor (TERM), and elsewhere lines are read as
/// they come.
class LineEditor {
 public:
  LineEditor();

  bool on_terminal() const { return terminal_; }
  /// The next line of standard input, without its end; false where there is none. The prompt, on standard error, is for a terminal alone.
  bool next(std::string& line);

 private:
  using ReadLine = char* (*)(const char* prompt);
  using AddHistory = int (*)(const char* line);

  bool terminal_;
  ReadLine read_ = nullptr;
  AddHistory add_ = nullptr;
  std::string last_;
};

}  // namespace kava
