#include "models/adapter.h"

#include <algorithm>
#include <filesystem>
#include <set>

#include "engine/files/files.h"
#include "engine/files/json.h"
#include "engine/files/paths.h"
#include "engine/files/safetensors.h"
#include "engine/files/torch_file.h"
#include "models/peft_config.h"
#include "models/recipe.h"
#include "models/upstream.h"

namespace kava {

namespace {

namespace fs = std::filesystem;

bool is_kava_tensor(const std::string& name) {
  return name.starts_with("new_tokens.") || name.starts_with("latent_projection.") || name.starts_with("kv_projection.");
}
bool is_lora_tensor(const std::string& name) { return name.starts_with(kLoraPrefix); }

// Reads those parameters that `belongs` says are in this file; the file must hold exactly them.
template <class Belongs>
void load_file(Model& model, const SafetensorsFile& file, Belongs belongs) {
  const std::string& path = file.path();
  std::size_t found = 0;
  for (const Parameter& p : model.parameters.all()) {
    if (!belongs(p.name)) continue;
    const TensorInfo* t = file.find(p.name);
    if (!t) mismatch(path, fmt::format("tensor {} is missing", p.name));
    if (t->shape != p.file_shape())
      mismatch(path, fmt::format("tensor {} has shape {}, the configuration asks for {}", p.name, shape_text(t->shape),
                                 shape_text(p.file_shape())));
    ++found;
    read_tensor(model.ops, p.value, file, *t, p.transposed);
  }
  if (found == file.tensors().size()) return;
  for (const TensorInfo& t : file.tensors())
    if (!model.parameters.find(t.name) || !belongs(t.name))
      mismatch(path, fmt::format("tensor {} is not part of this run's trainables", escaped(t.name)));
}

Json adapter_config(const Model& model) {
  const RunConfig& c = model.config;
  return {{"peft_type", "LORA"},
          {"task_type", "CAUSAL_LM"},
          {"base_model_name_or_path", c.model.init == Init::random ? Json() : Json(plain_path(c.model.path))},  // a drawn base lies nowhere
          {"r", c.lora.rank},
          {"lora_alpha", c.lora.alpha == static_cast<double>(static_cast<int64_t>(c.lora.alpha)) ? Json(static_cast<int64_t>(c.lora.alpha))
                                                                                                 : Json(c.lora.alpha)},
          {"lora_dropout", c.lora.dropout},
          {"target_modules", c.lora.targets},
          {"bias", "none"},
          {"fan_in_fan_out", model.shape.architecture().transposed},
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

template <class Belongs>
void save_file(const Model& model, FolderWriter& folder, const std::string& name, Belongs belongs,
               const std::map<std::string, std::string>& metadata = {}) {
  std::vector<TensorOut> tensors;
  for (const Parameter& p : model.parameters.all())
    if (belongs(p.name))
      tensors.push_back({p.name, "F32", p.file_shape(), nullptr,
                         [&model, &p](void* out) { model.parameters.download_as_stored(p, p.value, static_cast<float*>(out)); }});
  FileWriter file = folder.file(name);
  write_safetensors(file, std::move(tensors), metadata);
}

// What a written model folder takes from the base as it is, by names in it.
std::vector<std::string> copied_files(const fs::path& base) {
  std::vector<std::string> names;
  for (const char* name : {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                           "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.json", "chat_template.jinja"})
    if (is_there(base / name)) names.push_back(name);
  std::error_code failed;
  const std::string templates = "additional_chat_templates";
  for (fs::directory_iterator entry(base / templates, failed), end; !failed && entry != end; entry.increment(failed))
    if (entry->path().extension() == ".jinja" && is_utf8(entry->path().filename().string()))
      names.push_back(templates + "/" + entry->path().filename().string());
  return names;
}

// The base's config.json for weights of a type: transformers loads them in the one that it names, as "dtype" in version 5 and as
// "torch_dtype" in version 4.
std::string config_of_written(const fs::path& base, DType type) {
  Json config = read_json((base / "config.json").string());
  config["dtype"] = config["torch_dtype"] = type == DType::bf16 ? "bfloat16" : "float32";
  return config.dump(2) + "\n";
}

}  // namespace

void write_base_files(const std::string& base, DType type, FolderWriter& folder, const std::string& prefix) {
  folder.write_file(prefix + "config.json", config_of_written(base, type));
  for (const std::string& name : copied_files(base))
    folder.write_file(prefix + name, read_file((fs::path(base) / name).string(), std::size_t{256} << 20));
}

SafetensorsFile open_adapter_file(const std::string& folder) { return open_either_file(folder, "adapter_model", "adapter_model"); }

void require_adapter_kind(const std::string& folder, bool whole) {
  const bool model = is_there(path_in(folder, "config.json")), lora = is_there(path_in(folder, "adapter_config.json"));
  if (whole && lora && !model)
    throw Error(Exit::data, shown_path(folder), "is a LoRA adapter and no whole model", "set train.trainable = \"lora\"");
  if (!whole && model && !lora)
    throw Error(Exit::data, shown_path(folder), "is a whole model and no LoRA adapter",
                "name it in model.path, or set train.trainable = \"all\"");
}

void load_adapter(Model& model, const std::string& folder) {
  if (UpstreamAdapter::is_at(folder)) return load_upstream_adapter(model, folder);
  const bool all = model.config.train.trainable == Trainable::all;
  require_adapter_kind(folder, all);
  if (all) {
    const ModelConfig shape = ModelConfig::load(folder);
    const WeightFiles files = WeightFiles::open(folder, model.shape);
    for (const WeightSpec& w : weight_specs(model.shape)) files.read(w, model.ops, model.parameters.at(w.name).value);
    if (shape.rope_theta != model.shape.rope_theta || shape.rope != model.shape.rope || shape.norm_eps != model.shape.norm_eps ||
        shape.heads != model.shape.heads || shape.kv_heads != model.shape.kv_heads || shape.tied != model.shape.tied ||
        shape.family != model.shape.family)
      mismatch(shape.source, "describes another model than " + model.shape.source);
  } else {
    check_peft_config(model.config, model.shape, path_in(folder, "adapter_config.json"));
    load_file(model, open_adapter_file(folder), is_lora_tensor);
  }
  const std::string extra = path_in(folder, "kava.safetensors");
  const bool wanted = recipe_of(model.config).markers;
  if (wanted && !is_there(extra))
    throw Error(Exit::data, extra, fmt::format("is not there, but method {} has new tokens", name_of(model.config.method)),
                "use the adapter's own configuration, or merge it by kava_merge and name the result in model.path");
  if (!wanted && is_there(extra)) mismatch(extra, fmt::format("is there, but method {} has no new tokens", name_of(model.config.method)));
  if (wanted) load_file(model, SafetensorsFile::open(extra), is_kava_tensor);
  model.parameters.refresh();
}

void save_adapter(const Model& model, FolderWriter& folder, const std::string& prefix, std::optional<int64_t> last_stage) {
  if (model.config.train.trainable == Trainable::all) {
    write_base_files(model.config.model.path, DType::f32, folder, prefix);
    save_file(model, folder, prefix + "model.safetensors", [](const std::string& name) { return !is_kava_tensor(name); });
  } else {
    folder.write_file(prefix + "adapter_config.json", adapter_config(model).dump(2) + "\n");
    save_file(model, folder, prefix + "adapter_model.safetensors", is_lora_tensor, {{"kava.base", model.base_digest}});
  }
  if (!recipe_of(model.config).markers) return;
  const Recipe decoding = last_stage ? decoding_recipe(model.config, *last_stage) : decoding_recipe(model.config);
  save_file(model, folder, prefix + "kava.safetensors", is_kava_tensor,
            {{"kava.format", "1"},
             {"kava.base", model.base_digest},
             {"kava.method", name_of(model.config.method)},
             {"kava.latents", std::to_string(decoding.latents)},
             {"kava.iterations", std::to_string(decoding.iterations)}});
}

void save_adapter(const Model& model, const std::string& folder) {
  FolderWriter out(folder);
  save_adapter(model, out, "");
  out.commit();
}

}  // namespace kava
