#include "models/peft_config.h"

#include <algorithm>
#include <filesystem>
#include <set>
#include <stdexcept>
#include <vector>

#include "engine/error.h"
#include "engine/files/json.h"
#include "engine/text/split_pattern.h"
#include "models/wanted_folder.h"

namespace kava {

namespace {

bool off(const Json& v) { return v.is_null() || v == false || v == "" || v == "none" || ((v.is_array() || v.is_object()) && v.empty()); }

void check_number(const Json& json, const std::string& path, const char* key, double wanted, const char* config_key) {
  auto it = json.find(key);
  if (it == json.end() || !it->is_number()) mismatch(path, fmt::format("{} is missing or no number", key));
  if (it->get<double>() != wanted) mismatch(path, fmt::format("{} = {} contradicts {} = {}", key, escaped(it->dump()), config_key, wanted));
}

// The linears of a model by their full names, those of the layers and the head.
std::vector<std::string> linear_modules(const ModelConfig& shape) {
  std::vector<std::string> names;
  for (std::int64_t layer = 0; layer < shape.layers; ++layer)
    for (const auto& group : shape.architecture().maps)
      for (const LinearSpec& map : group) names.push_back(shape.architecture().layer(layer) + map.path);
  names.push_back("lm_head");
  return names;
}

// The modules that a value of target_modules or exclude_modules names: a pattern that matches the full name, or a list of full names or
// ends of them.
std::set<std::string> named_modules(const Json& value, const std::vector<std::string>& modules, const std::string& path, const char* key) {
  std::set<std::string> named;
  if (value == "all-linear") {
    for (const std::string& m : modules)
      if (m != "lm_head") named.insert(m);
  } else if (value.is_string()) {
    try {
      const SplitPattern pattern = SplitPattern::regex("\\A(?:" + value.get<std::string>() + ")\\z");
      for (const std::string& m : modules) {
        std::vector<Stretch> found;
        pattern.find_all(m, found);
        if (std::ranges::any_of(found, [](const Stretch& s) { return s.matched; })) named.insert(m);
      }
    } catch (const std::invalid_argument& e) {
      mismatch(path, fmt::format("{} = {} is no pattern: {}", key, escaped(value.dump(), 200), escaped(e.what(), 200)));
    }
  } else {
    if (!value.is_array()) mismatch(path, fmt::format("{} is neither a list nor a pattern", key));
    for (const Json& name : value) {
      if (!name.is_string()) mismatch(path, fmt::format("{} holds something that is no string", key));
      for (const std::string& m : modules)
        if (const auto text = name.get<std::string>(); m == text || m.ends_with("." + text)) named.insert(m);
    }
  }
  return named;
}

// Whether layers_to_transform, if it is there, names every layer.
bool every_layer(const Json& json, const ModelConfig& shape, const std::string& path) {
  const Json given = json.value("layers_to_transform", Json()), pattern = json.value("layers_pattern", Json());
  const std::string& layers = shape.architecture().layers;
  const std::string list = layers.substr(0, layers.size() - 1);
  if (!off(pattern) && (off(given) || (pattern != list && pattern != Json::array({list}))))
    unsupported(path, fmt::format("layers_pattern = {} is not supported", escaped(pattern.dump())));
  if (off(given)) return true;
  std::set<std::int64_t> chosen;
  for (const Json& layer : given.is_array() ? given : Json::array({given}))
    if (layer.is_number_integer()) chosen.insert(layer.get<std::int64_t>());
  for (std::int64_t layer = 0; layer < shape.layers; ++layer)
    if (!chosen.contains(layer)) return false;
  return true;
}

void check_targets(const RunConfig& config, const Json& json, const ModelConfig& shape, const std::string& path) {
  const auto targets = json.find("target_modules");
  if (targets == json.end() || targets->is_null()) mismatch(path, "target_modules is missing");
  const std::vector<std::string> modules = linear_modules(shape);
  const std::set<std::string> found = named_modules(*targets, modules, path, "target_modules");
  std::set<std::string> wanted;
  for (const std::string& m : modules)
    if (is_adapted(config.lora.targets, m)) wanted.insert(m);
  if (found != wanted)
    mismatch(path, fmt::format("target_modules = {} contradicts lora.targets = {}", escaped(targets->dump(), 200),
                               escaped(Json(std::set<std::string>(config.lora.targets.begin(), config.lora.targets.end())).dump(), 200)));
  if (const Json excluded = json.value("exclude_modules", Json()); !off(excluded))
    for (const std::string& m : named_modules(excluded, modules, path, "exclude_modules"))
      if (wanted.contains(m)) mismatch(path, fmt::format("exclude_modules = {} excludes {}", escaped(excluded.dump(), 200), m));
  if (!every_layer(json, shape, path))
    unsupported(path, fmt::format("layers_to_transform = {} leaves layers out", escaped(json["layers_to_transform"].dump(), 200)));
}

// A pattern that gives modules the number that they have anyway.
void check_pattern(const Json& json, const std::string& path, const char* key, double usual) {
  const auto it = json.find(key);
  if (it == json.end() || off(*it)) return;
  const bool same = it->is_object() && std::ranges::all_of(it->get_ref<const Json::object_t&>(), [&](const auto& entry) {
                      return entry.second.is_number() && entry.second.template get<double>() == usual;
                    });
  if (!same) unsupported(path, fmt::format("{} = {} is not supported", key, escaped(it->dump())));
}

}  // namespace

void mismatch(const std::string& file, const std::string& what) {
  throw Error(Exit::data, file, what, "use the configuration that the adapter was trained with");
}

void unsupported(const std::string& file, const std::string& what) {
  throw Error(Exit::data, file, what, "merge it into its base by PEFT's merge_and_unload");
}

void check_peft_config(const RunConfig& config, const ModelConfig& shape, const std::string& path,
                       const std::set<std::string>& read_elsewhere) {
  require_in_folder(std::filesystem::path(path).parent_path(), std::filesystem::path(path).filename().string());
  const Json json = read_json(path, std::size_t{1} << 20);
  if (!json.is_object()) mismatch(path, "not a JSON object");
  if (json.value("peft_type", Json()) != "LORA") mismatch(path, "peft_type is not \"LORA\"");
  check_number(json, path, "r", static_cast<double>(config.lora.rank), "lora.rank");
  check_number(json, path, "lora_alpha", config.lora.alpha, "lora.alpha");
  check_targets(config, json, shape, path);
  check_pattern(json, path, "rank_pattern", static_cast<double>(config.lora.rank));
  check_pattern(json, path, "alpha_pattern", config.lora.alpha);
  const std::string_view fan_in_fan_out = "fan_in_fan_out";
  const bool transposed = shape.architecture().transposed;
  for (const char* key : {"use_rslora",
                          "use_dora",
                          "modules_to_save",
                          "fan_in_fan_out",
                          "trainable_token_indices",
                          "layer_replication",
                          "bias",
                          "lora_bias",
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
    if (auto it = json.find(key);
        it != json.end() && !off(*it) && !read_elsewhere.contains(key) && !(transposed && *it == true && key == fan_in_fan_out))
      unsupported(path, fmt::format("{} = {} is not supported", key, escaped(it->dump())));
  // The other ways to begin (pissa, olora, ...) take their start from the base's weights, which PEFT does again when it loads the adapter.
  const Json start = json.value("init_lora_weights", Json(true));
  if (!start.is_boolean() && !start.is_null() && start != "gaussian" && start != "orthogonal" && start != "eva")
    unsupported(path, fmt::format("init_lora_weights = {} is not supported", escaped(start.dump())));
}

}  // namespace kava
