#include "models/transformer.h"

#include <algorithm>
#include <cmath>

#include "engine/device/indices.h"

namespace kava {

namespace {

// keys: rows that there are; queries: rows of the pass, or its live rows.
void add_segments(IndexBlock& block, Segments& d, const SegmentList& s, int64_t keys, int64_t queries) {
  check_indices(s.keys, 0, keys);
  check_offsets(s.key_offsets, static_cast<int64_t>(s.keys.size()));
  check_offsets(s.group_offsets, s.count());
  for (std::size_t i = 0; i < s.query_begin.size(); ++i) {
    const int64_t begin = s.query_begin[i], count = s.query_count[i], seen = s.key_offsets[i + 1] - s.key_offsets[i];
    KAVA_CHECK(begin >= 0 && count > 0 && begin + count <= queries && count <= seen, "{} queries from {} on {} keys", count, begin, seen);
  }
  block.add(d.key_offsets, s.key_offsets);
  block.add(d.keys, s.keys);
  block.add(d.query_begin, s.query_begin);
  block.add(d.query_count, s.query_count);
  block.add(d.group_offsets, s.group_offsets);
  d.count = s.count(), d.groups = static_cast<int64_t>(s.group_offsets.size()) - 1, d.most_keys = s.most_keys,
  d.most_queries = s.most_queries, d.fewest_queries = s.fewest_queries;
}

// The activation in front of LoRA's columns.
Tensor x_of(const Tensor& xx, const TrainedGroup& group) { return xx.col_range(0, group.map.in); }

// Columns of what a norm keeps of a row for its backward.
int64_t stats_of(const Model& model) { return model.shape.architecture().norm == NormKind::layer ? 2 : 1; }

// Places of a layer whose input LoRA drops from.
enum Place : int64_t { kNormed1, kAttention, kNormed2, kAct, kPlaces };

}  // namespace

void check_pass(const Model& model, const Pass& p) {
  check_indices(p.ids, kLatentId, model.shape.vocab);
  check_indices(p.positions, 0, model.positions ? model.positions.rows : model.cosine.rows);
}

void add_pass(IndexBlock& block, DevicePass& d, const Pass& p) {
  d.begin = p.begin, d.end = p.end, d.live_begin = p.live_begin, d.live_end = p.live_end, d.fed = p.fed();
  block.add(d.ids, p.ids);
  block.add(d.positions, p.positions);
  block.add(d.row_keys, p.row_keys, p.rows(), 2);
  check_distinct(p.live, p.rows());
  block.add(d.live, p.live);
  std::vector<int32_t> positions, keys;
  for (int32_t r : p.live) {
    const auto at = static_cast<std::size_t>(r);
    positions.push_back(p.positions[at]);
    keys.push_back(p.row_keys[2 * at]);
    keys.push_back(p.row_keys[2 * at + 1]);
  }
  block.add(d.live_positions, positions);
  block.add(d.live_row_keys, keys, p.live_rows(), 2);
  add_segments(block, d.segments, p.segments, p.end, p.rows());
  add_segments(block, d.live_segments, p.live_segments, p.end, p.live_rows());
}

DevicePass upload_pass(Ops& ops, Arena& arena, const Pass& pass) {
  DevicePass d;
  IndexBlock block;
  add_pass(block, d, pass);
  block.send(ops, arena);
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
  residual_final_ = {arena_.alloc(t, n, m.hidden), whole}, stats_final_ = {arena_.alloc(sum_type(t), n, stats_of(model_)), whole};
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
  if (l == 0 && !model_.positions) k.residual = {inputs_, true};
  else if (keep_ == Keep::nothing && l > 1) k.residual = kept_[l - 1].residual;
  else made(k.residual, keep_ != Keep::nothing, t, rows, C);
  made_input(s.normed1, w.qkv, rows), made(s.stats1, own, sum, rows, stats_of(model_));
  Tensor kv;
  if (last(l)) {
    made(s.raw_q, own, t, n, HD);
    kv = arena_.alloc(t, rows, 2 * KD);
    s.qkv = {kv, true};
    made_input(s.normed1_live, w.qkv, n), made(s.residual_live, own, t, n, C);
  } else {
    made(s.qkv, own, t, rows, HD + 2 * KD);
    s.raw_q = {s.qkv.all.col_range(0, HD), own};
    kv = own ? s.qkv.all.col_range(HD, HD + 2 * KD) : arena_.alloc(t, rows, 2 * KD);
  }
  k.k = kv.col_range(0, KD), k.v = kv.col_range(KD, 2 * KD);
  if (w.q_norm.gain) {
    // Backward reads what comes before the norms: the last layer keeps it of all rows, as it keeps its keys.
    if (own || last(l)) k.k = arena_.alloc(t, rows, KD);
    made(s.q, own, t, n, HD);
    made(s.q_rstd, own, sum, n, m.heads), made(s.k_rstd, own || last(l), sum, rows, m.kv_heads);
  } else {
    s.q = s.raw_q;
  }
  made(s.attention, own, t, n, w.o.map.joined.cols), made(s.lse, own, sum, n, m.heads);
  made(s.residual2, own, t, n, C), made(s.stats2, own, sum, n, stats_of(model_));
  made_input(s.normed2, w.gate_up, n);
  made(s.gate_up, own, t, n, w.gate_up.map.outs()), made_input(s.act, w.down, n);
}

void Transformer::allocate_gradients(int64_t rows, int64_t live_rows) {
  constexpr int64_t kAlign = 16;
  const int64_t C = model_.shape.hidden, KD = model_.shape.kv_heads * model_.shape.head_dim;
  const auto room = [](int64_t n, int64_t width) { return (n * width + kAlign - 1) / kAlign * kAlign; };
  const int64_t layers = std::ssize(kept_), elements = 2 * layers * room(rows, KD) + room(live_rows, C) + room(rows, C);
  const Tensor all = arena_.alloc(sum_type(model_.storage), 1, elements);
  ops_.fill(all, 0);
  int64_t used = 0;
  const auto part = [&](int64_t n, int64_t width) {
    const Tensor t = all.col_range(used, used + n * width).row_range(0, 1).reshape(n, width);
    used += room(n, width);
    return t;
  };
  for (LayerKept& k : kept_) k.dk = part(rows, KD), k.dv = part(rows, KD);
  dhidden_ = part(live_rows, C), dinput_ = part(rows, C);
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

// y = norm of sum = a + b.
void Transformer::norm(const Tensor& y, const Tensor& sum, const Tensor& stats, const Tensor& a, const Tensor& b, const Norm& n) {
  const double eps = model_.shape.norm_eps;
  const Tensor rstd = stats.col_range(0, 1);
  if (n.bias) ops_.add_layer_norm_fwd(y, sum, stats.col_range(1, 2), rstd, a, b, n.gain, n.bias, eps);
  else ops_.add_rms_norm_fwd(y, sum, rstd, a, b, n.gain, eps);
}

// Adds to dx.
void Transformer::norm_backward(const Tensor& dx, const Tensor& dy, const Tensor& x, const Tensor& stats, const Norm& n) {
  const Tensor rstd = stats.col_range(0, 1);
  if (n.bias) ops_.layer_norm_bwd(arena_, dx, n.dgain, n.dbias, dy, x, stats.col_range(1, 2), rstd, n.gain);
  else ops_.rms_norm_bwd(arena_, dx, n.dgain, dy, x, rstd, n.gain);
}

// The residual that goes into layer l, and its norm.
void Transformer::enter(const DevicePass& p, std::size_t l) {
  const LayerWork& s = work_[l];
  const Tensor residual = in(kept_[l].residual, p);
  if (l == 0) {
    if (model_.positions) {
      ops_.gather_rows(residual, model_.positions, p.positions);
      ops_.add(residual, inputs(p));
    }
    return norm_input(p, l);
  }
  norm(x_of(in(s.normed1, p), model_.layers[l].qkv), residual, in(s.stats1, p), in(work_[l - 1].residual2, p), mlp_.row_range(0, p.rows()),
       model_.layers[l].norm1);
}

void Transformer::norm_input(const DevicePass& p, std::size_t l) {
  const LayerWork& s = work_[l];
  const LayerWeights& w = model_.layers[l];
  norm(x_of(in(s.normed1, p), w.qkv), {}, in(s.stats1, p), in(kept_[l].residual, p), {}, w.norm1);
}

// Heads as attention reads them: normed where the architecture has norms of heads, and turned where its positions are rotary. Without norms
// heads and raw are one tensor.
void Transformer::turn(const Tensor& heads, const Tensor& raw, const Tensor& rstd, const Norm& n, const Tensor& positions) {
  if (n.gain) ops_.norm_rope_fwd(heads, rstd, raw, n.gain, positions, model_.cosine, model_.sine, model_.shape.norm_eps);
  else if (!model_.positions) ops_.rope_fwd(heads, positions, model_.cosine, model_.sine, model_.shape.head_dim, false);
}

// q, k and v. One product where all rows go on; else k and v of all rows, then q of those that do, from the same xa.
void Transformer::project(const DevicePass& p, std::size_t l, bool again) {
  const LayerWeights& w = model_.layers[l];
  const LayerWork& s = work_[l];
  const Tensor xx = in(s.normed1, p), qkv = in(s.qkv, p), raw_q = after(s.raw_q, p, l), q = after(s.q, p, l);
  const Tensor k = kept_[l].k.row_range(p.begin, p.end), v = kept_[l].v.row_range(p.begin, p.end);
  const int64_t HD = q.cols, KD = k.cols;
  add_lora(xx, w.qkv, dropout(l, kNormed1, p.row_keys), p.reads);
  if (!last(l)) {
    ops_.linear_group_fwd(arena_, qkv, xx, w.qkv.map, p.reads);
    if (w.q_norm.gain) {
      turn(q, raw_q, in(s.q_rstd, p), w.q_norm, p.positions);
      turn(k, raw_k(p, l), in(s.k_rstd, p), w.k_norm, p.positions);
    } else {
      // The heads of q and k lie side by side and turn in one pass.
      const Tensor both = qkv.col_range(0, HD + KD);
      turn(both, both, {}, {}, p.positions);
      if (!whole() && !again) ops_.copy(k, qkv.col_range(HD, HD + KD));
    }
    if (!whole() && !again) ops_.copy(v, qkv.col_range(HD + KD, qkv.cols));
    return;
  }
  if (!again) {
    ops_.linear_group_fwd(arena_, qkv, xx, w.qkv.map.out_range(HD, HD + 2 * KD), p.reads);
    turn(k, raw_k(p, l), in(s.k_rstd, p), w.k_norm, p.positions);
  }
  const Tensor queries = after(s.normed1_live, p, l);
  ops_.gather_rows(queries, xx, p.live);
  ops_.linear_group_fwd(arena_, raw_q, queries, w.qkv.map.out_range(0, HD), p.reads);
  turn(q, raw_q, after(s.q_rstd, p, l), w.q_norm, p.live_positions);
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
  norm(x_of(after(s.normed2, p, l), w.gate_up), after(s.residual2, p, l), after(s.stats2, p, l), residual,
       attended_.row_range(0, residual.rows), w.norm2);
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
  switch (model_.shape.architecture().mlp) {
    case MlpKind::swiglu:
      ops_.swiglu_fwd(x_of(act, down), gate_up.col_range(0, F), gate_up.col_range(F, 2 * F));
      break;
    case MlpKind::gelu_tanh:
      ops_.gelu_fwd(x_of(act, down), gate_up, Gelu::tanh);
      break;
  }
  add_lora(act, down, dropout(l, kAct, row_keys(p, l)), p.reads);
}

// What the objective reads of layer l, before another layer or pass takes its place.
void Transformer::take(const DevicePass& p, std::size_t l, const PassReads& reads) {
  for (const PassReads::States& r : reads.states)
    if (l > 0) ops_.gather_rows(r.to[l - 1], in(kept_[l].residual, p), r.rows);
    else if (r.input) ops_.gather_rows(r.input, in(kept_[0].residual, p), r.rows);
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
  norm(hidden(p), residual_final_.rows(p.live_begin, p.live_end), stats_final_.rows(p.live_begin, p.live_end), before,
       mlp_.row_range(0, before.rows), model_.final_norm);
}

// Whether anything trainable lies at the inputs of the first layer.
bool Transformer::wants_inputs() const {
  // Gradients pass through the latents' inputs even where the new tokens are frozen.
  return model_.dembedding || model_.new_tokens || model_.dpositions || model_.layers[0].norm1.dgain;
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
    norm(x_of(normed2, w.gate_up), {}, after(s.stats2, p, l), after(s.residual2, p, l), {}, w.norm2);
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
  const Tensor dact = arena_.alloc(t, n, F), dgate_up = arena_.alloc(t, n, gate_up.cols);
  pull_back(dact, dresidual, after(s.act, p, l), w.down, dropout(l, kAct, row_keys(p, l)));
  switch (model_.shape.architecture().mlp) {
    case MlpKind::swiglu:
      ops_.swiglu_bwd(dgate_up.col_range(0, F), dgate_up.col_range(F, 2 * F), dact, gate_up.col_range(0, F), gate_up.col_range(F, 2 * F));
      break;
    case MlpKind::gelu_tanh:
      ops_.gelu_bwd(dgate_up, dact, gate_up, Gelu::tanh);
      break;
  }
  const Tensor dnormed = arena_.alloc(t, n, model_.shape.hidden);
  pull_back(dnormed, dgate_up, after(s.normed2, p, l), w.gate_up, dropout(l, kNormed2, row_keys(p, l)));
  norm_backward(dresidual, dnormed, after(s.residual2, p, l), after(s.stats2, p, l), w.norm2);
}

// dqkv gets the gradients of q (dq: its columns or, in the last layer, a tensor of its own, which is turned in place), of k and of v, as
// they come from their maps. Those of this pass's keys and values are complete: later passes have added theirs.
void Transformer::turn_back(const DevicePass& p, std::size_t l, const Tensor& dq, const Tensor& dqkv) {
  const LayerWeights& w = model_.layers[l];
  const LayerWork& s = work_[l];
  const Tensor dk = kept_[l].dk.row_range(p.begin, p.end), dv = kept_[l].dv.row_range(p.begin, p.end);
  const Tensor dk_out = dqkv.col_range(dqkv.cols - 2 * dk.cols, dqkv.cols - dk.cols),
               dv_out = dqkv.col_range(dqkv.cols - dk.cols, dqkv.cols);
  const Tensor& q_positions = last(l) ? p.live_positions : p.positions;
  if (w.q_norm.gain) {
    ops_.norm_rope_bwd(arena_, dq, w.q_norm.dgain, dq, after(s.raw_q, p, l), after(s.q_rstd, p, l), w.q_norm.gain, q_positions,
                       model_.cosine, model_.sine);
    ops_.norm_rope_bwd(arena_, dk_out, w.k_norm.dgain, dk, raw_k(p, l), in(s.k_rstd, p), w.k_norm.gain, p.positions, model_.cosine,
                       model_.sine);
    ops_.copy(dv_out, dv);
  } else if (model_.positions) {
    ops_.copy(dk_out, dk);
    ops_.copy(dv_out, dv);
  } else {
    const int64_t D = model_.shape.head_dim;
    if (last(l)) ops_.rope_bwd(dq, dq, {}, {}, q_positions, model_.cosine, model_.sine, D);
    ops_.rope_bwd(dqkv, last(l) ? Tensor{} : dq, dk, dv, p.positions, model_.cosine, model_.sine, D);
  }
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
  turn_back(p, l, dq, dqkv);
  const bool wanted = l > 0 || wants_inputs();
  const Tensor dnormed = wanted ? arena_.alloc(t, p.rows(), C) : Tensor{};
  const Tensor xx = in(s.normed1, p);
  const Dropout d = dropout(l, kNormed1, p.row_keys);
  if (last(l)) {
    const Tensor dnormed_live = wanted ? arena_.alloc(t, q.rows, C) : Tensor{};
    pull_back(dnormed, dqkv, xx, w.qkv.out_range(HD, HD + 2 * KD), d);
    pull_back(dnormed_live, dq, after(s.normed1_live, p, l), w.qkv.out_range(0, HD), dropout(l, kNormed1, p.live_row_keys));
    if (wanted) ops_.scatter_add_rows(dnormed, dnormed_live, p.live);
    ops_.fill(dinput, 0);
    ops_.scatter_add_rows(dinput, dresidual, p.live);
  } else {
    pull_back(dnormed, dqkv, xx, w.qkv, d);
  }
  if (wanted) norm_backward(dinput, dnormed, in(kept.residual, p), in(s.stats1, p), w.norm1);
  return dinput;
}

void Transformer::backward(const DevicePass& p, std::span<const Tap> taps, const std::function<void(int64_t)>& layer_done) {
  KAVA_CHECK(keep_ != Keep::nothing, "backward of a forward that kept nothing");
  ArenaScope scope(arena_);
  Tensor dresidual = arena_.alloc(model_.storage, p.live_rows(), model_.shape.hidden);
  ops_.fill(dresidual, 0);
  norm_backward(dresidual, dhidden_.row_range(p.live_begin, p.live_end), residual_final_.rows(p.live_begin, p.live_end),
                stats_final_.rows(p.live_begin, p.live_end), model_.final_norm);
  for (std::size_t l = kept_.size(); l-- > 0;) {
    if (!last(l) && l < taps.size() && taps[l].rows) ops_.scatter_add_rows(dresidual, taps[l].gradient, taps[l].rows);
    if (keep_ != Keep::all) recompute(p, l);
    mlp_block_backward(p, l, dresidual);
    dresidual = attention_block_backward(p, l, dresidual);
    if (layer_done) layer_done(static_cast<int64_t>(l));
  }
  if (wants_inputs()) ops_.add(dinput_.row_range(p.begin, p.end), dresidual);
  if (!model_.dpositions) return;
  const Tensor d = arena_.alloc(sum_type(model_.storage), p.rows(), model_.shape.hidden);
  ops_.copy(d, dresidual);
  ops_.embed_bwd(model_.dpositions, {}, d, p.positions);
}

}  // namespace kava
