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

Transformer::Transformer(Model& model, Arena& arena, Use use, uint32_t step, bool drops)
    : model_(model),
      ops_(model.ops),
      arena_(arena),
      use_(use),
      step_(step),
      dropout_(drops && use == Use::train ? model.config.lora.dropout : 0),
      layers_(static_cast<std::size_t>(model.shape.layers)) {}

void Transformer::allocate(int64_t rows, int64_t live_rows, int64_t pass_rows) {
  const ModelConfig& m = model_.shape;
  const DType t = model_.storage, sum = sum_type(t);
  const int64_t C = m.hidden, HD = m.heads * m.head_dim, KD = m.kv_heads * m.head_dim, F = m.mlp;
  const bool keep = use_ == Use::train;
  inputs_ = arena_.alloc(t, rows, C);
  const int64_t own = keep ? rows : pass_rows, own_live = keep ? live_rows : pass_rows;
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    const LayerWeights& w = model_.layers[l];
    LayerState& s = layers_[l];
    if (!keep && l > 0) s = layers_[0];
    const int64_t n = last(l) ? own_live : own;
    const bool shared = !keep && l > 0 && !last(l);
    if (keep && !last(l)) {
      s.qkv = arena_.alloc(t, rows, HD + 2 * KD);
      s.q = s.qkv.col_range(0, HD);
    } else {
      s.qkv = arena_.alloc(t, rows, 2 * KD);
      if (!shared) s.q = arena_.alloc(t, n, HD);
    }
    s.k = s.qkv.col_range(s.qkv.cols - 2 * KD, s.qkv.cols - KD), s.v = s.qkv.col_range(s.qkv.cols - KD, s.qkv.cols);
    if (shared) continue;
    auto input_of = [&](const TrainedGroup& group, int64_t r) { return arena_.alloc(t, r, group.map.joined.cols); };
    s.residual1 = keep && l == 0 ? inputs_ : arena_.alloc(t, own, C);
    s.normed1 = input_of(w.qkv, own), s.rstd1 = arena_.alloc(sum, own, 1);
    s.attention = input_of(w.o, n), s.lse = arena_.alloc(sum, n, m.heads);
    s.residual2 = arena_.alloc(t, n, C);
    s.normed2 = input_of(w.gate_up, n), s.rstd2 = arena_.alloc(sum, n, 1);
    s.gate_up = arena_.alloc(t, n, 2 * F), s.act = input_of(w.down, n);
    if (last(l)) s.normed1_live = input_of(w.qkv, n), s.residual1_live = arena_.alloc(t, n, C);
  }
  mlp_ = arena_.alloc(t, pass_rows, C);
  attended_ = arena_.alloc(t, pass_rows, C);
  residual_final_ = arena_.alloc(t, own_live, C), rstd_final_ = arena_.alloc(sum, own_live, 1);
  hidden_ = arena_.alloc(t, live_rows, C);
}

void Transformer::allocate_gradients(int64_t rows, int64_t live_rows) {
  const DType sum = sum_type(model_.storage);
  auto zeroed = [&](int64_t n, int64_t width) {
    Tensor t = arena_.alloc(sum, n, width);
    ops_.fill(t, 0);
    return t;
  };
  const int64_t KD = model_.shape.kv_heads * model_.shape.head_dim;
  for (LayerState& s : layers_) s.dk = zeroed(rows, KD), s.dv = zeroed(rows, KD);
  dhidden_ = zeroed(live_rows, model_.shape.hidden);
  dinput_ = zeroed(rows, model_.shape.hidden);
}

Tensor Transformer::rows_of(const Tensor& t, int64_t begin, int64_t end) const {
  if (!t) return t;
  return use_ == Use::train ? t.row_range(begin, end) : t.row_range(0, end - begin);
}

Tensor Transformer::kept_rows(const Tensor& t, const DevicePass& p, std::size_t l) const {
  return last(l) ? rows_of(t, p.live_begin, p.live_end) : rows_of(t, p.begin, p.end);
}

