#include "models/merge.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "engine/device/rounding.h"
#include "engine/files/json.h"
#include "engine/files/paths.h"
#include "engine/files/safetensors.h"
#include "models/adapter.h"
#include "models/peft_config.h"
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

// The adapter's pairs by the full name of their module.
std::map<std::string, Lora> lora_of(const SafetensorsFile& file) {
  std::map<std::string, Lora> modules;
  for (const TensorInfo& t : file.tensors()) {
    const bool a = t.name.ends_with(kA), b = t.name.ends_with(kB);
    if (!t.name.starts_with(kLoraPrefix) || (!a && !b)) other_base(file.path(), "tensor " + escaped(t.name) + " is no part of LoRA");
    if (t.shape.size() != 2 || !SafetensorsFile::is_floating(t)) other_base(file.path(), "tensor " + escaped(t.name) + " is no matrix");
    Lora& m = modules[t.name.substr(kLoraPrefix.size(), t.name.size() - kLoraPrefix.size() - kA.size())];
    (a ? m.a : m.b) = &t;
  }
  for (const auto& [name, m] : modules)
    if (!m.a || !m.b || m.a->shape[0] != m.b->shape[1])
      other_base(file.path(), "lora_A and lora_B of " + escaped(name) + " do not belong together");
  return modules;
}

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
  const TensorInfo* tensor;
  const SafetensorsFile* adapter;
  const Lora* lora;
};

void fill_merged(Ops& ops, const Source& source, const MergeInput& input, DType type, void* out) {
  const TensorInfo& t = *source.tensor;
  if (!source.lora) return source.weights->read_as(t, type, out, true);
  const Product product(*source.adapter, *source.lora, input.scale, input.transposed);
  const int64_t cols = t.shape[1];
  ops.on_host(t.shape[0], [&](int64_t row) {
    std::vector<double> w(static_cast<std::size_t>(cols));
    source.weights->read_as(t, row * cols, cols, DType::f64, w.data(), true);
    product.add_to(w.data(), row);
    for (int64_t i = 0; i < cols; ++i) {
      const double x = w[static_cast<std::size_t>(i)];
      if (type == DType::bf16) static_cast<bf16*>(out)[row * cols + i] = to_bf16(round_to_odd(x));
      else static_cast<float*>(out)[row * cols + i] = static_cast<float>(x);
    }
  });
}

}  // namespace

std::string peft_base(const std::string& adapter) {
  const std::string path = path_in(adapter, "adapter_config.json");
  const Json json = read_json(path, std::size_t{1} << 20);
  const Json base = json.is_object() ? json.value("base_model_name_or_path", Json()) : Json();
  if (!base.is_string() || base.get_ref<const std::string&>().empty())
    throw Error(Exit::data, shown_path(path), "names no base_model_name_or_path", "name the base with --base DIR");
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
  const SafetensorsFile file = SafetensorsFile::open(path_in(adapter, "adapter_model.safetensors"));
  for (const auto& [module, pair] : lora_of(file)) {
    if (pair.a->shape[0] != config.lora.rank) other_base(file.path(), fmt::format("the rank of {} is not r", escaped(module)));
    for (const auto& group : shape.architecture().maps)
      for (const LinearSpec& map : group)
        if (names_map(map.path, module)) targets.insert(map.path);
  }
  config.lora.targets.assign(targets.begin(), targets.end());
  check_peft_config(config, shape, path);
  return {base, base, adapter, config.lora.alpha / static_cast<double>(config.lora.rank), shape.architecture().transposed};
}

void write_merged(Ops& ops, const MergeInput& input, DType type, FolderWriter& out) {
  const ModelConfig shape = ModelConfig::load(input.weights);
  const WeightFiles checked = WeightFiles::open(input.weights, shape);
  std::vector<SafetensorsFile> files;
  for (const std::string& path : checked.paths()) files.push_back(SafetensorsFile::open(path));
  std::unique_ptr<SafetensorsFile> adapter;
  std::map<std::string, Lora> modules;
  if (!input.adapter.empty()) {
    adapter = std::make_unique<SafetensorsFile>(SafetensorsFile::open(path_in(input.adapter, "adapter_model.safetensors")));
    modules = lora_of(*adapter);
  }
  std::vector<TensorOut> tensors;
  std::size_t merged = 0;
  for (const SafetensorsFile& file : files)
    for (const TensorInfo& t : file.tensors()) {
      if (checked.passes_over(t.name)) continue;
      const Lora* lora = find_lora(modules, t.name);
      if (lora) {
        std::vector<int64_t> shape = {lora->b->shape[0], lora->a->shape[1]};
        if (input.transposed) std::swap(shape[0], shape[1]);
        if (t.shape != shape) other_base(adapter->path(), "LoRA of " + escaped(t.name) + " has another shape than the base");
        ++merged;
      }
      const Source source{&file, &t, adapter.get(), lora};
      tensors.push_back({checked.name_with_prefix(t.name), type == DType::bf16 ? "BF16" : "F32", t.shape, nullptr,
                         [&ops, &input, source, type](void* to) { fill_merged(ops, source, input, type, to); }});
    }
  if (merged != modules.size()) other_base(adapter->path(), "holds LoRA of a module that the base does not have");
  write_base_files(input.base, type, out, "");
  FileWriter file = out.file("model.safetensors");
  write_safetensors(file, std::move(tensors));
}

}  // namespace kava
