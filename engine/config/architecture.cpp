#include "engine/config/architecture.h"

#include <algorithm>

#include "engine/error.h"

namespace kava {

namespace {

// LLaMA's block, whose relatives differ in little.
Architecture llama() {
  Architecture a;
  a.family = "llama";
  a.prefix = "model.", a.layers = "layers.";
  a.embedding = "embed_tokens", a.final_norm = "norm";
  a.norm1 = "input_layernorm", a.norm2 = "post_attention_layernorm";
  a.maps[kAttentionIn] = {{"self_attn.q_proj", Width::query, Width::hidden},
                          {"self_attn.k_proj", Width::key, Width::hidden},
                          {"self_attn.v_proj", Width::key, Width::hidden}};
  a.maps[kAttentionOut] = {{"self_attn.o_proj", Width::hidden, Width::query}};
  a.maps[kMlpIn] = {{"mlp.gate_proj", Width::mlp, Width::hidden}, {"mlp.up_proj", Width::mlp, Width::hidden}};
  a.maps[kMlpOut] = {{"mlp.down_proj", Width::hidden, Width::mlp}};
  a.lora_targets = {"q_proj", "k_proj", "v_proj", "o_proj"};
  return a;
}

Architecture qwen2() {
  Architecture a = llama();
  a.family = "qwen2";
  for (LinearSpec& map : a.maps[kAttentionIn]) map.bias = true;
  return a;
}

Architecture qwen3() {
  Architecture a = llama();
  a.family = "qwen3";
  a.q_norm = "self_attn.q_norm", a.k_norm = "self_attn.k_norm";
  return a;
}

Architecture gpt2() {
  Architecture a;
  a.family = "gpt2";
  a.prefix = "transformer.", a.layers = "h.";
  a.embedding = "wte", a.positions = "wpe", a.final_norm = "ln_f";
  a.norm1 = "ln_1", a.norm2 = "ln_2";
  a.maps[kAttentionIn] = {{"attn.c_attn", Width::fused, Width::hidden, true}};
  a.maps[kAttentionOut] = {{"attn.c_proj", Width::hidden, Width::query, true}};
  a.maps[kMlpIn] = {{"mlp.c_fc", Width::mlp, Width::hidden, true}};
  a.maps[kMlpOut] = {{"mlp.c_proj", Width::hidden, Width::mlp, true}};
  a.norm = NormKind::layer, a.mlp = MlpKind::gelu_tanh;
  a.transposed = true;
  a.buffers = {"attn.bias", "attn.masked_bias"};
  a.lora_targets = {"c_attn", "c_proj", "c_fc"};
  return a;
}

}  // namespace

const std::vector<Architecture>& architectures() {
  static const std::vector<Architecture> all = {llama(), qwen2(), qwen3(), gpt2()};
  return all;
}

const Architecture* find_architecture(std::string_view family) {
  const auto at = std::ranges::find(architectures(), family, &Architecture::family);
  return at == architectures().end() ? nullptr : &*at;
}

const Architecture& architecture_of(std::string_view family) {
  const Architecture* a = find_architecture(family);
  KAVA_CHECK(a, "no architecture {}", family);
  return *a;
}

bool names_map(std::string_view target, std::string_view path) {
  return path == target || (path.size() > target.size() && path.ends_with(target) && path[path.size() - target.size() - 1] == '.');
}

bool is_adapted(const std::vector<std::string>& targets, std::string_view path) {
  return std::ranges::any_of(targets, [&](const std::string& t) { return names_map(t, path); });
}

std::vector<std::string> Architecture::target_names() const {
  std::vector<std::string> names, whole;
  for (const auto& group : maps)
    for (const LinearSpec& map : group) {
      const std::string last = map.path.substr(map.path.rfind('.') + 1);
      if (std::ranges::find(names, last) == names.end()) names.push_back(last);
      else whole.push_back(map.path);
    }
  // The first of several with one last part has been taken by that part alone.
  std::vector<std::string> shared;
  for (const auto& group : maps)
    for (const LinearSpec& map : group)
      if (std::ranges::any_of(whole, [&](const std::string& w) { return names_map(map.path.substr(map.path.rfind('.') + 1), w); }))
        shared.push_back(map.path);
  names.insert(names.end(), shared.begin(), shared.end());
  return names;
}

}  // namespace kava
