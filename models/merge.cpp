#include "models/merge.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <vector>

#include "engine/device/rounding.h"
#include "engine/files/json.h"
#include "engine/files/paths.h"
#include "engine/files/safetensors.h"
#include "models/adapter.h"
#include "models/peft_config.h"
#include "models/upstream.h"
#include "models/weights.h"

namespace kava {

namespace {

namespace fs = std::filesystem;

constexpr std::string_view kA = ".lora_A.weight", kB = ".lora_B.weight";

[[noreturn]] void other_base(const std::string& file, const std::string& what) {
  throw Error(Exit::data, shown_path(file), what, "merge an adapter into the base that it was trained on");
}

struct Lora {
  const TensorInfo *a = nullptr, *b = nullptr;
};

// An adapter's file, with its pairs by the full name of their module.
class AdapterTensors {
 public:
  explicit AdapterTensors(const std::string& folder) {
    std::map<std::string, const TensorInfo*> named;
    if (UpstreamAdapter::is_at(folder)) {
      upstream_ = UpstreamAdapter::open(folder);
      for (const auto& [name, t] : upstream_->tensors())
        if (name.starts_with(kLoraPrefix)) named[name] = t;
    } else {
      peft_ = open_adapter_file(folder);
      for (const TensorInfo& t : peft_->tensors()) named[t.name] = &t;
    }
    for (const auto& [name, t] : named) add(name, *t);
    for (const auto& [name, m] : modules_)
      if (!m.a || !m.b || m.a->shape[0] != m.b->shape[1])
        other_base(file().path(), "lora_A and lora_B of " + escaped(name) + " do not belong together");
  }

  const SafetensorsFile& file() const { return upstream_ ? upstream_->file() : *peft_; }
  const std::map<std::string, Lora>& modules() const { return modules_; }
  const std::optional<UpstreamAdapter>& upstream() const { return upstream_; }

 private:
  void add(const std::string& name, const TensorInfo& t) {
    const bool a = name.ends_with(kA), b = name.ends_with(kB);
    if (!name.starts_with(kLoraPrefix) || (!a && !b))
      unsupported(file().path(), "tensor " + escaped(name) + " is no part of LoRA on whole linears");
    if (t.shape.size() != 2 || !SafetensorsFile::is_floating(t)) other_base(file().path(), "tensor " + escaped(name) + " is no matrix");
    Lora& m = modules_[name.substr(kLoraPrefix.size(), name.size() - kLoraPrefix.size() - kA.size())];
    (a ? m.a : m.b) = &t;
  }

  std::optional<SafetensorsFile> peft_;
  std::optional<UpstreamAdapter> upstream_;
  std::map<std::string, Lora> modules_;
};

// A model saved without its head lacks the first part of its names.
const Lora* find_lora(const std::map<std::string, Lora>& modules, const std::string& tensor) {
  constexpr std::string_view end = ".weight";
  if (!tensor.ends_with(end)) return nullptr;
  const std::string module = tensor.substr(0, tensor.size() - end.size());
  for (const char* prefix : {"", "model.", "transformer."})
    if (const auto at = modules.find(prefix + module); at != modules.end()) return &at->second;
  return nullptr;
}

std::vector<double> values(const SafetensorsFile& file, const TensorInfo& t) {
  std::vector<double> out(static_cast<std::size_t>(t.count()));
  file.read_as(t, DType::f64, out.data(), true);
  return out;
}

// One weight with its pair.
class Product {
 public:
  Product(const SafetensorsFile& adapter, const Lora& lora, double scale, bool transposed)
      : a_(values(adapter, *lora.a)),
        b_(values(adapter, *lora.b)),
        rank_(lora.a->shape[0]),
        in_(lora.a->shape[1]),
        out_(lora.b->shape[0]),
        scale_(scale),
        transposed_(transposed) {}

  /// Adds scale B A to a row of the weight as it is stored.
  void add_to(double* w, int64_t row) const {
    if (transposed_) {
      for (int64_t o = 0; o < out_; ++o) {
        double sum = 0;
        for (int64_t k = 0; k < rank_; ++k) sum += b(o, k) * a(k, row);
        w[o] += scale_ * sum;
      }
      return;
    }
    for (int64_t k = 0; k < rank_; ++k) {
      const double factor = scale_ * b(row, k);
      for (int64_t i = 0; i < in_; ++i) w[i] += factor * a(k, i);
    }
  }