Dropout Transformer::dropout(int64_t layer, int64_t place, const Tensor& row_keys) const {
  Dropout d;
  d.p = dropout_;
  d.seed = static_cast<uint64_t>(model_.config.seed);
  d.step = step_;
  d.site = static_cast<uint32_t>(layer * kPlaces + place);
  d.row_keys = row_keys;
  return d;
}

// xx holds x, and gets xa.
void Transformer::apply(const Tensor& y, const Tensor& xx, const TrainedGroup& group, const Dropout& d, Reads reads) {
  if (group.map.a) ops_.lora_fwd(arena_, xx, group.map, d, reads);
  ops_.linear_group_fwd(arena_, y, xx, group.map, reads);
}

// Backward of one group: to its input (where dx is wanted) and to its trainable parts.
void Transformer::pull_back(const Tensor& dx, const Tensor& dy, const Tensor& xx, const TrainedGroup& group, const Dropout& d) {
  ArenaScope scope(arena_);
  const Tensor dxa = group.map.a ? arena_.alloc(xx.dtype, xx.rows, group.map.ranks()) : Tensor{};
  if (dx || dxa) ops_.linear_group_bwd_input(arena_, dx, dxa, dy, group.map, d);
  if (group.grad.any()) ops_.linear_group_bwd_params(arena_, group.grad, dy, dxa, xx, group.map, d);
}

// q, k and v. One product where all rows go on; else k and v of all rows, then q of those that do, from the same xa.
void Transformer::project(const DevicePass& p, std::size_t l) {
  const LayerWeights& w = model_.layers[l];
  LayerState& s = layers_[l];
  const Tensor xx = rows_of(s.normed1, p.begin, p.end), y = s.qkv.row_range(p.begin, p.end);
  const Dropout d = dropout(static_cast<int64_t>(l), kNormed1, p.row_keys);
  if (use_ == Use::train && !last(l)) return apply(y, xx, w.qkv, d, p.reads);
  apply(y, xx, w.qkv.part_range(1, 3), d, p.reads);
  Tensor queries = xx;
  if (last(l)) {
    queries = kept_rows(s.normed1_live, p, l);
    ops_.gather_rows(queries, xx, p.live);
  }
  ops_.linear_group_fwd(arena_, kept_rows(s.q, p, l), queries, w.qkv.map.part_range(0, 1), p.reads);
}

void Transformer::attention_block(const DevicePass& p, std::size_t l) {
  const LayerWeights& w = model_.layers[l];
  LayerState& s = layers_[l];
  const ModelConfig& m = model_.shape;
  const Tensor k = s.k.row_range(p.begin, p.end), q = kept_rows(s.q, p, l), lse = kept_rows(s.lse, p, l);
  const Tensor attention = kept_rows(s.attention, p, l), o = x_of(attention, w.o);
  const Segments& segments = last(l) ? p.live_segments : p.segments;
  project(p, l);
  // Where q and k lie side by side, their heads turn in one pass.
  const bool packed = use_ == Use::train && !last(l);
  const Tensor qkv = s.qkv.row_range(p.begin, p.end);
  if (!packed) ops_.rope_fwd(q, last(l) ? p.live_positions : p.positions, model_.cosine, model_.sine, m.head_dim, false);
  ops_.rope_fwd(packed ? qkv.col_range(0, q.cols + k.cols) : k, p.positions, model_.cosine, model_.sine, m.head_dim, false);
  const double scale = 1 / std::sqrt(static_cast<double>(m.head_dim));
  ops_.attention_fwd(arena_, o, lse, q, s.k, s.v, segments, m.heads, m.kv_heads, scale);
  apply(attended_.row_range(0, q.rows), attention, w.o,
        dropout(static_cast<int64_t>(l), kAttention, last(l) ? p.live_row_keys : p.row_keys), p.reads);
}

void Transformer::mlp_block(const DevicePass& p, std::size_t l) {
  const LayerWeights& w = model_.layers[l];
  LayerState& s = layers_[l];
  const int64_t layer = static_cast<int64_t>(l), F = model_.shape.mlp;
  const Tensor& row_keys = last(l) ? p.live_row_keys : p.row_keys;
  const Tensor gate_up = kept_rows(s.gate_up, p, l), act = kept_rows(s.act, p, l);
  apply(gate_up, kept_rows(s.normed2, p, l), w.gate_up, dropout(layer, kNormed2, row_keys), p.reads);
  ops_.swiglu_fwd(x_of(act, w.down), gate_up.col_range(0, F), gate_up.col_range(F, 2 * F));
  apply(mlp_.row_range(0, act.rows), act, w.down, dropout(layer, kAct, row_keys), p.reads);
}

