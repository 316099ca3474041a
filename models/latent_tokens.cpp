#include "models/latent_tokens.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>

#include "engine/device/host.h"
#include "engine/device/indices.h"
#include "models/transformer.h"

namespace kava {

namespace {

constexpr int64_t kChunk = 4096;  // tokens at a time

// Value rows of tokens first..first+count-1, at a position where that is learned: [count, K*D].
std::vector<float> value_rows(Model& model, Arena& arena, int64_t first, int64_t count, int32_t position) {
  ArenaScope scope(arena);
  Ops& ops = model.ops;
  const LayerWeights& w = model.layers[0];
  const DType t = model.storage;
  const LinearGroup map = w.qkv.map.out_range(w.qkv.map.outs() - model.shape.width(Width::key), w.qkv.map.outs());
  const int64_t C = model.shape.hidden, width = map.outs();
  std::vector<int32_t> ids(static_cast<std::size_t>(count));
  std::iota(ids.begin(), ids.end(), static_cast<int32_t>(first));
  check_indices(ids, 0, model.embedding.rows);
  const Tensor x = arena.alloc(t, count, C), normed = arena.alloc(t, count, map.joined.cols), rstd = arena.alloc(sum_type(t), count, 1);
  const Tensor v = arena.alloc(t, count, width), y = normed.col_range(0, C);
  ops.embed_fwd(x, model.embedding, {}, upload_indices(ops, arena, ids));
  if (model.positions) {
    const Tensor place = arena.alloc(t, count, C);
    ops.gather_rows(place, model.positions, upload_indices(ops, arena, std::vector<int32_t>(ids.size(), position)));
    ops.add(x, place);
  }
  const Norm& norm = w.norm1;
  if (norm.bias) ops.add_layer_norm_fwd(y, {}, arena.alloc(sum_type(t), count, 1), rstd, x, {}, norm.gain, norm.bias, model.shape.norm_eps);
  else ops.add_rms_norm_fwd(y, {}, rstd, x, {}, norm.gain, model.shape.norm_eps);
  if (map.a) ops.lora_fwd(arena, normed, map, {});
  ops.linear_group_fwd(arena, v, normed, map);
  const std::vector<double> values = to_host(ops, v);
  return {values.begin(), values.end()};
}

}  // namespace

std::vector<NearestToken> nearest_tokens(Model& model, Arena& arena, std::span<const float> values, int64_t tokens,
                                         std::span<const int32_t> positions) {
  const auto width = static_cast<std::size_t>(model.shape.width(Width::key));
  std::vector<NearestToken> nearest(values.size() / width, {0, std::numeric_limits<double>::infinity()});
  // The rows of one position serve all values that stand there; rotary positions do not enter values.
  std::map<int32_t, std::vector<std::size_t>> by_position;
  for (std::size_t i = 0; i < nearest.size(); ++i) by_position[model.positions ? positions[i] : 0].push_back(i);
  for (const auto& [position, here] : by_position)
    for (int64_t first = 0; first < tokens; first += kChunk) {
      const int64_t count = std::min(kChunk, tokens - first);
      const std::vector<float> rows = value_rows(model, arena, first, count, position);
      for (std::size_t i : here)
        for (std::size_t j = 0; j < static_cast<std::size_t>(count); ++j) {
          const float *a = values.data() + i * width, *b = rows.data() + j * width;
          float square = 0;
          for (std::size_t d = 0; d < width; ++d) square += (a[d] - b[d]) * (a[d] - b[d]);
          if (square < nearest[i].distance) nearest[i] = {static_cast<int32_t>(first) + static_cast<int32_t>(j), square};
        }
    }
  for (NearestToken& n : nearest) n.distance = std::sqrt(n.distance);
  return nearest;
}

}  // namespace kava
