// What `kava_inspect step` writes of a step (docs/formats.md section 6).
#include <string_view>

#include "models/step.h"

namespace kava {

void Step::dump(const std::string& name, std::vector<int64_t> shape, std::vector<double> values, int axis) {
  DumpTensor d;
  d.shape = std::move(shape), d.values = std::move(values), d.axis = axis;
  options_.dump->emplace(name, std::move(d));
}

// [B*M rows, K*D] of every layer as [L, B, K, M, D].
std::vector<double> Step::by_layer(const std::vector<Tensor>& layers) const {
  const int64_t K = model_.shape.kv_heads, D = model_.shape.head_dim;
  std::vector<double> out;
  for (const Tensor& t : layers) {
    const std::vector<double> x = host(t);
    for (int64_t b = 0; b < B_; ++b)
      for (int64_t k = 0; k < K; ++k)
        for (int64_t m = 0; m < M_; ++m)
          for (int64_t d = 0; d < D; ++d) out.push_back(x[static_cast<std::size_t>((b * M_ + m) * KD_ + k * D + d)]);
  }
  return out;
}

void Step::dump_by_layer(const std::string& name, const std::vector<Tensor>& layers) {
  const ModelConfig& m = model_.shape;
  dump(name, {m.layers, B_, m.kv_heads, M_, m.head_dim}, by_layer(layers), 1);
}

void Step::dump_kv(const std::vector<KvLayer>& layers, RkvDump& rkv) {
  const int64_t L = model_.shape.layers, K = model_.shape.kv_heads, tokens = static_cast<int64_t>(layout_.trace_rows.size());
  std::vector<Tensor> t;
  for (const char* name : {"target.k", "target.v", "latent.k", "latent.v"}) {
    t.clear();
    const int i = name[std::string_view(name).size() - 1] == 'v';
    for (const KvLayer& k : layers) t.push_back(name[0] == 't' ? k.target[i] : k.projected[i]);
    dump_by_layer(name, t);
  }
  dump("rkv.importance", {L, K, tokens}, std::move(rkv.importance), 2);
  dump("rkv.redundancy", {L, K, tokens}, std::move(rkv.redundancy), 2);
  dump("rkv.score", {L, K, tokens}, std::move(rkv.score), 2);
  DumpTensor kept;
  kept.shape = {B_, L, K, M_}, kept.is_index = true;
  for (int64_t b = 0; b < B_; ++b)
    for (int64_t l = 0; l < L; ++l)
      for (int64_t k = 0; k < K; ++k)
        for (int64_t m = 0; m < M_; ++m)
          kept.indices.push_back(rkv.kept[static_cast<std::size_t>(l)][static_cast<std::size_t>((b * M_ + m) * K + k)]);
  options_.dump->emplace("rkv.kept", std::move(kept));
}

void Step::dump_codi() {
  const int64_t S = std::ssize(student_states_), C = model_.shape.hidden;
  for (const auto& [name, states] : {std::pair{"codi.student", &student_states_}, std::pair{"codi.teacher", &teacher_states_}}) {
    std::vector<double> all;
    for (const Tensor& t : *states) {
      const std::vector<double> x = host(t);
      all.insert(all.end(), x.begin(), x.end());
    }
    dump(name, {S, B_, C}, std::move(all), 1);
  }
}

// The batch may hold samples with more latents and passes than this forward.
void Step::dump_latents() {
  const int64_t C = model_.shape.hidden, N = totals_.latents, T = totals_.iterations;
  const std::vector<double> inputs = host(transformer_.all_inputs());
  std::vector<double> out;
  for (int64_t t = 0; t <= T; ++t)
    for (int64_t b = 0; b < B_; ++b)
      for (int64_t i = 0; i < N; ++i) {
        const bool here = t <= layout_.iterations && i < M_;
        const int64_t row = here ? layout_.latent_input_rows[static_cast<std::size_t>((t * B_ + b) * M_ + i)] : -1;
        if (row < 0) out.insert(out.end(), static_cast<std::size_t>(C), 0.0);
        else out.insert(out.end(), inputs.begin() + row * C, inputs.begin() + (row + 1) * C);
      }
  dump("latent.inputs", {T + 1, B_, N, C}, std::move(out), 1);
  if (config_.kv.weight > 0) return;  // written with their targets
  std::vector<int32_t> real = layout_.latent_rows;
  std::erase(real, -1);
  for (int i = 0; i < 2; ++i) dump_latent_pairs(i == 0 ? "latent.k" : "latent.v", i, real);
}

// K (i = 0) or V of the latents' final rows, zero where a sample has fewer than the batch's most.
void Step::dump_latent_pairs(const char* name, int i, std::span<const int32_t> real) {
  const ModelConfig& m = model_.shape;
  const int64_t n = static_cast<int64_t>(real.size()), N = totals_.latents, D = m.head_dim;
  std::vector<double> out;
  for (std::size_t l = 0; l < layer_count(); ++l) {
    ArenaScope scope(arena_);
    const LayerKept& s = transformer_.layers()[l];
    const Tensor x = arena_.alloc(type_, n, KD_), y = arena_.alloc(type_, n, KD_);
    if (n > 0) ops_.gather_rows(x, i == 0 ? s.k : s.v, indices(real));
    if (i == 0 && n > 0) unrotate(x, indices(positions_of(real)));
    const TrainedGroup* map = kv_map(l, i);
    if (map && n > 0) ops_.linear_group_fwd(arena_, by_head(y), by_head(x), map->map);
    const std::vector<double> rows = n > 0 ? host(map ? y : x) : std::vector<double>{};
    std::vector<int64_t> at(static_cast<std::size_t>(B_ * N), -1);
    for (int64_t slot = 0, next = 0; slot < B_ * M_; ++slot)
      if (layout_.latent_rows[static_cast<std::size_t>(slot)] >= 0) at[static_cast<std::size_t>(slot / M_ * N + slot % M_)] = next++;
    for (int64_t b = 0; b < B_; ++b)
      for (int64_t k = 0; k < m.kv_heads; ++k)
        for (int64_t j = 0; j < N; ++j)
          for (int64_t d = 0; d < D; ++d) {
            const int64_t row = at[static_cast<std::size_t>(b * N + j)];
            out.push_back(row < 0 ? 0.0 : rows[static_cast<std::size_t>(row * KD_ + k * D + d)]);
          }
  }
  dump(name, {m.layers, B_, m.kv_heads, N, D}, std::move(out), 1);
}

}  // namespace kava
