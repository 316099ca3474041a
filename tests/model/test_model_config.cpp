#include <catch2/catch_test_macros.hpp>

#include "models/text.h"
#include "models/weights.h"
#include "tests/model/model_config_rig.h"

using namespace kava;
using namespace kava::test;

namespace {

Json qwen2() {
  Json json = llama();
  json["model_type"] = "qwen2";
  return json;
}

}  // namespace

TEST_CASE("the configurations of real models are read as transformers reads them") {
  const std::string llama = shared_data("data/tokenizers/llama-3.2-1b-instruct"),
                    qwen = shared_data("data/tokenizers/qwen2.5-0.5b-instruct"),
                    smol = shared_data("data/tokenizers/smollm2-135m-instruct"), stories = shared_data("data/models/stories260k");
  if (llama.empty() || qwen.empty() || smol.empty() || stories.empty()) SKIP("no shared data");
  ModelConfig c = ModelConfig::load(llama);
  CHECK(c.family == "llama");
  CHECK(std::vector{c.layers, c.hidden, c.heads, c.kv_heads, c.head_dim, c.mlp, c.vocab, c.max_positions} ==
        std::vector<std::int64_t>{16, 2048, 32, 8, 64, 8192, 128256, 131072});
  CHECK((c.tied && !c.architecture().maps[kAttentionIn][0].bias && c.norm_eps == 1e-5 && c.rope_theta == 500000 &&
         c.initializer_range == 0.02));
  CHECK((c.rope.llama3 && c.rope.factor == 32 && c.rope.low_freq_factor == 1 && c.rope.high_freq_factor == 4));
  CHECK(c.rope.original_max_position == 8192);
  CHECK((c.eos_is_list && c.eos_ids == std::vector<std::int64_t>{128001, 128008, 128009}));

  c = ModelConfig::load(qwen);
  CHECK(c.family == "qwen2");
  CHECK(std::vector{c.layers, c.hidden, c.heads, c.kv_heads, c.head_dim, c.mlp, c.vocab} ==
        std::vector<std::int64_t>{24, 896, 14, 2, 64, 4864, 151936});
  CHECK((c.tied && c.architecture().maps[kAttentionIn][0].bias && c.norm_eps == 1e-6 && c.rope_theta == 1e6 && !c.rope.llama3));
  CHECK((!c.eos_is_list && c.eos_ids == std::vector<std::int64_t>{151645}));

  c = ModelConfig::load(smol);
  CHECK(std::vector{c.layers, c.hidden, c.heads, c.kv_heads, c.head_dim, c.mlp, c.vocab} ==
        std::vector<std::int64_t>{30, 576, 9, 3, 64, 1536, 49152});
  CHECK((c.rope_theta == 100000 && c.initializer_range == 0.041666666666666664));

  c = ModelConfig::load(stories);
  CHECK(std::vector{c.layers, c.hidden, c.heads, c.kv_heads, c.head_dim, c.mlp, c.vocab} ==
        std::vector<std::int64_t>{5, 64, 8, 4, 8, 172, 512});
}

TEST_CASE("missing keys get the defaults of transformers") {
  TempFolder folder;
  const Json bare = {{"model_type", "llama"},  {"hidden_size", 8}, {"intermediate_size", 6},
                     {"num_hidden_layers", 1}, {"vocab_size", 10}, {"num_attention_heads", 4}};
  ModelConfig c = load(folder, bare);
  CHECK((c.kv_heads == 4 && c.head_dim == 2 && !c.tied && c.norm_eps == 1e-6 && c.rope_theta == 10000 && c.initializer_range == 0.02));
  CHECK((c.max_positions == 2048 && c.eos_ids.empty()));
  Json qwen = bare;
  qwen.update({{"model_type", "qwen2"}, {"num_attention_heads", 64}, {"hidden_size", 128}});
  c = load(folder, qwen);
  CHECK((c.kv_heads == 32 && c.max_positions == 32768));
  qwen["num_key_value_heads"] = nullptr;
  CHECK(load(folder, qwen).kv_heads == 64);
  qwen.erase("num_key_value_heads");
  qwen["num_attention_heads"] = 8;
  CHECK(refusal([&] { load(folder, qwen); }).find("num_key_value_heads = 32") != std::string::npos);
}

