// The transformer's layers over the passes of a step: forward, and backward in reverse. What outlives a pass lies in step tensors, one
// buffer per layer over all rows; a pass reads and writes its row range. In the last layer only live rows go on after K and V.
#pragma once
#include <functional>
#include <span>
#include <vector>

#include "engine/device/ops.h"
#include "models/layout.h"
#include "models/model.h"
#include "models/step_lists.h"

namespace kava {

/// What a forward leaves for what follows it. Keys and values of all rows and final hidden states of live ones are always there.
enum class Keep {
  all,      // every activation, for backward
  cheap,    // all but inputs of linear maps that a norm, swiglu and LoRA's A make again: backward does
  block,    // what goes into each layer: backward runs the layer again
  nothing,  // no backward follows
};
/// By train.recompute.
Keep keep_of(Recompute recompute);

/// Index tensors of a pass on the device.
struct DevicePass {
  int64_t begin = 0, end = 0, live_begin = 0, live_end = 0, fed = 0;
  Tensor ids, positions, row_keys, live, live_positions, live_row_keys;
  Segments segments, live_segments;
  Reads reads = Reads::tiled;
  int64_t rows() const { return end - begin; }
  int64_t live_rows() const { return live_end - live_begin; }
};

/// That the model's tables hold the ids and the positions of a pass.
void check_pass(const Model& model, const Pass& pass);
/// What the lists of a pass are once the block is sent. Their ranges are checked.
void add_pass(IndexBlock& block, DevicePass& to, const Pass& pass);
/// The same, sent.
DevicePass upload_pass(Ops& ops, Arena& arena, const Pass& pass);

/// Rows of one quantity: those of all passes, or those of one pass at a time, in a buffer that layers and passes share.
struct Activation {
  Tensor all;
  bool whole = true;
  Tensor rows(int64_t begin, int64_t end) const {
    if (!all) return all;
    return whole ? all.row_range(begin, end) : all.row_range(0, end - begin);
  }
};

/// Of one layer: what later passes and the objective read. k, v [rows, K*D] storage; dk, dv the same in sum type. queries: those of the
/// rows named by query_rows, i32 [1, n].
struct LayerKept {
  Activation residual;  // [rows, C]: what goes into the layer
  Tensor k, v, dk, dv;
  Tensor queries;
};

/// Of one layer: what its own backward reads, [rows, width], or [live rows, width] for what follows K and V in the last layer. lse, rstd
/// and stats, [rstd] or [rstd | mean] of a norm, in sum type. The inputs of linear maps have room for LoRA's xa behind them: normed1,
/// attention, normed2 and act are all columns of such a buffer, x | xa.
struct LayerWork {
  Activation normed1, stats1, qkv;  // qkv: [q | k | v], in the last layer [k | v], as they come from their maps
  Activation raw_q, q;              // before and after the norms of heads and the rotary embedding; one tensor where there are no norms
  Activation q_rstd, k_rstd;        // [n, H], [n, K]
  Activation attention, lse;
  Activation residual2, normed2, stats2, gate_up, act;
  Activation normed1_live, residual_live;  // last layer only
};

/// Rows of a pass, counted from its begin, that the objective reads in every layer.
struct PassReads {
  Tensor queries, queries_live;  // i32 [1, n]: whose queries, as rows and as live rows; empty where none are read
  struct States {
    Tensor rows;                 // i32 [1, n]: whose residuals after each block but the last
    std::span<const Tensor> to;  // [n, C] each, of L-1 blocks
    Tensor input;                // and, where it is there, what goes into the first one
  };
  std::vector<States> states;
};

/// Gradients of residuals after a block that come from outside, added when backward gets there: rows of one pass, counted from its begin.
struct Tap {
  Tensor rows;      // i32 [1, n]
  Tensor gradient;  // [n, C] sum
};

class Transformer {
 public:
  /// drops: whether LoRA's input dropout acts, with the masks of optimiser step `step`.
  Transformer(Model& model, Arena& arena, Keep keep, uint32_t step, bool drops);

  /// Room for `rows` rows in all, at most `pass_rows` of them in one pass.
  void allocate(int64_t rows, int64_t live_rows, int64_t pass_rows);
  /// dk, dv, dhidden and dinput, zeroed.
  void allocate_gradients(int64_t rows, int64_t live_rows);

