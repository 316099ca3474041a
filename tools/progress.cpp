#include "tools/progress.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "engine/device/cuda_module.h"
#include "engine/device/host.h"
#include "engine/rng.h"

namespace kava {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kWindow = 50;  // steps that the time left is judged by

double seconds_between(Clock::time_point from, Clock::time_point to) { return std::chrono::duration<double>(to - from).count(); }

std::string bar_text(int64_t step, int64_t total) {
  constexpr int64_t kWidth = 12;
  std::string bar(kWidth, '.');
  std::fill_n(bar.begin(), kWidth * step / std::max<int64_t>(total, 1), '#');
  return fmt::format("[{}]", bar);
}

// [n, n] of normal numbers. 128 rows of them are repeated: more would take the host longer than the products take.
Tensor random_square(Ops& ops, Arena& arena, DType type, int64_t n) {
  const Tensor x = arena.alloc(type, n, n);
  const int64_t rows = std::min<int64_t>(128, n);
  std::vector<double> some(static_cast<std::size_t>(rows * n));
  const auto key = philox_key(Purpose::bench, 1);
  for (std::size_t i = 0; i < some.size(); ++i) {
    const auto word = philox({static_cast<uint32_t>(i / 2), 0, 0, 0}, key);
    some[i] = normal_pair(word[0], word[1])[i % 2];
  }
  for (int64_t begin = 0; begin < n; begin += rows)
    from_host(ops, x.row_range(begin, std::min(n, begin + rows)),
              std::span(some).first(static_cast<std::size_t>(std::min(rows, n - begin) * n)));
  return x;
}

}  // namespace

MatrixRate::MatrixRate(Ops& ops, DType storage, double run_flops)
    : ops_(ops), storage_(storage), large_(run_flops > 1e12), rate_(ops.queues() ? measure_queued() : measure()) {}

double MatrixRate::measure_queued() const {
  const bool emulated = ops_.name() != "cuda";
  const int products = emulated ? 2 : 20;  // between two waits
  const double long_enough = emulated ? 0 : 0.5,
               hot = emulated || !large_ ? long_enough : 5;  // seconds; a GPU's clocks sink while it is busy
  const int64_t least = emulated ? 96 : 1024;
  const auto cube = [](int64_t side) { return std::pow(static_cast<double>(side), 3); };
  // Of one product of these sides, in batches for at least so long, after others that warm up.
  const auto seconds_of = [&](int64_t side, double at_least, double before) {
    Arena arena(ops_);
    const Tensor x = random_square(ops_, arena, storage_, side), w = random_square(ops_, arena, storage_, side),
                 y = arena.alloc(storage_, side, side);
    const LinearGroup map = LinearGroup::plain(w);
    double seconds = 0;
    for (int round = 0; round < 2; ++round) {
      int64_t made = 0;
      ops_.finish();
      const Clock::time_point start = Clock::now();
      do {
        for (int i = 0; i < products; ++i, ++made) ops_.linear_group_fwd(arena, y, x, map);
        ops_.finish();
      } while (seconds_between(start, Clock::now()) < (round == 0 ? before : at_least));
      seconds = seconds_between(start, Clock::now()) / static_cast<double>(made);
    }
    return seconds;
  };
  int64_t n = 8 * least;
  while (n > least && 3 * n * n * size_of(storage_) > free_memory(ops_) / 2) n /= 2;
  // In f32 a device may take minutes for what it multiplies in a tenth of a second in bf16: sides of which a batch takes a second.
  const double each = seconds_of(least, 0, 0) / cube(least);
  while (n > least && each * cube(n) * products > 1) n /= 2;
  return 2 * cube(n) / std::max(seconds_of(n, long_enough, hot), 1e-9);
}

double MatrixRate::measure() const {
  // The plain f64 product is some hundred times slower than oneDNN's.
  const int64_t n = storage_ == DType::f64 ? 128 : large_ ? 1536 : 384;
  const double at_least = large_ ? 0.3 : 0.0;  // seconds
  Arena arena(ops_);
  const Tensor x = arena.alloc(storage_, n, n), y = arena.alloc(storage_, n, n);
  const LinearGroup map = LinearGroup::plain(arena.alloc(storage_, n, n));
  ops_.fill(x, 0.5);
  ops_.fill(map.w(), 0.25);
  const double flops = 2.0 * static_cast<double>(n) * static_cast<double>(n) * static_cast<double>(n);
  double best = 0;
  const Clock::time_point start = Clock::now();
  for (int i = 0; i < 2 || seconds_between(start, Clock::now()) < at_least; ++i) {
    ops_.finish();
    const Clock::time_point begin = Clock::now();
    ops_.linear_group_fwd(arena, y, x, map);
    ops_.finish();
    best = std::max(best, flops / std::max(seconds_between(begin, Clock::now()), 1e-9));
  }
  return best;
}

