// The shape of a model, from the config.json of a Hugging Face folder.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "engine/config/architecture.h"
#include "engine/config/config.h"

namespace kava {

struct RopeScaling {
  bool llama3 = false;  // the others are used only where it is set
  double factor = 1, low_freq_factor = 1, high_freq_factor = 1;
  std::int64_t original_max_position = 0;
  bool operator==(const RopeScaling&) const = default;
};

struct ModelConfig {
  std::string family;  // names its architecture
  std::int64_t layers = 0, hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, mlp = 0, vocab = 0;
  bool tied = false;  // the head is the embedding
  double norm_eps = 0;
  double rope_theta = 0;
  RopeScaling rope;
  double initializer_range = 0;
  std::vector<std::pair<std::string, double>> dropouts;  // the base's own, by their keys, where they are not 0
  std::int64_t max_positions = 0;
  std::vector<std::int64_t> eos_ids;  // empty where config.json names none; any numbers, since a tokenizer names it first
  bool eos_is_list = false;
  std::string source;  // path of the file, for messages

  /// Reads folder/config.json in the older and the newer spelling of its keys. What is missing gets transformers' default, but sizes must
  /// be there. Error(code data) on a value out of range and, by name, on an option that changes the function and is not supported. All
  /// products of sizes that a model needs fit in 2^40.
  static ModelConfig load(const std::string& folder);

  /// Error(code usage) where the file asks for dropout in the base, which is implemented nowhere, and the configuration does not leave it
  /// out.
  void require_for_training(BaseDropout dropout) const;

  const Architecture& architecture() const { return architecture_of(family); }
  std::int64_t width(Width w) const;
  /// How many positions a sequence may have; 0: any number.
  std::int64_t position_limit() const { return architecture().rotary() ? 0 : max_positions; }
};

}  // namespace kava
