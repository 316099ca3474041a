#include "models/upstream.h"

#include <algorithm>
#include <filesystem>
#include <optional>

#include "engine/error.h"
#include "engine/files/json.h"
#include "engine/files/json_at.h"
#include "engine/files/paths.h"
#include "engine/files/torch_file.h"
#include "models/adapter.h"
#include "models/peft_config.h"
#include "models/recipe.h"
#include "models/weights.h"

namespace kava {

namespace {

namespace fs = std::filesystem;

constexpr const char *kPccotArgs = "pccot_args.json", *kPeftConfig = "adapter_config.json";
constexpr std::string_view kCodiPrefix = "codi.", kTrainedRows = ".token_adapter.trainable_tokens_delta";
constexpr std::size_t kLargestSidecar = std::size_t{1} << 20;
constexpr std::int32_t kLargestTokenId = (1 << 30);

// "weight" or "bias" of a part of the projection.
std::optional<std::string> projection_name(const std::string& part, const std::string& linear1, const std::string& linear2,
                                           const std::string& norm) {
  for (const char* value : {"weight", "bias"})
    for (const auto& [theirs, ours] : {std::pair{linear1, "linear1"}, std::pair{linear2, "linear2"}, std::pair{norm, "norm"}})
      if (part == theirs + "." + value) return fmt::format("latent_projection.{}.{}", ours, value);
  return std::nullopt;
}

// What a tensor of PCCoT is called here; "" where it only says again what the base holds, nothing where it has no place.
std::optional<std::string> name_of_pccot(const std::string& name) {
  if (!name.starts_with(kLoraPrefix)) return std::nullopt;
  const std::string rest = name.substr(kLoraPrefix.size());
  if (rest.ends_with(".lora_A.weight") || rest.ends_with(".lora_B.weight")) return name;
  // PEFT writes the embedding and the head whole where rows were added, a tied head's rows a second time.
  if (rest.ends_with(".token_adapter.base_layer.weight") || rest.starts_with("lm_head.")) return "";
  if (rest.starts_with("prj.")) return projection_name(rest.substr(4), "0", "2", "3");
  return std::nullopt;
}

// The same of CODI, whose program stores its whole model.
std::optional<std::string> name_of_codi(const std::string& name) {
  if (name.starts_with("prj.")) return projection_name(name.substr(4), "1", "3", "ln");
  const std::string before = std::string(kCodiPrefix) + kLoraPrefix;
  if (!name.starts_with(before)) return std::nullopt;
  std::string rest = name.substr(before.size());
  for (const std::string part : {"A", "B"})
    if (const std::string end = ".lora_" + part + ".default.weight"; rest.ends_with(end))
      return kLoraPrefix + rest.substr(0, rest.size() - end.size()) + ".lora_" + part + ".weight";
  constexpr std::string_view base = ".base_layer";
  if (const std::size_t at = rest.find(base); at != std::string::npos) rest.erase(at, base.size());
  return rest;
}

std::string quoted_tensor(const std::string& tensor) { return "tensor \"" + escaped(tensor, 200) + "\""; }

SafetensorsFile open_codi_file(const std::string& folder) { return open_either_file(folder, "model", "pytorch_model"); }

bool holds_codi(const SafetensorsFile& file) {
  return std::ranges::any_of(file.tensors(), [](const TensorInfo& t) { return t.name.starts_with(kCodiPrefix); });
}

}  // namespace

bool UpstreamAdapter::is_at(const std::string& folder) {
  if (is_there(fs::path(folder) / kPeftConfig)) return is_there(fs::path(folder) / kPccotArgs);
  const auto has = [&](const char* name) { return is_there(fs::path(folder) / name); };
  if (has("config.json") || (!has("model.safetensors") && !has("pytorch_model.bin"))) return false;
  return holds_codi(open_codi_file(folder));
}

UpstreamAdapter::UpstreamAdapter(const std::string& folder, Program program)
    : program_(program), file_(program == Program::pccot ? open_adapter_file(folder) : open_codi_file(folder)) {}

UpstreamAdapter UpstreamAdapter::open(const std::string& folder) {
  const bool pccot = is_there(fs::path(folder) / kPeftConfig);
  UpstreamAdapter adapter(folder, pccot ? Program::pccot : Program::codi);
  adapter.read_names();
  if (pccot) adapter.read_rows(folder);
  return adapter;
}

void UpstreamAdapter::fail(const std::string& what) const { mismatch(shown_path(file_.path()), what); }

void UpstreamAdapter::read_names() {
  for (const TensorInfo& t : file_.tensors()) {
    if (program_ == Program::pccot && t.name.starts_with(kLoraPrefix) && t.name.ends_with(kTrainedRows) &&
        !t.name.starts_with(kLoraPrefix + "lm_head.")) {
      if (trained_rows_) fail(quoted_tensor(t.name) + " is a second embedding");
      trained_rows_ = &t;
      continue;
    }
    const std::optional<std::string> name = program_ == Program::pccot ? name_of_pccot(t.name) : name_of_codi(t.name);
    if (!name)
      fail(fmt::format("{} is no part of {}", quoted_tensor(t.name),
                       program_ == Program::pccot ? "a PCCoT adapter" : "a CODI model with LoRA"));
    if (name->empty()) continue;
    if (!SafetensorsFile::is_floating(t)) fail(quoted_tensor(t.name) + " has dtype " + t.dtype);
    if (!tensors_.emplace(*name, &t).second) fail(quoted_tensor(t.name) + " is there under another name too");
  }
}

void UpstreamAdapter::read_rows(const std::string& folder) {
  const std::string args_path = path_in(folder, kPccotArgs), config_path = path_in(folder, kPeftConfig);
  const Json args = read_json(args_path, kLargestSidecar), config = read_json(config_path, kLargestSidecar);
  const char* keys[3] = {"bot_token_id", "eot_token_id", "latent_token_id"};
  for (std::size_t i = 0; i < 3; ++i) marker_ids_[i] = JsonAt(args, args_path).at(keys[i]).whole(kLargestTokenId);
  // {"embed_tokens": [ids]}
  const JsonAt given = JsonAt(config, config_path).at("trainable_token_indices");
  if (given.object().size() != 1) given.refuse("names more than the embedding");
  const JsonAt list = given.at(given.object().begin()->first.c_str());
  for (std::size_t i = 0; i < list.array().size(); ++i) ids_.push_back(list.at(i).whole(kLargestTokenId));
  if (!trained_rows_) fail("has no trainable_tokens_delta of the embedding");
  if (!SafetensorsFile::is_floating(*trained_rows_) || trained_rows_->shape.size() != 2 ||
      trained_rows_->shape[0] != static_cast<std::int64_t>(ids_.size()))
    fail(fmt::format("{} has shape {}, but trainable_token_indices has {} tokens", quoted_tensor(trained_rows_->name),
                     shape_text(trained_rows_->shape), ids_.size()));
  for (std::size_t i = 0; i < 3; ++i)
    if (std::ranges::find(ids_, marker_ids_[i]) == ids_.end())
      fail(fmt::format("trainable_token_indices lacks {} = {} of {}", keys[i], marker_ids_[i], kPccotArgs));
}

UpstreamAdapter::Rows UpstreamAdapter::rows(const ModelConfig& shape) const {
  Rows found;
  if (program_ == Program::codi) {
    // pad, bot and eot follow the base's rows.
    const WeightSpec embedding = weight_specs(shape)[0];
    const TensorInfo* t = base_tensor(embedding, shape);
    if (!t) fail(quoted_tensor(embedding.name) + " is missing");
    found.markers = {TensorRow{t, shape.vocab + 1}, TensorRow{t, shape.vocab + 2}, TensorRow{}};
    return found;
  }
  if (trained_rows_->shape[1] != shape.hidden)
    fail(fmt::format("{} has shape {}, but hidden_size is {}", quoted_tensor(trained_rows_->name), shape_text(trained_rows_->shape),
                     shape.hidden));
  // A token that is named twice, as one that is end of sequence and padding, has one row in training.
  for (std::size_t i = 0; i < ids_.size(); ++i) {
    const TensorRow row{trained_rows_, static_cast<std::int64_t>(i)};
    if (ids_[i] < shape.vocab) found.embedding[ids_[i]] = row;
    if (const auto at = std::ranges::find(marker_ids_, ids_[i]); at != marker_ids_.end())
      found.markers[static_cast<std::size_t>(at - marker_ids_.begin())] = row;
  }
  return found;
}

const TensorInfo* UpstreamAdapter::base_tensor(const WeightSpec& spec, const ModelConfig& shape) const {
  constexpr std::int64_t kAdded = 3;
  const auto at = tensors_.find(spec.name);
  if (program_ != Program::codi || at == tensors_.end()) return nullptr;
  std::vector<std::int64_t> expected = spec.file_shape();
  const Architecture& arch = shape.architecture();
  if (spec.name == arch.prefix + arch.embedding + ".weight" || spec.name == kHeadName) expected[0] += kAdded;
  if (at->second->shape != expected)
    fail(fmt::format("{} has shape {}, but this base asks for {}", quoted_tensor(at->second->name), shape_text(at->second->shape),
                     shape_text(expected)));
  return at->second;
}

std::set<std::string> UpstreamAdapter::config_keys() const {
  if (program_ == Program::codi) return {};
  return {"trainable_token_indices", "modules_to_save"};
}

void load_upstream_adapter(Model& model, const std::string& folder) {
  const UpstreamAdapter adapter = UpstreamAdapter::open(folder);
  const SafetensorsFile& file = adapter.file();
  const bool codi = adapter.program() == UpstreamAdapter::Program::codi;
  const Recipe recipe = recipe_of(model.config);
  if (model.config.train.trainable == Trainable::all) mismatch(folder, "holds LoRA, and train.trainable is \"all\"");
  if (!recipe.markers) mismatch(folder, fmt::format("has latents, and method {} has none", name_of(model.config.method)));
  if (codi && recipe.iterations < recipe.latents) mismatch(folder, "has no row of latent, which latent.iterations < latent.count reads");
  if (!codi) check_peft_config(model.config, model.shape, path_in(folder, kPeftConfig), adapter.config_keys());
  std::size_t used = 0;
  const auto& tensors = adapter.tensors();
  const UpstreamAdapter::Rows rows = adapter.rows(model.shape);
  for (const Parameter& p : model.parameters.all()) {
    if (p.name == "new_tokens.weight") {
      for (std::int64_t i = 0; i < 3; ++i) {
        const TensorRow& row = rows.markers[static_cast<std::size_t>(i)];
        if (row.tensor) read_tensor(model.ops, p.value.row_range(i, i + 1), file, *row.tensor, false, row.row);
        else model.ops.fill(p.value.row_range(i, i + 1), 0);
      }
      continue;
    }
    const auto at = tensors.find(p.name);
    if (at == tensors.end()) mismatch(file.path(), fmt::format("has no tensor for {}", p.name));
    if (at->second->shape != p.file_shape())
      mismatch(file.path(), fmt::format("{} has shape {}, the configuration asks for {}", quoted_tensor(at->second->name),
                                        shape_text(at->second->shape), shape_text(p.file_shape())));
    read_tensor(model.ops, p.value, file, *at->second, p.transposed);
    ++used;
  }
  for (const WeightSpec& spec : weight_specs(model.shape)) {
    if (!codi) break;
    const TensorInfo* t = adapter.base_tensor(spec, model.shape);
    if (!t) mismatch(file.path(), fmt::format("has no tensor for {}", spec.name));
    read_tensor(model.ops, model.base_tensor(spec.name), file, *t, spec.transposed);
    ++used;
  }
  if (codi && model.shape.tied) used += tensors.count(kHeadName);  // CODI ties the two again when it loads them
  for (const auto& [id, row] : rows.embedding)
    read_tensor(model.ops, model.embedding.row_range(id, id + 1), file, *row.tensor, false, row.row);
  if (used != tensors.size())
    for (const auto& [name, tensor] : tensors)
      if (!model.parameters.find(name) && !(codi && model.base_tensor(name)) && !(codi && model.shape.tied && name == kHeadName))
        mismatch(file.path(), quoted_tensor(tensor->name) + " is not part of this run's model");
  model.parameters.refresh();
}

}  // namespace kava
