#include "models/footprint.h"

#include <algorithm>
#include <string_view>

#include "engine/device/op_observer.h"
#include "engine/device/ordered_sum.h"
#include "engine/error.h"
#include "models/curriculum.h"
#include "models/flops.h"
#include "models/kava.h"
#include "models/layout.h"
#include "models/trainer.h"
#include "models/validation.h"

namespace kava {

namespace {

constexpr int64_t kMostScanned = int64_t{1} << 22;  // samples whose lengths are looked at
constexpr std::size_t kListed = 4096, kAll = 64, kLargest = 24, kLongest = 8;

// Rounded against the run, so that what does not fit never looks as if it did.
std::string needed(int64_t bytes) { return fmt::format("{} MiB", (bytes + (1 << 20) - 1) >> 20); }
std::string there(int64_t bytes) { return fmt::format("{} MiB", bytes >> 20); }

int64_t sum_bytes(const RunConfig& config) { return size_of(sum_type(storage_of(config.model.dtype))); }
int64_t storage_bytes(const RunConfig& config) { return size_of(storage_of(config.model.dtype)); }

// Fewer bytes than a forward takes: inputs, K, V and their gradients.
int64_t least_step_bytes(const RunConfig& config, const ModelConfig& m, int64_t rows) {
  const double row = static_cast<double>((sum_bytes(config) + storage_bytes(config)) * (m.hidden + 2 * m.layers * m.kv_heads * m.head_dim));
  return static_cast<int64_t>(std::min(static_cast<double>(rows) * row, 0x1p62));
}

// What lies in an arena where forward ends, and what is sent from the host.
class Watch final : public OpObserver {
 public:
  explicit Watch(const Arena& arena) : arena_(arena) {}
  void before(const OpCall& op) override {
    if (std::string_view(op.name) == "head_cross_entropy") most_ = std::max(most_, arena_.mark().used);
    if (std::string_view(op.name) == "upload") sent_ += op.outputs[0].count() * size_of(op.outputs[0].dtype);
    most_sent_ = std::max(most_sent_, sent_);
    if (std::string_view(op.name) == "head_argmax") sent_ = 0;  // the next token's lists are others
  }
  void next_forward() { sent_ = 0; }
  int64_t most() const { return most_; }
  int64_t most_sent() const { return most_sent_; }

