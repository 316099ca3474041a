// Errors. One exception type; main prints it as `error: WHERE: what; remedy` and exits with its code (docs/design.md, errors).
#pragma once
#include <fmt/format.h>

#include <filesystem>
#include <source_location>
#include <stdexcept>
#include <string>
#include <string_view>

namespace kava {

enum class Exit : int {
  ok = 0,
  internal = 1,   // a broken contract inside the program
  usage = 2,      // command line or configuration
  preflight = 3,  // no such device, does not fit, output unusable
  data = 4,       // bad data or model file
  numeric = 5,    // non-finite loss or gradient
  comm = 6,       // communication between processes, or a device that failed
  write = 7,      // could not write
  stopped = 75,   // stopped by a signal with a checkpoint
};

class Error : public std::runtime_error {
 public:
  /// where: FILE, FILE:LINE, an option or a key. what: the fault, with any text of a file passed through escaped(). remedy: what to do.
  Error(Exit code, std::string where, std::string what, std::string remedy = "");
  Exit code() const { return code_; }
  const std::string& where() const { return where_; }

 private:
  Exit code_;
  std::string where_;
};

/// Printable form of text from a file or a user: control characters, quotes' backslashes and broken UTF-8 escaped, cut at `most` bytes.
std::string escaped(std::string_view text, std::size_t most = 80);
/// A path as messages show it: whole, escaped; "" in quotes.
std::string shown_path(const std::filesystem::path& path);

/// Length of the valid UTF-8 sequence that starts at s[i], 0 if there is none (broken, overlong, a surrogate or beyond U+10FFFF); in
/// `part` how many of its bytes could have begun one.
int utf8_length(std::string_view s, std::size_t i, std::size_t* part = nullptr);
/// Byte offset of the first byte that is not part of valid UTF-8; npos when all is valid.
std::size_t invalid_utf8(std::string_view s);
inline bool is_utf8(std::string_view s) { return invalid_utf8(s) == std::string_view::npos; }

/// Levenshtein distance in bytes, for "the nearest valid key".
std::size_t edit_distance(std::string_view a, std::string_view b);

[[noreturn]] void broken_contract(const char* condition, std::string message, std::source_location at);

/// Checks a contract between parts of the program, in every build.
#define KAVA_CHECK(condition, ...)                                                                                    \
  do {                                                                                                                \
    if (!(condition)) ::kava::broken_contract(#condition, fmt::format(__VA_ARGS__), std::source_location::current()); \
  } while (0)

}  // namespace kava
