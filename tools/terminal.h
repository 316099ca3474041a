// Lines that move on a terminal, and lines that a log can keep.
#pragma once
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <vector>

namespace kava {

/// 1,234,567
std::string thousands(std::int64_t n);
/// A rate with three digits or more, and no exponent from 1e-4 on.
std::string rate_text(double rate);
/// "1:02:03" or "2:03", from 0 on
std::string duration_text(double seconds);

/// Fields of a line, the most needed first.
using Fields = std::vector<std::string>;
/// The fields that fit into so many columns, apart by two spaces: whole ones, from the first on; the first always.
std::string fitted(const Fields& fields, std::int64_t columns);

/// Columns of a stream: those that COLUMNS says, else the window's, else `unknown`.
std::int64_t columns_of(std::FILE* to, std::int64_t unknown);

/// Lines that say how far something is: redrawn in place on a terminal, at most ten times a second. Elsewhere (a pipe, a file, TERM=dumb)
/// nothing moves.
class MovingLines {
 public:
  /// may_move: false where what looks like a terminal is none.
  explicit MovingLines(std::FILE* to, bool may_move = true);

  bool moves() const { return moves_; }
  /// Draws the lines over those drawn before. Nothing where lines do not move, or the last drawing is younger than a tenth of a second and
  /// this is not `last`.
  void draw(const std::vector<Fields>& lines, bool last = false);
  /// Ends what is drawn, so that it stays and other lines follow.
  void keep();
  /// Takes what is drawn away.
  void clear();

 private:
  std::int64_t columns() const { return columns_of(to_, 80); }
  void print(const std::string& text);
  std::string back_to_first() const;

  std::FILE* to_;
  bool moves_;
  std::size_t drawn_ = 0;  // lines
  std::chrono::steady_clock::time_point last_{};
};

/// How far a piece of work is that has a known end: one moving line, or a line every ten seconds where lines do not move.
class WorkLine {
 public:
  /// "NAME 120 of 1,319 questions"
  WorkLine(std::FILE* to, std::string name, std::string what, bool may_move = true);

  /// `more` follows the count; the rate since the first call and the time left end the line.
  void at(std::int64_t done, std::int64_t total, const Fields& more);
  /// Nothing of it stays on a terminal.
  void end() { lines_.clear(); }

 private:
  std::FILE* to_;
  std::string name_, what_;
  MovingLines lines_;
  std::optional<std::int64_t> first_;  // what was done before, as the first call says
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now(), printed_ = start_;
};

}  // namespace kava
