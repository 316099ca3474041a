// Qwen3 and GPT-2: what of config.json is read, which tensors there are and in which layout, what LoRA adapts.
#include <catch2/catch_test_macros.hpp>
#include <map>

#include "engine/error.h"
#include "engine/files/json.h"
#include "models/config.h"
#include "models/model.h"
#include "models/weights.h"
#include "tests/model/model_config_rig.h"

using namespace kava;
using namespace kava::test;

namespace {

Json qwen3() {
  return {{"model_type", "qwen3"}, {"hidden_size", 8},         {"intermediate_size", 6},   {"num_hidden_layers", 2},
          {"vocab_size", 10},      {"num_attention_heads", 4}, {"num_key_value_heads", 2}, {"head_dim", 6}};
}

Json gpt2() { return {{"model_type", "gpt2"}, {"n_embd", 8}, {"n_layer", 2}, {"n_head", 2}, {"n_positions", 12}, {"vocab_size", 10}}; }

// Every tensor of the model, element i of one with n letters being i + n/64.
using Tensors = std::map<std::string, std::pair<std::vector<std::int64_t>, std::vector<float>>>;
void add(Tensors& all, const std::string& name, std::vector<std::int64_t> shape) {
  std::int64_t count = 1;
  for (std::int64_t d : shape) count *= d;
  std::vector<float> x(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i) + static_cast<float>(name.size()) / 64;
  all[name] = {std::move(shape), std::move(x)};
}
Tensors tensors_of(const ModelConfig& config) {
  Tensors all;
  for (const WeightSpec& spec : weight_specs(config)) add(all, spec.name, spec.file_shape());
  return all;
}
void write(const std::string& path, const Tensors& all) {
  std::vector<TensorOut> out;
  for (const auto& [name, t] : all) out.push_back({name, "F32", t.first, t.second.data()});
  write_safetensors(path, out);
}

}  // namespace

TEST_CASE("qwen3: the keys that are read, and transformers' defaults of those that are missing") {
  TempFolder folder;
  ModelConfig c = load(folder, qwen3());
  CHECK((c.family == "qwen3" && c.head_dim == 6 && c.kv_heads == 2 && !c.tied && c.norm_eps == 1e-6 && c.rope_theta == 10000));
  CHECK((c.position_limit() == 0 && c.width(Width::query) == 24 && c.width(Width::key) == 12));
  Json json = qwen3();
  json.erase("head_dim");
  CHECK(load(folder, json).head_dim == 128);
  check_refused(folder, qwen3(), {{"head_dim", nullptr}}, "head_dim", "null");
  check_refused(folder, qwen3(), {{"head_dim", 7}}, "head_dim", "7");
  json = qwen3();
  json.erase("num_key_value_heads");
  CHECK(refusal([&] { load(folder, json); }).find("num_key_value_heads") != std::string::npos);
  CHECK(with(folder, qwen3(), {{"num_key_value_heads", nullptr}}).kv_heads == 4);
  check_refused(folder, qwen3(), {{"num_key_value_heads", 3}}, "num_key_value_heads");
  const Json inside = {{"rope_type", "default"}, {"rope_theta", 5e5}};
  CHECK(with(folder, qwen3(), {{"rope_theta", 1e6}}).rope_theta == 1e6);
  CHECK(with(folder, qwen3(), {{"rope_theta", 1e6}, {"rope_parameters", inside}}).rope_theta == 5e5);
  CHECK(with(folder, qwen3(), {{"rope_theta", 1e6}, {"rope_scaling", inside}}).rope_theta == 5e5);
  check_refused(folder, qwen3(), {{"rope_scaling", inside}, {"rope_parameters", inside}}, "rope_scaling");
  CHECK(with(folder, qwen3(), {{"rope_scaling", nullptr}, {"rope_parameters", inside}}).rope_theta == 5e5);
  for (const char* type : {"yarn", "linear", "dynamic", "longrope"})
    for (const char* key : {"rope_scaling", "rope_parameters"})
      for (const char* name : {"rope_type", "type"})
        check_refused(folder, qwen3(), {{key, {{name, type}, {"factor", 1.0}}}}, std::string(key) + "." + name, type);
  const Json llama3 = {{"rope_type", "llama3"},
                       {"factor", 8.0},
                       {"low_freq_factor", 1.0},
                       {"high_freq_factor", 4.0},
                       {"original_max_position_embeddings", 64}};
  CHECK(with(folder, qwen3(), {{"rope_scaling", llama3}}).rope.llama3);
}

