#include "models/adapter.h"

#include <filesystem>
#include <set>

#include "engine/files/files.h"
#include "engine/files/json.h"
#include "engine/files/safetensors.h"
#include "models/recipe.h"

namespace kava {

namespace {

namespace fs = std::filesystem;

constexpr std::string_view kLoraPrefix = "base_model.model.";

bool is_kava_tensor(const std::string& name) {
  return name.starts_with("new_tokens.") || name.starts_with("latent_projection.") || name.starts_with("kv_projection.");
}
bool is_lora_tensor(const std::string& name) { return name.starts_with(kLoraPrefix); }

[[noreturn]] void mismatch(const std::string& file, const std::string& what) {
  throw Error(Exit::data, file, what, "use the configuration that the adapter was trained with");
}

// Reads those parameters that `belongs` says are in this file; the file must hold exactly them.
template <class Belongs>
void load_file(Model& model, const std::string& path, Belongs belongs) {
  const SafetensorsFile file = SafetensorsFile::open(path);
  std::size_t found = 0;
  for (const Parameter& p : model.parameters.all()) {
    if (!belongs(p.name)) continue;
    const TensorInfo* t = file.find(p.name);
    if (!t) mismatch(path, fmt::format("tensor {} is missing", p.name));
    if (t->shape != p.file_shape())
      mismatch(path, fmt::format("tensor {} has shape {}, the configuration asks for {}", p.name, shape_text(t->shape),
                                 shape_text(p.file_shape())));
    ++found;
    std::vector<char> host(static_cast<std::size_t>(p.rows * p.cols * size_of(p.value.dtype)));
    file.read_as(*t, p.value.dtype, host.data(), true);
    model.ops.upload(p.value, host.data());
  }
  if (found == file.tensors().size()) return;
  for (const TensorInfo& t : file.tensors())
    if (!model.parameters.find(t.name) || !belongs(t.name))
      mismatch(path, fmt::format("tensor {} is not part of this run's trainables", escaped(t.name)));
}

void check_number(const Json& json, const std::string& path, const char* key, double wanted, const char* config_key) {
  auto it = json.find(key);
  if (it == json.end() || !it->is_number()) mismatch(path, fmt::format("{} is missing or no number", key));
  if (it->get<double>() != wanted) mismatch(path, fmt::format("{} = {} contradicts {} = {}", key, escaped(it->dump()), config_key, wanted));
}

void check_adapter_config(const RunConfig& config, const std::string& path) {
  const Json json = read_json(path, std::size_t{1} << 20);
  if (!json.is_object()) mismatch(path, "not a JSON object");
  if (json.value("peft_type", Json()) != "LORA") mismatch(path, "peft_type is not \"LORA\"");
  check_number(json, path, "r", static_cast<double>(config.lora.rank), "lora.rank");
  check_number(json, path, "lora_alpha", config.lora.alpha, "lora.alpha");
  auto targets = json.find("target_modules");
  std::set<std::string> found, wanted(config.lora.targets.begin(), config.lora.targets.end());
  if (targets == json.end() || !targets->is_array()) mismatch(path, "target_modules is missing or no list");
  for (const Json& t : *targets) {
    if (!t.is_string()) mismatch(path, "target_modules holds something that is no string");
    found.insert(t.get<std::string>());
  }
  if (found != wanted)
    mismatch(path, fmt::format("target_modules = {} contradicts lora.targets = {}", escaped(targets->dump(), 200),
                               escaped(Json(wanted).dump(), 200)));
  auto off = [](const Json& v) {
    return v.is_null() || v == false || v == "" || v == "none" || ((v.is_array() || v.is_object()) && v.empty());
  };
  for (const char* key : {"use_rslora",
                          "use_dora",
                          "rank_pattern",
                          "alpha_pattern",
                          "layers_to_transform",
                          "layers_pattern",
                          "modules_to_save",
                          "fan_in_fan_out",
                          "trainable_token_indices",
                          "layer_replication",
                          "bias",
                          "lora_bias",
                          "exclude_modules",
                          "use_qalora",
                          "target_parameters",
                          "megatron_config",
                          "corda_config",
                          "eva_config",
                          "alora_invocation_tokens",
                          "use_bdlora",
                          "arrow_config",
                          "kasa_config",
                          "velora_config",
                          "monteclora_config",
                          "lora_ga_config"})
    if (auto it = json.find(key); it != json.end() && !off(*it))
      mismatch(path, fmt::format("{} = {} is not supported", key, escaped(it->dump())));
  // The other ways to begin (pissa, olora, ...) take their start from the base's weights, which PEFT does again when it loads the adapter.
  const Json start = json.value("init_lora_weights", Json(true));
  if (!start.is_boolean() && !start.is_null() && start != "gaussian" && start != "orthogonal" && start != "eva")
    mismatch(path, fmt::format("init_lora_weights = {} is not supported", escaped(start.dump())));
}

Json adapter_config(const Model& model) {
  const RunConfig& c = model.config;
  return {{"peft_type", "LORA"},
          {"task_type", "CAUSAL_LM"},
          {"base_model_name_or_path", c.model.path},
          {"r", c.lora.rank},
          {"lora_alpha", c.lora.alpha == static_cast<double>(static_cast<int64_t>(c.lora.alpha)) ? Json(static_cast<int64_t>(c.lora.alpha))
                                                                                                 : Json(c.lora.alpha)},
          {"lora_dropout", c.lora.dropout},
          {"target_modules", c.lora.targets},
          {"bias", "none"},
          {"fan_in_fan_out", false},
          {"inference_mode", true},
          {"init_lora_weights", true},
          {"modules_to_save", nullptr},
          {"rank_pattern", Json::object()},
          {"alpha_pattern", Json::object()},
          {"use_dora", false},
          {"use_rslora", false},
          {"layers_to_transform", nullptr},
          {"layers_pattern", nullptr},
          {"revision", nullptr}};
}

// f32 copies of parameters for a file.
struct FileTensors {
  std::vector<std::vector<float>> values;
  std::vector<TensorOut> tensors;
};

template <class Belongs>
FileTensors collect(const Model& model, Belongs belongs) {
  FileTensors out;
  for (const Parameter& p : model.parameters.all()) {
    if (!belongs(p.name)) continue;
    const std::vector<double> host = model.parameters.get(p.value);
    out.values.emplace_back(host.begin(), host.end());
    out.tensors.push_back({p.name, "F32", p.file_shape(), nullptr});
  }
  for (std::size_t i = 0; i < out.tensors.size(); ++i) out.tensors[i].data = out.values[i].data();
  return out;
}

std::string path_in(const std::string& folder, const char* name) { return (fs::path(folder) / name).string(); }

void copy_base_files(const Model& model, const std::string& folder) {
  for (const char* name : {"config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"}) {
    const std::string from = path_in(model.config.model.path, name);
    if (is_there(from)) write_file(path_in(folder, name), read_file(from, std::size_t{256} << 20));
  }
}

}  // namespace

void load_adapter(Model& model, const std::string& folder) {
  const bool all = model.config.train.trainable == Trainable::all;
  if (all) {
    const ModelConfig shape = ModelConfig::load(folder);
    const WeightFiles files = WeightFiles::open(folder, model.shape);
    for (const WeightSpec& w : weight_specs(model.shape)) {
      const Parameter& p = model.parameters.at(w.name);
      std::vector<char> host(static_cast<std::size_t>(p.rows * p.cols * size_of(p.value.dtype)));
      files.read(w, host.data(), p.value.dtype);
      model.ops.upload(p.value, host.data());
    }
    if (shape.rope_theta != model.shape.rope_theta || shape.rope != model.shape.rope || shape.norm_eps != model.shape.norm_eps ||
        shape.heads != model.shape.heads || shape.kv_heads != model.shape.kv_heads || shape.tied != model.shape.tied)
      mismatch(shape.source, "describes another model than " + model.shape.source);
  } else {
    check_adapter_config(model.config, path_in(folder, "adapter_config.json"));
    load_file(model, path_in(folder, "adapter_model.safetensors"), is_lora_tensor);
  }
  const std::string extra = path_in(folder, "kava.safetensors");
  if (recipe_of(model.config).markers) load_file(model, extra, is_kava_tensor);
  else if (is_there(extra)) mismatch(extra, "is there, but method " + name_of(model.config.method) + " has no latents");
  model.parameters.refresh();
}

void save_adapter(const Model& model, const std::string& folder) {
  std::error_code failed;
  fs::create_directories(folder, failed);
  if (failed) throw Error(Exit::write, folder, "could not make the folder: " + failed.message(), "choose another --out");
  if (model.config.train.trainable == Trainable::all) {
    copy_base_files(model, folder);
    FileTensors weights = collect(model, [](const std::string& name) { return !is_kava_tensor(name); });
    write_safetensors(path_in(folder, "model.safetensors"), weights.tensors);
  } else {
    write_file(path_in(folder, "adapter_config.json"), adapter_config(model).dump(2) + "\n");
    FileTensors lora = collect(model, is_lora_tensor);
    write_safetensors(path_in(folder, "adapter_model.safetensors"), lora.tensors);
  }
  if (!recipe_of(model.config).markers) return;
  FileTensors extra = collect(model, is_kava_tensor);
  write_safetensors(path_in(folder, "kava.safetensors"), extra.tensors,
                    {{"kava.format", "1"},
                     {"kava.base", model.base_digest},
                     {"kava.method", name_of(model.config.method)},
                     {"kava.latents", std::to_string(model.config.latent.count)},
                     {"kava.iterations", std::to_string(model.config.latent.iterations)}});
}

}  // namespace kava
