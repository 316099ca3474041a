#include "tools/terminal.h"

#include <fmt/core.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <string_view>

#include "engine/clock.h"

namespace kava {

namespace {

using Clock = std::chrono::steady_clock;

std::string_view variable(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

// Columns that a UTF-8 text takes where each character takes one.
std::int64_t width(const std::string& text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0u) != 0x80u; });
}

}  // namespace

std::string thousands(std::int64_t n) {
  std::string digits = fmt::format("{}", n);
  for (std::size_t at = digits.size(), first = n < 0 ? 1 : 0; at > first + 3;) digits.insert(at -= 3, ",");
  return digits;
}

std::string rate_text(double rate) { return rate < 100 ? fmt::format("{:.3g}", rate) : thousands(std::llround(rate)); }

std::string duration_text(double seconds) {
  const auto s = static_cast<std::int64_t>(std::clamp(seconds, 0.0, 1e12));
  return s >= 3600 ? fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60) : fmt::format("{}:{:02}", s / 60, s % 60);
}

std::int64_t columns_of(std::FILE* to, std::int64_t unknown) {
  const std::string_view given = variable("COLUMNS");
  std::int64_t columns = 0;
  const auto [end, error] = std::from_chars(given.data(), given.data() + given.size(), columns);
  if (error == std::errc() && end == given.data() + given.size() && columns > 0) return columns;
  winsize size = {};
  return ::ioctl(::fileno(to), TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : unknown;
}

std::string fitted(const Fields& fields, std::int64_t columns) {
  std::string line;
  for (const std::string& field : fields) {
    const std::string longer = line.empty() ? field : line + "  " + field;
    if (!line.empty() && width(longer) > columns) break;
    line = longer;
  }
  return line;
}

MovingLines::MovingLines(std::FILE* to, bool may_move)
    : to_(to), moves_(may_move && ::isatty(::fileno(to)) != 0 && variable("TERM") != "dumb") {}

// A reader that went away is no reason to stop the work; the program's end reports it.
void MovingLines::print(const std::string& text) {
  std::fputs(text.c_str(), to_);
  std::fflush(to_);
}

std::string MovingLines::back_to_first() const {
  if (drawn_ == 0) return "";
  return drawn_ == 1 ? "\r" : fmt::format("\r\x1b[{}A", drawn_ - 1);
}

void MovingLines::draw(const std::vector<Fields>& lines, bool last) {
  if (!moves_ || (!last && drawn_ > 0 && seconds_since(last_) < 0.1)) return;
  last_ = Clock::now();
  std::string text = back_to_first();
  // A line as wide as the window would wrap on some terminals.
  for (std::size_t i = 0; i < lines.size(); ++i) text += (i == 0 ? "" : "\n") + fitted(lines[i], columns() - 1) + "\x1b[K";
  print(text);
  drawn_ = lines.size();
}

void MovingLines::keep() {
  if (drawn_ > 0) print("\n");
  drawn_ = 0;
}

void MovingLines::clear() {
  if (drawn_ > 0) print(back_to_first() + "\x1b[J");
  drawn_ = 0;
}

WorkLine::WorkLine(std::FILE* to, std::string name, std::string what, bool may_move)
    : to_(to), name_(std::move(name)), what_(std::move(what)), lines_(to, may_move) {}

void WorkLine::at(std::int64_t done, std::int64_t total, const Fields& more) {
  if (!first_) first_ = done, start_ = Clock::now();
  if (!lines_.moves() && (seconds_since(printed_) < 10 || done == total)) return;
  const double each = seconds_since(start_) / static_cast<double>(std::max<std::int64_t>(done - *first_, 1));
  Fields fields = {fmt::format("{} {} of {} {}", name_, thousands(done), thousands(total), what_)};
  fields.insert(fields.end(), more.begin(), more.end());
  if (done > *first_) {
    fields.push_back("ETA " + duration_text(each * static_cast<double>(total - done)));
    fields.push_back(rate_text(1 / std::max(each, 1e-9)) + " " + what_ + "/s");
  }
  if (lines_.moves()) return lines_.draw({fields}, done == total);
  printed_ = Clock::now();
  std::fputs((fitted(fields, 1 << 20) + "\n").c_str(), to_);
  std::fflush(to_);
}

}  // namespace kava
