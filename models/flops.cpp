#include "models/flops.h"

#include <algorithm>

namespace kava {

namespace {

// One of a layer's maps and its adapter, per row: W [out, in], LoRA of rank r.
struct MapCost {
  double weights = 0, lora_in = 0, lora_out = 0;
  bool trained = false;
  double forward() const { return 2 * (weights + lora_in + lora_out); }
  double to_input() const { return 2 * (weights + lora_in); }
  double to_parameters() const { return 2 * (trained ? weights : 0) + 2 * lora_out + 2 * (lora_in + lora_out); }
};

MapCost operator+(const MapCost& a, const MapCost& b) {
  return {a.weights + b.weights, a.lora_in + b.lora_in, a.lora_out + b.lora_out, a.trained || b.trained};
}

struct LayerCost {
  MapCost q, kv, rest;  // rest: what follows attention
};

LayerCost layer_cost(const RunConfig& config, const ModelConfig& m) {
  const bool all = config.train.trainable == Trainable::all;
  auto map = [&](const LinearSpec& spec, int64_t out) {
    const bool adapted = !all && is_adapted(config.lora.targets, spec.path);
    const double rank = adapted ? static_cast<double>(config.lora.rank) : 0;
    const double i = static_cast<double>(m.width(spec.in)), o = static_cast<double>(out);
    return MapCost{i * o, rank * i, rank * o, all};
  };
  const Architecture& arch = m.architecture();
  LayerCost cost;
  for (std::size_t g = 0; g < kMapGroups; ++g)
    for (const LinearSpec& spec : arch.maps[g]) {
      if (spec.out == Width::fused) {
        // One A for all three, whose product is that of k and v, since these are wanted of every row.
        cost.q = map(spec, m.width(Width::query)), cost.kv = map(spec, 2 * m.width(Width::key));
        cost.q.lora_in = 0;
        continue;
      }
      MapCost& to = g != kAttentionIn ? cost.rest : &spec == &arch.maps[g][0] ? cost.q : cost.kv;
      to = to + map(spec, m.width(spec.out));
    }
  return cost;
}

// Query-key pairs of a pass.
double pairs(const SegmentList& s) {
  double sum = 0;
  for (std::size_t i = 0; i < s.query_begin.size(); ++i) {
    const double keys = s.key_offsets[i + 1] - s.key_offsets[i], queries = s.query_count[i];
    sum += queries * keys - queries * (queries - 1) / 2;
  }
  return sum;
}

// Rows of a pass that come from the embedding of real tokens, and those of them that are live.
struct RealRows {
  double all = 0, live = 0;
};

RealRows real_rows(const Pass& p) {
  RealRows r;
  auto is_real = [&](int64_t row) { return row >= p.fed() && p.ids[static_cast<std::size_t>(row - p.fed())] >= 0; };
  for (int64_t i = 0; i < p.rows(); ++i) r.all += is_real(i);
  for (int32_t i : p.live) r.live += is_real(i);
  return r;
}

double pass_flops(const RunConfig& config, const ModelConfig& m, const Pass& p) {
  const LayerCost cost = layer_cost(config, m);
  const double rows = static_cast<double>(p.rows()), live = static_cast<double>(p.live_rows());
  const double per_pair = 14.0 * static_cast<double>(m.heads * m.head_dim);
  auto whole = [](const MapCost& c) { return c.forward() + c.to_input() + c.to_parameters(); };
  const double inner = rows * (whole(cost.q) + whole(cost.kv) + whole(cost.rest)) + per_pair * pairs(p.segments);
  const double last = rows * whole(cost.kv) + live * (whole(cost.q) + whole(cost.rest)) + per_pair * pairs(p.live_segments);
  double sum = static_cast<double>(m.layers - 1) * inner + last;
  if (config.train.trainable == Trainable::lora) {
    const RealRows real = real_rows(p);
    sum -= real.all * cost.kv.to_input() + (m.layers == 1 ? real.live : real.all) * cost.q.to_input();
  }
  return sum;
}

}  // namespace

bool has_fewest_rows(const RunConfig& config) { return config.step.prefix_sharing && config.step.prune_latents; }

double minimum_flops(const RunConfig& config, const Recipe& recipe, const ModelConfig& m, std::span<const Sample> samples,
                     int64_t first_index) {
  RunConfig least = config;
  least.step.prefix_sharing = least.step.prune_latents = true;
  return minimum_flops(config, m, make_layout(least, recipe, samples, first_index));
}

double minimum_flops(const RunConfig& config, const ModelConfig& m, const Layout& layout) {
  const double C = static_cast<double>(m.hidden), D = static_cast<double>(m.head_dim);
  double sum = 0, projected = 0;
  for (const Pass& p : layout.passes) {
    sum += pass_flops(config, m, p);
    for (const Feed& f : p.feeds) projected += f.hidden_row >= 0;
  }
  if (config.latent.projection) sum += projected * 2 * 3 * 2 * C * C;
  if (config.kv.projection && config.kv.weight > 0)
    sum += static_cast<double>(layout.samples * layout.latents * m.layers * m.kv_heads) * 2 * 3 * 2 * D * D;
  const double supervised = static_cast<double>(layout.student.targets.size() + layout.teacher.targets.size());
  return sum + supervised * static_cast<double>(m.vocab) * C * (config.train.trainable == Trainable::all ? 6 : 4);
}

int64_t token_count(const Recipe& recipe, std::span<const Sample> samples) {
  int64_t n = 0;
  for (std::size_t i = 0; i < samples.size(); ++i) n += lengths_of(recipe, samples[i], static_cast<int64_t>(i)).tokens;
  return n;
}

}  // namespace kava