TEST_CASE("the older and the newer spelling of rotary positions mean the same") {
  TempFolder folder;
  const Json llama3 = {{"factor", 32.0}, {"low_freq_factor", 1.0}, {"high_freq_factor", 4.0}, {"original_max_position_embeddings", 8192}};
  const auto with = [&](const Json& changes) {
    Json json = llama();
    json.update(changes);
    return load(folder, json);
  };
  Json typed = llama3, old_typed = llama3, themed = llama3;
  typed["rope_type"] = "llama3";
  old_typed["type"] = "llama3";
  themed.update({{"rope_type", "llama3"}, {"rope_theta", 500000.0}});
  for (const Json& changes :
       {Json{{"rope_theta", 500000}, {"rope_scaling", typed}}, Json{{"rope_theta", 500000.0}, {"rope_scaling", old_typed}},
        Json{{"rope_parameters", themed}}, Json{{"rope_theta", 7}, {"rope_parameters", themed}},
        Json{{"rope_scaling", nullptr}, {"rope_parameters", themed}},
        Json{{"rope_scaling", Json::object()}, {"rope_parameters", themed}}}) {
    CAPTURE(changes.dump());
    const ModelConfig c = with(changes);
    CHECK((c.rope_theta == 500000 && c.rope.llama3 && c.rope.factor == 32 && c.rope.high_freq_factor == 4 &&
           c.rope.original_max_position == 8192));
  }
  CHECK(with({{"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 100}}}}).rope_theta == 100);
  CHECK(with({{"rope_parameters", {{"rope_theta", 100}}}}).rope_theta == 100);
  CHECK(with({{"rope_scaling", {{"rope_type", "default"}}}, {"rope_theta", 50}}).rope_theta == 50);
  Json short_form = typed;
  short_form.erase("original_max_position_embeddings");
  CHECK(with({{"rope_scaling", short_form}, {"max_position_embeddings", 77}}).rope.original_max_position == 77);
  CHECK(with({{"torch_dtype", "bfloat16"}}).layers == 2);
  CHECK(with({{"dtype", "bfloat16"}}).layers == 2);
}

TEST_CASE("every option that changes the function and is not supported is refused by name") {
  TempFolder folder;
  for (const Json& base : {llama(), qwen2()}) {
    for (const Json& changes :
         {Json{{"model_type", "mistral"}}, Json{{"hidden_act", "gelu"}}, Json{{"mlp_bias", true}},
          Json{{"use_sliding_window", true}, {"max_window_layers", 1}}, Json{{"use_sliding_window", 1}},
          Json{{"partial_rotary_factor", 0.5}}, Json{{"rope_interleaved", true}}, Json{{"pretraining_tp", 2}},
          Json{{"attention_dropout", 1.0}}, Json{{"quantization_config", {{"bits", 4}}}},
          Json{{"layer_types", {"full_attention", "sliding_attention"}}}, Json{{"layer_types", {"full_attention"}}},
          Json{{"architectures", {"LlamaForSequenceClassification"}}}, Json{{"hidden_act", 3}}, Json{{"attention_dropout", "0"}}})
      check_refused(folder, base, changes, changes.contains("use_sliding_window") ? "use_sliding_window" : changes.begin().key());
    for (const char* type : {"linear", "dynamic", "yarn", "longrope", "mrope", "Llama3", ""}) {
      const Json rope = {{"rope_type", type},
                         {"factor", 2.0},
                         {"low_freq_factor", 1.0},
                         {"high_freq_factor", 4.0},
                         {"original_max_position_embeddings", 8}};
      check_refused(folder, base, {{"rope_scaling", rope}}, "rope_scaling.rope_type");
      check_refused(folder, base, {{"rope_parameters", rope}}, "rope_parameters.rope_type");
    }
    check_refused(folder, base, {{"rope_scaling", {{"type", "linear"}, {"factor", 2}}}}, "rope_scaling.type");
    check_refused(folder, base, {{"rope_scaling", {{"factor", 2}}}}, "rope_type");
    check_refused(folder, base, {{"rope_parameters", {{"partial_rotary_factor", 0.25}}}}, "partial_rotary_factor");
    check_refused(folder, base, {{"rope_parameters", {{"full_attention", {{"rope_theta", 5}}}}}}, "full_attention");
  }
  check_refused(folder, llama(), {{"attention_bias", true}}, "attention_bias");
  Json harmless = qwen2();
  harmless.update({{"use_sliding_window", false},
                   {"sliding_window", 4096},
                   {"max_window_layers", 1},
                   {"attention_dropout", 0.0},
                   {"pretraining_tp", 1},
                   {"partial_rotary_factor", 1.0},
                   {"layer_types", {"full_attention", "full_attention"}},
                   {"architectures", {"Qwen2ForCausalLM"}},
                   {"quantization_config", nullptr},
                   {"rope_interleaved", false},
                   {"attention_bias", true},
                   {"use_cache", true}});
  CHECK(load(folder, harmless).family == "qwen2");
}

TEST_CASE("options that name what the engine does anyway are read") {
  TempFolder folder;
  const auto with = [&](Json json, const Json& changes) {
    json.update(changes);
    return load(folder, json);
  };
  for (const Json& base : {llama(), qwen2()}) {
    CHECK(with(base, {{"hidden_act", "swish"}}).layers == 2);
    for (const char* key : {"rope_scaling", "rope_parameters"})
      for (const Json& rope : {Json{{"rope_type", "linear"}, {"factor", 1.0}, {"rope_theta", 77}},
                               Json{{"type", "linear"}, {"factor", 1}, {"rope_theta", 77}}}) {
        const ModelConfig c = with(base, {{key, rope}});
        CHECK((c.rope_theta == 77 && !c.rope.llama3));
      }
    check_refused(folder, base, {{"rope_scaling", {{"rope_type", "linear"}}}}, "rope_scaling.rope_type");
  }
  CHECK(with(llama(), {{"architectures", {"LlamaModel"}}}).layers == 2);
  CHECK(with(qwen2(), {{"architectures", {"Qwen2Model"}}}).layers == 2);
  check_refused(folder, llama(), {{"architectures", {"Qwen2Model"}}}, "architectures");
  const Json slides = {{"use_sliding_window", true}};
  CHECK(with(qwen2(), slides).layers == 2);  // the default of max_window_layers is 28
  for (const Json& more : {Json{{"max_window_layers", 2}}, Json{{"max_window_layers", 0}, {"sliding_window", nullptr}},
                           Json{{"max_window_layers", 0}, {"layer_types", {"full_attention", "full_attention"}}}}) {
    Json changes = slides;
    changes.update(more);
    CHECK(with(qwen2(), changes).layers == 2);
  }
  check_refused(folder, llama(), {{"use_sliding_window", true}, {"max_window_layers", 2}}, "use_sliding_window");
  const ModelConfig drops = with(llama(), {{"attention_dropout", 0.1}});
  try {
    drops.require_for_training(BaseDropout::config);
    FAIL("not refused");
  } catch (const Error& e) {
    CHECK(e.code() == Exit::usage);
    CHECK(std::string(e.what()).find("attention_dropout = 0.1") != std::string::npos);
  }
  CHECK_NOTHROW(drops.require_for_training(BaseDropout::off));
  CHECK_NOTHROW(load(folder, llama()).require_for_training(BaseDropout::config));
}

TEST_CASE("sizes and numbers that make no sense are refused by name") {
  TempFolder folder;
  for (const char* key : {"hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads",
                          "num_key_value_heads", "head_dim", "max_position_embeddings"})
    for (const Json& value : {Json(0), Json(-1), Json(2147483648u), Json(18446744073709551615u), Json(8.0), Json("8"), Json(true),
                              Json::array({8}), Json(1e30)})
      check_refused(folder, llama(), {{key, value}}, key);
  for (const char* key : {"hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "model_type"}) {
    Json json = llama();
    json.erase(key);
    CHECK(refusal([&] { load(folder, json); }).find(key) != std::string::npos);
    check_refused(folder, llama(), {{key, nullptr}}, key);
  }
  for (const char* key : {"rms_norm_eps", "rope_theta"})
    for (const Json& value : {Json(0), Json(-1), Json("1e-5"), Json(true), Json(1e300)})
      check_refused(folder, llama(), {{key, value}}, key);
  check_refused(folder, llama(), {{"head_dim", 5}}, "head_dim");
  check_refused(folder, llama(), {{"num_key_value_heads", 3}}, "num_key_value_heads");
  check_refused(folder, llama(), {{"head_dim", nullptr}, {"hidden_size", 9}}, "hidden_size");
  check_refused(folder, llama(), {{"num_hidden_layers", 2147483647}}, "num_hidden_layers");
  check_refused(folder, llama(), {{"hidden_size", 2147483647}, {"vocab_size", 2147483647}}, "2^40");
  check_refused(
      folder, llama(),
      {{"head_dim", 2147483646}, {"num_attention_heads", 2147483647}, {"num_key_value_heads", 2147483647}, {"hidden_size", 2147483647}},
      "2^40");
  check_refused(folder, llama(), {{"tie_word_embeddings", 1}}, "tie_word_embeddings");
  check_refused(folder, llama(), {{"tie_word_embeddings", "true"}}, "tie_word_embeddings");
  for (const Json& value :
       {Json(int64_t{1} << 31), Json(-1), Json("2"), Json(2.0), Json::array(), Json::array({1, -1}), Json::array({"a"}), Json::object()})
    check_refused(folder, llama(), {{"eos_token_id", value}}, "eos_token_id");
  // Ids without a row are refused where one is taken: the end of sequence, where no tokenizer names it.
  Json beyond = llama();
  beyond.update({{"eos_token_id", 50256}, {"bos_token_id", 50256}});
  (void)load(folder, beyond);
  CHECK(refusal([&] { (void)open_text_model(folder.path()); }).find("config.json: eos_token_id = 50256 is no token of 10") !=
        std::string::npos);
  const Json rope = {{"rope_type", "llama3"},
                     {"factor", 32.0},
                     {"low_freq_factor", 1.0},
                     {"high_freq_factor", 4.0},
                     {"original_max_position_embeddings", 8}};
  for (const auto& [key, value] : rope.items()) {
    if (key == "original_max_position_embeddings" || key == "rope_type") continue;
    Json bad = rope;
    bad.erase(key);
    check_refused(folder, llama(), {{"rope_scaling", bad}}, key);
    for (const Json& wrong : {Json(0), Json(-1.5), Json("2"), Json(1e300)}) {
      bad[key] = wrong;
      check_refused(folder, llama(), {{"rope_scaling", bad}}, key);
    }
  }
  check_refused(folder, llama(), {{"rope_scaling", "llama3"}}, "rope_scaling");
}

TEST_CASE("a config.json that is missing or no object is one clear error") {
  TempFolder folder;
  CHECK(refusal([&] { ModelConfig::load(folder.path().string()); }).find("config.json") != std::string::npos);
  CHECK(refusal([&] { ModelConfig::load(folder / "no folder"); }) != "");
  for (const char* text : {"", "[]", "null", "{", "{\"model_type\": \"llama\", \"model_type\": \"llama\"}", "{\"model_type\": 1}"}) {
    overwrite(folder / "config.json", text);
    CHECK(refusal([&] { ModelConfig::load(folder.path().string()); }).find("config.json") != std::string::npos);
  }
}

TEST_CASE("the tensors of a model are those of its family") {
  TempFolder folder;
  const auto specs = weight_specs(load(folder, llama()));
  CHECK(specs.size() == 1 + 2 * 9 + 1);
  CHECK(specs[0].name == "model.embed_tokens.weight");
  const auto find = [](const std::vector<WeightSpec>& all, const std::string& name) {
    for (const WeightSpec& s : all)
      if (s.name == name) return std::vector{s.rows, s.cols, std::int64_t{s.vector()}};
    return std::vector<std::int64_t>{};
  };
  CHECK(find(specs, "model.layers.1.self_attn.q_proj.weight") == std::vector<std::int64_t>{16, 8, 0});
  CHECK(find(specs, "model.layers.0.self_attn.k_proj.weight") == std::vector<std::int64_t>{8, 8, 0});
  CHECK(find(specs, "model.layers.0.self_attn.o_proj.weight") == std::vector<std::int64_t>{8, 16, 0});
  CHECK(find(specs, "model.layers.0.mlp.down_proj.weight") == std::vector<std::int64_t>{8, 6, 0});
  CHECK(find(specs, "model.norm.weight") == std::vector<std::int64_t>{1, 8, 1});
  CHECK(find(specs, "lm_head.weight").empty());
  Json json = qwen2();
  json["tie_word_embeddings"] = false;
  const auto biased = weight_specs(load(folder, json));
  CHECK(biased.size() == 1 + 2 * 12 + 2);
  CHECK(find(biased, "model.layers.1.self_attn.v_proj.bias") == std::vector<std::int64_t>{1, 8, 1});
  CHECK(find(biased, "lm_head.weight") == std::vector<std::int64_t>{10, 8, 0});
}