void Transformer::forward(const DevicePass& p) {
  const double eps = model_.shape.norm_eps;
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    LayerState& s = layers_[l];
    const LayerWeights& w = model_.layers[l];
    const Tensor residual1 = l == 0 ? inputs(p) : rows_of(s.residual1, p.begin, p.end),
                 normed1 = x_of(rows_of(s.normed1, p.begin, p.end), w.qkv);
    const Tensor rstd1 = rows_of(s.rstd1, p.begin, p.end);
    if (l == 0) {
      ops_.add_rms_norm_fwd(normed1, {}, rstd1, residual1, {}, w.norm1, eps);
    } else {
      const Tensor before = rows_of(layers_[l - 1].residual2, p.begin, p.end);
      ops_.add_rms_norm_fwd(normed1, residual1, rstd1, before, mlp_.row_range(0, p.rows()), w.norm1, eps);
    }
    attention_block(p, l);
    Tensor residual = residual1;
    if (last(l)) {
      residual = kept_rows(s.residual1_live, p, l);
      ops_.gather_rows(residual, residual1, p.live);
    }
    ops_.add_rms_norm_fwd(x_of(kept_rows(s.normed2, p, l), w.gate_up), kept_rows(s.residual2, p, l), kept_rows(s.rstd2, p, l), residual,
                          attended_.row_range(0, residual.rows), w.norm2, eps);
    mlp_block(p, l);
  }
  const Tensor before = kept_rows(layers_.back().residual2, p, layers_.size() - 1);
  ops_.add_rms_norm_fwd(hidden(p), rows_of(residual_final_, p.live_begin, p.live_end), rows_of(rstd_final_, p.live_begin, p.live_end),
                        before, mlp_.row_range(0, before.rows), model_.final_norm, eps);
}

// Whether anything trainable lies at the inputs of the first layer.
bool Transformer::wants_inputs() const {
  // Gradients pass through the latents' inputs even where the new tokens are frozen.
  return model_.dembedding || model_.new_tokens || model_.layers[0].dnorm1;
}

void Transformer::mlp_block_backward(const DevicePass& p, std::size_t l, const Tensor& dresidual) {
  ArenaScope scope(arena_);
  const LayerWeights& w = model_.layers[l];
  LayerState& s = layers_[l];
  const int64_t layer = static_cast<int64_t>(l), n = dresidual.rows;
  const Tensor& row_keys = last(l) ? p.live_row_keys : p.row_keys;
  const DType t = model_.storage;
  const int64_t F = model_.shape.mlp;
  const Tensor gate_up = kept_rows(s.gate_up, p, l);
  const Tensor dact = arena_.alloc(t, n, F), dgate_up = arena_.alloc(t, n, 2 * F);
  pull_back(dact, dresidual, kept_rows(s.act, p, l), w.down, dropout(layer, kAct, row_keys));
  ops_.swiglu_bwd(dgate_up.col_range(0, F), dgate_up.col_range(F, 2 * F), dact, gate_up.col_range(0, F), gate_up.col_range(F, 2 * F));
  const Tensor dnormed = arena_.alloc(t, n, model_.shape.hidden);
  pull_back(dnormed, dgate_up, kept_rows(s.normed2, p, l), w.gate_up, dropout(layer, kNormed2, row_keys));
  ops_.rms_norm_bwd(arena_, dresidual, w.dnorm2, dnormed, kept_rows(s.residual2, p, l), kept_rows(s.rstd2, p, l), w.norm2);
}

