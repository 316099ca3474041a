#include "models/transformer.h"

#include <algorithm>
#include <cmath>

#include "engine/device/indices.h"

namespace kava {

Tensor upload_indices(Ops& ops, Arena& arena, std::span<const int32_t> host) {
  Tensor t = arena.alloc(DType::i32, 1, static_cast<int64_t>(host.size()));
  if (!host.empty()) ops.upload(t, host.data());
  return t;
}

namespace {

// keys: rows that there are; queries: rows of the pass, or its live rows.
Segments upload_segments(Ops& ops, Arena& arena, const SegmentList& s, int64_t keys, int64_t queries) {
  Segments d;
  check_indices(s.keys, 0, keys);
  check_offsets(s.key_offsets, static_cast<int64_t>(s.keys.size()));
  check_offsets(s.group_offsets, s.count());
  for (std::size_t i = 0; i < s.query_begin.size(); ++i) {
    const int64_t begin = s.query_begin[i], count = s.query_count[i], seen = s.key_offsets[i + 1] - s.key_offsets[i];
    KAVA_CHECK(begin >= 0 && count > 0 && begin + count <= queries && count <= seen, "{} queries from {} on {} keys", count, begin, seen);
    d.most_scores = std::max(d.most_scores, count * seen);
  }
  d.key_offsets = upload_indices(ops, arena, s.key_offsets);
  d.keys = upload_indices(ops, arena, s.keys);
  d.query_begin = upload_indices(ops, arena, s.query_begin);
  d.query_count = upload_indices(ops, arena, s.query_count);
  d.group_offsets = upload_indices(ops, arena, s.group_offsets);
  d.count = s.count(), d.groups = static_cast<int64_t>(s.group_offsets.size()) - 1, d.most_keys = s.most_keys,
  d.most_queries = s.most_queries;
  return d;
}

// The activation in front of LoRA's columns.
Tensor x_of(const Tensor& xx, const TrainedGroup& group) { return xx.col_range(0, group.map.in); }

// Places of a layer whose input LoRA drops from.
enum Place : int64_t { kNormed1, kAttention, kNormed2, kAct, kPlaces };

}  // namespace

DevicePass upload_pass(Ops& ops, Arena& arena, const Pass& p) {
  DevicePass d;
  d.begin = p.begin, d.end = p.end, d.live_begin = p.live_begin, d.live_end = p.live_end, d.fed = p.fed();
  d.ids = upload_indices(ops, arena, p.ids);
  d.positions = upload_indices(ops, arena, p.positions);
  d.row_keys = upload_indices(ops, arena, p.row_keys).reshape(p.rows(), 2);
  check_distinct(p.live, p.rows());
  d.live = upload_indices(ops, arena, p.live);
  std::vector<int32_t> positions, keys;
  for (int32_t r : p.live) {
    const auto at = static_cast<std::size_t>(r);
    positions.push_back(p.positions[at]);
    keys.push_back(p.row_keys[2 * at]);
    keys.push_back(p.row_keys[2 * at + 1]);
  }
  d.live_positions = upload_indices(ops, arena, positions);
  d.live_row_keys = upload_indices(ops, arena, keys).reshape(p.live_rows(), 2);
  d.segments = upload_segments(ops, arena, p.segments, p.end, p.rows());
  d.live_segments = upload_segments(ops, arena, p.live_segments, p.end, p.live_rows());
  return d;
}

Keep keep_of(Recompute recompute) {
  switch (recompute) {
    case Recompute::none:
      return Keep::all;
    case Recompute::cheap:
      return Keep::cheap;
    case Recompute::block:
      return Keep::block;
  }
  KAVA_CHECK(false, "no such train.recompute");
}

Transformer::Transformer(Model& model, Arena& arena, Keep keep, uint32_t step, bool drops)
    : model_(model),
      ops_(model.ops),
      arena_(arena),
      keep_(keep),
      step_(step),
      dropout_(drops ? model.config.lora.dropout : 0),
      kept_(static_cast<std::size_t>(model.shape.layers)),
      work_(kept_.size()) {}

void Transformer::allocate(int64_t rows, int64_t live_rows, int64_t pass_rows) {
  const ModelConfig& m = model_.shape;
  const DType t = model_.storage;
  inputs_ = arena_.alloc(t, rows, m.hidden);
  for (std::size_t l = 0; l < kept_.size(); ++l) allocate_layer(l, rows, live_rows, pass_rows);
  mlp_ = arena_.alloc(t, pass_rows, m.hidden), attended_ = arena_.alloc(t, pass_rows, m.hidden);
  const bool whole = keep_ != Keep::nothing;
  const int64_t n = whole ? live_rows : pass_rows;
  residual_final_ = {arena_.alloc(t, n, m.hidden), whole}, rstd_final_ = {arena_.alloc(sum_type(t), n, 1), whole};
  hidden_ = arena_.alloc(t, live_rows, m.hidden);
}

void Transformer::allocate_layer(std::size_t l, int64_t rows, int64_t live_rows, int64_t pass_rows) {
  const ModelConfig& m = model_.shape;
  const LayerWeights& w = model_.layers[l];
  const DType t = model_.storage, sum = sum_type(t);
  const int64_t C = m.hidden, HD = m.heads * m.head_dim, KD = m.kv_heads * m.head_dim;
  LayerKept& k = kept_[l];
  LayerWork& s = work_[l];
  const bool own = whole();
  // One pass's buffers serve every layer; the last one needs some of its own, as its rows are others.
  if (l > 0 && !own) s = work_[0];
  else if (l > 0) s.normed1 = work_[0].normed1, s.normed2 = work_[0].normed2, s.act = work_[0].act;
  auto made = [&](Activation& a, bool whole, DType type, int64_t all_rows, int64_t width) {
    if (whole || !a.all) a = {arena_.alloc(type, whole ? all_rows : pass_rows, width), whole};
  };
  // The input of a map is read again for the gradients of its parts alone.
  auto made_input = [&](Activation& a, const TrainedGroup& group, int64_t all_rows) {
    made(a, keep_ == Keep::all && group.grad.any(), t, all_rows, group.map.joined.cols);
  };
  const int64_t n = last(l) ? live_rows : rows;
  if (l == 0) k.residual = {inputs_, true};
  else if (keep_ == Keep::nothing && l > 1) k.residual = kept_[l - 1].residual;
  else made(k.residual, keep_ != Keep::nothing, t, rows, C);
  made_input(s.normed1, w.qkv, rows), made(s.rstd1, own, sum, rows, 1);
  Tensor kv;
  if (last(l)) {
    made(s.q, own, t, n, HD);
    kv = arena_.alloc(t, rows, 2 * KD);
    s.qkv = {kv, true};
    made_input(s.normed1_live, w.qkv, n), made(s.residual_live, own, t, n, C);
  } else {
    made(s.qkv, own, t, rows, HD + 2 * KD);
    s.q = {s.qkv.all.col_range(0, HD), own};
    kv = own ? s.qkv.all.col_range(HD, HD + 2 * KD) : arena_.alloc(t, rows, 2 * KD);
  }
  k.k = kv.col_range(0, KD), k.v = kv.col_range(KD, 2 * KD);
  made(s.attention, own, t, n, w.o.map.joined.cols), made(s.lse, own, sum, n, m.heads);
  made(s.residual2, own, t, n, C), made(s.rstd2, own, sum, n, 1);
  made_input(s.normed2, w.gate_up, n);
  made(s.gate_up, own, t, n, 2 * m.mlp), made_input(s.act, w.down, n);
}

void Transformer::allocate_gradients(int64_t rows, int64_t live_rows) {
  const DType sum = sum_type(model_.storage);
  auto zeroed = [&](int64_t n, int64_t width) {
    Tensor t = arena_.alloc(sum, n, width);
    ops_.fill(t, 0);
    return t;
  };
  const int64_t KD = model_.shape.kv_heads * model_.shape.head_dim;
  for (LayerKept& k : kept_) k.dk = zeroed(rows, KD), k.dv = zeroed(rows, KD);
  dhidden_ = zeroed(live_rows, model_.shape.hidden);
  dinput_ = zeroed(rows, model_.shape.hidden);
}

Dropout Transformer::dropout(std::size_t l, int64_t place, const Tensor& row_keys) const {
  Dropout d;
  d.p = dropout_;
  d.seed = static_cast<uint64_t>(model_.config.seed);
  d.step = step_;
  d.site = static_cast<uint32_t>(static_cast<int64_t>(l) * kPlaces + place);
  d.row_keys = row_keys;
  return d;
}

// xx holds x, and gets xa.
void Transformer::add_lora(const Tensor& xx, const TrainedGroup& group, const Dropout& d, Reads reads) {
  if (group.map.a) ops_.lora_fwd(arena_, xx, group.map, d, reads);
}

void Transformer::apply(const Tensor& y, const Tensor& xx, const TrainedGroup& group, const Dropout& d, Reads reads) {
  add_lora(xx, group, d, reads);
  ops_.linear_group_fwd(arena_, y, xx, group.map, reads);
}

// Backward of one group: to its input (where dx is wanted) and to its trainable parts.
void Transformer::pull_back(const Tensor& dx, const Tensor& dy, const Tensor& xx, const TrainedGroup& group, const Dropout& d) {
  ArenaScope scope(arena_);
  const Tensor dxa = group.map.a ? arena_.alloc(xx.dtype, xx.rows, group.map.ranks()) : Tensor{};
  if (dx || dxa) ops_.linear_group_bwd_input(arena_, dx, dxa, dy, group.map, d);
  if (group.grad.any()) ops_.linear_group_bwd_params(arena_, group.grad, dy, dxa, xx, group.map, d);
}

// The residual that goes into layer l, and its norm.
void Transformer::enter(const DevicePass& p, std::size_t l) {
  if (l == 0) return norm_input(p, l);
  const LayerWork& s = work_[l];
  const LayerWeights& w = model_.layers[l];
  ops_.add_rms_norm_fwd(x_of(in(s.normed1, p), w.qkv), in(kept_[l].residual, p), in(s.rstd1, p), in(work_[l - 1].residual2, p),
                        mlp_.row_range(0, p.rows()), w.norm1, model_.shape.norm_eps);
}

void Transformer::norm_input(const DevicePass& p, std::size_t l) {
  const LayerWork& s = work_[l];
  const LayerWeights& w = model_.layers[l];
  ops_.add_rms_norm_fwd(x_of(in(s.normed1, p), w.qkv), {}, in(s.rstd1, p), in(kept_[l].residual, p), {}, w.norm1, model_.shape.norm_eps);
}

// q, k and v, turned. One product where all rows go on; else k and v of all rows, then q of those that do, from the same xa.
void Transformer::project(const DevicePass& p, std::size_t l, bool again) {
  const LayerWeights& w = model_.layers[l];
  const LayerWork& s = work_[l];
  const Tensor xx = in(s.normed1, p), qkv = in(s.qkv, p), q = after(s.q, p, l), k = kept_[l].k.row_range(p.begin, p.end);
  auto rope = [&](const Tensor& x, const Tensor& positions) {
    ops_.rope_fwd(x, positions, model_.cosine, model_.sine, model_.shape.head_dim, false);
  };
  add_lora(xx, w.qkv, dropout(l, kNormed1, p.row_keys), p.reads);
  if (!last(l)) {
    ops_.linear_group_fwd(arena_, qkv, xx, w.qkv.map, p.reads);
    rope(qkv.col_range(0, q.cols + k.cols), p.positions);
    if (whole() || again) return;
    ops_.copy(k, qkv.col_range(q.cols, q.cols + k.cols));
    ops_.copy(kept_[l].v.row_range(p.begin, p.end), qkv.col_range(q.cols + k.cols, qkv.cols));
    return;
  }
  if (!again) {
    ops_.linear_group_fwd(arena_, qkv, xx, w.qkv.map.part_range(1, 3), p.reads);
    rope(k, p.positions);
  }
  const Tensor queries = after(s.normed1_live, p, l);
  ops_.gather_rows(queries, xx, p.live);
  ops_.linear_group_fwd(arena_, q, queries, w.qkv.map.part_range(0, 1), p.reads);
  rope(q, p.live_positions);
}

void Transformer::attention_block(const DevicePass& p, std::size_t l, bool again) {
  const LayerWeights& w = model_.layers[l];
  const LayerWork& s = work_[l];
  const ModelConfig& m = model_.shape;
  const Tensor q = after(s.q, p, l), attention = after(s.attention, p, l);
  const double scale = 1 / std::sqrt(static_cast<double>(m.head_dim));
  project(p, l, again);
  ops_.attention_fwd(arena_, x_of(attention, w.o), after(s.lse, p, l), q, kept_[l].k, kept_[l].v, last(l) ? p.live_segments : p.segments,
                     m.heads, m.kv_heads, scale);
  apply(attended_.row_range(0, q.rows), attention, w.o, dropout(l, kAttention, row_keys(p, l)), p.reads);
  Tensor residual = in(kept_[l].residual, p);
  if (last(l)) {
    const Tensor live = after(s.residual_live, p, l);
    ops_.gather_rows(live, residual, p.live);
    residual = live;
  }
  ops_.add_rms_norm_fwd(x_of(after(s.normed2, p, l), w.gate_up), after(s.residual2, p, l), after(s.rstd2, p, l), residual,
                        attended_.row_range(0, residual.rows), w.norm2, m.norm_eps);
}

void Transformer::mlp_block(const DevicePass& p, std::size_t l, bool again) {
  const LayerWeights& w = model_.layers[l];
  const Tensor act = after(work_[l].act, p, l);
  apply(after(work_[l].gate_up, p, l), after(work_[l].normed2, p, l), w.gate_up, dropout(l, kNormed2, row_keys(p, l)), p.reads);
  if (!again || w.down.grad.any()) activate(p, l);
  if (!again) ops_.linear_group_fwd(arena_, mlp_.row_range(0, act.rows), act, w.down.map, p.reads);
}

// The input of down.
void Transformer::activate(const DevicePass& p, std::size_t l) {
  const int64_t F = model_.shape.mlp;
  const TrainedGroup& down = model_.layers[l].down;
  const Tensor gate_up = after(work_[l].gate_up, p, l), act = after(work_[l].act, p, l);
  ops_.swiglu_fwd(x_of(act, down), gate_up.col_range(0, F), gate_up.col_range(F, 2 * F));
  add_lora(act, down, dropout(l, kAct, row_keys(p, l)), p.reads);
}

// What the objective reads of layer l, before another layer or pass takes its place.
void Transformer::take(const DevicePass& p, std::size_t l, const PassReads& reads) {
  if (l > 0)
    for (const PassReads::States& r : reads.states) ops_.gather_rows(r.to[l - 1], in(kept_[l].residual, p), r.rows);
  if (!reads.queries) return;
  const Tensor rows = last(l) ? reads.queries_live : reads.queries, q = after(work_[l].q, p, l);
  ops_.gather_rows(kept_[l].queries, q, rows);
}

void Transformer::forward(const DevicePass& p, const PassReads& reads) {
  if (reads.queries)
    for (LayerKept& k : kept_) k.queries = arena_.alloc(model_.storage, reads.queries.cols, model_.shape.heads * model_.shape.head_dim);
  for (std::size_t l = 0; l < kept_.size(); ++l) {
    enter(p, l);
    attention_block(p, l, false);
    mlp_block(p, l, false);
    take(p, l, reads);
  }
  const Tensor before = after(work_.back().residual2, p, work_.size() - 1);
  ops_.add_rms_norm_fwd(hidden(p), residual_final_.rows(p.live_begin, p.live_end), rstd_final_.rows(p.live_begin, p.live_end), before,
                        mlp_.row_range(0, before.rows), model_.final_norm, model_.shape.norm_eps);
}

// Whether anything trainable lies at the inputs of the first layer.
bool Transformer::wants_inputs() const {
  // Gradients pass through the latents' inputs even where the new tokens are frozen.
  return model_.dembedding || model_.new_tokens || model_.layers[0].dnorm1;
}

// What the forward of layer l left in buffers that others have used since, made again by the same calls.
void Transformer::recompute(const DevicePass& p, std::size_t l) {
  const LayerWork& s = work_[l];
  const LayerWeights& w = model_.layers[l];
  if (keep_ == Keep::block) {
    norm_input(p, l);
    attention_block(p, l, true);
    mlp_block(p, l, true);
    return;
  }
  if (w.qkv.grad.any()) {
    norm_input(p, l);
    add_lora(in(s.normed1, p), w.qkv, dropout(l, kNormed1, p.row_keys), p.reads);
    if (last(l)) ops_.gather_rows(after(s.normed1_live, p, l), in(s.normed1, p), p.live);
  }
  if (w.gate_up.grad.any()) {
    const Tensor normed2 = after(s.normed2, p, l);
    ops_.add_rms_norm_fwd(x_of(normed2, w.gate_up), {}, after(s.rstd2, p, l), after(s.residual2, p, l), {}, w.norm2, model_.shape.norm_eps);
    add_lora(normed2, w.gate_up, dropout(l, kNormed2, row_keys(p, l)), p.reads);
  }
  if (w.down.grad.any()) activate(p, l);
}

void Transformer::mlp_block_backward(const DevicePass& p, std::size_t l, const Tensor& dresidual) {
  ArenaScope scope(arena_);
  const LayerWeights& w = model_.layers[l];
  const LayerWork& s = work_[l];
  const int64_t n = dresidual.rows, F = model_.shape.mlp;
  const DType t = model_.storage;
  const Tensor gate_up = after(s.gate_up, p, l);
  const Tensor dact = arena_.alloc(t, n, F), dgate_up = arena_.alloc(t, n, 2 * F);
  pull_back(dact, dresidual, after(s.act, p, l), w.down, dropout(l, kAct, row_keys(p, l)));
  ops_.swiglu_bwd(dgate_up.col_range(0, F), dgate_up.col_range(F, 2 * F), dact, gate_up.col_range(0, F), gate_up.col_range(F, 2 * F));
  const Tensor dnormed = arena_.alloc(t, n, model_.shape.hidden);
  pull_back(dnormed, dgate_up, after(s.normed2, p, l), w.gate_up, dropout(l, kNormed2, row_keys(p, l)));
  ops_.rms_norm_bwd(arena_, dresidual, w.dnorm2, dnormed, after(s.residual2, p, l), after(s.rstd2, p, l), w.norm2);
}

// dresidual: of the residual after attention. Returns that of the layer's input, all rows of the pass.
Tensor Transformer::attention_block_backward(const DevicePass& p, std::size_t l, const Tensor& dresidual) {
  const LayerWeights& w = model_.layers[l];
  const LayerWork& s = work_[l];
  const LayerKept& kept = kept_[l];
  const ModelConfig& m = model_.shape;
  const DType t = model_.storage;
  const int64_t C = m.hidden;
  const Tensor q = after(s.q, p, l), attention = after(s.attention, p, l);
  const int64_t HD = q.cols, KD = kept.k.cols;
  // In the last layer the gradient spreads from the live rows to all rows.
  const Tensor dinput = last(l) ? arena_.alloc(t, p.rows(), C) : dresidual;
  ArenaScope scope(arena_);
  const Tensor dout = arena_.alloc(t, q.rows, HD), dqkv = arena_.alloc(t, p.rows(), last(l) ? 2 * KD : HD + 2 * KD),
               dq = last(l) ? arena_.alloc(t, q.rows, HD) : dqkv.col_range(0, HD);
  pull_back(dout, dresidual, attention, w.o, dropout(l, kAttention, row_keys(p, l)));
  const double scale = 1 / std::sqrt(static_cast<double>(m.head_dim));
  ops_.attention_bwd(arena_, dq, kept.dk, kept.dv, dout, x_of(attention, w.o), after(s.lse, p, l), q, kept.k, kept.v,
                     last(l) ? p.live_segments : p.segments, m.heads, m.kv_heads, scale);
  // The gradients of this pass's keys and values are complete: later passes have added theirs.
  if (last(l)) ops_.rope_bwd(dq, dq, {}, {}, p.live_positions, model_.cosine, model_.sine, m.head_dim);
  ops_.rope_bwd(dqkv, last(l) ? Tensor{} : dq, kept.dk.row_range(p.begin, p.end), kept.dv.row_range(p.begin, p.end), p.positions,
                model_.cosine, model_.sine, m.head_dim);
  const bool wanted = l > 0 || wants_inputs();
  const Tensor dnormed = wanted ? arena_.alloc(t, p.rows(), C) : Tensor{};
  const Tensor xx = in(s.normed1, p);
  const Dropout d = dropout(l, kNormed1, p.row_keys);
  if (last(l)) {
    const Tensor dnormed_live = wanted ? arena_.alloc(t, q.rows, C) : Tensor{};
    pull_back(dnormed, dqkv, xx, w.qkv.part_range(1, 3), d);
    pull_back(dnormed_live, dq, after(s.normed1_live, p, l), w.qkv.part_range(0, 1), dropout(l, kNormed1, p.live_row_keys));
    if (wanted) ops_.scatter_add_rows(dnormed, dnormed_live, p.live);
    ops_.fill(dinput, 0);
    ops_.scatter_add_rows(dinput, dresidual, p.live);
  } else {
    pull_back(dnormed, dqkv, xx, w.qkv, d);
  }
  if (wanted) ops_.rms_norm_bwd(arena_, dinput, w.dnorm1, dnormed, in(kept.residual, p), in(s.rstd1, p), w.norm1);
  return dinput;
}

void Transformer::backward(const DevicePass& p, std::span<const Tap> taps) {
  KAVA_CHECK(keep_ != Keep::nothing, "backward of a forward that kept nothing");
  ArenaScope scope(arena_);
  Tensor dresidual = arena_.alloc(model_.storage, p.live_rows(), model_.shape.hidden);
  ops_.fill(dresidual, 0);
  ops_.rms_norm_bwd(arena_, dresidual, model_.dfinal_norm, dhidden_.row_range(p.live_begin, p.live_end),
                    residual_final_.rows(p.live_begin, p.live_end), rstd_final_.rows(p.live_begin, p.live_end), model_.final_norm);
  for (std::size_t l = kept_.size(); l-- > 0;) {
    if (!last(l) && l < taps.size() && taps[l].rows) ops_.scatter_add_rows(dresidual, taps[l].gradient, taps[l].rows);
    if (keep_ != Keep::all) recompute(p, l);
    mlp_block_backward(p, l, dresidual);
    dresidual = attention_block_backward(p, l, dresidual);
  }
  if (wants_inputs()) ops_.add(dinput_.row_range(p.begin, p.end), dresidual);
}

}  // namespace kava
