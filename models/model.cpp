#include "models/model.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "engine/device/cpu/threads.h"
#include "engine/device/host.h"
#include "engine/files/files.h"
#include "engine/rng.h"

namespace kava {

namespace {

std::string layer_prefix(int64_t layer) { return fmt::format("model.layers.{}.", layer); }

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

}  // namespace

DType storage_of(StorageType t) { return t == StorageType::bf16 ? DType::bf16 : t == StorageType::f32 ? DType::f32 : DType::f64; }

std::vector<TrainableSpec> trainable_specs(const RunConfig& config, const ModelConfig& shape) {
  using Start = TrainableSpec::Start;
  std::vector<TrainableSpec> specs;
  const int64_t C = shape.hidden, D = shape.head_dim;
  if (config.train.trainable == Trainable::all) {
    for (const WeightSpec& w : weight_specs(shape)) specs.push_back({w.name, w.rows, w.cols, w.vector, !w.vector, Start::base});
  } else {
    auto targeted = [&](const char* name) { return std::ranges::find(config.lora.targets, name) != config.lora.targets.end(); };
    const int64_t q = shape.heads * D, kv = shape.kv_heads * D, F = shape.mlp, r = config.lora.rank;
    const int64_t out[7] = {q, kv, kv, C, F, F, C}, in[7] = {C, C, C, q, C, C, F};
    for (int64_t l = 0; l < shape.layers; ++l)
      for (int j = 0; j < 7; ++j) {
        if (!targeted(kLinearNames[j].short_name)) continue;
        const std::string name = "base_model.model." + layer_prefix(l) + kLinearNames[j].path;
        specs.push_back({name + ".lora_A.weight", r, in[j], false, true, Start::lora_a});
        specs.push_back({name + ".lora_B.weight", out[j], r, false, true, Start::zero});
      }
  }
  if (!has_latents(config.method)) return specs;
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
  for (const TrainableSpec& t : specs) parameters.add(t.name, t.rows, t.cols, t.vector, t.decay);
  parameters.allocate();
  for (const WeightSpec& w : weight_specs(shape)) {
    const Parameter* trained = parameters.find(w.name);
    const Tensor to = trained ? trained->value : frozen_.emplace_back(w.name, allocate(storage, w.rows, w.cols)).second;
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

TrainedLinear Model::bind_linear(const std::string& path, const std::string& lora_path, bool bias) {
  auto tensor = [&](const std::string& name, Tensor& grad) { return named_tensor(parameters, frozen_, name, grad); };
  TrainedLinear l;
  l.map.w = tensor(path + ".weight", l.grad.dw);
  if (bias) l.map.bias = tensor(path + ".bias", l.grad.dbias);
  if (!lora_path.empty()) {
    l.map.lora_a = tensor(lora_path + ".lora_A.weight", l.grad.dlora_a);
    l.map.lora_b = tensor(lora_path + ".lora_B.weight", l.grad.dlora_b);
    if (l.map.lora_a) l.map.scale = config.lora.alpha / static_cast<double>(config.lora.rank);
  }
  return l;
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
    TrainedLinear* maps[7] = {&w.q, &w.k, &w.v, &w.o, &w.gate, &w.up, &w.down};
    for (int j = 0; j < 7; ++j) {
      const std::string path = prefix + kLinearNames[j].path;
      *maps[j] = bind_linear(path, "base_model.model." + path, shape.qkv_bias && j < 3);
    }
    layers.push_back(std::move(w));
  }
  if (parameters.find("latent_projection.linear1.weight")) {
    LatentProjection p;
    p.linear1 = bind_linear("latent_projection.linear1", "", true);
    p.linear2 = bind_linear("latent_projection.linear2", "", true);
    p.norm_w = tensor("latent_projection.norm.weight", p.dnorm_w);
    p.norm_b = tensor("latent_projection.norm.bias", p.dnorm_b);
    projection = p;
  }
  if (parameters.find("kv_projection.0.k.weight"))
    for (int64_t l = 0; l < shape.layers; ++l)
      kv_projection.push_back(
          {bind_linear(fmt::format("kv_projection.{}.k", l), "", false), bind_linear(fmt::format("kv_projection.{}.v", l), "", false)});
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
