// Training steps of several ranks beside those of one rank that has the threads of all.
#pragma once
#include <string>

#include "benchmarks/bench_shapes.h"
#include "engine/device/comm.h"

namespace kava {

struct RankSteps {
  int64_t samples = 0;             // of a step
  double ranks = 0, alone = 0;     // seconds of the fastest step: of all ranks, and of rank 0 by itself
  double exposed = 0, hidden = 0;  // of the gradients' exchange: seconds a step, where they are the least share of it
  double exposed_share = 0;        // of that step
  double of_alone() const { return alone / ranks; }
};

/// Steps of method kava at the shape, of max(2, N) forwards of equal samples, in turn: all N ranks, each on `threads` threads of the cpu,
/// and rank 0 with the threads of all while the others wait. Every rank calls it; the times are rank 0's. Error(code internal) where the
/// two do not have the same losses.
RankSteps bench_rank_steps(Comm& comm, int threads, const Shapes& shapes);

}  // namespace kava