TEST_CASE("qwen3: sliding windows, experts and biases are refused by key and value, numbers that nothing uses are not") {
  TempFolder folder;
  check_refused(folder, qwen3(), {{"use_sliding_window", true}, {"max_window_layers", 28}}, "use_sliding_window", "true");
  check_refused(folder, qwen3(), {{"layer_types", {"full_attention", "sliding_attention"}}}, "layer_types", "sliding_attention");
  check_refused(folder, qwen3(), {{"attention_bias", true}}, "attention_bias", "true");
  check_refused(folder, qwen3(), {{"num_experts", 8}}, "num_experts", "8");
  check_refused(folder, qwen3(), {{"quantization_config", {{"bits", 4}}}}, "quantization_config", "bits");
  check_refused(folder, qwen3(), {{"hidden_act", "gelu"}}, "hidden_act", "gelu");
  for (const char* type : {"qwen3_moe", "qwen3_next", "pccot-gpt2", "gpt_neo", "Qwen3", "qwen"})
    check_refused(folder, qwen3(), {{"model_type", type}}, "model_type", type);
  const Json harmless = {{"use_sliding_window", false},  {"sliding_window", 4096},
                         {"max_window_layers", 0},       {"layer_types", {"full_attention", "full_attention"}},
                         {"attention_bias", false},      {"architectures", {"SomethingElse"}},
                         {"partial_rotary_factor", 0.5}, {"hidden_act", "swish"}};
  CHECK(with(folder, qwen3(), harmless).layers == 2);
}

TEST_CASE("gpt2: the keys that are read, their defaults and what is refused") {
  TempFolder folder;
  ModelConfig c = load(folder, gpt2());
  CHECK((c.tied && c.heads == 2 && c.kv_heads == 2 && c.head_dim == 4 && c.mlp == 32 && c.norm_eps == 1e-5 && c.position_limit() == 12));
  CHECK(with(folder, gpt2(), {{"n_inner", nullptr}}).mlp == 32);
  CHECK(with(folder, gpt2(), {{"n_inner", 20}}).mlp == 20);
  CHECK(with(folder, gpt2(), {{"layer_norm_epsilon", 1e-3}}).norm_eps == 1e-3);
  for (const char* key : {"n_layer", "n_embd", "n_head", "n_positions", "vocab_size"}) {
    Json json = gpt2();
    json.erase(key);
    CHECK(refusal([&] { load(folder, json); }).find(key) != std::string::npos);
  }
  check_refused(folder, gpt2(), {{"n_head", 3}}, "n_head");
  for (const char* act : {"gelu", "relu", "silu"})
    check_refused(folder, gpt2(), {{"activation_function", act}}, "activation_function", act);
  for (const char* act : {"gelu_new", "gelu_pytorch_tanh"}) CHECK(with(folder, gpt2(), {{"activation_function", act}}).layers == 2);
  check_refused(folder, gpt2(), {{"tie_word_embeddings", false}}, "tie_word_embeddings", "false");
  check_refused(folder, gpt2(), {{"scale_attn_weights", false}}, "scale_attn_weights", "false");
  check_refused(folder, gpt2(), {{"scale_attn_by_inverse_layer_idx", true}}, "scale_attn_by_inverse_layer_idx", "true");
  check_refused(folder, gpt2(), {{"add_cross_attention", true}}, "add_cross_attention", "true");
  check_refused(folder, gpt2(), {{"quantization_config", {{"bits", 4}}}}, "quantization_config");
  const Json unread = {{"n_ctx", 7},        {"hidden_size", 99},        {"reorder_and_upcast_attn", true}, {"summary_first_dropout", 0.3},
                       {"use_cache", true}, {"initializer_range", 0.1}, {"architectures", {"GPT2Model"}},  {"rope_scaling", "yarn"}};
  CHECK(with(folder, gpt2(), unread).initializer_range == 0.1);
}

