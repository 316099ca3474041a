#include "models/footprint.h"

#include <algorithm>

#include "engine/error.h"
#include "models/flops.h"
#include "models/kava.h"
#include "models/recipe.h"
#include "models/trainer.h"

namespace kava {

namespace {

constexpr int64_t kMostScanned = int64_t{1} << 22;
// Room for what is not taken from the arena, above all the rows of products that are filled up.
constexpr int64_t kOpsRoom = int64_t{192} << 20;

std::string mib(int64_t bytes) { return fmt::format("{} MiB", (bytes + (1 << 20) - 1) >> 20); }

int64_t storage_bytes(const RunConfig& config) { return size_of(storage_of(config.model.dtype)); }
int64_t sum_bytes(const RunConfig& config) { return size_of(sum_type(storage_of(config.model.dtype))); }

// Fewer bytes than a forward takes: inputs, K, V and their gradients, and the latents' keys. Found without the layout, which for many
// latents and iterations would not fit in memory itself.
int64_t least_step_bytes(const RunConfig& config, const Recipe& recipe, const ModelConfig& m, std::span<const Sample> samples) {
  const double both = static_cast<double>(sum_bytes(config) + storage_bytes(config));
  const double row = both * static_cast<double>(m.hidden + 2 * m.layers * m.kv_heads * m.head_dim);
  double bytes = 0;
  for (const Sample& s : samples) {
    const Cut cut = cut_of(recipe, s, 0);
    const double M = cut.latents, T = config.step.prune_latents ? std::min<double>(cut.iterations, M) : cut.iterations;
    const double latent_rows = config.step.prune_latents ? M - T + T * (M - T + 1) : (T + 1) * M;
    const double question = static_cast<double>(s.question.size()),
                 answer = static_cast<double>(cut.rest()) + static_cast<double>(s.answer.size());
    bytes += row * (question + answer + latent_rows) + 4 * T * (question + M / 2);
  }
  return static_cast<int64_t>(std::min(bytes, 0x1p62));
}

int64_t held_bytes(const RunConfig& config, const ModelConfig& shape, ModelUse use) {
  const std::unique_ptr<Ops> dry = make_cpu_ops(1, true);
  const Model planned(*dry, config, shape, Values::none, use);
  return dry->held_bytes();
}

}  // namespace

int64_t model_bytes(const RunConfig& config, const ModelConfig& shape) {
  int64_t trained = 0;
  for (const TrainableSpec& t : trainable_specs(config, shape)) trained += t.rows * t.cols;
  // Three host copies while a checkpoint is written, and the sum of the gradients of several forwards.
  const int64_t copies = config.train.micro_batch > 0 && config.train.micro_batch < config.train.batch ? 4 : 3;
  return held_bytes(config, shape, ModelUse::training) + trained * copies * sum_bytes(config);
}

int64_t inference_bytes(const RunConfig& config, const ModelConfig& shape) { return held_bytes(config, shape, ModelUse::inference); }

int64_t step_bytes(Model& planned, const Recipe& recipe, std::span<const Sample> samples) {
  Arena arena(planned.ops);
  StepOptions options;
  options.recipe = recipe;
  run_step(planned, arena, samples, batch_totals(planned.config, recipe, samples), options);
  return arena.peak_bytes();
}

PlannedForward largest_forward(const RunConfig& config, std::span<const Sample> samples, int64_t micro) {
  const int64_t n = static_cast<int64_t>(samples.size()), batch = config.train.batch;
  const int64_t steps_per_epoch = (n + batch - 1) / batch, steps = total_steps(config.train, n);
  const int64_t epochs = std::min((steps + steps_per_epoch - 1) / steps_per_epoch, std::max<int64_t>(1, kMostScanned / n));
  std::vector<int64_t> stages = planned_stages(config), tokens(stages.size());
  std::vector<Recipe> recipes;
  for (int64_t stage : stages) recipes.push_back(recipe_of(config, stage));
  PlannedForward largest;
  int64_t most = -1;
  for (int64_t epoch = 0; epoch < epochs; ++epoch) {
    const std::vector<int64_t> order = epoch_order(n, config.seed, epoch);
    for (int64_t begin = 0, end; begin < n; begin = end) {
      end = std::min({n, begin + micro, begin - begin % batch + batch});
      std::ranges::fill(tokens, 0);
      auto at = [&](int64_t i) -> const Sample& { return samples[static_cast<std::size_t>(order[static_cast<std::size_t>(i)])]; };
      for (int64_t i = begin; i < end; ++i)
        for (std::size_t k = 0; k < stages.size(); ++k) {
          const Lengths length = lengths_of(recipes[k], at(i), 0);
          tokens[k] += length.tokens + length.latents;
        }
      const auto worst = static_cast<std::size_t>(std::ranges::max_element(tokens) - tokens.begin());
      if (tokens[worst] <= most) continue;
      most = tokens[worst];
      largest = {recipes[worst], stages[worst], {}};
      for (int64_t i = begin; i < end; ++i) largest.samples.push_back(at(i));
    }
  }
  return largest;
}

void require_memory(const Ops& ops, const RunConfig& config, const ModelConfig& shape, std::span<const Sample> samples, int64_t available) {
  // A config.json that is not that of the weights is told as such, not as a lack of memory.
  if (config.model.init == Init::pretrained) WeightFiles::open(config.model.path, shape);
  const int64_t weights = model_bytes(config, shape);
  if (weights > available)
    throw Error(Exit::preflight, "memory",
                fmt::format("the model and its optimiser take {}, {} are available", mib(weights), mib(available)),
                "use a smaller model, lora.rank or train.trainable = \"lora\"");
  const std::unique_ptr<Ops> dry = ops.dry_twin();
  Model planned(*dry, config, shape, Values::none);
  auto need = [&](int64_t micro) {
    const auto [recipe, stage, forward] = largest_forward(config, samples, micro);
    const int64_t least = least_step_bytes(config, recipe, shape, forward), room = available - weights - kOpsRoom;
    return weights + kOpsRoom + (least > room ? least : step_bytes(planned, recipe, forward));
  };
  const int64_t asked =
      config.train.micro_batch > 0 ? config.train.micro_batch : std::min(config.train.batch, static_cast<int64_t>(samples.size()));
  const int64_t needed = need(asked);
  if (needed <= available) return;
  int64_t fits = 0, fails = asked;
  while (fails - fits > 1) {
    const int64_t middle = fits + (fails - fits) / 2;
    (need(middle) <= available ? fits : fails) = middle;
  }
  throw Error(
      Exit::preflight, "train.micro_batch",
      fmt::format("a forward of {} samples takes at least {} in all, {} are available", asked, mib(needed), mib(available)),
      fits > 0 ? fmt::format("set train.micro_batch = {}, the largest that fits", fits) : "not even one sample fits: use a smaller model");
}

}  // namespace kava
