// L_KV: what of the teacher's trace is kept, and the distance of the latents' keys and values to it (docs/method.md section 4).
#include <numeric>

#include "engine/device/indices.h"
#include "models/step.h"

namespace kava {

void Step::plan_kv(IndexBlock& block) {
  check_indices(layout_.query_rows, 0, layout_.passes.front().end);  // the teacher's answer tokens, all of pass 0
  check_distinct(layout_.latent_rows, layout_.rows);
  check_indices(layout_.trace_rows, 0, layout_.rows);
  check_offsets(layout_.trace_offsets, std::ssize(layout_.trace_rows));
  check_offsets(layout_.query_offsets, std::ssize(layout_.query_rows));
  check_indices(valid_, 0, M_ + 1);
  std::vector<int32_t> taken(layout_.query_rows.size());
  std::iota(taken.begin(), taken.end(), 0);
  block.add(kv_.queries, layout_.query_rows);
  block.add(kv_.queries_live, live_of(layout_.query_rows));
  block.add(kv_.taken, taken);
  block.add(kv_.query_offsets, layout_.query_offsets);
  block.add(kv_.trace, layout_.trace_rows);
  block.add(kv_.trace_offsets, layout_.trace_offsets);
  block.add(kv_.trace_positions, positions_of(layout_.trace_rows));
  block.add(kv_.latents, layout_.latent_rows);
  block.add(kv_.latent_positions, positions_of(layout_.latent_rows));
  block.add(kv_.valid, valid_);
  block.add(kv_.samples, layout_.sample_index);
}

void Step::kv_loss(const Tensor& loss) {
  const std::size_t L = layer_count();
  const int64_t n = B_ * M_;
  const Tensor moments = arena_.alloc(sum_, 2 * static_cast<int64_t>(L), 3);  // of all keys, then of all values
  std::vector<Tensor> targets(2 * L);
  std::vector<KvLayer> layers(L);
  RkvDump rkv;
  for (std::size_t l = 0; l < L; ++l) {
    KvLayer& k = layers[l];
    for (Tensor& t : k.target) t = arena_.alloc(type_, n, KD_);
    for (Tensor& t : k.student) t = arena_.alloc(type_, n, KD_);
    select(l, k, rkv);
    ops_.gather_rows(k.student[0], transformer_.layers()[l].k, kv_.latents);
    ops_.gather_rows(k.student[1], transformer_.layers()[l].v, kv_.latents);
    unrotate(k.student[0], kv_.latent_positions);
    for (int i = 0; i < 2; ++i) {
      k.projected[i] = k.student[i];
      if (const TrainedGroup* map = kv_map(l, i)) {
        k.projected[i] = arena_.alloc(type_, n, KD_);
        ops_.linear_group_fwd(arena_, by_head(k.projected[i]), by_head(k.student[i]), map->map);
      }
      targets[static_cast<std::size_t>(i) * L + l] = k.target[i];
    }
  }
  if (config_.kv.std != Std::none) ops_.moments(arena_, moments, targets, kv_.valid);
  const double mean = totals_.kv_slots > 0 ? 1.0 / static_cast<double>(totals_.kv_slots) : 0;
  const double all = static_cast<double>(L) * static_cast<double>(KD_);
  const double factor = 0.5 * (config_.kv.reduction == KvReduction::slot_sum ? mean : mean / all);
  for (int i = 0; i < 2; ++i) {
    const Tensor scale = inverse(config_.kv.std, moments.row_range(i * static_cast<int64_t>(L), (i + 1) * static_cast<int64_t>(L)));
    for (std::size_t l = 0; l < L; ++l) distill_kv(l, i, layers[l], of_layer(scale, l), factor, loss);
  }
  if (options_.dump) dump_kv(layers, rkv);
}

void Step::select(std::size_t l, const KvLayer& out, RkvDump& rkv) {
  ArenaScope scope(arena_);
  const LayerKept& s = transformer_.layers()[l];
  const int64_t tokens = kv_.trace.cols, K = model_.shape.kv_heads;
  Tensor match;
  if (turned_back()) {
    match = arena_.alloc(type_, tokens, KD_);
    ops_.gather_rows(match, s.k, kv_.trace);
    unrotate(match, kv_.trace_positions);
  }
  RkvOptions o;
  o.policy = config_.rkv.policy, o.group = config_.rkv.group, o.lambda = config_.rkv.lambda;
  o.order_by_score = config_.rkv.order == Order::score;
  o.latents = M_, o.heads = model_.shape.heads, o.kv_heads = K;
  o.seed = static_cast<uint64_t>(config_.seed), o.step = options_.step, o.layer = static_cast<uint32_t>(l);
  o.samples = kv_.samples;
  const Tensor kept = arena_.alloc(DType::i32, B_ * M_, K);
  Tensor scores[3];
  if (options_.dump)
    for (Tensor& t : scores) t = arena_.alloc(sum_, K, tokens);
  ops_.rkv_select(arena_, out.target[0], out.target[1], kept, scores[0], scores[1], scores[2], s.queries, kv_.taken, kv_.query_offsets, s.k,
                  s.v, kv_.trace, kv_.trace_offsets, match, o);
  if (!options_.dump) return;
  auto append = [](std::vector<double>& to, const std::vector<double>& x) { to.insert(to.end(), x.begin(), x.end()); };
  append(rkv.importance, host(scores[0]));
  append(rkv.redundancy, host(scores[1]));
  append(rkv.score, host(scores[2]));
  rkv.kept.emplace_back(static_cast<std::size_t>(kept.count()));
  if (kept.count() > 0) ops_.download(rkv.kept.back().data(), kept);
}

// One of K (i = 0) and V of one layer: its part of the loss, and the gradient to the latents' rows.
void Step::distill_kv(std::size_t l, int i, const KvLayer& k, const Tensor& inverse, double factor, const Tensor& loss) {
  ArenaScope scope(arena_);
  const int64_t n = B_ * M_;
  const Tensor d = arena_.alloc(sum_, n, KD_);
  ops_.distill(arena_, loss, d, k.projected[i], k.target[i], kv_.valid, inverse, config_.kv.loss, factor, config_.kv.weight);
  if (!options_.backward) return;
  Tensor dstudent = d;
  if (const TrainedGroup* map = kv_map(l, i)) {
    const Tensor dy = arena_.alloc(type_, n, KD_), dx = arena_.alloc(type_, n, KD_);
    ops_.copy(dy, d);
    ops_.linear_group_bwd_input(arena_, by_head(dx), {}, by_head(dy), map->map, {});
    ops_.linear_group_bwd_params(arena_, map->grad, by_head(dy), {}, by_head(k.student[i]), map->map, {});
    ops_.copy(dstudent, dx);
  }
  if (i == 0 && turned_back()) ops_.rope_fwd(dstudent, kv_.latent_positions, model_.cosine, model_.sine, model_.shape.head_dim, false);
  const LayerKept& s = transformer_.layers()[l];
  ops_.scatter_add_rows(i == 0 ? s.dk : s.dv, dstudent, kv_.latents);
}

// Keys as they are matched: as they lie in the cache, or turned back.
void Step::unrotate(const Tensor& k, const Tensor& positions) {
  if (turned_back()) ops_.rope_fwd(k, positions, model_.cosine, model_.sine, model_.shape.head_dim, true);
}

}  // namespace kava