TEST_CASE("dropout in the base is refused by all its names unless the configuration leaves it out") {
  TempFolder folder;
  const auto text = [&](const Json& changes, const Json& base) {
    const ModelConfig c = with(folder, base, changes);
    CHECK_NOTHROW(c.require_for_training(BaseDropout::off));
    return refusal([&] { c.require_for_training(BaseDropout::config); }, Exit::usage);
  };
  std::string all = text(Json::object(), gpt2());  // missing keys are 0.1
  for (const char* key : {"resid_pdrop = 0.1", "embd_pdrop = 0.1", "attn_pdrop = 0.1", "model.dropout = \"off\""})
    CHECK(all.find(key) != std::string::npos);
  all = text({{"resid_pdrop", 0.0}, {"embd_pdrop", 0}, {"summary_first_dropout", 0.1}}, gpt2());
  CHECK(
      (all.find("attn_pdrop") != std::string::npos && all.find("resid") == std::string::npos && all.find("summary") == std::string::npos));
  CHECK(text({{"resid_pdrop", 0.0}, {"embd_pdrop", 0}, {"attn_pdrop", 0}}, gpt2()) == "");
  CHECK(text({{"attention_dropout", 0.2}}, qwen3()).find("attention_dropout = 0.2") != std::string::npos);
  CHECK(text(Json::object(), qwen3()) == "");
}

TEST_CASE("qwen3 has norms of heads and no bias") {
  TempFolder folder;
  const ModelConfig c = load(folder, qwen3());
  const Tensors all = tensors_of(c);
  CHECK(all.size() == 1 + 2 * 11 + 2);
  CHECK(all.at("model.layers.1.self_attn.q_norm.weight").first == std::vector<std::int64_t>{6});
  CHECK(all.at("model.layers.0.self_attn.k_norm.weight").first == std::vector<std::int64_t>{6});
  CHECK(all.at("model.layers.0.self_attn.q_proj.weight").first == std::vector<std::int64_t>{24, 8});
  CHECK(all.at("model.layers.0.self_attn.o_proj.weight").first == std::vector<std::int64_t>{8, 24});
  CHECK(all.contains("lm_head.weight"));
  write(folder / "model.safetensors", all);
  CHECK_NOTHROW(WeightFiles::open(folder.path().string(), c));
}

TEST_CASE("gpt2's tensors are read with and without the prefix, transposed, and their masks are passed over") {
  TempFolder folder;
  const ModelConfig c = load(folder, gpt2());
  const std::string path = folder / "model.safetensors", dir = folder.path().string();
  const Tensors all = tensors_of(c);
  CHECK(all.size() == 2 + 2 * 12 + 2);
  CHECK(all.at("transformer.h.1.attn.c_attn.weight").first == std::vector<std::int64_t>{8, 24});
  CHECK(all.at("transformer.h.0.attn.c_attn.bias").first == std::vector<std::int64_t>{24});
  CHECK(all.at("transformer.h.0.mlp.c_fc.weight").first == std::vector<std::int64_t>{8, 32});
  CHECK(all.at("transformer.h.0.mlp.c_proj.weight").first == std::vector<std::int64_t>{32, 8});
  CHECK(all.at("transformer.wpe.weight").first == std::vector<std::int64_t>{12, 8});
  Tensors bare;
  for (const auto& [name, t] : all) bare[name.substr(std::string("transformer.").size())] = t;
  const std::unique_ptr<Ops> ops = make_cpu_ops(1);
  const auto check_read = [&](const Tensors& file) {
    write(path, file);
    const WeightFiles files = WeightFiles::open(dir, c);
    for (const WeightSpec& spec : weight_specs(c)) {
      std::vector<float> x(static_cast<std::size_t>(spec.rows * spec.cols));
      files.read(spec, *ops, {x.data(), DType::f32, spec.rows, spec.cols, spec.cols});
      const std::vector<float>& stored = all.at(spec.name).second;
      for (std::int64_t r = 0; r < spec.rows; ++r)
        for (std::int64_t col = 0; col < spec.cols; ++col)
          REQUIRE(x[static_cast<std::size_t>(r * spec.cols + col)] ==
                  stored[static_cast<std::size_t>(spec.transposed ? col * spec.rows + r : r * spec.cols + col)]);
    }
  };
  check_read(all);
  check_read(bare);
  Tensors old = bare;
  for (const char* layer : {"h.0.", "h.1."}) {
    add(old, layer + std::string("attn.bias"), {1, 1, 12, 12});
    add(old, layer + std::string("attn.masked_bias"), {1});
  }
  check_read(old);
  Tensors prefixed = all;
  add(prefixed, "transformer.h.1.attn.bias", {1, 1, 12, 12});
  prefixed["lm_head.weight"] = all.at("transformer.wte.weight");
  check_read(prefixed);

  const auto refused = [&](Tensors file, const std::string& name) {
    write(path, file);
    CHECK(refusal([&] { WeightFiles::open(dir, c); }).find(name) != std::string::npos);
  };
  Tensors bad = all;
  bad["wte.weight"] = all.at("transformer.wte.weight");
  refused(bad, "wte.weight");
  bad = bare;
  bad["transformer.wte.weight"] = bare.at("wte.weight");
  refused(bad, "wte.weight");
  for (const char* name : {"h.2.attn.bias", "h.0.attn.bias2", "attn.bias", "h.0.mlp.bias"}) {
    bad = bare;
    add(bad, name, {1, 1, 12, 12});
    refused(bad, name);
  }
  bad = bare;
  bad.erase("h.1.attn.c_attn.bias");
  refused(bad, "h.1.attn.c_attn.bias");
  bad = bare;
  add(bad, "h.0.mlp.c_fc.weight", {32, 8});
  refused(bad, "h.0.mlp.c_fc.weight");
  bad = all;
  bad["lm_head.weight"] = all.at("transformer.wte.weight");
  bad["lm_head.weight"].second[3] += 1;
  refused(bad, "lm_head.weight");
}

