#include "benchmarks/bench_rank_steps.h"

#include <algorithm>
#include <chrono>
#include <limits>

#include "benchmarks/bench_step.h"
#include "engine/clock.h"
#include "engine/error.h"
#include "models/trainer.h"

namespace kava {

namespace {

constexpr int kSteps = 5;
constexpr int64_t kForwards = 2;  // at least

// A model on random weights and its training.
struct Training {
  Training(std::unique_ptr<Ops> backend, const Shapes& shapes, const std::vector<Sample>& batch, int64_t forwards, Comm* comm)
      : ops(std::move(backend)),
        samples(batch),
        config(config_of(shapes, std::ssize(batch), forwards)),
        model(*ops, config, shapes.model()) {
    trainer.emplace(model, samples, TrainingState(), comm);
  }
  static RunConfig config_of(const Shapes& shapes, int64_t batch, int64_t forwards) {
    RunConfig c = bench_config(Method::kava, shapes);
    c.train.batch = batch, c.train.micro_batch = batch / forwards, c.train.max_steps = 1000;
    return c;
  }
  double step(double& loss) {
    const auto start = std::chrono::steady_clock::now();
    loss = trainer->step().loss;
    return seconds_since(start);
  }

  const std::unique_ptr<Ops> ops;
  const std::vector<Sample> samples;
  const RunConfig config;
  Model model;
  std::optional<Trainer> trainer;
};

}  // namespace

RankSteps bench_rank_steps(Comm& comm, int threads, const Shapes& shapes) {
  const int64_t forwards = std::max<int64_t>(kForwards, comm.size()), each = std::max<int64_t>(1, shapes.batch / kForwards);
  const std::vector<Sample> one = bench_samples(shapes.vocab, each);
  std::vector<Sample> batch;
  for (int64_t i = 0; i < forwards; ++i) batch.insert(batch.end(), one.begin(), one.end());
  Training together(make_cpu_ops(threads), shapes, batch, forwards, &comm);
  std::optional<Training> alone;
  if (comm.leads()) alone.emplace(make_cpu_ops(threads * comm.size()), shapes, batch, forwards, nullptr);
  RankSteps result;
  result.samples = std::ssize(batch);
  result.ranks = result.alone = result.exposed_share = std::numeric_limits<double>::infinity();
  // The first round meets memory that nobody has touched.
  for (int round = 0; round <= kSteps; ++round) {
    comm.barrier("beginning together");
    const OverlapTime before = comm.overlap();
    double loss = 0, same = 0;
    const double seconds = together.step(loss), exposed = comm.overlap().exposed - before.exposed;
    if (round > 0) result.ranks = std::min(result.ranks, seconds);
    if (round > 0 && exposed / seconds < result.exposed_share)
      result.exposed_share = exposed / seconds, result.exposed = exposed, result.hidden = comm.overlap().hidden - before.hidden;
    comm.barrier("one rank goes alone");
    if (!alone) continue;
    const double by_itself = alone->step(same);
    if (round > 0) result.alone = std::min(result.alone, by_itself);
    if (loss != same) throw Error(Exit::internal, "ranks", fmt::format("loss {} of all ranks, {} of one", loss, same));
  }
  comm.barrier("ending together");
  return result;
}

}  // namespace kava
