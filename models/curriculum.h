// Which stage every step of a run is of, and where the optimiser begins anew. A function of the step alone, so that a resumed run needs no
// record of it. Methods without stages have stage 0 and no resets.
#pragma once
#include <functional>

#include "models/recipe.h"

namespace kava {

class Curriculum {
 public:
  Curriculum(const RunConfig& config, int64_t steps_per_epoch) : config_(config), steps_per_epoch_(steps_per_epoch) {}

  /// Stage of step t, from 0.
  int64_t stage(int64_t step) const;

  /// What step t trains, its draws included.
  Recipe recipe(int64_t step) const;

  /// Whether both moments are zero again before step t. left_before: whether the batch of step t - 1 had anything of its traces left.
  bool resets(int64_t step, const std::function<bool()>& left_before) const;

 private:
  int64_t capped(int64_t step) const;

  const RunConfig& config_;
  int64_t steps_per_epoch_;
};

}  // namespace kava
