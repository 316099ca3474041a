#include "models/model.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "engine/device/cpu/threads.h"
#include "engine/device/host.h"
#include "engine/files/files.h"
#include "engine/rng.h"
#include "models/recipe.h"

namespace kava {

namespace {

std::string layer_prefix(int64_t layer) { return fmt::format("model.layers.{}.", layer); }

std::string lora_path(int64_t layer, std::size_t map) { return "base_model.model." + layer_prefix(layer) + kLinearNames[map].path; }

struct MapShape {
  int64_t out, in;
};
using MapShapes = std::array<MapShape, 7>;  // in the order of kLinearNames

MapShapes map_shapes(const ModelConfig& m) {
  const int64_t C = m.hidden, F = m.mlp, q = m.heads * m.head_dim, kv = m.kv_heads * m.head_dim;
  return {{{q, C}, {kv, C}, {kv, C}, {C, q}, {F, C}, {F, C}, {C, F}}};
}

// Whether a weight or bias of the base is that of a map behind the first of its group.
bool follows_in_group(const std::string& name) {
  for (const GroupName& group : kGroups)
    for (std::size_t j = group.first + 1; j < group.last; ++j)
      if (name.find(std::string(kLinearNames[j].path) + ".") != std::string::npos) return true;
  return false;
}

// Numbers drawn for the start of one tensor: a stream of its own per name, so that adding a tensor changes no other.
class Stream {
 public:
  Stream(int64_t seed, const std::string& name) : key_(philox_key(Purpose::init, static_cast<uint64_t>(seed))) {
    uint64_t h = 0xcbf29ce484222325u;  // FNV-1a
    for (unsigned char c : name) h = (h ^ c) * 0x100000001b3u;
    name_ = {static_cast<uint32_t>(h), static_cast<uint32_t>(h >> 32)};
  }
  /// Normal numbers 4 i .. 4 i + 3.
  std::array<double, 4> normals(int64_t i) const {
    const auto w = words(i);
    const auto a = normal_pair(w[0], w[1]), b = normal_pair(w[2], w[3]);
    return {a[0], a[1], b[0], b[1]};
  }
  double uniform(int64_t i) const { return uniform01(words(i)[0]); }

 private:
  std::array<uint32_t, 4> words(int64_t i) const {
    return philox({static_cast<uint32_t>(i), static_cast<uint32_t>(i >> 32), name_[0], name_[1]}, key_);
  }
  std::array<uint32_t, 2> key_, name_{};
};

// Standard deviation of model.init = "random".
double random_std(const WeightSpec& spec, const ModelConfig& shape) {
  if (spec.name.ends_with("o_proj.weight") || spec.name.ends_with("down_proj.weight"))
    return 1 / std::sqrt(static_cast<double>(spec.cols)) / std::sqrt(2.0 * static_cast<double>(shape.layers));
  return 1 / std::sqrt(static_cast<double>(spec.cols));  // embedding and head: cols = C
}

bool is_norm(const std::string& name) { return name.ends_with("norm.weight"); }

std::vector<double> random_start(const WeightSpec& spec, const ModelConfig& shape, int64_t seed) {
  std::vector<double> x(static_cast<std::size_t>(spec.rows * spec.cols), is_norm(spec.name) ? 1.0 : 0.0);
  if (spec.vector) return x;
  const Stream stream(seed, spec.name);
  const double std = random_std(spec, shape);
  Threads threads(std::max(1, static_cast<int>(std::thread::hardware_concurrency())));
  threads.blocks(static_cast<int64_t>(x.size()), 1 << 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += 4) {
      const auto z = stream.normals(i / 4);
      for (int64_t j = i; j < std::min(end, i + 4); ++j) x[static_cast<std::size_t>(j)] = std * z[static_cast<std::size_t>(j - i)];
    }
  });
  return x;
}

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
      specs.push_back({w.name, w.rows, w.cols, w.vector, !w.vector, Start::base, follows_in_group(w.name)});
  } else {
    auto targeted = [&](const char* name) { return std::ranges::find(config.lora.targets, name) != config.lora.targets.end(); };
    const MapShapes maps = map_shapes(shape);
    const int64_t r = config.lora.rank;
    for (int64_t l = 0; l < shape.layers; ++l)
      for (const GroupName& group : kGroups) {
        std::vector<std::size_t> targets;
        for (std::size_t j = group.first; j < group.last; ++j)
          if (targeted(kLinearNames[j].short_name)) targets.push_back(j);
        for (std::size_t j : targets)
          specs.push_back({lora_path(l, j) + ".lora_A.weight", r, maps[j].in, false, true, Start::lora_a, j != targets[0]});
        for (std::size_t j : targets) specs.push_back({lora_path(l, j) + ".lora_B.weight", maps[j].out, r, false, true, Start::zero});
      }
  }
  if (!recipe_of(config).markers) return specs;
  specs.push_back({"new_tokens.weight", 3, C, false, true, Start::mean_embedding});
  if (config.latent.projection) {
    for (const char* linear : {"linear1", "linear2"}) {
      specs.push_back({fmt::format("latent_projection.{}.weight", linear), C, C, false, true, Start::normal});
      specs.push_back({fmt::format("latent_projection.{}.bias", linear), 1, C, true, false, Start::zero});
    }
    const Start gain = config.latent.projection_init == ProjectionInit::one ? Start::one : Start::embedding_rms;
    specs.push_back({"latent_projection.norm.weight", 1, C, true, false, gain});
    specs.push_back({"latent_projection.norm.bias", 1, C, true, false, Start::zero});
  }
  if (config.kv.projection)
    for (int64_t l = 0; l < shape.layers; ++l)
      for (const char* which : {"k", "v"})
        specs.push_back({fmt::format("kv_projection.{}.{}.weight", l, which), D, D, false, true, Start::identity});
  return specs;
}

