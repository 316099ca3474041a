#include "models/curriculum.h"

#include <algorithm>
#include <cmath>

namespace kava {

int64_t Curriculum::stage(int64_t step) const {
  const RunConfig::Stages& s = config_.stages;
  if (!recipe_of(config_).has_stages()) return 0;
  if (s.fixed >= 0) return s.fixed;
  const int64_t after = std::max<int64_t>(0, step - s.hold * steps_per_epoch_);
  if (config_.method == Method::icot) {
    // Halves round to even.
    const double steps = std::nearbyint(static_cast<double>(steps_per_epoch_) / config_.icot.remove_per_epoch);
    return s.first + after / (s.steps > 0 ? s.steps : static_cast<int64_t>(std::clamp(steps, 1.0, 0x1p62)));
  }
  const int64_t begun = s.steps > 0 ? after / s.steps : after / steps_per_epoch_ / s.epochs;
  return std::min(std::max(s.first, last_stage(config_)), s.first + begun);
}

Recipe Curriculum::recipe(int64_t step) const {
  Recipe r = recipe_of(config_, stage(step));
  const bool holds = config_.stages.fixed < 0 && step < config_.stages.hold * steps_per_epoch_;
  if (r.rest == Recipe::Rest::steps) r.mix = config_.stages.mix;
  if (r.rest == Recipe::Rest::tokens && !holds) r.smoothing = config_.icot.smoothing;
  r.seed = config_.seed, r.step = step;
  return r;
}

int64_t Curriculum::capped(int64_t step) const {
  const int64_t s = stage(step), all = config_.method == Method::icot ? config_.icot.remove_all_from : 0;
  return all > 0 ? std::min(s, all) : s;
}

bool Curriculum::resets(int64_t step, const std::function<bool()>& left_before) const {
  const Recipe r = recipe_of(config_);
  if (step == 0 || !r.has_stages() || config_.stages.reset_optimizer == ResetOptimizer::never) return false;
  if (config_.stages.reset_optimizer == ResetOptimizer::epoch) return step % steps_per_epoch_ == 0;
  return capped(step) > capped(step - 1) && (r.rest == Recipe::Rest::steps || left_before());
}

}  // namespace kava