TEST_CASE("LoRA's targets are those of the architecture, by default and by name") {
  CHECK(architecture_of("gpt2").target_names() == std::vector<std::string>{"c_attn", "c_proj", "c_fc", "attn.c_proj", "mlp.c_proj"});
  CHECK(architecture_of("llama").target_names() ==
        std::vector<std::string>{"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"});
  CHECK((names_map("c_proj", "attn.c_proj") && names_map("mlp.c_proj", "mlp.c_proj") && !names_map("proj", "attn.c_proj")));
  CHECK((!names_map("attn.c_proj", "mlp.c_proj") && !names_map("", "attn.c_proj")));
  TempFolder folder;
  const ModelConfig c = load(folder, gpt2());
  overwrite(folder / "run.toml", "[model]\npath = \".\"\n");
  RunConfig run = load_config(folder / "run.toml");
  CHECK(run.lora.targets == std::vector<std::string>{"c_attn", "c_proj", "c_fc"});
  CHECK(to_toml(run).find("\"c_fc\"") != std::string::npos);
  const auto shapes = [&](const std::string& targets) {
    const RunConfig chosen = load_config(folder / "run.toml", {"lora.targets=" + targets, "lora.rank=3", "method=no_cot"});
    std::map<std::string, std::vector<std::int64_t>> all;
    for (const TrainableSpec& t : trainable_specs(chosen, c)) all[t.name] = {t.rows, t.cols};
    return all;
  };
  const std::string h = "base_model.model.transformer.h.1.";
  auto all = shapes("[\"c_attn\", \"c_proj\", \"attn.c_proj\"]");
  CHECK(all.size() == 2 * 2 * 3);
  CHECK(all.at(h + "attn.c_attn.lora_A.weight") == std::vector<std::int64_t>{3, 8});
  CHECK(all.at(h + "attn.c_attn.lora_B.weight") == std::vector<std::int64_t>{24, 3});
  CHECK(all.at(h + "mlp.c_proj.lora_A.weight") == std::vector<std::int64_t>{3, 32});
  CHECK(all.at(h + "mlp.c_proj.lora_B.weight") == std::vector<std::int64_t>{8, 3});
  CHECK(shapes("[\"mlp.c_proj\"]").size() == 2 * 2);
  const auto wrong = [&](const std::string& name) {
    return refusal([&] { load_config(folder / "run.toml", {"lora.targets=[\"" + name + "\"]"}); }, Exit::usage);
  };
  for (const char* name : {"q_proj", "lm_head"}) CHECK(wrong(name).find("attn.c_proj") != std::string::npos);
  const std::string hash = config_hash(run);
  run.lora.targets = {"q_proj", "k_proj", "v_proj", "o_proj"};
  CHECK(config_hash(run) == hash);
  load(folder, qwen3());
  CHECK(load_config(folder / "run.toml").lora.targets == std::vector<std::string>{"q_proj", "k_proj", "v_proj", "o_proj"});
  CHECK(wrong("c_attn").find("q_proj") != std::string::npos);
}
