#include "models/transformer.h"

#include <array>
#include <cmath>

namespace kava {

Tensor upload_indices(Ops& ops, Arena& arena, std::span<const int32_t> host) {
  Tensor t = arena.alloc(DType::i32, 1, static_cast<int64_t>(host.size()));
  if (!host.empty()) ops.upload(t, host.data());
  return t;
}

namespace {

Segments upload_segments(Ops& ops, Arena& arena, const SegmentList& s) {
  Segments d;
  d.key_offsets = upload_indices(ops, arena, s.key_offsets);
  d.keys = upload_indices(ops, arena, s.keys);
  d.query_begin = upload_indices(ops, arena, s.query_begin);
  d.query_count = upload_indices(ops, arena, s.query_count);
  d.group_offsets = upload_indices(ops, arena, s.group_offsets);
  d.count = s.count(), d.groups = static_cast<int64_t>(s.group_offsets.size()) - 1, d.most_keys = s.most_keys,
  d.most_queries = s.most_queries;
  return d;
}

bool any(const LinearGrad& g) { return g.dw || g.dbias || g.dlora_a || g.dlora_b; }

bool has_lora(const TrainedLinear& l) { return static_cast<bool>(l.map.lora_a); }

int64_t rank(std::initializer_list<const TrainedLinear*> maps) {
  int64_t r = 0;
  for (const TrainedLinear* l : maps)
    if (has_lora(*l)) r += l->map.lora_a.rows;
  return r;
}

// Places of a layer whose input LoRA drops from.
enum Place : int64_t { kNormed1, kAttention, kNormed2, kAct, kPlaces };

}  // namespace

DevicePass upload_pass(Ops& ops, Arena& arena, const Pass& p) {
  DevicePass d;
  d.begin = p.begin, d.end = p.end, d.live_begin = p.live_begin, d.live_end = p.live_end, d.fed = p.fed();
  d.ids = upload_indices(ops, arena, p.ids);
  d.positions = upload_indices(ops, arena, p.positions);
  d.row_keys = upload_indices(ops, arena, p.row_keys).reshape(p.rows(), 2);
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
  d.segments = upload_segments(ops, arena, p.segments);
  d.live_segments = upload_segments(ops, arena, p.live_segments);
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
    s.k = arena_.alloc(t, rows, KD), s.v = arena_.alloc(t, rows, KD);
    const bool shared = !keep && l > 0 && !last(l);
    if (shared) continue;
    const int64_t n = last(l) ? own_live : own;
    s.residual1 = keep && l == 0 ? inputs_ : arena_.alloc(t, own, C);
    s.normed1 = arena_.alloc(t, own, C), s.rstd1 = arena_.alloc(sum, own, 1);
    s.q = arena_.alloc(t, n, HD);
    s.attention = arena_.alloc(t, n, HD), s.lse = arena_.alloc(sum, n, m.heads);
    s.residual2 = arena_.alloc(t, n, C);
    s.normed2 = arena_.alloc(t, n, C), s.rstd2 = arena_.alloc(sum, n, 1);
    s.gate = arena_.alloc(t, n, F), s.up = arena_.alloc(t, n, F), s.act = arena_.alloc(t, n, F);
    auto xa = [&](int64_t width, int64_t r) { return width > 0 ? arena_.alloc(t, r, width) : Tensor{}; };
    if (last(l)) {
      s.normed1_live = arena_.alloc(t, n, C), s.residual1_live = arena_.alloc(t, n, C);
      s.xa_qkv = xa(rank({&w.k, &w.v}), own);
      s.xa_q = xa(rank({&w.q}), n);
    } else {
      s.xa_qkv = xa(rank({&w.q, &w.k, &w.v}), own);
    }
    s.xa_o = xa(rank({&w.o}), n);
    s.xa_gate_up = xa(rank({&w.gate, &w.up}), n);
    s.xa_down = xa(rank({&w.down}), n);
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

void Transformer::apply(std::span<const Tensor> y, const Tensor& xa, const Tensor& x, std::initializer_list<const TrainedLinear*> maps,
                        const Dropout& d) {
  std::vector<Linear> linears;
  for (const TrainedLinear* m : maps) linears.push_back(m->map);
  ops_.linear_group_fwd(arena_, y, xa, x, linears, d);
}

// Backward of one group: to its input (where dx is wanted) and to its trainable parts.
void Transformer::pull_back(const Tensor& dx, std::span<const Tensor> dy, const Tensor& x, const Tensor& xa,
                            std::initializer_list<const TrainedLinear*> maps, const Dropout& d) {
  ArenaScope scope(arena_);
  std::vector<Linear> linears;
  std::vector<LinearGrad> grads;
  bool trains = false;
  for (const TrainedLinear* m : maps) {
    linears.push_back(m->map);
    grads.push_back(m->grad);
    trains = trains || any(m->grad);
  }
  const Tensor dxa = xa ? arena_.alloc(xa.dtype, xa.rows, xa.cols) : Tensor{};
  if (dx || dxa) ops_.linear_group_bwd_input(arena_, dx, dxa, dy, linears, d);
  if (trains) ops_.linear_group_bwd_params(arena_, grads, dy, dxa, x, xa, linears, d);
}

void Transformer::attention_block(const DevicePass& p, std::size_t l) {
  const LayerWeights& w = model_.layers[l];
  LayerState& s = layers_[l];
  const ModelConfig& m = model_.shape;
  const int64_t layer = static_cast<int64_t>(l);
  const Tensor x = rows_of(s.normed1, p.begin, p.end), k = s.k.row_range(p.begin, p.end), v = s.v.row_range(p.begin, p.end);
  const Tensor q = kept_rows(s.q, p, l), o = kept_rows(s.attention, p, l), lse = kept_rows(s.lse, p, l);
  const Tensor& positions = last(l) ? p.live_positions : p.positions;
  const Tensor& row_keys = last(l) ? p.live_row_keys : p.row_keys;
  const Segments& segments = last(l) ? p.live_segments : p.segments;
  const Tensor xa = rows_of(s.xa_qkv, p.begin, p.end);
  if (last(l)) {
    const Tensor x_live = kept_rows(s.normed1_live, p, l);
    apply(std::array{k, v}, xa, x, {&w.k, &w.v}, dropout(layer, kNormed1, p.row_keys));
    ops_.gather_rows(x_live, x, p.live);
    apply(std::array{q}, kept_rows(s.xa_q, p, l), x_live, {&w.q}, dropout(layer, kNormed1, row_keys));
  } else {
    apply(std::array{q, k, v}, xa, x, {&w.q, &w.k, &w.v}, dropout(layer, kNormed1, p.row_keys));
  }
  ops_.rope(q, positions, model_.cosine, model_.sine, m.head_dim, false);
  ops_.rope(k, p.positions, model_.cosine, model_.sine, m.head_dim, false);
  const double scale = 1 / std::sqrt(static_cast<double>(m.head_dim));
  ops_.attention_fwd(arena_, o, lse, q, s.k, s.v, segments, m.heads, m.kv_heads, scale);
  apply(std::array{attended_.row_range(0, q.rows)}, kept_rows(s.xa_o, p, l), o, {&w.o}, dropout(layer, kAttention, row_keys));
}

void Transformer::mlp_block(const DevicePass& p, std::size_t l) {
  const LayerWeights& w = model_.layers[l];
  LayerState& s = layers_[l];
  const int64_t layer = static_cast<int64_t>(l);
  const Tensor& row_keys = last(l) ? p.live_row_keys : p.row_keys;
  const Tensor gate = kept_rows(s.gate, p, l), up = kept_rows(s.up, p, l), act = kept_rows(s.act, p, l);
  apply(std::array{gate, up}, kept_rows(s.xa_gate_up, p, l), kept_rows(s.normed2, p, l), {&w.gate, &w.up},
        dropout(layer, kNormed2, row_keys));
  ops_.swiglu_fwd(act, gate, up);
  apply(std::array{mlp_.row_range(0, act.rows)}, kept_rows(s.xa_down, p, l), act, {&w.down}, dropout(layer, kAct, row_keys));
}

void Transformer::forward(const DevicePass& p) {
  const double eps = model_.shape.norm_eps;
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    LayerState& s = layers_[l];
    const LayerWeights& w = model_.layers[l];
    const Tensor residual1 = l == 0 ? inputs(p) : rows_of(s.residual1, p.begin, p.end), normed1 = rows_of(s.normed1, p.begin, p.end);
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
    ops_.add_rms_norm_fwd(kept_rows(s.normed2, p, l), kept_rows(s.residual2, p, l), kept_rows(s.rstd2, p, l), residual,
                          attended_.row_range(0, residual.rows), w.norm2, eps);
    mlp_block(p, l);
  }
  const Tensor before = kept_rows(layers_.back().residual2, p, layers_.size() - 1);
  ops_.add_rms_norm_fwd(hidden(p), rows_of(residual_final_, p.live_begin, p.live_end), rows_of(rstd_final_, p.live_begin, p.live_end),
                        before, mlp_.row_range(0, before.rows), model_.final_norm, eps);
}

// Whether anything trainable lies at the inputs of the first layer.
bool Transformer::wants_inputs() const { return model_.dembedding || model_.dnew_tokens || model_.projection || model_.layers[0].dnorm1; }

void Transformer::mlp_block_backward(const DevicePass& p, std::size_t l, const Tensor& dresidual) {
  ArenaScope scope(arena_);
  const LayerWeights& w = model_.layers[l];
  LayerState& s = layers_[l];
  const int64_t layer = static_cast<int64_t>(l), n = dresidual.rows;
  const Tensor& row_keys = last(l) ? p.live_row_keys : p.row_keys;
  const Tensor gate = kept_rows(s.gate, p, l), up = kept_rows(s.up, p, l), act = kept_rows(s.act, p, l);
  const Tensor dact = arena_.alloc(act.dtype, n, act.cols), dgate = arena_.alloc(act.dtype, n, act.cols),
               dup = arena_.alloc(act.dtype, n, act.cols);
  pull_back(dact, std::array{dresidual}, act, kept_rows(s.xa_down, p, l), {&w.down}, dropout(layer, kAct, row_keys));
  ops_.swiglu_bwd(dgate, dup, dact, gate, up);
  const Tensor dnormed = arena_.alloc(act.dtype, n, model_.shape.hidden);
  pull_back(dnormed, std::array{dgate, dup}, kept_rows(s.normed2, p, l), kept_rows(s.xa_gate_up, p, l), {&w.gate, &w.up},
            dropout(layer, kNormed2, row_keys));
  ops_.rms_norm_bwd(dresidual, w.dnorm2, dnormed, kept_rows(s.residual2, p, l), kept_rows(s.rstd2, p, l), w.norm2);
}

// dresidual: of the residual after attention. Returns that of the layer's input, all rows of the pass.
Tensor Transformer::attention_block_backward(const DevicePass& p, std::size_t l, const Tensor& dresidual) {
  const LayerWeights& w = model_.layers[l];
  LayerState& s = layers_[l];
  const ModelConfig& m = model_.shape;
  const DType t = model_.storage;
  const int64_t layer = static_cast<int64_t>(l), C = m.hidden;
  const Tensor& row_keys = last(l) ? p.live_row_keys : p.row_keys;
  const Tensor q = kept_rows(s.q, p, l), o = kept_rows(s.attention, p, l);
  // In the last layer the gradient spreads from the live rows to all rows.
  const Tensor dinput = last(l) ? arena_.alloc(t, p.rows(), C) : dresidual;
  ArenaScope scope(arena_);
  const Tensor dout = arena_.alloc(t, q.rows, q.cols), dq = arena_.alloc(t, q.rows, q.cols);
  pull_back(dout, std::array{dresidual}, o, kept_rows(s.xa_o, p, l), {&w.o}, dropout(layer, kAttention, row_keys));
  const double scale = 1 / std::sqrt(static_cast<double>(m.head_dim));
  ops_.attention_bwd(arena_, dq, s.dk, s.dv, dout, o, kept_rows(s.lse, p, l), q, s.k, s.v, last(l) ? p.live_segments : p.segments, m.heads,
                     m.kv_heads, scale);
  // The gradients of this pass's keys and values are complete: later passes have added theirs.
  ops_.rope(dq, last(l) ? p.live_positions : p.positions, model_.cosine, model_.sine, m.head_dim, true);
  const Tensor dk_sum = s.dk.row_range(p.begin, p.end), dv_sum = s.dv.row_range(p.begin, p.end);
  ops_.rope(dk_sum, p.positions, model_.cosine, model_.sine, m.head_dim, true);
  const Tensor dk = arena_.alloc(t, p.rows(), dk_sum.cols), dv = arena_.alloc(t, p.rows(), dk_sum.cols);
  ops_.copy(dk, dk_sum);
  ops_.copy(dv, dv_sum);
  const bool wanted = l > 0 || wants_inputs();
  const Tensor dnormed = wanted ? arena_.alloc(t, p.rows(), C) : Tensor{};
  const Tensor x = rows_of(s.normed1, p.begin, p.end), xa = rows_of(s.xa_qkv, p.begin, p.end);
  if (last(l)) {
    const Tensor dnormed_live = wanted ? arena_.alloc(t, q.rows, C) : Tensor{};
    pull_back(dnormed, std::array{dk, dv}, x, xa, {&w.k, &w.v}, dropout(layer, kNormed1, p.row_keys));
    pull_back(dnormed_live, std::array{dq}, kept_rows(s.normed1_live, p, l), kept_rows(s.xa_q, p, l), {&w.q},
              dropout(layer, kNormed1, row_keys));
    if (wanted) ops_.scatter_add_rows(dnormed, dnormed_live, p.live);
    ops_.fill(dinput, 0);
    ops_.scatter_add_rows(dinput, dresidual, p.live);
  } else {
    pull_back(dnormed, std::array{dq, dk, dv}, x, xa, {&w.q, &w.k, &w.v}, dropout(layer, kNormed1, p.row_keys));
  }
  if (wanted) ops_.rms_norm_bwd(dinput, w.dnorm1, dnormed, rows_of(s.residual1, p.begin, p.end), rows_of(s.rstd1, p.begin, p.end), w.norm1);
  return dinput;
}

void Transformer::backward(const DevicePass& p, std::span<const Tap> taps) {
  ArenaScope scope(arena_);
  Tensor dresidual = arena_.alloc(model_.storage, p.live_rows(), model_.shape.hidden);
  ops_.fill(dresidual, 0);
  ops_.rms_norm_bwd(dresidual, model_.dfinal_norm, dhidden_.row_range(p.live_begin, p.live_end),
                    rows_of(residual_final_, p.live_begin, p.live_end), rows_of(rstd_final_, p.live_begin, p.live_end), model_.final_norm);
  for (std::size_t l = layers_.size(); l-- > 0;) {
    if (!last(l) && l < taps.size() && taps[l].rows) ops_.scatter_add_rows(dresidual, taps[l].gradient, taps[l].rows);
    mlp_block_backward(p, l, dresidual);
    dresidual = attention_block_backward(p, l, dresidual);
  }
  if (wants_inputs()) ops_.add(dinput_.row_range(p.begin, p.end), dresidual);
}

}  // namespace kava
