// The shape of a model, from the config.json of a Hugging Face folder.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace kava {

struct RopeScaling {
  bool llama3 = false;  // the others are used only where it is set
  double factor = 1, low_freq_factor = 1, high_freq_factor = 1;
  std::int64_t original_max_position = 0;
  bool operator==(const RopeScaling&) const = default;
};

struct ModelConfig {
  std::string family;  // "llama" or "qwen2"
  std::int64_t layers = 0, hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, mlp = 0, vocab = 0;
  bool tied = false;      // the head is the embedding
  bool qkv_bias = false;  // q, k and v projections have a bias
  double norm_eps = 0;
  double rope_theta = 0;
  RopeScaling rope;
  double initializer_range = 0;
  double attention_dropout = 0;
  std::int64_t max_positions = 0;
  std::vector<std::int64_t> eos_ids;  // empty where config.json names none
  bool eos_is_list = false;
  std::optional<std::int64_t> bos_id;
  std::string source;  // path of the file, for messages

  /// Reads folder/config.json in the older and the newer spelling of its keys. What is missing gets transformers' default, but sizes must
  /// be there. Error(code data) on a value out of range and, by name, on an option that changes the function and is not supported. All
  /// products of sizes that a model needs fit in 2^40.
  static ModelConfig load(const std::string& folder);

  /// Error(code usage) where the file asks for something that only decoding does without.
  void require_for_training() const;
};

}  // namespace kava
