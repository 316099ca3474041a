#include "tools/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace kava {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_between(Clock::time_point from, Clock::time_point to) { return std::chrono::duration<double>(to - from).count(); }

std::string bar_text(int64_t step, int64_t total) {
  constexpr int64_t kWidth = 12;
  std::string bar(kWidth, '.');
  std::fill_n(bar.begin(), kWidth * step / std::max<int64_t>(total, 1), '#');
  return fmt::format("[{}]", bar);
}

int64_t terminal_columns() {
  winsize size = {};
  return ::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

}  // namespace

double measure_matrix_rate(Ops& ops, DType storage, double run_flops) {
  const bool large = run_flops > 1e12;
  // The plain f64 product is some hundred times slower than oneDNN's.
  const int64_t n = storage == DType::f64 ? 128 : large ? 1536 : 384;
  const double at_least = large ? 0.3 : 0.0;  // seconds
  Arena arena(ops);
  const Tensor x = arena.alloc(storage, n, n), y = arena.alloc(storage, n, n);
  const LinearGroup map = LinearGroup::plain(arena.alloc(storage, n, n));
  ops.fill(x, 0.5);
  ops.fill(map.w(), 0.25);
  const double flops = 2.0 * static_cast<double>(n) * static_cast<double>(n) * static_cast<double>(n);
  double best = 0;
  const Clock::time_point start = Clock::now();
  for (int i = 0; i < 2 || seconds_between(start, Clock::now()) < at_least; ++i) {
    const Clock::time_point begin = Clock::now();
    ops.linear_group_fwd(arena, y, x, map);
    best = std::max(best, flops / std::max(seconds_between(begin, Clock::now()), 1e-9));
  }
  return best;
}

std::string duration_text(double seconds) {
  const auto s = static_cast<int64_t>(std::clamp(seconds, 0.0, 1e12));
  return s >= 3600 ? fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60) : fmt::format("{}:{:02}", s / 60, s % 60);
}

Progress::Progress(int64_t first_step, int64_t total_steps, int64_t log_every, double matrix_rate, bool alone)
    : first_step_(first_step),
      total_steps_(total_steps),
      log_every_(log_every),
      matrix_rate_(matrix_rate),
      terminal_(alone && ::isatty(STDOUT_FILENO) != 0),
      start_(Clock::now()) {}

std::string Progress::losses_text(const StepReport& r) const {
  return fmt::format("loss {:.3f} student {:.3f} teacher {:.3f} kv {:.3f} codi {:.3f} grad {:.3g} lr {:.1e}", r.loss, r.losses.student_ce,
                     r.losses.teacher_ce, r.losses.kv, r.losses.codi, r.grad_norm, r.lr);
}

std::string Progress::speed_text(const StepReport& r, const Speed& speed) const {
  const double each = seconds_between(start_, Clock::now()) / static_cast<double>(std::max<int64_t>(1, r.step - first_step_));
  std::string text = fmt::format("{:.3g} samples/s {:.3g} tokens/s", speed.samples_per_s, speed.tokens_per_s);
  if (matrix_rate_ > 0) text += fmt::format(" {:.0f}% of peak", 100 * speed.flops_per_s / matrix_rate_);
  return text + " ETA " + duration_text(each * static_cast<double>(total_steps_ - r.step));
}

void Progress::step(const StepReport& r, const Speed& speed) {
  const Clock::time_point now = Clock::now();
  const std::string at = fmt::format("{}/{} ", r.step, total_steps_);
  if (!terminal_) {
    if (r.step % log_every_ == 0 || r.step == total_steps_) print("step " + at + losses_text(r) + " " + speed_text(r, speed) + "\n");
    return;
  }
  if (r.step < total_steps_ && seconds_between(drawn_, now) < 0.1) return;
  drawn_ = now;
  // Two lines; one longer than the terminal would wrap and could not be redrawn.
  const auto columns = static_cast<std::size_t>(terminal_columns() - 1);
  const std::string first = (bar_text(r.step, total_steps_) + " " + at + speed_text(r, speed)).substr(0, columns);
  print((bar_shown_ ? "\r\x1b[1A" : "") + first + "\x1b[K\n" + losses_text(r).substr(0, columns) + "\x1b[K");
  bar_shown_ = true;
}

void Progress::validation(int64_t step, const Validation& v) {
  std::string text = fmt::format("step {}: validation", step);
  for (const auto& [name, value] : v.values) text += fmt::format(" {} {:.4g}", name, value);
  note(text);
}

void Progress::note(const std::string& text) {
  finish();
  print(text + "\n");
}

void Progress::finish() {
  if (bar_shown_) print("\n");
  bar_shown_ = false;
}

void Progress::print(const std::string& text) {
  // A reader that went away is no reason to stop training; the program's end reports it.
  std::fputs(text.c_str(), stdout);
  std::fflush(stdout);
}

}  // namespace kava
