// The work of kava_train.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "engine/device/world.h"
#include "tools/device.h"
#include "tools/plan.h"

namespace kava {

struct TrainCommand {
  std::string config;  // a TOML file, or the folder of a run to go on with
  std::optional<std::string> out;
  std::vector<std::string> sets;
  bool resume = false, extend = false, plan = false, profile = false, check_ops = false;
  PlanOptions plan_options;
  DeviceOptions device;
  RankOptions ranks;
};

/// Returns the exit code: 0 done, 75 stopped by a signal or by train.max_hours.
int train(const TrainCommand& command);

}  // namespace kava
