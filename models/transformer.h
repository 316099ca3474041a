// The transformer's layers over the passes of a step: forward, and backward in reverse. Everything backward needs lies in step tensors, one
// buffer per layer over all rows; a pass reads and writes its row range. In the last layer only live rows go on after K and V.
#pragma once
#include <span>
#include <vector>

#include "engine/device/ops.h"
#include "models/layout.h"
#include "models/model.h"

namespace kava {

/// Whether backward follows, or tokens do.
enum class Use { train, decode };

/// Index tensors of a pass on the device.
struct DevicePass {
  int64_t begin = 0, end = 0, live_begin = 0, live_end = 0, fed = 0;
  Tensor ids, positions, row_keys, live, live_positions, live_row_keys;
  Segments segments, live_segments;
  Reads reads = Reads::tiled;
  int64_t rows() const { return end - begin; }
  int64_t live_rows() const { return live_end - live_begin; }
};

/// i32 [1, n]
Tensor upload_indices(Ops& ops, Arena& arena, std::span<const int32_t> host);
DevicePass upload_pass(Ops& ops, Arena& arena, const Pass& pass);

/// Step tensors of one layer: [rows, width], or [live rows, width] for what follows K and V in the last layer. rstd, lse, dk, dv in sum
/// type. The inputs of linear maps have room for LoRA's xa behind them: normed1, attention, normed2 and act are all columns of such a
/// buffer, x | xa.
struct LayerState {
  Tensor residual1, normed1, rstd1, qkv, dk, dv, attention, lse;
  Tensor q, k, v;  // columns of qkv; where q has other rows than k and v (last layer, decoding), of two buffers
  Tensor residual2, normed2, rstd2, gate_up, act;
  Tensor normed1_live, residual1_live;  // last layer only
};

/// Gradients of residuals after a block that come from outside, added when backward gets there: rows of one pass, counted from its begin.
struct Tap {
  Tensor rows;      // i32 [1, n]
  Tensor gradient;  // [n, C] sum
};

class Transformer {
 public:
  /// Training keeps everything; decoding keeps inputs, K, V and final hidden states, and shares the other buffers between layers and
  /// passes. drops: whether LoRA's input dropout acts, with the masks of optimiser step `step`; never while decoding.
  Transformer(Model& model, Arena& arena, Use use, uint32_t step, bool drops = true);

  /// Room for `rows` rows in all; for decoding, at most `pass_rows` and `live_rows` in one pass.
  void allocate(int64_t rows, int64_t live_rows, int64_t pass_rows);
  /// dk, dv, dhidden and dinput, zeroed.
  void allocate_gradients(int64_t rows, int64_t live_rows);

  /// inputs(pass) has been written; afterwards hidden(pass) holds the final hidden state of the live rows.
  void forward(const DevicePass& pass);
  /// Reads dhidden of the pass, adds to dk, dv of the rows it attended, to the parameters' gradients and to dinput of the pass.
  /// taps[l]: for the residual after block l, l < L-1; empty where there is none.
  void backward(const DevicePass& pass, std::span<const Tap> taps);

  Tensor inputs(const DevicePass& pass) const { return inputs_.row_range(pass.begin, pass.end); }
  Tensor hidden(const DevicePass& pass) const { return hidden_.row_range(pass.live_begin, pass.live_end); }
  std::vector<LayerState>& layers() { return layers_; }
  const std::vector<LayerState>& layers() const { return layers_; }
  const Tensor& all_inputs() const { return inputs_; }  // [rows, C]
  const Tensor& all_hidden() const { return hidden_; }  // [live rows, C]
  const Tensor& dhidden() const { return dhidden_; }
  const Tensor& dinput() const { return dinput_; }

 private:
  Tensor rows_of(const Tensor& t, int64_t begin, int64_t end) const;
  Dropout dropout(int64_t layer, int64_t place, const Tensor& row_keys) const;
  void apply(const Tensor& y, const Tensor& xx, const TrainedGroup& group, const Dropout& d, Reads reads);
  void pull_back(const Tensor& dx, const Tensor& dy, const Tensor& xx, const TrainedGroup& group, const Dropout& d);
  void project(const DevicePass& pass, std::size_t l);
  void attention_block(const DevicePass& pass, std::size_t l);
  void mlp_block(const DevicePass& pass, std::size_t l);
  void mlp_block_backward(const DevicePass& pass, std::size_t l, const Tensor& dresidual);
  Tensor attention_block_backward(const DevicePass& pass, std::size_t l, const Tensor& dresidual);
  bool last(std::size_t l) const { return l + 1 == layers_.size(); }
  bool wants_inputs() const;
  // Rows of the pass that go through layer l after K and V.
  Tensor kept_rows(const Tensor& t, const DevicePass& p, std::size_t l) const;

  Model& model_;
  Ops& ops_;
  Arena& arena_;
  Use use_;
  uint32_t step_;
  double dropout_;
  std::vector<LayerState> layers_;
  Tensor inputs_;          // [rows, C]: embeddings fed to the first layer
  Tensor mlp_, attended_;  // [pass rows, C]: outputs of the two blocks, until the next norm adds them
  Tensor residual_final_, rstd_final_, hidden_, dhidden_, dinput_;
};

}  // namespace kava
