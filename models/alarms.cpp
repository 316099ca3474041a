#include "models/alarms.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>

#include "models/traces.h"

namespace kava {

namespace {

constexpr double kLargestRatio = 10, kLargestShare = 0.95, kSpikeDeviations = 8, kSpikeShare = 0.1;
constexpr std::size_t kWindow = 100, kFewest = 20;

double median(std::vector<double>& values) {
  const auto middle = values.begin() + std::ssize(values) / 2;
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

Alarms::Alarms(const RunConfig& config, int64_t total)
    : config_(config), warmup_(static_cast<int64_t>(std::ceil(config.train.warmup * static_cast<double>(total)))) {}

void Alarms::raise(const std::string& kind, const std::string& line, std::vector<std::string>& lines, bool each) {
  if (++count_[kind] == 1 || each) lines.push_back("warning: " + line);
}

std::vector<std::string> Alarms::start(std::span<const Sample> train) {
  std::vector<std::string> lines;
  if (config_.model.init == Init::random && config_.train.trainable == Trainable::lora)
    raise("a drawn base", "model.init = \"random\" draws the base, of which LoRA trains nothing; set train.trainable = \"all\"", lines);
  if (config_.train.trainable == Trainable::lora && config_.lora.alpha == 0)
    raise("LoRA scaled by zero", "lora.alpha = 0 scales LoRA by 0: it changes nothing; set it above 0", lines);
  const int64_t empty = std::ranges::count_if(train, [](const Sample&s) { return s.trace.empty(); }), n = std::ssize(train);
  if (const TraceUse use = trace_use(config_); use != TraceUse::none && 2 * empty > n)
    raise("rows without a trace",
          fmt::format("{} of {} rows have no trace token (n_c = 0), so {} there; {}train on rows with {} chains", empty, n,
                      lost_without_trace(use), config_.data.drop_last_step ? "set data.drop_last_step = false, or " : "",
                      config_.data.drop_last_step ? "longer" : "written"),
          lines);
  return lines;
}

std::vector<std::string> Alarms::step(const StepReport& r) {
  std::vector<std::string> lines;
  if (!r.updated) ++count_["steps without an update"];  // each is told where it is found
  // Coconut's inputs are the states behind the last norm as they are: their size is the model's.
  const bool as_they_are = config_.method == Method::coconut && !config_.latent.projection;
  if (r.latent_norm_ratio && *r.latent_norm_ratio > kLargestRatio && !as_they_are)
    raise("latents' norm",
          fmt::format("step {}: the latents' inputs are {:.1f} times as large as the embeddings; {}", r.step, *r.latent_norm_ratio,
                      !config_.latent.projection ? "set latent.projection = true"
                      : config_.latent.projection_init != ProjectionInit::embedding_rms
                          ? "set latent.projection_init = \"embedding_rms\", or lower train.lr"
                          : "lower train.lr"),
          lines);
  double sum = 0;
  for (const auto& [name, norm] : r.term_grads) sum += norm;
  for (const auto& [name, norm] : r.term_grads)
    if (r.term_grads.size() > 1 && norm > kLargestShare * sum)
      raise(name + "'s share",
            fmt::format("step {}: {} is {:.1f} % of all terms' gradient norms, so that the others hardly train; lower its weight", r.step,
                        name, 100 * norm / sum),
            lines);
  spikes(r, lines);
  return lines;
}

bool Alarms::is_spike(double value, std::vector<double> before) {
  if (before.size() < kFewest) return false;
  const double middle = median(before);
  for (double& x : before) x = std::abs(x - middle);
  return value - middle > std::max(kSpikeDeviations * 1.4826 * median(before), kSpikeShare * std::abs(middle));
}

void Alarms::spikes(const StepReport& r, std::vector<std::string>& lines) {
  const auto watch = [&](const std::string& what, const char* remedy, double value, std::deque<double>& last) {
    if (!std::isfinite(value)) return;
    std::vector<double> before(last.begin(), last.end());
    if (is_spike(value, before))
      raise("spikes of the " + what,
            fmt::format("step {}: a spike of the {}, {:.4g}; the median of the {} steps before is {:.4g}; {}", r.step, what, value,
                        before.size(), median(before), remedy),
            lines, true);
    last.push_back(value);
    if (last.size() > kWindow) last.pop_front();
  };
  watch("loss", "where it does not come back, lower train.lr, or raise train.warmup", r.loss, losses_);
  watch("gradient's norm", "train.clip bounds the update; where it stays, lower train.lr", r.grad_norm, norms_);
}

std::vector<std::string> Alarms::validation(int64_t step, const Validation& v) {
  std::vector<std::string> lines;
  if (config_.valid.floor > 0 && step > warmup_ && v.score < config_.valid.floor)
    raise("validation under valid.floor",
          fmt::format(
              "step {}: validation is at {:.1f} % strict, under valid.floor = {:.1f} %; look at the answers with kava_eval, compare with "
              "method no_cot, or lower train.lr",
              step, 100 * v.score, 100 * config_.valid.floor),
          lines);
  return lines;
}

std::string Alarms::summary() const {
  std::string text;
  for (const auto& [kind, count] : count_)
    text += fmt::format("{}{} {} time{}", text.empty() ? "" : ", ", kind, count, count == 1 ? "" : "s");
  return text;
}

}  // namespace kava
