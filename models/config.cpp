#include "models/config.h"

#include <fmt/ranges.h>

#include <cmath>
#include <filesystem>
#include <initializer_list>

#include "engine/error.h"
#include "engine/files/json.h"
#include "models/wanted_folder.h"

namespace kava {

namespace {

constexpr std::int64_t kLargestSize = std::int64_t{1} << 31;
constexpr std::int64_t kMostLayers = 10'000;
constexpr std::int64_t kMostParameters = std::int64_t{1} << 40;
constexpr std::size_t kLargestFile = std::size_t{16} << 20;

// Typed access to one JSON object of config.json. A key that is null counts as missing, as in transformers.
class JsonKeys {
 public:
  JsonKeys(const Json& object, std::string source, std::string prefix = "")
      : object_(object), source_(std::move(source)), prefix_(std::move(prefix)) {}

  [[noreturn]] void fail(const std::string& key, const std::string& what, const std::string& remedy = "correct the file") const {
    throw Error(Exit::data, source_, prefix_ + key + " " + what, remedy);
  }
  [[noreturn]] void unsupported(const std::string& key) const {
    fail(key, "= " + escaped(object_.at(key).dump(-1, ' ', true), 60) + " is not supported", "use a model without it");
  }
  bool has(const std::string& key) const { return find(key) != nullptr; }
  bool given(const std::string& key) const { return object_.contains(key); }
  const Json* find(const std::string& key) const {
    const auto at = object_.find(key);
    return at == object_.end() || at->is_null() ? nullptr : &*at;
  }

  std::int64_t integer(const std::string& key, std::int64_t least, std::int64_t most) const {
    const Json* value = find(key);
    if (!value) fail(key, "is missing", "get the whole config.json again");
    return checked_integer(key, *value, least, most);
  }
  std::int64_t size(const std::string& key) const { return integer(key, 1, kLargestSize - 1); }
  std::int64_t size_or(const std::string& key, std::int64_t otherwise) const { return has(key) ? size(key) : otherwise; }

  std::int64_t checked_integer(const std::string& key, const Json& value, std::int64_t least, std::int64_t most) const {
    const bool fits =
        value.is_number_integer() && !(value.is_number_unsigned() && value.get<std::uint64_t>() > static_cast<std::uint64_t>(most));
    if (!fits || value.get<std::int64_t>() < least || value.get<std::int64_t>() > most)
      fail(key, fmt::format("must be a whole number from {} to {}", least, most));
    return value.get<std::int64_t>();
  }
  double number_or(const std::string& key, double otherwise) const {
    const Json* value = find(key);
    if (!value) return otherwise;
    if (!value->is_number() || !std::isfinite(value->get<double>())) fail(key, "must be a number");
    return value->get<double>();
  }
  double positive_or(const std::string& key, double otherwise, double most) const {
    const double x = number_or(key, otherwise);
    if (!(x > 0 && x <= most)) fail(key, fmt::format("must be above 0 and at most {}", most));
    return x;
  }
  bool flag_or(const std::string& key, bool otherwise) const {
    const Json* value = find(key);
    if (value && !value->is_boolean()) fail(key, "must be true or false");
    return value ? value->get<bool>() : otherwise;
  }
  std::string text_or(const std::string& key, const std::string& otherwise) const {
    const Json* value = find(key);
    if (value && !value->is_string()) fail(key, "must be a string");
    return value ? value->get<std::string>() : otherwise;
  }

  /// Error naming the key unless its value, where it is given, equals one of those that change nothing.
  void allow_only(const std::string& key, std::initializer_list<Json> values) const {
    const Json* value = find(key);
    if (!value) return;
    for (const Json& v : values)
      if (*value == v) return;
    unsupported(key);
  }

