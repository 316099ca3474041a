#include "models/model.h"

#include <algorithm>
#include <cmath>

#include "engine/device/host.h"
#include "engine/error.h"
#include "engine/files/files.h"
#include "models/recipe.h"
#include "models/starts.h"

namespace kava {

namespace {

// What the products read of a tensor, empty where the model has none of this name; its gradient where it is trained.
Tensor named_tensor(const ParameterStore& trained, const std::vector<std::pair<std::string, Tensor>>& frozen, const std::string& name,
                    Tensor& grad) {
  if (const Parameter* p = trained.find(name)) {
    grad = p->grad;
    return p->compute;
  }
  const auto it = std::ranges::find(frozen, name, &std::pair<std::string, Tensor>::first);
  return it == frozen.end() ? Tensor{} : it->second;
}

// The tensor of which these are the rows (or, of vectors, the columns): first lies at its begin, and the others follow without a gap.
Tensor packed(const Tensor& first, int64_t rows, int64_t cols, int64_t stride) {
  return first ? Tensor{first.data, first.dtype, rows, cols, stride} : Tensor{};
}

}  // namespace

DType storage_of(StorageType t) { return t == StorageType::bf16 ? DType::bf16 : t == StorageType::f32 ? DType::f32 : DType::f64; }

std::vector<TrainableSpec> trainable_specs(const RunConfig& config, const ModelConfig& shape) {
  using Start = TrainableSpec::Start;
  std::vector<TrainableSpec> specs;
  const int64_t C = shape.hidden, D = shape.head_dim;
  if (config.train.trainable == Trainable::all) {
    for (const WeightSpec& w : weight_specs(shape))
      specs.push_back({w.name, w.rows, w.cols, w.vector(), !w.vector(), Start::base, w.joined, w.transposed});
  } else {
    const Architecture& arch = shape.architecture();
    const int64_t r = config.lora.rank;
    for (int64_t l = 0; l < shape.layers; ++l)
      for (const auto& group : arch.maps) {
        std::vector<const LinearSpec*> adapted;
        for (const LinearSpec& map : group)
          if (is_adapted(config.lora.targets, map.path)) adapted.push_back(&map);
        auto path = [&](const LinearSpec* map) { return kLoraPrefix + arch.layer(l) + map->path; };
        for (const LinearSpec* map : adapted)
          specs.push_back({path(map) + ".lora_A.weight", r, shape.width(map->in), false, true, Start::lora_a, map != adapted[0]});
        for (const LinearSpec* map : adapted)
          specs.push_back({path(map) + ".lora_B.weight", shape.width(map->out), r, false, true, Start::zero});
      }
  }
  if (!recipe_of(config).markers) return specs;
  const bool frozen = config.latent.tokens == NewTokens::frozen;
  const Start row = config.latent.token_init.empty() ? Start::mean_embedding : Start::token_row;
  specs.push_back({"new_tokens.weight", 3, C, false, !frozen, row});
  if (config.latent.projection) {
    const ProjectionInit init = config.latent.projection_init;
    const bool torch = init == ProjectionInit::torch;  // uniform within 1/sqrt(C), as LoRA's A
    for (const char* linear : {"linear1", "linear2"}) {
      specs.push_back({fmt::format("latent_projection.{}.weight", linear), C, C, false, true, torch ? Start::lora_a : Start::normal});
      specs.push_back({fmt::format("latent_projection.{}.bias", linear), 1, C, true, false, torch ? Start::lora_a : Start::zero});
    }
    const Start gain = init == ProjectionInit::embedding_rms ? Start::embedding_rms : Start::one;
    specs.push_back({"latent_projection.norm.weight", 1, C, true, false, gain});
    specs.push_back({"latent_projection.norm.bias", 1, C, true, false, Start::zero});
  }
  if (config.kv.projection)
    for (int64_t l = 0; l < shape.layers; ++l)
      for (const char* which : {"k", "v"})
        specs.push_back({fmt::format("kv_projection.{}.{}.weight", l, which), D, D, false, true, Start::identity});
  return specs;
}

void refuse_storage(DType storage, std::string_view device) {
  throw Error(Exit::usage, "model.dtype", fmt::format("{} is not a type of the device {}", name_of(storage), device),
              "use bf16 or f32, or --device cpu");
}

Model::Model(Ops& o, const RunConfig& c, const ModelConfig& s, Values values, ModelUse use)
    : ops(o), config(c), shape(s), storage(storage_of(c.model.dtype)), parameters(o, storage_of(c.model.dtype), use) {
  if (!ops.stores(storage)) refuse_storage(storage, ops.name());
  std::optional<WeightFiles> files;
  if (values != Values::none && config.model.init == Init::pretrained) {
    files = WeightFiles::open(config.model.path, shape);
    base_digest = digest_of_base(shape, *files);
  }
  const std::vector<TrainableSpec> specs = trainable_specs(config, shape);
  for (const TrainableSpec& t : specs) parameters.add(t.name, t.rows, t.cols, t.vector, t.decay, t.joined, t.transposed);
  parameters.allocate();
  if (config.train.trainable != Trainable::all) allocate_groups();
  for (const WeightSpec& w : weight_specs(shape)) {
    const Parameter* trained = parameters.find(w.name);
    const auto packed = std::ranges::find(frozen_, w.name, &std::pair<std::string, Tensor>::first);
    const Tensor to = trained                   ? trained->value
                      : packed != frozen_.end() ? packed->second
                                                : frozen_.emplace_back(w.name, allocate(storage, w.rows, w.cols)).second;
    if (values == Values::none || (trained && values == Values::loaded)) continue;
    if (files) files->read(w, ops, to);
    else set_random_weight(ops, to, w, shape, config.seed);
  }
  if (values == Values::start) parameters.refresh();  // the starts read the embedding
  bind();
  if (values != Values::start) return;
  set_starts(*this, specs);
  parameters.refresh();
}

Tensor Model::base_tensor(const std::string& name) const {
  const auto it = std::ranges::find(frozen_, name, &std::pair<std::string, Tensor>::first);
  return it == frozen_.end() ? Tensor{} : it->second;
}

Tensor Model::allocate(DType dtype, int64_t rows, int64_t cols) { return owned_.emplace_back(ops, dtype, rows, cols).tensor(); }

// The packed tensors of frozen maps; each map's own rows get their values by its name.
void Model::allocate_groups() {
  const Architecture& arch = shape.architecture();
  for (int64_t l = 0; l < shape.layers; ++l)
    for (const auto& group : arch.maps) {
      int64_t outs = 0, ranks = 0;
      for (const LinearSpec& map : group) {
        outs += shape.width(map.out);
        if (const Parameter* a = parameters.find(kLoraPrefix + arch.layer(l) + map.path + ".lora_A.weight")) ranks += a->rows;
      }
      const int64_t in = shape.width(group[0].in);
      const Tensor joined = allocate(storage, outs, in + ranks);
      const Tensor bias = group[0].bias ? allocate(storage, 1, outs) : Tensor{};
      int64_t begin = 0;
      for (const LinearSpec& map : group) {
        const std::string path = arch.layer(l) + map.path;
        const int64_t end = begin + shape.width(map.out);
        frozen_.emplace_back(path + ".weight", joined.row_range(begin, end).col_range(0, in));
        if (bias) frozen_.emplace_back(path + ".bias", bias.col_range(begin, end));
        begin = end;
      }
    }
}

TrainedGroup Model::bind_group(const std::string& layer, const std::vector<LinearSpec>& maps) {
  auto tensor = [&](const std::string& name, Tensor& grad) { return named_tensor(parameters, frozen_, name, grad); };
  TrainedGroup g;
  int64_t outs = 0, ranks = 0;
  Tensor w, a, bias, dw, da, dbias;  // of the first map that has one
  for (const LinearSpec& map : maps) {
    const std::string path = layer + map.path, lora = kLoraPrefix + path;
    Tensor grad_w, grad_bias, grad_a, grad_b;
    const Tensor own = tensor(path + ".weight", grad_w), own_bias = tensor(path + ".bias", grad_bias),
                 own_a = tensor(lora + ".lora_A.weight", grad_a);
    LinearPart p{.out_begin = outs, .outs = own.rows, .rank_begin = ranks, .rank = own_a.rows};
    p.b = tensor(lora + ".lora_B.weight", grad_b);
    if (p.rank > 0) p.scale = config.lora.alpha / static_cast<double>(config.lora.rank);
    if (!w) w = own, dw = grad_w, bias = own_bias, dbias = grad_bias;
    if (!a) a = own_a, da = grad_a;
    g.map.parts.push_back(p);
    g.grad.db.push_back(grad_b);
    outs += p.outs, ranks += p.rank;
  }
  const int64_t in = g.map.in = w.cols;
  g.map.joined = packed(w, outs, in + ranks, w.stride), g.map.bias = packed(bias, 1, outs, outs), g.map.a = packed(a, ranks, in, in);
  g.grad.dw = packed(dw, outs, in, in), g.grad.dbias = packed(dbias, 1, outs, outs), g.grad.da = packed(da, ranks, in, in);
  parameters.prepare(g.map);
  return g;
}

Norm Model::bind_norm(const std::string& path) {
  Norm n;
  n.gain = named_tensor(parameters, frozen_, path + ".weight", n.dgain);
  n.bias = named_tensor(parameters, frozen_, path + ".bias", n.dbias);
  return n;
}

TrainedGroup Model::bind_plain(const std::string& path, bool bias) {
  TrainedGroup g;
  Tensor b;
  const Tensor w = named_tensor(parameters, frozen_, path + ".weight", g.grad.dw);
  if (bias) b = named_tensor(parameters, frozen_, path + ".bias", g.grad.dbias);
  g.map = LinearGroup::plain(w, b);
  return g;
}

void Model::bind() {
  auto tensor = [&](const std::string& name, Tensor& grad) { return named_tensor(parameters, frozen_, name, grad); };
  const Architecture& arch = shape.architecture();
  embedding = tensor(arch.prefix + arch.embedding + ".weight", dembedding);
  if (!arch.rotary()) positions = tensor(arch.prefix + arch.positions + ".weight", dpositions);
  final_norm = bind_norm(arch.prefix + arch.final_norm);
  if (shape.tied) head = embedding, dhead = dembedding;
  else head = tensor(kHeadName, dhead);
  new_tokens = tensor("new_tokens.weight", dnew_tokens);
  if (config.latent.tokens == NewTokens::frozen) dnew_tokens = {};
  for (int64_t l = 0; l < shape.layers; ++l) {
    LayerWeights w;
    const std::string layer = arch.layer(l);
    w.norm1 = bind_norm(layer + arch.norm1), w.norm2 = bind_norm(layer + arch.norm2);
    if (arch.has_head_norms()) w.q_norm = bind_norm(layer + arch.q_norm), w.k_norm = bind_norm(layer + arch.k_norm);
    TrainedGroup* groups[kMapGroups] = {&w.qkv, &w.o, &w.gate_up, &w.down};
    for (std::size_t j = 0; j < kMapGroups; ++j) *groups[j] = bind_group(layer, arch.maps[j]);
    layers.push_back(std::move(w));
  }
  if (parameters.find("latent_projection.linear1.weight")) {
    LatentProjection p;
    p.linear1 = bind_plain("latent_projection.linear1", true);
    p.linear2 = bind_plain("latent_projection.linear2", true);
    p.norm_w = tensor("latent_projection.norm.weight", p.dnorm_w);
    p.norm_b = tensor("latent_projection.norm.bias", p.dnorm_b);
    projection = p;
  }
  if (parameters.find("kv_projection.0.k.weight"))
    for (int64_t l = 0; l < shape.layers; ++l)
      kv_projection.push_back(
          {bind_plain(fmt::format("kv_projection.{}.k", l), false), bind_plain(fmt::format("kv_projection.{}.v", l), false)});
}

void Model::ensure_positions(int64_t count) {
  if (positions) {
    KAVA_CHECK(count <= positions.rows, "{} of {} positions", count, positions.rows);
    return;
  }
  if (count <= table_positions_) return;
  table_positions_ = std::max(count, 2 * table_positions_);
  const int64_t half = shape.head_dim / 2;
  std::vector<double> frequency(static_cast<std::size_t>(half));
  for (int64_t i = 0; i < half; ++i) {
    double f = std::pow(shape.rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(shape.head_dim));
    if (const RopeScaling& r = shape.rope; r.llama3) {
      const double length = static_cast<double>(r.original_max_position), wave = 2 * 3.14159265358979323846 / f;
      const double blend = (length / wave - r.low_freq_factor) / (r.high_freq_factor - r.low_freq_factor);
      if (wave > length / r.low_freq_factor) f /= r.factor;
      else if (wave >= length / r.high_freq_factor) f = (1 - blend) * f / r.factor + blend * f;
    }
    frequency[static_cast<std::size_t>(i)] = f;
  }
  const DType sum = sum_type(storage);
  cosine_ = Buffer(ops, sum, table_positions_, half), sine_ = Buffer(ops, sum, table_positions_, half);
  cosine = cosine_.tensor(), sine = sine_.tensor();
  for (const bool is_sine : {false, true}) {
    std::vector<double> x(static_cast<std::size_t>(table_positions_ * half));
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double angle = static_cast<double>(static_cast<int64_t>(i) / half) * frequency[i % static_cast<std::size_t>(half)];
      x[i] = is_sine ? std::sin(angle) : std::cos(angle);
    }
    from_host(ops, is_sine ? sine : cosine, x);
  }
}

}  // namespace kava