Model::Model(Ops& o, const RunConfig& c, const ModelConfig& s, Values values)
    : ops(o), config(c), shape(s), storage(storage_of(c.model.dtype)), parameters(o, storage_of(c.model.dtype)) {
  std::optional<WeightFiles> files;
  if (values == Values::set && config.model.init == Init::pretrained) {
    files = WeightFiles::open(config.model.path, shape);
    base_digest = sha256(read_file(shape.source, std::size_t{64} << 20) + files->header_text());
  }
  const std::vector<TrainableSpec> specs = trainable_specs(config, shape);
  for (const TrainableSpec& t : specs) parameters.add(t.name, t.rows, t.cols, t.vector, t.decay, t.joined);
  parameters.allocate();
  if (config.train.trainable != Trainable::all) allocate_groups();
  for (const WeightSpec& w : weight_specs(shape)) {
    const Parameter* trained = parameters.find(w.name);
    const auto packed = std::ranges::find(frozen_, w.name, &std::pair<std::string, Tensor>::first);
    const Tensor to = trained                   ? trained->value
                      : packed != frozen_.end() ? packed->second
                                                : frozen_.emplace_back(w.name, allocate(storage, w.rows, w.cols)).second;
    if (values == Values::set) read_value(w, files ? &*files : nullptr, to);
  }
  parameters.refresh();
  bind();
  if (values == Values::none) return;
  set_starts(specs);
  parameters.refresh();
}

Model::~Model() {
  for (auto [data, bytes] : owned_) ops.release(data, bytes);
}

Tensor Model::allocate(DType dtype, int64_t rows, int64_t cols) {
  const int64_t bytes = rows * cols * size_of(dtype);
  Tensor t{ops.allocate(bytes), dtype, rows, cols, cols};
  owned_.emplace_back(t.data, bytes);
  return t;
}

void Model::read_value(const WeightSpec& spec, const WeightFiles* files, const Tensor& to) {
  if (!files) return from_host(ops, to, random_start(spec, shape, config.seed));
  std::vector<char> host(static_cast<std::size_t>(to.count() * size_of(to.dtype)));
  files->read(spec, host.data(), to.dtype);
  ops.upload(to, host.data());
}

// The packed tensors of frozen maps; each map's own rows get their values by its name.
void Model::allocate_groups() {
  const MapShapes maps = map_shapes(shape);
  for (int64_t l = 0; l < shape.layers; ++l)
    for (const GroupName& group : kGroups) {
      int64_t outs = 0, ranks = 0;
      for (std::size_t j = group.first; j < group.last; ++j) {
        outs += maps[j].out;
        if (const Parameter* a = parameters.find(lora_path(l, j) + ".lora_A.weight")) ranks += a->rows;
      }
      const int64_t in = maps[group.first].in;
      const std::string prefix = layer_prefix(l);
      const Tensor joined = allocate(storage, outs, in + ranks);
      const bool biased = shape.qkv_bias && group.first == 0;
      const Tensor bias = biased ? allocate(storage, 1, outs) : Tensor{};
      for (std::size_t j = group.first, at = 0; j < group.last; ++j) {
        const auto begin = static_cast<int64_t>(at), end = begin + maps[j].out;
        frozen_.emplace_back(prefix + kLinearNames[j].path + ".weight", joined.row_range(begin, end).col_range(0, in));
        if (bias) frozen_.emplace_back(prefix + kLinearNames[j].path + ".bias", bias.col_range(begin, end));
        at = static_cast<std::size_t>(end);
      }
    }
}