 private:
  const Json& object_;
  std::string source_, prefix_;
};

// Whether a layer of a Qwen2 with use_sliding_window slides: by layer_types, else those from max_window_layers on.
bool layer_slides(const JsonKeys& keys, const ModelConfig& c) {
  if (keys.has("layer_types") || (keys.given("sliding_window") && !keys.has("sliding_window"))) return false;  // layer_types: checked below
  const std::int64_t first = keys.has("max_window_layers") ? keys.integer("max_window_layers", 0, kLargestSize - 1) : 28;
  return first < c.layers;
}

void check_layer_types(const JsonKeys& keys, const ModelConfig& c) {
  const Json* types = keys.find("layer_types");
  if (!types) return;
  if (!types->is_array() || types->size() != static_cast<std::size_t>(c.layers))
    keys.fail("layer_types", "must list one type for each layer");
  for (const Json& type : *types)
    if (type != "full_attention")
      keys.fail("layer_types", "with " + escaped(type.dump(-1, ' ', true), 60) + " is not supported", "use a model with full attention");
}

// Qwen3's sliding windows are on by one key alone; the numbers stand also in files that do not use them.
void refuse_unsupported_qwen3(const JsonKeys& keys, const ModelConfig& c) {
  keys.allow_only("hidden_act", {"silu", "swish"});
  keys.allow_only("attention_bias", {false});
  keys.allow_only("use_sliding_window", {false});
  keys.allow_only("num_experts", {false});
  if (keys.has("quantization_config")) keys.unsupported("quantization_config");
  check_layer_types(keys, c);
}

void refuse_unsupported(const JsonKeys& keys, const ModelConfig& c) {
  if (c.family == "qwen3") return refuse_unsupported_qwen3(keys, c);
  keys.allow_only("hidden_act", {"silu", "swish"});
  // transformers gives Qwen2 its biases whatever this key says.
  if (c.family == "llama") keys.allow_only("attention_bias", {false});
  keys.allow_only("mlp_bias", {false});
  if (keys.flag_or("use_sliding_window", false) && (c.family != "qwen2" || layer_slides(keys, c))) keys.unsupported("use_sliding_window");
  keys.allow_only("partial_rotary_factor", {1});
  keys.allow_only("rope_interleaved", {false});
  keys.allow_only("pretraining_tp", {1});
  for (const char* key : {"quantization_config", "per_layer_config"})
    if (keys.has(key)) keys.unsupported(key);
  check_layer_types(keys, c);
  if (const Json* names = keys.find("architectures")) {
    const std::string family = c.family == "llama" ? "Llama" : "Qwen2";
    if (!names->is_array()) keys.fail("architectures", "must be a list");
    for (const Json& name : *names)
      if (name != family + "ForCausalLM" && name != family + "Model") keys.unsupported("architectures");
  }
}

// rope_parameters (newer) or rope_scaling and rope_theta (older); where both are there rope_scaling wins, as in transformers.
void read_rope(const JsonKeys& keys, ModelConfig& c) {
  constexpr double kLargestTheta = 1e18;
  c.rope_theta = keys.positive_or("rope_theta", 10000, kLargestTheta);
  const bool strict = c.family == "qwen3";
  if (strict && keys.has("rope_scaling") && keys.has("rope_parameters"))
    keys.fail("rope_scaling", "is given beside rope_parameters", "leave one of the two");
  for (const char* name : {"rope_scaling", "rope_parameters"}) {
    const Json* object = keys.find(name);
    if (!object) continue;
    if (!object->is_object()) keys.fail(name, "must be an object");
    if (object->empty()) continue;
    const JsonKeys rope(*object, c.source, std::string(name) + ".");
    for (const auto& [key, value] : object->items())
      if (value.is_object())
        rope.fail(key, "sets the positions of one layer type, which is not supported", "use a model with one kind of layer");
    c.rope_theta = rope.positive_or("rope_theta", c.rope_theta, kLargestTheta);
    if (!strict) rope.allow_only("partial_rotary_factor", {1});
    const char* type_key = rope.has("rope_type") ? "rope_type" : "type";
    if (!strict && !rope.has(type_key) && rope.has("factor")) rope.fail("rope_type", "is missing", "get the whole config.json again");
    const std::string type = rope.text_or(type_key, "default");
    // Positions divided by 1 are the same positions.
    if (type == "default" || (!strict && type == "linear" && rope.has("factor") && rope.number_or("factor", 0) == 1)) return;
    if (type != "llama3") rope.unsupported(type_key);
    for (const char* key : {"factor", "low_freq_factor", "high_freq_factor"})
      if (!rope.has(key)) rope.fail(key, "is missing", "get the whole config.json again");
    constexpr double kLargestFactor = 1e6;
    c.rope.llama3 = true;
    c.rope.factor = rope.positive_or("factor", 0, kLargestFactor);
    c.rope.low_freq_factor = rope.positive_or("low_freq_factor", 0, kLargestFactor);
    c.rope.high_freq_factor = rope.positive_or("high_freq_factor", 0, kLargestFactor);
    if (c.rope.high_freq_factor <= c.rope.low_freq_factor) rope.fail("high_freq_factor", "must be above low_freq_factor");
    constexpr const char* original = "original_max_position_embeddings";
    c.rope.original_max_position = keys.size_or(original, rope.size_or(original, c.max_positions));
    return;
  }
}

// transformers' defaults of num_key_value_heads and head_dim where a key is missing: Qwen2 has 32 heads of K and V, Qwen3 also heads of
// 128. null means as many as there are query heads; a head_dim of null is hidden_size / num_attention_heads, but for Qwen3, which then
// fails.
void read_heads(const JsonKeys& keys, ModelConfig& c) {
  const bool qwen3 = c.family == "qwen3";
  if (qwen3 && !keys.given("num_key_value_heads")) keys.fail("num_key_value_heads", "is missing", "get the whole config.json again");
  const bool qwen_default = c.family == "qwen2" && !keys.given("num_key_value_heads");
  c.kv_heads = keys.size_or("num_key_value_heads", qwen_default ? 32 : c.heads);
  if (c.heads % c.kv_heads != 0)
    keys.fail("num_attention_heads", fmt::format("= {} is not a multiple of num_key_value_heads = {}{}", c.heads, c.kv_heads,
                                                 qwen_default ? " (the default for qwen2)" : ""));
  if (qwen3) {
    if (keys.given("head_dim") && !keys.has("head_dim")) keys.unsupported("head_dim");
    c.head_dim = keys.size_or("head_dim", 128);
  } else {
    if (!keys.has("head_dim") && c.hidden % c.heads != 0)
      keys.fail("hidden_size", fmt::format("= {} is not a multiple of num_attention_heads = {}", c.hidden, c.heads));
    c.head_dim = keys.size_or("head_dim", c.hidden / c.heads);
  }
  if (c.head_dim % 2 != 0) keys.fail("head_dim", fmt::format("= {} is odd, but rotary positions need pairs", c.head_dim));
}

void read_dropout(const JsonKeys& keys, ModelConfig& c, const std::string& key, double otherwise) {
  const double p = keys.number_or(key, otherwise);
  if (!(p >= 0 && p < 1)) keys.fail(key, "must be at least 0 and below 1");
  if (p != 0) c.dropouts.emplace_back(key, p);
}

void read_llama(const JsonKeys& keys, ModelConfig& c) {
  c.layers = keys.integer("num_hidden_layers", 1, kMostLayers);
  c.hidden = keys.size("hidden_size");
  c.heads = keys.size("num_attention_heads");
  c.mlp = keys.size("intermediate_size");
  c.vocab = keys.size("vocab_size");
  read_heads(keys, c);
  c.max_positions = keys.size_or("max_position_embeddings", c.family == "llama" ? 2048 : 32768);
  refuse_unsupported(keys, c);
  read_rope(keys, c);
  c.tied = keys.flag_or("tie_word_embeddings", false);
  c.norm_eps = keys.positive_or("rms_norm_eps", 1e-6, 1);
  read_dropout(keys, c, "attention_dropout", 0);
}

void read_gpt2(const JsonKeys& keys, ModelConfig& c) {
  c.layers = keys.integer("n_layer", 1, kMostLayers);
  c.hidden = keys.size("n_embd");
  c.heads = c.kv_heads = keys.size("n_head");
  if (c.hidden % c.heads != 0) keys.fail("n_embd", fmt::format("= {} is not a multiple of n_head = {}", c.hidden, c.heads));
  c.head_dim = c.hidden / c.heads;
  c.max_positions = keys.size("n_positions");
  c.vocab = keys.size("vocab_size");
  c.mlp = keys.has("n_inner") ? keys.size("n_inner") : 4 * c.hidden;
  keys.allow_only("activation_function", {"gelu_new", "gelu_pytorch_tanh"});
  keys.allow_only("tie_word_embeddings", {true});
  keys.allow_only("scale_attn_weights", {true});
  keys.allow_only("scale_attn_by_inverse_layer_idx", {false});
  keys.allow_only("add_cross_attention", {false});
  if (keys.has("quantization_config")) keys.unsupported("quantization_config");
  c.tied = true;
  c.norm_eps = keys.positive_or("layer_norm_epsilon", 1e-5, 1);
  for (const char* key : {"resid_pdrop", "embd_pdrop", "attn_pdrop"}) read_dropout(keys, c, key, 0.1);
}

// Sizes are below 2^31 and layers below 2^14, so each product and the sum fit in 128 bits.
void check_size(const JsonKeys& keys, const ModelConfig& c) {
  using Wide = __int128;
  Wide layer = 0;
  for (const auto& group : c.architecture().maps)
    for (const LinearSpec& map : group) layer += Wide{c.width(map.out)} * c.width(map.in);
  const Wide latents = Wide{2} * c.hidden * c.hidden;  // their projection
  const Wide total = Wide{c.layers} * layer + Wide{2} * c.vocab * c.hidden + Wide{c.position_limit()} * c.hidden + latents;
  if (total > kMostParameters)
    keys.fail("model_type", "= \"" + c.family + "\" with these sizes makes a model of more than 2^40 parameters");
}

void read_special_ids(const JsonKeys& keys, ModelConfig& c) {
  const Json* eos = keys.find("eos_token_id");
  if (!eos) return;
  c.eos_is_list = eos->is_array();
  if (!c.eos_is_list) {
    c.eos_ids.push_back(keys.checked_integer("eos_token_id", *eos, 0, INT32_MAX));
    return;
  }
  if (eos->empty()) keys.fail("eos_token_id", "is an empty list");
  for (const Json& id : *eos) c.eos_ids.push_back(keys.checked_integer("eos_token_id", id, 0, INT32_MAX));
}

}  // namespace

ModelConfig ModelConfig::load(const std::string& folder) {
  ModelConfig c;
  const std::string path = (std::filesystem::path(folder) / "config.json").string();
  c.source = shown_path(path);
  require_in_folder(folder, "config.json");
  const Json json = read_json(path, kLargestFile);
  if (!json.is_object()) throw Error(Exit::data, c.source, "is not a JSON object", "get the whole config.json again");
  const JsonKeys keys(json, c.source);
  std::vector<std::string> names;
  for (const Architecture& known : architectures()) names.push_back(known.family);
  const std::string remedy = fmt::format("kava runs models of type {}", fmt::join(names, ", "));
  if (!keys.has("model_type")) keys.fail("model_type", "is missing", remedy);
  c.family = keys.text_or("model_type", "");
  if (!find_architecture(c.family)) keys.fail("model_type", "= \"" + escaped(c.family) + "\" is not supported", remedy);
  if (c.family == "gpt2") read_gpt2(keys, c);
  else read_llama(keys, c);
  check_size(keys, c);
  read_special_ids(keys, c);
  c.initializer_range = keys.number_or("initializer_range", 0.02);
  return c;
}

std::int64_t ModelConfig::width(Width w) const {
  switch (w) {
    case Width::hidden:
      return hidden;
    case Width::mlp:
      return mlp;
    case Width::query:
      return heads * head_dim;
    case Width::key:
      return kv_heads * head_dim;
    case Width::fused:
      return (heads + 2 * kv_heads) * head_dim;
  }
  KAVA_CHECK(false, "a width of another kind");
}

void ModelConfig::require_for_training(BaseDropout dropout) const {
  if (dropouts.empty() || dropout == BaseDropout::off) return;
  std::vector<std::string> named;
  for (const auto& [key, p] : dropouts) named.push_back(fmt::format("{} = {}", key, p));
  throw Error(Exit::usage, source, fmt::format("{}: dropout in the base is not supported in training", fmt::join(named, ", ")),
              "set model.dropout = \"off\": the base then trains without it");
}

}  // namespace kava