 private:
  double a(int64_t k, int64_t i) const { return a_[static_cast<std::size_t>(k * in_ + i)]; }
  double b(int64_t o, int64_t k) const { return b_[static_cast<std::size_t>(o * rank_ + k)]; }

  std::vector<double> a_, b_;
  int64_t rank_, in_, out_;
  double scale_;
  bool transposed_;
};

struct Source {
  const SafetensorsFile* weights;
  const TensorInfo* tensor;      // may have more rows than are taken
  std::vector<int64_t> shape{};  // of what is taken
  const SafetensorsFile* adapter = nullptr;
  const Lora* lora = nullptr;
  const std::map<int64_t, TensorRow>* rows = nullptr;  // of the adapter, in the place of these
};

// The tensor as it is, but for rows of the adapter's own.
void fill_plain(const Source& source, DType type, void* out) {
  int64_t count = 1;
  for (const int64_t dim : source.shape) count *= dim;
  source.weights->read_as(*source.tensor, 0, count, type, out, true);
  if (!source.rows) return;
  const int64_t cols = source.shape[1];
  for (const auto& [id, row] : *source.rows)
    source.adapter->read_as(*row.tensor, row.row * cols, cols, type, static_cast<char*>(out) + id * cols * size_of(type), true);
}

// Error(code numeric) where the product of an adapter makes a value that is not finite.
void fill_merged(Ops& ops, const Source& source, const MergeInput& input, DType type, void* out) {
  if (!source.lora) return fill_plain(source, type, out);
  const Product product(*source.adapter, *source.lora, input.scale, input.transposed);
  const int64_t cols = source.shape[1];
  std::atomic<bool> finite = true;
  ops.on_host(source.shape[0], [&](int64_t row) {
    std::vector<double> w(static_cast<std::size_t>(cols));
    source.weights->read_as(*source.tensor, row * cols, cols, DType::f64, w.data(), true);
    product.add_to(w.data(), row);
    for (int64_t i = 0; i < cols; ++i) {
      const double x = w[static_cast<std::size_t>(i)];
      float stored = static_cast<float>(x);
      if (type == DType::bf16) stored = to_float(static_cast<bf16*>(out)[row * cols + i] = to_bf16(round_to_odd(x)));
      else static_cast<float*>(out)[row * cols + i] = stored;
      if (!std::isfinite(stored)) finite = false;
    }
  });
  if (!finite)
    throw Error(Exit::numeric, shown_path(source.adapter->path()),
                "the sum of " + escaped(source.tensor->name) + " and its LoRA is not finite", "merge an earlier checkpoint");
}

// What an adapter of PCCoT or CODI holds of the base, in the place of the base's own.
class UpstreamBase {
 public:
  UpstreamBase(const UpstreamAdapter& adapter, const ModelConfig& shape) : adapter_(adapter), shape_(shape), rows_(adapter.rows(shape)) {
    for (WeightSpec& spec : weight_specs(shape)) specs_.emplace(spec.name, std::move(spec));
    embedding_ = shape.architecture().prefix + shape.architecture().embedding + ".weight";
  }

  /// name: of the tensor in a model with its head.
  void replace(Source& source, const std::string& name) const {
    const std::string own = shape_.tied && name == kHeadName ? embedding_ : name;
    source.adapter = &adapter_.file();
    if (own == embedding_) source.rows = &rows_.embedding;
    if (adapter_.program() != UpstreamAdapter::Program::codi) return;
    source.weights = &adapter_.file(), source.tensor = adapter_.base_tensor(specs_.at(own), shape_);
    if (!source.tensor) other_base(adapter_.file().path(), "has no tensor for " + own);
  }

