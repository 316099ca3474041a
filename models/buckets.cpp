#include "models/buckets.h"

#include <algorithm>

namespace kava {

namespace {

// The layer of each parameter, or -1, in the order of their places.
std::vector<std::pair<int64_t, int64_t>> layers_by_offset(const Model& model) {
  const Architecture& arch = model.shape.architecture();
  std::vector<std::pair<int64_t, int64_t>> places;  // offset, layer
  for (const Parameter& p : model.parameters.all()) {
    int64_t layer = -1;
    for (int64_t l = 0; l < model.shape.layers && layer < 0; ++l)
      if (p.name.find(arch.layer(l)) != std::string::npos) layer = l;
    places.emplace_back(p.offset, layer);
  }
  std::ranges::sort(places);
  return places;
}

}  // namespace

std::vector<Bucket> gradient_buckets(const Model& model, int64_t least_bytes) {
  const Tensor grad = model.parameters.grad();
  const auto places = layers_by_offset(model);
  // Neighbours of one layer are one range.
  std::vector<std::vector<Tensor>> of_layer(static_cast<std::size_t>(model.shape.layers + 1));  // the last: of none
  for (std::size_t i = 0; i < places.size();) {
    const auto [begin, layer] = places[i];
    while (i < places.size() && places[i].second == layer) ++i;
    const int64_t end = i < places.size() ? places[i].first : grad.cols;
    of_layer[layer < 0 ? of_layer.size() - 1 : static_cast<std::size_t>(layer)].push_back(grad.col_range(begin, end));
  }
  std::vector<Bucket> buckets;
  Bucket next;
  int64_t bytes = 0;
  for (int64_t l = model.shape.layers - 1; l >= 0; --l) {
    next.layer = l;
    for (const Tensor& t : of_layer[static_cast<std::size_t>(l)]) next.ranges.push_back(t), bytes += t.count() * size_of(t.dtype);
    if (bytes < least_bytes) continue;
    buckets.push_back(std::exchange(next, {})), bytes = 0;
  }
  next.layer = -1;
  next.ranges.insert(next.ranges.end(), of_layer.back().begin(), of_layer.back().end());
  buckets.push_back(std::move(next));
  return buckets;
}

}  // namespace kava
