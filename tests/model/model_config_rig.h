// config.json written and read, and what of it is refused.
#pragma once
#include <catch2/catch_test_macros.hpp>
#include <string>

#include "engine/error.h"
#include "engine/files/json.h"
#include "models/config.h"
#include "tests/folders.h"

namespace kava::test {

inline Json llama() {
  return {{"model_type", "llama"}, {"hidden_size", 8},     {"intermediate_size", 6},     {"num_hidden_layers", 2},
          {"vocab_size", 10},      {"head_dim", 4},        {"num_attention_heads", 4},   {"num_key_value_heads", 2},
          {"rms_norm_eps", 1e-5},  {"hidden_act", "silu"}, {"tie_word_embeddings", true}};
}

inline ModelConfig load(const TempFolder& folder, const Json& json) {
  overwrite(folder / "config.json", json.dump());
  return ModelConfig::load(folder.path().string());
}

template <class F>
std::string refusal(F&& f, Exit code = Exit::data) {
  try {
    f();
  } catch (const Error& e) {
    CHECK(e.code() == code);
    return e.what();
  }
  return "";
}

inline ModelConfig with(const TempFolder& folder, Json json, const Json& changes) {
  json.update(changes);
  return load(folder, json);
}

inline void check_refused(const TempFolder& folder, const Json& base, const Json& changes, const std::string& key,
                          const std::string& value = "") {
  CAPTURE(changes.dump());
  const std::string text = refusal([&] { with(folder, base, changes); });
  CHECK(text.find(key) != std::string::npos);
  CHECK(text.find(value) != std::string::npos);
}

}  // namespace kava::test
