#include "tools/line_editor.h"

#include <dlfcn.h>
#include <unistd.h>

#include <clocale>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string_view>

#include "engine/cli.h"

namespace kava {

namespace {

constexpr const char* kPrompt = "> ";

template <class T>
T symbol(void* library, const char* name) {
  return reinterpret_cast<T>(::dlsym(library, name));
}

}  // namespace

LineEditor::LineEditor() : terminal_(::isatty(STDIN_FILENO) == 1) {
  const char* kind = std::getenv("TERM");
  if (!terminal_ || ::isatty(STDERR_FILENO) != 1 || !kind || !*kind || std::string_view(kind) == "dumb") return;
  void* library = ::dlopen("libedit.so.2", RTLD_NOW | RTLD_LOCAL);
  if (!library) return;
  auto* out = symbol<std::FILE**>(library, "rl_outstream");
  read_ = symbol<ReadLine>(library, "readline"), add_ = symbol<AddHistory>(library, "add_history");
  if (!out || !add_) read_ = nullptr;
  if (!read_) return;
  // Answers alone go to standard output. Letters are those of the terminal's locale, or UTF-8.
  *out = stderr;
  if (!std::setlocale(LC_CTYPE, "") || MB_CUR_MAX == 1) std::setlocale(LC_CTYPE, "C.UTF-8");
}

bool LineEditor::next(std::string& line) {
  if (!read_) {
    if (terminal_) std::fputs(kPrompt, stderr);
    return next_line(line);
  }
  const std::unique_ptr<char, decltype(&std::free)> typed(read_(kPrompt), &std::free);
  if (!typed) return false;
  line = typed.get();
  if (!line.empty() && line != last_) add_(line.c_str()), last_ = line;
  return true;
}

}  // namespace kava
