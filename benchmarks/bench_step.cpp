#include "benchmarks/bench_step.h"

#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <numeric>
#include <optional>

#include "engine/clock.h"
#include "engine/device/host.h"
#include "models/flops.h"
#include "models/kava.h"
#include "models/trainer.h"

namespace kava {

namespace {

using Clock = std::chrono::steady_clock;
/// A model on random weights and one batch of it.
class StepRun {
 public:
  StepRun(Ops& ops, const StepCase& what) : ops_(ops), what_(what), model_(ops, what.config, what.shape), arena_(ops) {}

  struct Result {
    double seconds, loss, norm;
    OpCounter::Counts asked;
  };

  Result step(int64_t stage, bool reset, bool counted) {
    OpCounter counter(ops_);
    std::optional<Observed> observed;
    if (counted) observed.emplace(ops_, counter);
    const auto begin = Clock::now();
    if (reset) model_.parameters.reset_moments();
    const Recipe recipe = recipe_of(what_.config, stage);
    const BatchTotals totals = batch_totals(what_.config, recipe, what_.samples);
    model_.parameters.zero_grad();
    StepOptions options;
    options.recipe = recipe;
    options.step = step_++;
    ops_.fill(sums_, 0);
    add_step(model_, arena_, what_.samples, totals, options, sums_);
    model_.parameters.update(arena_, {1e-4, 0.9, 0.999, 1e-8, 0.1, 2}, grad_square_, sums_);
    const std::vector<double> scalars = to_host(ops_, scalars_);
    const double seconds = seconds_since(begin);
    return {seconds, losses_of(scalars, totals).total(what_.config), std::sqrt(scalars.back()), counter.counts()};
  }

  double flops() const { return minimum_flops(what_.config, recipe_of(what_.config, what_.stage), what_.shape, what_.samples); }
  int64_t peak_bytes() const { return static_cast<int64_t>(arena_.peak_bytes()); }

 private:
  Ops& ops_;
  const StepCase& what_;
  Model model_;
  Arena arena_;
  const Tensor scalars_ = step_scalars(arena_, 1), sums_ = scalars_.col_range(0, kStepSums),
               grad_square_ = scalars_.col_range(kStepSums, kStepSums + 1);
  uint32_t step_ = 0;
};

}  // namespace

RunConfig bench_config(Method method, const Shapes& shapes) {
  RunConfig config = method_defaults(method);
  config.model.init = Init::random;
  config.lora.rank = shapes.rank;
  config.latent.token_init.clear();  // there is no tokenizer
  return config;
}

double MeasuredStep::median() const {
  std::vector<double> s = seconds;
  std::ranges::nth_element(s, s.begin() + std::ssize(s) / 2);
  return s[s.size() / 2];
}

double MeasuredStep::fastest() const { return *std::ranges::min_element(seconds); }

MeasuredStep measure_step(Ops& ops, const StepCase& what, int steps, std::FILE* lines, double hot) {
  const auto start = Clock::now();
  const bool apart = ops.name() != "cpu";
  OpTimer timer(ops);
  std::optional<Observed> observed;
  if (!apart) observed.emplace(ops, timer);
  StepRun run(ops, what);
  MeasuredStep result;
  result.flops = run.flops();
  const auto batch = static_cast<double>(what.samples.size());
  if (lines)
    fmt::print(lines, "\nstep: {}, bf16, batch {}, method {}, {:.1f} GFLOP a sample at least; ready after {:.1f} s\n", what.name,
               what.samples.size(), name_of(what.config.method), result.flops / batch / 1e9, seconds_since(start));
  if (what.stage_before >= 0) run.step(what.stage_before, false, !apart), run.step(what.stage_before, false, !apart);
  for (int i = 0; i <= steps; ++i) {
    timer.clear();
    const StepRun::Result r = run.step(what.stage, i == 0 && what.stage_before >= 0, !apart);
    for (const auto& [op, t] : timer.times())
      if (i > 0) result.ops[op] += t.seconds / steps;
    result.asked = r.asked;
    if (lines)
      fmt::print(lines, "step {}: {:.3f} s, {:.1f} samples/s, loss {:.4f}, grad norm {:.3f}\n", i, r.seconds, batch / r.seconds, r.loss,
                 r.norm);
    if (i > 0) result.seconds.push_back(r.seconds);
    if (i == 0 && what.stage_before >= 0) result.after_change = r.seconds;
    const auto warm = Clock::now();
    while (i == 0 && seconds_since(warm) < hot) run.step(what.stage, false, !apart);
  }
  if (apart) {
    for (int i = 0; i < steps; ++i) result.one_by_one.push_back(run.step(what.stage, false, true).seconds);
    observed.emplace(ops, timer);
    result.asked = run.step(what.stage, false, true).asked;
    for (const auto& [op, t] : timer.times()) result.ops[op] = t.seconds;
  }
  result.peak_bytes = run.peak_bytes();
  return result;
}

void print_ops(const MeasuredStep& step, bool timed_in_step) {
  std::vector<std::pair<double, std::string>> shares;
  double all = 0;
  for (const auto& [op, s] : step.ops) shares.emplace_back(s, op), all += s;
  if (timed_in_step) all = std::accumulate(step.seconds.begin(), step.seconds.end(), 0.0) / static_cast<double>(step.seconds.size());
  std::ranges::sort(shares, std::greater{});
  for (const auto& [s, op] : shares)
    if (s / all > 0.002) fmt::print("  {:<28} {:>8.3f} s {:>5.1f} %\n", op, s, 100 * s / all);
}

std::vector<MeasuredStep> measure_in_turn(Ops& ops, const std::vector<StepCase>& cases, int rounds) {
  constexpr int kSteps = 2;
  std::vector<MeasuredStep> all(cases.size());
  for (int round = 0; round < rounds; ++round)
    for (std::size_t i = 0; i < cases.size(); ++i) {
      MeasuredStep one = measure_step(ops, cases[i], kSteps, nullptr);
      const bool fastest = all[i].seconds.empty() || one.fastest() < all[i].fastest();
      one.seconds.insert(one.seconds.end(), all[i].seconds.begin(), all[i].seconds.end());
      if (round > 0) one.after_change = std::min(one.after_change, all[i].after_change);
      if (!fastest) one.ops = std::move(all[i].ops);
      all[i] = std::move(one);
    }
  return all;
}

std::vector<StepCase> method_cases(const Shapes& shapes) {
  const ModelConfig shape = shapes.model();
  RunConfig coconut = bench_config(Method::coconut, shapes);
  coconut.coconut.thoughts = 2, coconut.coconut.max_stage = 3;
  return {{"kava", bench_config(Method::kava, shapes), shape, bench_samples(shapes.vocab, shapes.batch), 0, -1},
          {"coconut", coconut, shape, bench_samples_in_steps(shapes.vocab, shapes.batch), 3, 2},
          {"codi", bench_config(Method::codi, shapes), shape, bench_samples(shapes.vocab, shapes.batch), 0, -1}};
}

std::vector<StepCase> model_cases(const Shapes& shapes) {
  std::vector<StepCase> cases;
  for (const char* family : {"llama", "qwen3"}) {
    ModelConfig shape = shapes.model();
    shape.family = family;
    cases.push_back({family, bench_config(Method::kava, shapes), shape, bench_samples(shapes.vocab, shapes.batch), 0, -1});
  }
  return cases;
}

}  // namespace kava
