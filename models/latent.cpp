#include "models/latent.h"

#include "engine/device/indices.h"

namespace kava {

namespace {
constexpr double kLayerNormEps = 1e-5;
}

void add_feeds(IndexBlock& block, FeedState& s, const Layout& layout, const Pass& pass) {
  std::vector<int32_t> live, rows, at, copies, copied;
  for (std::size_t i = 0; i < pass.feeds.size(); ++i) {
    const Feed& f = pass.feeds[i];
    if (f.copy_row >= 0) {
      copies.push_back(f.copy_row);
      copied.push_back(static_cast<int32_t>(i));
    } else {
      live.push_back(layout.live_of[static_cast<std::size_t>(f.hidden_row)]);
      rows.push_back(f.hidden_row);
      at.push_back(static_cast<int32_t>(i));
    }
  }
  check_distinct(live, layout.live_rows);
  check_distinct(rows, layout.rows);
  check_distinct(copies, layout.rows);
  block.add(s.hidden_live, live);
  block.add(s.hidden_rows, rows);
  block.add(s.projected_at, at);
  block.add(s.copy_rows, copies);
  block.add(s.copied_at, copied);
}

void feed_latents(Model& model, Arena& arena, Transformer& transformer, const DevicePass& pass, FeedState& s) {
  if (pass.fed == 0) return;
  Ops& ops = model.ops;
  const DType t = model.storage, sum = sum_type(t);
  const int64_t n = s.hidden_live.cols, C = model.shape.hidden;
  const Tensor inputs = transformer.inputs(pass).row_range(0, pass.fed), all_inputs = transformer.all_inputs();
  s.h = arena.alloc(t, n, C);
  ops.gather_rows(s.h, transformer.all_hidden(), s.hidden_live);
  Tensor y = s.h;
  if (model.projection) {
    const LatentProjection& p = *model.projection;
    s.a1 = arena.alloc(t, n, C), s.g1 = arena.alloc(t, n, C), s.a2 = arena.alloc(t, n, C);
    s.mean = arena.alloc(sum, n, 1), s.rstd = arena.alloc(sum, n, 1);
    y = arena.alloc(t, n, C);
    ops.linear_group_fwd(arena, s.a1, s.h, p.linear1.map);
    ops.gelu_fwd(s.g1, s.a1, Gelu::erf);
    ops.linear_group_fwd(arena, s.a2, s.g1, p.linear2.map);
    ops.add_layer_norm_fwd(y, {}, s.mean, s.rstd, s.a2, {}, p.norm_w, p.norm_b, kLayerNormEps);
  }
  ops.scatter_rows(inputs, y, s.projected_at);
  ArenaScope scope(arena);
  if (model.config.latent.update == Update::residual) {
    const Tensor before = arena.alloc(t, n, C);
    ops.gather_rows(before, all_inputs, s.hidden_rows);
    ops.scatter_add_rows(inputs, before, s.projected_at);
  }
  if (s.copy_rows.cols > 0) {
    const Tensor copied = arena.alloc(t, s.copy_rows.cols, C);
    ops.gather_rows(copied, all_inputs, s.copy_rows);
    ops.scatter_rows(inputs, copied, s.copied_at);
  }
}

void feed_latents_backward(Model& model, Arena& arena, Transformer& transformer, const DevicePass& pass, const FeedState& s) {
  if (pass.fed == 0) return;
  ArenaScope scope(arena);
  Ops& ops = model.ops;
  const DType t = model.storage, sum = sum_type(t);
  const int64_t n = s.hidden_live.cols, C = model.shape.hidden;
  const Tensor dinput = transformer.dinput(), own = dinput.row_range(pass.begin, pass.begin + pass.fed);
  if (s.copy_rows.cols > 0) {
    const Tensor d = arena.alloc(sum, s.copy_rows.cols, C);
    ops.gather_rows(d, own, s.copied_at);
    ops.scatter_add_rows(dinput, d, s.copy_rows);
  }
  const Tensor dy_sum = arena.alloc(sum, n, C);
  ops.gather_rows(dy_sum, own, s.projected_at);
  if (model.config.latent.update == Update::residual) ops.scatter_add_rows(dinput, dy_sum, s.hidden_rows);
  if (!model.projection) {
    ops.scatter_add_rows(transformer.dhidden(), dy_sum, s.hidden_live);
    return;
  }
  const LatentProjection& p = *model.projection;
  auto tensor = [&] { return arena.alloc(t, n, C); };
  const Tensor dy = tensor(), da2 = tensor(), dg1 = tensor(), da1 = tensor(), dh = tensor();
  ops.copy(dy, dy_sum);
  ops.fill(da2, 0);
  ops.layer_norm_bwd(arena, da2, p.dnorm_w, p.dnorm_b, dy, s.a2, s.mean, s.rstd, p.norm_w);
  ops.linear_group_bwd_input(arena, dg1, {}, da2, p.linear2.map, {});
  ops.linear_group_bwd_params(arena, p.linear2.grad, da2, {}, s.g1, p.linear2.map, {});
  ops.gelu_bwd(da1, dg1, s.a1, Gelu::erf);
  ops.linear_group_bwd_input(arena, dh, {}, da1, p.linear1.map, {});
  ops.linear_group_bwd_params(arena, p.linear1.grad, da1, {}, s.h, p.linear1.map, {});
  ops.scatter_add_rows(transformer.dhidden(), dh, s.hidden_live);
}

}  // namespace kava
