// The latents' inputs: prj of docs/method.md section 3 applied to hidden states of earlier rows, forward and backward.
#pragma once

#include "models/model.h"
#include "models/transformer.h"

namespace kava {

/// The feeding of one pass: index tensors and what backward needs.
struct FeedState {
  Tensor hidden_live;                // live rows whose hidden state is projected, i32
  Tensor hidden_rows;                // the same as step rows
  Tensor projected_at;               // their fed rows, counted from the pass's begin
  Tensor copy_rows;                  // step rows whose input is copied
  Tensor copied_at;                  // their fed rows
  Tensor h, a1, g1, a2, mean, rstd;  // projection: input, linear1, gelu, linear2, LayerNorm's statistics
};

/// The index tensors of a pass, once the block is sent.
void add_feeds(IndexBlock& block, FeedState& to, const Layout& layout, const Pass& pass);

/// Writes the inputs of the pass's fed rows.
void feed_latents(Model& model, Arena& arena, Transformer& transformer, const DevicePass& pass, FeedState& state);
/// Reads dinput of the fed rows; adds to dhidden and dinput of the rows they came from, and to the projection's gradients.
void feed_latents_backward(Model& model, Arena& arena, Transformer& transformer, const DevicePass& pass, const FeedState& state);

}  // namespace kava
