// Where a step's time goes: a backend that measures another one, op by op.
#pragma once
#include <map>
#include <memory>
#include <string>

#include "engine/device/ops.h"

namespace kava {

struct OpTime {
  double seconds = 0;
  int64_t calls = 0;
};
using OpTimes = std::map<std::string, OpTime>;

/// Runs every op on `ops` and adds its wall time to times[op]. Both must outlive it. For a backend whose ops have finished when they
/// return.
std::unique_ptr<Ops> make_timed_ops(Ops& ops, OpTimes& times);

}  // namespace kava
