#include "models/config.h"

#include <cmath>
#include <filesystem>
#include <initializer_list>

#include "engine/error.h"
#include "engine/files/json.h"

namespace kava {

namespace {

constexpr std::int64_t kLargestSize = std::int64_t{1} << 31;
constexpr std::int64_t kMostLayers = 10'000;
constexpr std::int64_t kMostParameters = std::int64_t{1} << 40;
constexpr std::size_t kLargestFile = std::size_t{16} << 20;

// Typed access to one JSON object of config.json. A key that is null counts as missing, as in transformers.
class Keys {
 public:
  Keys(const Json& object, std::string source, std::string prefix = "")
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
bool layer_slides(const Keys& keys, const ModelConfig& c) {
  if (keys.has("layer_types") || (keys.given("sliding_window") && !keys.has("sliding_window"))) return false;  // layer_types: checked below
  const std::int64_t first = keys.has("max_window_layers") ? keys.integer("max_window_layers", 0, kLargestSize - 1) : 28;
  return first < c.layers;
}

void refuse_unsupported(const Keys& keys, const ModelConfig& c) {
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
  if (const Json* types = keys.find("layer_types")) {
    if (!types->is_array() || types->size() != static_cast<std::size_t>(c.layers))
      keys.fail("layer_types", "must list one type for each layer");
    for (const Json& type : *types)
      if (type != "full_attention")
        keys.fail("layer_types", "with " + escaped(type.dump(-1, ' ', true), 60) + " is not supported", "use a model with full attention");
  }
  if (const Json* names = keys.find("architectures")) {
    const std::string family = c.family == "llama" ? "Llama" : "Qwen2";
    if (!names->is_array()) keys.fail("architectures", "must be a list");
    for (const Json& name : *names)
      if (name != family + "ForCausalLM" && name != family + "Model") keys.unsupported("architectures");
  }
}

// rope_parameters (newer) or rope_scaling and rope_theta (older); where both are there rope_scaling wins, as in transformers.
void read_rope(const Keys& keys, ModelConfig& c) {
  constexpr double kLargestTheta = 1e18;
  c.rope_theta = keys.positive_or("rope_theta", 10000, kLargestTheta);
  for (const char* name : {"rope_scaling", "rope_parameters"}) {
    const Json* object = keys.find(name);
    if (!object) continue;
    if (!object->is_object()) keys.fail(name, "must be an object");
    if (object->empty()) continue;
    const Keys rope(*object, c.source, std::string(name) + ".");
    for (const auto& [key, value] : object->items())
      if (value.is_object())
        rope.fail(key, "sets the positions of one layer type, which is not supported", "use a model with one kind of layer");
    c.rope_theta = rope.positive_or("rope_theta", c.rope_theta, kLargestTheta);
    rope.allow_only("partial_rotary_factor", {1});
    const char* type_key = rope.has("rope_type") ? "rope_type" : "type";
    if (!rope.has(type_key) && rope.has("factor")) rope.fail("rope_type", "is missing", "get the whole config.json again");
    const std::string type = rope.text_or(type_key, "default");
    // Positions divided by 1 are the same positions.
    if (type == "default" || (type == "linear" && rope.has("factor") && rope.number_or("factor", 0) == 1)) return;
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

void read_sizes(const Keys& keys, ModelConfig& c) {
  c.layers = keys.integer("num_hidden_layers", 1, kMostLayers);
  c.hidden = keys.size("hidden_size");
  c.heads = keys.size("num_attention_heads");
  c.mlp = keys.size("intermediate_size");
  c.vocab = keys.size("vocab_size");
  // transformers' Qwen2 has 32 where the key is missing, but as many as there are query heads where it is null.
  const bool qwen_default = c.family == "qwen2" && !keys.given("num_key_value_heads");
  c.kv_heads = keys.size_or("num_key_value_heads", qwen_default ? 32 : c.heads);
  if (c.heads % c.kv_heads != 0)
    keys.fail("num_attention_heads", fmt::format("= {} is not a multiple of num_key_value_heads = {}{}", c.heads, c.kv_heads,
                                                 qwen_default ? " (the default for qwen2)" : ""));
  if (!keys.has("head_dim") && c.hidden % c.heads != 0)
    keys.fail("hidden_size", fmt::format("= {} is not a multiple of num_attention_heads = {}", c.hidden, c.heads));
  c.head_dim = keys.size_or("head_dim", c.hidden / c.heads);
  if (c.head_dim % 2 != 0) keys.fail("head_dim", fmt::format("= {} is odd, but rotary positions need pairs", c.head_dim));
  c.max_positions = keys.size_or("max_position_embeddings", c.family == "llama" ? 2048 : 32768);

  // Sizes are below 2^31 and layers below 2^14, so each product and the sum fit in 128 bits.
  using Wide = __int128;
  const Wide attention = Wide{c.hidden} * c.head_dim * (2 * c.heads + 2 * c.kv_heads);
  const Wide latents = Wide{2} * c.hidden * c.hidden;  // their projection
  const Wide total = Wide{c.layers} * (attention + Wide{3} * c.hidden * c.mlp) + Wide{2} * c.vocab * c.hidden + latents;
  if (total > kMostParameters) keys.fail("num_hidden_layers", "and the other sizes make a model of more than 2^40 parameters");
}

void read_special_ids(const Keys& keys, ModelConfig& c) {
  if (keys.has("bos_token_id")) c.bos_id = keys.integer("bos_token_id", 0, c.vocab - 1);
  const Json* eos = keys.find("eos_token_id");
  if (!eos) return;
  c.eos_is_list = eos->is_array();
  if (!c.eos_is_list) {
    c.eos_ids.push_back(keys.checked_integer("eos_token_id", *eos, 0, c.vocab - 1));
    return;
  }
  if (eos->empty()) keys.fail("eos_token_id", "is an empty list");
  for (const Json& id : *eos) c.eos_ids.push_back(keys.checked_integer("eos_token_id", id, 0, c.vocab - 1));
}

}  // namespace

ModelConfig ModelConfig::load(const std::string& folder) {
  ModelConfig c;
  const std::string path = (std::filesystem::path(folder) / "config.json").string();
  c.source = escaped(path, 4096);
  const Json json = read_json(path, kLargestFile);
  if (!json.is_object()) throw Error(Exit::data, c.source, "is not a JSON object", "get the whole config.json again");
  const Keys keys(json, c.source);
  if (!keys.has("model_type")) keys.fail("model_type", "is missing", "kava runs llama and qwen2 models");
  c.family = keys.text_or("model_type", "");
  if (c.family != "llama" && c.family != "qwen2")
    keys.fail("model_type", "= \"" + escaped(c.family) + "\" is not supported", "kava runs llama and qwen2 models");

  read_sizes(keys, c);
  refuse_unsupported(keys, c);
  read_rope(keys, c);
  read_special_ids(keys, c);
  c.tied = keys.flag_or("tie_word_embeddings", false);
  c.qkv_bias = c.family == "qwen2";
  c.norm_eps = keys.positive_or("rms_norm_eps", 1e-6, 1);
  c.attention_dropout = keys.number_or("attention_dropout", 0);
  if (!(c.attention_dropout >= 0 && c.attention_dropout < 1)) keys.fail("attention_dropout", "must be at least 0 and below 1");
  c.initializer_range = keys.positive_or("initializer_range", 0.02, 1);
  return c;
}

void ModelConfig::require_for_training() const {
  if (attention_dropout != 0)
    throw Error(Exit::usage, source, fmt::format("attention_dropout = {} is not supported in training", attention_dropout),
                "set it to 0: the base then trains without it");
}

}  // namespace kava
