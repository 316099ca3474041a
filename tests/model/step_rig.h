// Whole steps of the method on tiny models, for tests of what must hold between steps: trainables away from their starts, everything that a
// step computes read back to the host.
#pragma once
#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "engine/device/host.h"
#include "models/kava.h"
#include "models/text.h"
#include "tests/folders.h"
#include "tests/golden_config.h"

namespace kava::test {

inline const std::string kSeven = "lora.targets=[\"q_proj\",\"k_proj\",\"v_proj\",\"o_proj\",\"gate_proj\",\"up_proj\",\"down_proj\"]";

struct StepRun {
  StepLosses losses;
  double total = 0;
  std::map<std::string, std::vector<double>> gradients;
  Dump dump;
};

/// Uniform numbers in +-1 that depend on the name and the index alone.
inline std::vector<double> drawn(const std::string& name, std::size_t count) {
  std::seed_seq seed(name.begin(), name.end());
  std::mt19937_64 generator(seed);
  std::vector<double> x(count);
  for (double& v : x) v = 2 * (static_cast<double>(generator() >> 11) * 0x1p-53) - 1;
  return x;
}

/// The golden case `kava_defaults` (tiny LLaMA in f64, LoRA of rank 2 without dropout, M = 5, T = 3) with other keys set. No adapter is
/// read: every trainable is its start plus noise, so that no gradient is zero for want of a B.
class StepRig {
 public:
  explicit StepRig(std::vector<std::string> sets, int threads = 1, double noise = 0.2, std::unique_ptr<Ops> backend = nullptr) {
    sets.insert(sets.begin(), "model.adapter=\"\"");
    config = golden_config("kava_defaults", sets);
    ops = backend ? std::move(backend) : make_cpu_ops(threads);
    text = open_text_model(config.model.path);
    LeftOut left_out;
    samples = read_samples(text, config, read_train_files(config), &left_out);
    model = std::make_unique<Model>(*ops, config, text.shape);
    arena = std::make_unique<Arena>(*ops);
    if (noise == 0) return;
    for (const Parameter& p : model->parameters.all()) {
      std::vector<double> x = value(p.name);
      const std::vector<double> d = drawn(p.name, x.size());
      for (std::size_t i = 0; i < x.size(); ++i) x[i] += noise * d[i];
      model->parameters.set(p.name, x);
    }
    model->parameters.refresh();
  }

  std::vector<double> value(const std::string& name) const { return model->parameters.get(model->parameters.at(name).value); }

  /// One forward over `batch`, a part of an optimiser batch with `totals`.
  StepRun run(std::span<const Sample> batch, const BatchTotals& totals, StepOptions options = {}) {
    StepRun r;
    options.dump = &r.dump;
    model->parameters.zero_grad();
    r.losses = run_step(*model, *arena, batch, totals, options);
    r.total = r.losses.total(config);
    if (options.backward)
      for (const Parameter& p : model->parameters.all()) r.gradients[p.name] = model->parameters.get(p.grad);
    return r;
  }
  StepRun run(std::span<const Sample> batch, StepOptions options = {}) {
    return run(batch, batch_totals(config, recipe_of(config), batch), options);
  }
  StepRun run() { return run(samples); }

  RunConfig config;
  TextModel text;
  std::vector<Sample> samples;
  std::unique_ptr<Ops> ops;
  std::unique_ptr<Model> model;
  std::unique_ptr<Arena> arena;
};

inline double norm(const std::vector<double>& x) {
  double square = 0;
  for (double v : x) square += v * v;
  return std::sqrt(square);
}

/// |a - b| / |b|; 0 where both are zero.
inline double relative_error(const std::vector<double>& a, const std::vector<double>& b) {
  if (a.size() != b.size()) return INFINITY;
  std::vector<double> difference(a.size());
  for (std::size_t i = 0; i < a.size(); ++i) difference[i] = a[i] - b[i];
  const double d = norm(difference);
  return d == 0 ? 0 : d / norm(b);
}

inline bool same(const Dump& a, const Dump& b) {
  return std::ranges::equal(a, b, [](const auto& x, const auto& y) {
    return x.first == y.first && x.second.shape == y.second.shape && x.second.values == y.second.values &&
           x.second.indices == y.second.indices;
  });
}

/// config.json of a model of hidden size 64 that is drawn, not read.
inline void write_random_model(const TempFolder& folder, const std::string& family = "llama") {
  overwrite(folder / "config.json",
            "{\"model_type\": \"" + family +
                "\", \"hidden_size\": 64, \"intermediate_size\": 160, \"num_hidden_layers\": 2, "
                "\"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"vocab_size\": 300, \"rms_norm_eps\": 1e-5, "
                "\"rope_theta\": 10000.0, \"tie_word_embeddings\": false, \"hidden_act\": \"silu\", "
                "\"max_position_embeddings\": 512, \"initializer_range\": 0.05, \"eos_token_id\": 2}");
}
inline std::vector<std::string> random_model(const TempFolder& folder, std::vector<std::string> more = {}) {
  more.insert(more.begin(), {"model.path=\"" + folder.path().string() + "\"", "model.init=random"});
  return more;
}

}  // namespace kava::test