  /// inputs(pass) has been written; afterwards hidden(pass) holds the final hidden state of the live rows, and what `reads` asks for is
  /// there.
  void forward(const DevicePass& pass, const PassReads& reads = {});
  /// Reads dhidden of the pass, adds to dk, dv of the rows it attended, to the parameters' gradients and to dinput of the pass.
  /// taps[l]: for the residual after block l, l < L-1; empty where there is none. layer_done: told of each layer after its part; may be
  /// empty.
  void backward(const DevicePass& pass, std::span<const Tap> taps, const std::function<void(int64_t layer)>& layer_done);

  Tensor inputs(const DevicePass& pass) const { return inputs_.row_range(pass.begin, pass.end); }
  Tensor hidden(const DevicePass& pass) const { return hidden_.row_range(pass.live_begin, pass.live_end); }
  const std::vector<LayerKept>& layers() const { return kept_; }
  const Tensor& all_inputs() const { return inputs_; }  // [rows, C]
  const Tensor& all_hidden() const { return hidden_; }  // [live rows, C]
  const Tensor& dhidden() const { return dhidden_; }
  const Tensor& dinput() const { return dinput_; }

 private:
  void allocate_layer(std::size_t l, int64_t rows, int64_t live_rows, int64_t pass_rows);
  Dropout dropout(std::size_t l, int64_t place, const Tensor& row_keys) const;
  void add_lora(const Tensor& xx, const TrainedGroup& group, const Dropout& d, Reads reads);
  void apply(const Tensor& y, const Tensor& xx, const TrainedGroup& group, const Dropout& d, Reads reads);
  void pull_back(const Tensor& dx, const Tensor& dy, const Tensor& xx, const TrainedGroup& group, const Dropout& d);
  void norm(const Tensor& y, const Tensor& sum, const Tensor& stats, const Tensor& a, const Tensor& b, const Norm& n);
  void norm_backward(const Tensor& dx, const Tensor& dy, const Tensor& x, const Tensor& stats, const Norm& n);
  void turn(const Tensor& heads, const Tensor& raw, const Tensor& rstd, const Norm& n, const Tensor& positions);
  void turn_back(const DevicePass& pass, std::size_t l, const Tensor& dq, const Tensor& dqkv);
  // again: in backward, where what is kept is there already.
  void enter(const DevicePass& pass, std::size_t l);
  void norm_input(const DevicePass& pass, std::size_t l);
  void project(const DevicePass& pass, std::size_t l, bool again);
  void attention_block(const DevicePass& pass, std::size_t l, bool again);
  void mlp_block(const DevicePass& pass, std::size_t l, bool again);
  void activate(const DevicePass& pass, std::size_t l);
  void take(const DevicePass& pass, std::size_t l, const PassReads& reads);
  void recompute(const DevicePass& pass, std::size_t l);
  void mlp_block_backward(const DevicePass& pass, std::size_t l, const Tensor& dresidual);
  Tensor attention_block_backward(const DevicePass& pass, std::size_t l, const Tensor& dresidual);
  bool last(std::size_t l) const { return l + 1 == kept_.size(); }
  bool wants_inputs() const;
  // Whether what lies within a layer is that of all passes.
  bool whole() const { return keep_ == Keep::all || keep_ == Keep::cheap; }
  // Rows of the pass, and those that go through layer l after K and V.
  Tensor in(const Activation& a, const DevicePass& p) const { return a.rows(p.begin, p.end); }
  Tensor after(const Activation& a, const DevicePass& p, std::size_t l) const {
    return last(l) ? a.rows(p.live_begin, p.live_end) : a.rows(p.begin, p.end);
  }
  Tensor raw_k(const DevicePass& p, std::size_t l) const {
    const int64_t begin = last(l) ? 0 : work_[l].q.all.cols;
    return in(work_[l].qkv, p).col_range(begin, begin + kept_[l].k.cols);
  }
  // The same of the pass's index lists.
  const Tensor& row_keys(const DevicePass& p, std::size_t l) const { return last(l) ? p.live_row_keys : p.row_keys; }

  Model& model_;
  Ops& ops_;
  Arena& arena_;
  Keep keep_;
  uint32_t step_;
  double dropout_;
  std::vector<LayerKept> kept_;
  std::vector<LayerWork> work_;
  Tensor inputs_;          // [rows, C]: embeddings fed to the first layer
  Tensor mlp_, attended_;  // [pass rows, C]: outputs of the two blocks, until the next norm adds them
  Activation residual_final_, stats_final_;
  Tensor hidden_, dhidden_, dinput_;
};

}  // namespace kava