 private:
  const Arena& arena_;
  int64_t most_ = 0, sent_ = 0, most_sent_ = 0;
};

// Lists are made, and laid out to be sent.
constexpr int64_t kHostCopies = 2;

// Rows of the cpu's products that are filled up (engine/device/cpu/matmul.cpp), of the widest operands.
int64_t filled_rows(const RunConfig& config, const ModelConfig& m) {
  constexpr int64_t kTileRows = 256;
  return 2 * kTileRows * (std::max(2 * m.mlp, m.vocab) + m.hidden) * storage_bytes(config);
}

}  // namespace

int64_t inference_bytes(const RunConfig& config, const ModelConfig& shape) {
  const std::unique_ptr<Ops> dry = make_cpu_ops(1, true);
  const Model planned(*dry, config, shape, Values::none, ModelUse::inference);
  return dry->held_bytes();
}

int64_t step_rows(const RunConfig& config, const Recipe& recipe, const Sample& sample, int64_t index) {
  const Cut cut = cut_of(recipe, sample, index);
  const Lengths n = lengths_of(recipe, sample, cut);
  const int64_t question = std::ssize(sample.question), N = cut.latents;
  const int64_t T = iterations_run(config, cut);
  if (!recipe.markers) return question + (recipe.student ? n.student_tail : n.teacher_tail);
  int64_t latents = (T + 1) * N;
  if (config.step.prune_latents) {
    latents = 0;
    for (int64_t t = 0; t <= T; ++t) latents += std::max<int64_t>(0, N - (T - t) - std::max<int64_t>(0, t - 1));
  }
  const int64_t again = recipe.teacher && !config.step.prefix_sharing ? question : 0;
  return question + 1 + latents + again + n.teacher_tail + 1 + n.student_tail;
}

MemoryPlanner::MemoryPlanner(const Ops& ops, const RunConfig& config, const ModelConfig& shape, std::span<const Sample> samples,
                             const Validator* valid, int ranks)
    : ops_(ops),
      config_(config),
      shape_(shape),
      samples_(samples),
      valid_(valid),
      ranks_(ranks),
      steps_per_epoch_((std::ssize(samples) + config.train.batch - 1) / config.train.batch),
      steps_(total_steps(config.train, std::ssize(samples))),
      shared_(ops.name() == "cpu") {}

int64_t forward_samples(const RunConfig& config, int64_t samples, int ranks) {
  const int64_t batch = std::min(config.train.batch, samples);
  if (config.train.micro_batch > 0) return std::min(config.train.micro_batch, batch);
  return (batch + ranks - 1) / ranks;
}

int64_t MemoryPlanner::asked_micro_batch() const { return forward_samples(config_, std::ssize(samples_), ranks_); }

std::vector<Sample> MemoryPlanner::batch_of(int64_t step) const {
  const int64_t n = std::ssize(samples_), first = step % steps_per_epoch_ * config_.train.batch;
  const std::vector<int64_t> order = epoch_order(n, config_.seed, step / steps_per_epoch_);
  std::vector<Sample> batch;
  for (int64_t i = first; i < std::min(n, first + config_.train.batch); ++i)
    batch.push_back(samples_[static_cast<std::size_t>(order[static_cast<std::size_t>(i)])]);
  return batch;
}

std::vector<MemoryPlanner::Candidate> MemoryPlanner::candidates(int64_t micro) const {
  const Curriculum curriculum(config_, steps_per_epoch_);
  const int64_t n = std::ssize(samples_), batch = config_.train.batch;
  std::vector<Candidate> all;
  std::vector<int64_t> order;
  const auto largest_first = [](const Candidate& a, const Candidate& b) { return a.rows > b.rows; };
  // The first so many by rows, and then by the longest sample.
  const auto keep = [&](std::size_t by_rows, std::size_t by_length) {
    if (all.size() <= by_rows + by_length) return;
    std::ranges::stable_sort(all, largest_first);
    std::stable_sort(all.begin() + static_cast<std::ptrdiff_t>(by_rows), all.end(),
                     [](const Candidate& a, const Candidate& b) { return a.longest > b.longest; });
    all.resize(by_rows + by_length);
  };
  // Stages of steps grow, so that each is looked at; those of tokens shrink.
  const bool each_stage = recipe_of(config_).rest == Recipe::Rest::steps;
  int64_t stage = curriculum.stage(0), epoch = -1, scanned = 0;
  const int64_t last = curriculum.stage(steps_ - 1), stages = each_stage ? last - stage + 1 : 1;
  for (int64_t step = 0; step < steps_; ++step) {
    if (each_stage && curriculum.stage(step) != stage) stage = curriculum.stage(step), scanned = 0;
    if (scanned >= kMostScanned / stages) {
      if (!each_stage || stage == last) break;
      continue;
    }
    if (step / steps_per_epoch_ != epoch) epoch = step / steps_per_epoch_, order = epoch_order(n, config_.seed, epoch);
    const Recipe recipe = curriculum.recipe(step);
    const int64_t begin = step % steps_per_epoch_ * batch, end = std::min(n, begin + batch);
    scanned += end - begin;
    for (int64_t first = begin; first < end; first += micro) {
      Candidate c{step, first - begin, std::min(micro, end - first), 0, 0, curriculum.stage(step)};
      for (int64_t i = first; i < first + c.samples; ++i) {
        const int64_t rows = step_rows(config_, recipe, samples_[static_cast<std::size_t>(order[static_cast<std::size_t>(i)])], i - begin);
        c.rows += rows, c.longest = std::max(c.longest, rows);
      }
      all.push_back(c);
    }
    if (all.size() > 2 * kListed) keep(kListed, kListed / 4);
  }
  if (all.size() > kAll) keep(kLargest, kLongest);
  std::ranges::stable_sort(all, largest_first);
  return all;
}

MemoryPlan MemoryPlanner::plan(int64_t micro, int64_t available) const {
  const std::vector<Candidate> forwards = candidates(micro);
  MemoryPlan plan;
  plan.samples = forwards[0].samples, plan.rows = forwards[0].rows, plan.stage = forwards[0].stage;
  RunConfig config = config_;
  config.train.micro_batch = micro;
  const std::unique_ptr<Ops> dry = ops_.dry_twin();
  Model planned(*dry, config, shape_, Values::none);
  const int64_t each = (config.train.batch + micro - 1) / micro;
  const Buffer total = each > 1 ? planned.parameters.like_grad() : Buffer();
  plan.device.trainables = planned.parameters.bytes() + (each > 1 ? total.tensor().count() * sum_bytes(config) : 0);
  for (const Parameter& p : planned.parameters.all())
    plan.host.trainables = std::max(plan.host.trainables, p.rows * p.cols * sum_bytes(config));
  if (shared_) plan.host.temporaries = filled_rows(config, shape_);
  const int64_t least = least_step_bytes(config, shape_, plan.rows);
  if (least > available) {
    plan.device.weights = dry->held_bytes() - plan.device.trainables, plan.device.activations = least, plan.at_least = true;
    return plan;
  }
  const Curriculum curriculum(config_, steps_per_epoch_);
  {
    Arena arena(*dry);
    Watch watch(arena);
    const Observed observed(*dry, watch);
    const Tensor scalars = step_scalars(arena, each);
    if (ranks_ > 1) OrderedSum::room(arena, planned.parameters.grad().dtype, planned.parameters.grad().cols, ranks_);
    for (const Candidate& c : forwards) {
      const std::vector<Sample> batch = batch_of(c.step);
      const auto samples = std::span(batch).subspan(static_cast<std::size_t>(c.first), static_cast<std::size_t>(c.samples));
      StepOptions options;
      options.recipe = curriculum.recipe(c.step);
      options.first_index = c.first, options.step = static_cast<uint32_t>(c.step);
      watch.next_forward();
      add_step(planned, arena, samples, batch_totals(config, *options.recipe, samples), options, scalars.col_range(0, kStepSums));
    }
    planned.parameters.update(arena, {}, scalars.col_range(scalars.cols - 1, scalars.cols), scalars.col_range(0, scalars.cols - 1));
    planned.parameters.find_not_finite(arena);
    plan.device.activations = watch.most(), plan.device.temporaries = arena.peak_bytes() - watch.most();
    plan.host.activations = kHostCopies * watch.most_sent();
  }
  if (valid_) {
    Arena arena(*dry);
    Watch watch(arena);
    const Observed observed(*dry, watch);
    step_scalars(arena, each);
    for (const int64_t stage : {curriculum.stage(0), curriculum.stage(steps_ - 1)}) valid_->run(planned, arena, stage, {});
    plan.device.decoding = arena.peak_bytes(), plan.host.decoding = kHostCopies * watch.most_sent();
  }
  plan.device.weights = dry->held_bytes() - plan.device.trainables;
  return plan;
}

int64_t MemoryPlanner::largest_micro_batch(int64_t most, int64_t available) const {
  int64_t fits = 0, fails = most + 1;
  while (fails - fits > 1) {
    const int64_t middle = fits == 0 && fails == most + 1 ? most : fits + (fails - fits) / 2;
    (plan(middle, available).total(shared_) <= available ? fits : fails) = middle;
  }
  return fits;
}

double MemoryPlanner::flops_per_step() const {
  constexpr int64_t kSteps = 16;               // that are counted in all, and at least one of each stage
  constexpr std::size_t kMostStretches = 256;  // icot has a stage for every token: behind them the last one goes on
  const Curriculum curriculum(config_, steps_per_epoch_);
  struct Stretch {
    int64_t begin, steps;
  };
  std::vector<Stretch> stretches;
  for (int64_t begin = 0; begin < steps_; begin += stretches.back().steps) {
    // Stages only rise: the first step of another one.
    int64_t end = begin + 1, other = steps_;
    const int64_t stage = curriculum.stage(begin);
    if (stretches.size() + 1 == kMostStretches || curriculum.stage(steps_ - 1) == stage) end = steps_;
    while (end < other) {
      const int64_t middle = end + (other - end) / 2;
      if (curriculum.stage(middle) == stage) end = middle + 1;
      else other = middle;
    }
    stretches.push_back({begin, end - begin});
  }
  double sum = 0;
  for (const auto [begin, steps] : stretches) {
    const int64_t n = std::clamp<int64_t>(kSteps * steps / steps_, 1, steps);
    double of_stretch = 0;
    for (int64_t i = 0; i < n; ++i)
      of_stretch += minimum_flops(config_, curriculum.recipe(begin + i * steps / n), shape_, batch_of(begin + i * steps / n));
    sum += of_stretch * static_cast<double>(steps) / static_cast<double>(n);
  }
  return sum / static_cast<double>(steps_);
}

int64_t MemoryPlanner::disk_bytes() const {
  int64_t elements = 0;
  for (const TrainableSpec& t : trainable_specs(config_, shape_)) elements += t.rows * t.cols;
  // The adapter in f32; values and moments. Beside those that are kept, the best one and one that is being written.
  const int64_t adapter = 4 * elements, checkpoint = adapter + 3 * elements * sum_bytes(config_);
  return (config_.train.keep_checkpoints + 2) * checkpoint + adapter;
}

Error memory_refusal(const MemoryPlanner& planner, const MemoryPlan& plan, int64_t asked, int64_t fits, int64_t available) {
  const bool shared = planner.shared();
  if (const int64_t model = plan.device.weights + plan.device.trainables; model > available)
    return {Exit::preflight, "memory",
            fmt::format("the model and its optimiser take {}, {} are available", needed(model), there(available)),
            "use a smaller model, lora.rank or train.trainable = \"lora\""};
  const std::string takes = plan.at_least ? "more than " + there(available) : needed(plan.total(shared));
  const std::string what = fmt::format("with forwards of {} samples the run takes {}, {} are available", asked, takes, there(available));
  if (fits < 1) {
    MemoryPlan one = planner.plan(1, available);
    const int64_t with_validation = one.total(shared);
    one.device.decoding = one.host.decoding = 0;
    if (!one.at_least && one.total(shared) <= available)
      return {Exit::preflight, "data.valid",
              fmt::format("its validation takes {}, training {}, {} are available", needed(with_validation), needed(one.total(shared)),
                          there(available)),
              "give it shorter rows, or leave it out and score the run by kava_eval, which has --batch"};
    return {Exit::preflight, "train.micro_batch", what,
            planner.config().train.recompute == Recompute::block
                ? "not even one sample fits: use shorter rows or a smaller model"
                : "not even one sample fits: set train.recompute = \"block\", or use a smaller model"};
  }
  return {Exit::preflight, "train.micro_batch", what,
          fmt::format("set train.micro_batch = {}, the largest that fits, which takes {}", fits,
                      needed(planner.plan(fits, available).total(shared)))};
}

void require_memory(const MemoryPlanner& planner, const RunConfig& config, const ModelConfig& shape, int64_t available, int64_t uncertain) {
  // A config.json that is not that of the weights is told as such, not as a lack of memory.
  if (config.model.init == Init::pretrained) WeightFiles::open(config.model.path, shape);
  const int64_t asked = planner.asked_micro_batch();
  const MemoryPlan plan = planner.plan(asked, available);
  if (plan.total(planner.shared()) <= available) return;
  throw memory_refusal(planner, plan, asked, planner.largest_micro_batch(asked - 1, available - uncertain), available);
}

}  // namespace kava
