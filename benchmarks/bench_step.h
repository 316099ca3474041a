// Whole training steps of kava_bench: forward, backward and update on random weights, whatever the method and the architecture.
#pragma once
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "benchmarks/bench_shapes.h"
#include "engine/config/config.h"
#include "engine/device/op_observer.h"

namespace kava {

struct StepCase {
  std::string name;
  RunConfig config;
  ModelConfig shape;
  std::vector<Sample> samples;
  int64_t stage = 0;
  /// A step of this stage runs before the measured ones, and the moments are set to zero after it; -1: none.
  int64_t stage_before = -1;
};

struct MeasuredStep {
  double flops = 0;                   // the fewest that the step takes (models/flops.h)
  std::vector<double> seconds;        // of the steps after the first
  std::vector<double> one_by_one;     // of as many whose kernels a device launches one by one; empty on the cpu
  double after_change = 0;            // seconds of the first step of the stage, the reset included; 0 without stage_before
  std::map<std::string, double> ops;  // seconds of a step, by op
  int64_t peak_bytes = 0;             // of the step's arena
  OpCounter::Counts asked;            // of the backend in the last step

  double median() const;
  double fastest() const;
};

/// Runs 1 + steps steps of which the first warms up, with others behind it for at least `hot` seconds. lines: where the head line and a
/// line for each step go; nullptr: nowhere. A device's steps are made again with an observer, so that no pass is launched as a whole, and
/// its ops are timed in one more, as waiting for each of them would slow it down.
MeasuredStep measure_step(Ops& ops, const StepCase& what, int steps, std::FILE* lines, double hot = 0);

/// The share of each op: of the step where its ops are timed in it, of all ops where they are timed apart.
void print_ops(const MeasuredStep& step, bool timed_in_step);

/// Cases side by side: each is measured in turn, in `rounds` rounds, and counts by its fastest step.
std::vector<MeasuredStep> measure_in_turn(Ops& ops, const std::vector<StepCase>& cases, int rounds);

/// The method's defaults on random weights, with the shape's rank of LoRA.
RunConfig bench_config(Method method, const Shapes& shapes);

/// Methods on one shape: kava, coconut (two latents a step, stage 3) and codi (six latents), each by its defaults.
std::vector<StepCase> method_cases(const Shapes& shapes);
/// The shape's sizes in the block of LLaMA and in that of Qwen3, method kava.
std::vector<StepCase> model_cases(const Shapes& shapes);

}  // namespace kava
