// The work of kava_train.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "tools/device.h"

namespace kava {

struct TrainCommand {
  std::string config;
  std::optional<std::string> out;
  std::vector<std::string> sets;
  bool resume = false, plan = false, profile = false, check_ops = false;
  DeviceOptions device;
};

/// Returns the exit code: 0 done, 75 stopped by a signal.
int train(const TrainCommand& command);

}  // namespace kava