// dresidual: of the residual after attention. Returns that of the layer's input, all rows of the pass.
Tensor Transformer::attention_block_backward(const DevicePass& p, std::size_t l, const Tensor& dresidual) {
  const LayerWeights& w = model_.layers[l];
  LayerState& s = layers_[l];
  const ModelConfig& m = model_.shape;
  const DType t = model_.storage;
  const int64_t layer = static_cast<int64_t>(l), C = m.hidden;
  const Tensor& row_keys = last(l) ? p.live_row_keys : p.row_keys;
  const Tensor q = kept_rows(s.q, p, l), attention = kept_rows(s.attention, p, l);
  const int64_t HD = q.cols, KD = s.k.cols;
  // In the last layer the gradient spreads from the live rows to all rows.
  const Tensor dinput = last(l) ? arena_.alloc(t, p.rows(), C) : dresidual;
  ArenaScope scope(arena_);
  const Tensor dout = arena_.alloc(t, q.rows, HD), dqkv = arena_.alloc(t, p.rows(), last(l) ? 2 * KD : HD + 2 * KD),
               dq = last(l) ? arena_.alloc(t, q.rows, HD) : dqkv.col_range(0, HD);
  pull_back(dout, dresidual, attention, w.o, dropout(layer, kAttention, row_keys));
  const double scale = 1 / std::sqrt(static_cast<double>(m.head_dim));
  ops_.attention_bwd(arena_, dq, s.dk, s.dv, dout, x_of(attention, w.o), kept_rows(s.lse, p, l), q, s.k, s.v,
                     last(l) ? p.live_segments : p.segments, m.heads, m.kv_heads, scale);
  // The gradients of this pass's keys and values are complete: later passes have added theirs.
  if (last(l)) ops_.rope_bwd(dq, dq, {}, {}, p.live_positions, model_.cosine, model_.sine, m.head_dim);
  ops_.rope_bwd(dqkv, last(l) ? Tensor{} : dq, s.dk.row_range(p.begin, p.end), s.dv.row_range(p.begin, p.end), p.positions, model_.cosine,
                model_.sine, m.head_dim);
  const bool wanted = l > 0 || wants_inputs();
  const Tensor dnormed = wanted ? arena_.alloc(t, p.rows(), C) : Tensor{};
  const Tensor xx = rows_of(s.normed1, p.begin, p.end);
  const Dropout d = dropout(layer, kNormed1, p.row_keys);
  if (last(l)) {
    const Tensor dnormed_live = wanted ? arena_.alloc(t, q.rows, C) : Tensor{};
    pull_back(dnormed, dqkv, xx, w.qkv.part_range(1, 3), d);
    pull_back(dnormed_live, dq, kept_rows(s.normed1_live, p, l), w.qkv.part_range(0, 1), dropout(layer, kNormed1, row_keys));
    if (wanted) ops_.scatter_add_rows(dnormed, dnormed_live, p.live);
    ops_.fill(dinput, 0);
    ops_.scatter_add_rows(dinput, dresidual, p.live);
  } else {
    pull_back(dnormed, dqkv, xx, w.qkv, d);
  }
  if (wanted)
    ops_.rms_norm_bwd(arena_, dinput, w.dnorm1, dnormed, rows_of(s.residual1, p.begin, p.end), rows_of(s.rstd1, p.begin, p.end), w.norm1);
  return dinput;
}

void Transformer::backward(const DevicePass& p, std::span<const Tap> taps) {
  ArenaScope scope(arena_);
  Tensor dresidual = arena_.alloc(model_.storage, p.live_rows(), model_.shape.hidden);
  ops_.fill(dresidual, 0);
  ops_.rms_norm_bwd(arena_, dresidual, model_.dfinal_norm, dhidden_.row_range(p.live_begin, p.live_end),
                    rows_of(residual_final_, p.live_begin, p.live_end), rows_of(rstd_final_, p.live_begin, p.live_end), model_.final_norm);
  for (std::size_t l = layers_.size(); l-- > 0;) {
    if (!last(l) && l < taps.size() && taps[l].rows) ops_.scatter_add_rows(dresidual, taps[l].gradient, taps[l].rows);
    mlp_block_backward(p, l, dresidual);
    dresidual = attention_block_backward(p, l, dresidual);
  }
  if (wants_inputs()) ops_.add(dinput_.row_range(p.begin, p.end), dresidual);
}

}  // namespace kava