 private:
  const UpstreamAdapter& adapter_;
  const ModelConfig& shape_;
  UpstreamAdapter::Rows rows_;
  std::map<std::string, WeightSpec> specs_;
  std::string embedding_;
};

}  // namespace

std::string peft_base(const std::string& adapter) {
  const std::string path = path_in(adapter, "adapter_config.json");
  const Json json = read_json(path, std::size_t{1} << 20);
  const Json base = json.is_object() ? json.value("base_model_name_or_path", Json()) : Json();
  if (!base.is_string() || base.get_ref<const std::string&>().empty())
    throw Error(Exit::data, shown_path(path), "names no base_model_name_or_path",
                "name the base with --base DIR; one that model.init = \"random\" drew lies in no folder");
  return base.get<std::string>();
}

MergeInput peft_merge_input(const std::string& adapter, const std::string& base) {
  const std::string path = path_in(adapter, "adapter_config.json");
  const Json json = read_json(path, std::size_t{1} << 20);
  auto number = [&](const char* key) {
    const Json value = json.is_object() ? json.value(key, Json()) : Json();
    if (!value.is_number() || !(value.get<double>() > 0) || value.get<double>() > 1e9)
      other_base(path, fmt::format("{} is missing or no positive number", key));
    return value.get<double>();
  };
  const ModelConfig shape = ModelConfig::load(base);
  RunConfig config;
  config.lora.rank = static_cast<int64_t>(number("r")), config.lora.alpha = number("lora_alpha");
  config.lora.targets.clear();
  std::set<std::string> targets;
  const AdapterTensors tensors(adapter);
  for (const auto& [module, pair] : tensors.modules()) {
    if (pair.a->shape[0] != config.lora.rank) other_base(tensors.file().path(), fmt::format("the rank of {} is not r", escaped(module)));
    for (const auto& group : shape.architecture().maps)
      for (const LinearSpec& map : group)
        if (names_map(map.path, module)) targets.insert(map.path);
  }
  config.lora.targets.assign(targets.begin(), targets.end());
  check_peft_config(config, shape, path, tensors.upstream() ? tensors.upstream()->config_keys() : std::set<std::string>());
  return {base, base, adapter, config.lora.alpha / static_cast<double>(config.lora.rank), shape.architecture().transposed};
}

MergeInput codi_merge_input(const std::string& adapter, const std::string& base, const RunConfig& config) {
  if (!UpstreamAdapter::is_at(adapter)) mismatch(path_in(adapter, "adapter_config.json"), "is not there");
  const AdapterTensors tensors(adapter);
  for (const auto& [module, pair] : tensors.modules())
    if (pair.a->shape[0] != config.lora.rank)
      mismatch(tensors.file().path(), fmt::format("the rank of {} is not lora.rank", escaped(module)));
  const bool transposed = ModelConfig::load(base).architecture().transposed;
  return {base, base, adapter, config.lora.alpha / static_cast<double>(config.lora.rank), transposed};
}

void write_merged(Ops& ops, const MergeInput& input, DType type, FolderWriter& out) {
  const ModelConfig shape = ModelConfig::load(input.weights);
  const WeightFiles checked = WeightFiles::open(input.weights, shape);
  std::vector<SafetensorsFile> files;
  for (const std::string& path : checked.paths()) files.push_back(SafetensorsFile::open(path));
  std::optional<AdapterTensors> adapter;
  std::optional<UpstreamBase> upstream;
  if (!input.adapter.empty()) adapter.emplace(input.adapter);
  if (adapter && adapter->upstream()) upstream.emplace(*adapter->upstream(), shape);
  std::vector<TensorOut> tensors;
  std::size_t merged = 0;
  for (const SafetensorsFile& file : files)
    for (const TensorInfo& t : file.tensors()) {
      if (checked.passes_over(t.name)) continue;
      Source source{&file, &t, t.shape};
      if (upstream) upstream->replace(source, checked.name_with_prefix(t.name));
      if (const Lora* lora = adapter ? find_lora(adapter->modules(), t.name) : nullptr) {
        std::vector<int64_t> product = {lora->b->shape[0], lora->a->shape[1]};
        if (input.transposed) std::swap(product[0], product[1]);
        if (t.shape != product) other_base(adapter->file().path(), "LoRA of " + escaped(t.name) + " has another shape than the base");
        source.adapter = &adapter->file(), source.lora = lora;
        ++merged;
      }
      tensors.push_back({checked.name_with_prefix(t.name), type == DType::bf16 ? "BF16" : "F32", t.shape, nullptr,
                         [&ops, &input, source, type](void* to) { fill_merged(ops, source, input, type, to); }});
    }
  if (adapter && merged != adapter->modules().size())
    other_base(adapter->file().path(), "holds LoRA of a module that the base does not have");
  write_base_files(input.base, type, out, "");
  FileWriter file = out.file("model.safetensors");
  write_safetensors(file, std::move(tensors));
}

}  // namespace kava
