// What every comparison of kava_bench measures with.
#pragma once
#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

#include "engine/clock.h"
#include "engine/device/ops.h"
#include "engine/text/split_pattern.h"

namespace kava {

/// Whether a filter's pattern is found in a name.
bool finds(const SplitPattern& filter, const std::string& name);
/// The pattern of --filter. Error(code usage) where it is no regular expression.
SplitPattern filter_of(const std::string& pattern);

/// Seconds a call: the median of five rounds, each of at least 50 ms. What a device was asked for is waited for once a round.
template <class F>
double time_of(Ops& ops, F&& run) {
  auto seconds_of = [&](int64_t calls) {
    ops.finish();
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < calls; ++i) run();
    ops.finish();
    return seconds_since(start) / static_cast<double>(calls);
  };
  seconds_of(1);
  const int64_t calls = std::clamp<int64_t>(std::lround(0.05 / seconds_of(1) + 0.5), 1, 10000);
  std::vector<double> rounds;
  for (int round = 0; round < 5; ++round) rounds.push_back(seconds_of(calls));
  std::ranges::nth_element(rounds, rounds.begin() + 2);
  return rounds[2];
}

/// Normal numbers times scale, the same in every run; beyond 2^20 of them the same ones again.
Tensor random_tensor(Ops& ops, Arena& arena, DType type, int64_t rows, int64_t cols, double scale = 1);

}  // namespace kava