double MatrixRate::after(double reached) {
  if (reached > rate_ && !ops_.queues()) rate_ = std::max(measure(), reached);
  return rate_;
}

Progress::Progress(int64_t total_steps, const RunConfig& config, bool alone)
    : total_steps_(total_steps),
      log_every_(config.train.log_every),
      weights_(config.loss),
      kv_weight_(config.kv.weight),
      codi_weight_(config.codi.weight),
      lines_(stdout, alone),
      last_step_(Clock::now()) {}

Fields Progress::loss_fields(const StepReport& r) const {
  Fields fields = {fmt::format("loss {:.3f}", r.loss)};
  if (weights_.student > 0) fields.push_back(fmt::format("student CE {:.3f}", r.losses.student_ce));
  if (weights_.teacher > 0) fields.push_back(fmt::format("teacher CE {:.3f}", r.losses.teacher_ce));
  if (kv_weight_ > 0) fields.push_back(fmt::format("L_KV {:.3f}", r.losses.kv));
  if (codi_weight_ > 0) fields.push_back(fmt::format("L_CODI {:.3f}", r.losses.codi));
  fields.push_back(fmt::format("grad {:.3g}", r.grad_norm));
  fields.push_back(fmt::format("lr {:.1e}", r.lr));
  return fields;
}

Fields Progress::speed_fields(const StepReport& r, const Speed& speed, double share) const {
  Fields fields = {"ETA " + duration_text(seconds_left(r.step)), rate_text(speed.samples_per_s) + " samples/s",
                   rate_text(speed.tokens_per_s) + " tokens/s"};
  if (share > 0) fields.push_back(fmt::format("{:.0f} % of the matrix rate", 100 * share));
  return fields;
}

// The last steps tell what a step takes; validations and checkpoints come as often as they did so far.
double Progress::seconds_left(int64_t step) const {
  if (steps_ == 0) return 0;
  const double each = step_seconds_.empty()
                          ? 0
                          : std::accumulate(step_seconds_.begin(), step_seconds_.end(), 0.0) / static_cast<double>(step_seconds_.size());
  return (each + pauses_ / static_cast<double>(steps_)) * static_cast<double>(total_steps_ - step);
}

void Progress::count_time() {
  const Clock::time_point now = Clock::now();
  double seconds = seconds_between(std::exchange(last_step_, now), now);
  ++steps_;
  if (std::exchange(paused_, false) && !step_seconds_.empty()) {
    const double step = std::min(seconds, step_seconds_.back());
    pauses_ += seconds - step, seconds = step;
  }
  step_seconds_.push_back(seconds);
  if (step_seconds_.size() > kWindow) step_seconds_.pop_front();
}

void Progress::step(const StepReport& r, const Speed& speed, double share) {
  count_time();
  const std::string at = fmt::format("{}/{}", thousands(r.step), thousands(total_steps_));
  if (!lines_.moves()) {
    if (r.step % log_every_ != 0 && r.step != total_steps_) return;
    Fields fields = {"step " + at};
    for (const Fields& more : {loss_fields(r), speed_fields(r, speed, share)}) fields.insert(fields.end(), more.begin(), more.end());
    return print(fitted(fields, 1 << 20) + "\n");
  }
  Fields first = {at};
  const Fields rest = speed_fields(r, speed, share);
  first.insert(first.end(), rest.begin(), rest.end());
  first.push_back(bar_text(r.step, total_steps_));
  lines_.draw({first, loss_fields(r)}, r.step == total_steps_);
}

void Progress::validating(int64_t done, int64_t total, int64_t correct) {
  if (!validating_) {
    lines_.keep();
    validating_.emplace(stdout, "validation:", "questions", lines_.moves());
  }
  Fields more;
  if (done > 0) more.push_back(fmt::format("strict {:.1f} %", 100.0 * static_cast<double>(correct) / static_cast<double>(done)));
  validating_->at(done, total, more);
}

void Progress::validation(int64_t step, const Validation& v, const std::optional<Best>& best) {
  std::string text = fmt::format("step {}: valid {:.2f} % strict", thousands(step), 100 * v.score);
  if (best) text += fmt::format(" (best {:.2f} at step {})", 100 * best->score, thousands(best->step));
  text +=
      fmt::format(", {:.1f} passes a question, {:.2f} % forced, loss {:.3f}", v.values.at("passes"), 100 * v.values.at("forced"), v.loss);
  if (v.values.at("too_long") > 0) text += fmt::format(", {:.0f} too long to be run", v.values.at("too_long"));
  note(text);
}

void Progress::note(const std::string& text) {
  finish();
  paused_ = true;
  print(text + "\n");
}

void Progress::finish() {
  if (validating_) validating_->end();
  validating_.reset();
  lines_.keep();
}

void Progress::print(const std::string& text) {
  // A reader that went away is no reason to stop training; the program's end reports it.
  std::fputs(text.c_str(), stdout);
  std::fflush(stdout);
}

}  // namespace kava