TrainedGroup Model::bind_group(const std::string& prefix, const GroupName& group) {
  auto tensor = [&](const std::string& name, Tensor& grad) { return named_tensor(parameters, frozen_, name, grad); };
  TrainedGroup g;
  int64_t outs = 0, ranks = 0;
  Tensor w, a, bias, dw, da, dbias;  // of the first map that has one
  for (std::size_t j = group.first; j < group.last; ++j) {
    const std::string path = prefix + kLinearNames[j].path, lora = "base_model.model." + path;
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
  embedding = tensor("model.embed_tokens.weight", dembedding);
  final_norm = tensor("model.norm.weight", dfinal_norm);
  if (shape.tied) head = embedding, dhead = dembedding;
  else head = tensor("lm_head.weight", dhead);
  new_tokens = tensor("new_tokens.weight", dnew_tokens);
  for (int64_t l = 0; l < shape.layers; ++l) {
    LayerWeights w;
    const std::string prefix = layer_prefix(l);
    w.norm1 = tensor(prefix + "input_layernorm.weight", w.dnorm1);
    w.norm2 = tensor(prefix + "post_attention_layernorm.weight", w.dnorm2);
    TrainedGroup* groups[4] = {&w.qkv, &w.o, &w.gate_up, &w.down};
    for (std::size_t j = 0; j < 4; ++j) *groups[j] = bind_group(prefix, kGroups[j]);
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

void Model::set_starts(const std::vector<TrainableSpec>& specs) {
  using Start = TrainableSpec::Start;
  std::vector<double> table;  // the embedding, read once for those starts that need it
  if (std::ranges::any_of(specs,
                          [](const TrainableSpec& t) { return t.start == Start::mean_embedding || t.start == Start::embedding_rms; }))
    table = to_host(ops, embedding);
  const int64_t C = shape.hidden;
  for (const TrainableSpec& t : specs) {
    if (t.start == Start::base || t.start == Start::zero) continue;
    std::vector<double> x(static_cast<std::size_t>(t.rows * t.cols), 0.0);
    const Stream stream(config.seed, t.name);
    const double bound = 1 / std::sqrt(static_cast<double>(t.cols));
    for (std::size_t i = 0; i < x.size(); ++i) {
      const int64_t at = static_cast<int64_t>(i);
      if (t.start == Start::lora_a) x[i] = (2 * stream.uniform(at) - 1) * bound;
      if (t.start == Start::normal) x[i] = shape.initializer_range * stream.normals(at / 4)[i % 4];
      if (t.start == Start::one) x[i] = 1;
      if (t.start == Start::identity) x[i] = at / t.cols == at % t.cols ? 1 : 0;
    }
    if (t.start == Start::mean_embedding) {
      std::vector<double> mean(static_cast<std::size_t>(C), 0.0);
      for (std::size_t i = 0; i < table.size(); ++i) mean[i % static_cast<std::size_t>(C)] += table[i];
      for (std::size_t i = 0; i < x.size(); ++i) x[i] = mean[i % static_cast<std::size_t>(C)] / static_cast<double>(shape.vocab);
    }
    if (t.start == Start::embedding_rms) {
      double square = 0;
      for (double v : table) square += v * v;
      std::ranges::fill(x, std::sqrt(square / static_cast<double>(table.size())));
    }
    parameters.set(t.name, x);
  }
}

void Model::ensure_positions(int64_t positions) {
  if (positions <= positions_) return;
  positions_ = std::max(positions, 2 * positions_);
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
  cosine = allocate(sum, positions_, half), sine = allocate(sum, positions_, half);
  for (const bool is_sine : {false, true}) {
    std::vector<double> x(static_cast<std::size_t>(positions_ * half));
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double angle = static_cast<double>(static_cast<int64_t>(i) / half) * frequency[i % static_cast<std::size_t>(half)];
      x[i] = is_sine ? std::sin(angle) : std::cos(angle);
    }
    from_host(ops, is_sine ? sine : cosine, x);
  }
}

}  // namespace kava
