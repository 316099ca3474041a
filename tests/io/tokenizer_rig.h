// Small tokenizers made of JSON, for the tests of tokenizing and of the file's contract.
#pragma once
#include <catch2/catch_test_macros.hpp>
#include <string>

#include "engine/error.h"
#include "engine/files/json.h"
#include "engine/text/tokenizer.h"
#include "engine/text/unicode.h"
#include "tests/folders.h"

namespace kava {

// A character of GPT-2's byte alphabet.
inline std::string symbol(int byte) {
  int next = 0x100;
  std::string out;
  for (int b = 0; b < 256; ++b) {
    const bool printable = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
    const int code = printable ? b : next++;
    if (b == byte) append_utf8(out, static_cast<char32_t>(code));
  }
  return out;
}

// A tokenizer of the 256 bytes (id = byte) and the merges ab, abc, aa, aaaa.
inline Json small() {
  Json vocab = Json::object();
  for (int b = 0; b < 256; ++b) vocab[symbol(b)] = b;
  vocab["ab"] = 256, vocab["abc"] = 257, vocab["aa"] = 258, vocab["aaaa"] = 259;
  return {
      {"version", "1.0"},
      {"truncation", nullptr},
      {"padding", nullptr},
      {"added_tokens", Json::array()},
      {"normalizer", nullptr},
      {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", false}}},
      {"post_processor", nullptr},
      {"decoder", {{"type", "ByteLevel"}, {"add_prefix_space", true}, {"trim_offsets", true}, {"use_regex", true}}},
      {"model",
       {{"type", "BPE"},
        {"vocab", vocab},
        {"merges", Json::array({Json::array({"a", "b"}), Json::array({"ab", "c"}), Json::array({"a", "a"}), Json::array({"aa", "aa"})})}}}};
}

inline Json added_token(int id, const std::string& content, bool special) {
  return {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", special}};
}

inline Json split_step(const Json& pattern, const std::string& behavior, bool invert = false) {
  return {{"type", "Split"}, {"pattern", pattern}, {"behavior", behavior}, {"invert", invert}};
}

// The small tokenizer with a step before ByteLevel.
inline Json with_step(const Json& step) {
  Json json = small();
  json["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", Json::array({step, json["pre_tokenizer"]})}};
  return json;
}

inline Tokenizer load(const Json& json, const Json& config = Json::object()) {
  TempFolder folder;
  overwrite(folder / "tokenizer.json", json.dump());
  overwrite(folder / "tokenizer_config.json", config.dump());
  return Tokenizer::load(folder.path().string());
}

// The message of the Error(code data) that loading ends in; "" when it loads.
inline std::string tokenizer_refusal(const std::string& text) {
  TempFolder folder;
  overwrite(folder / "tokenizer.json", text);
  try {
    Tokenizer::load(folder.path().string());
  } catch (const Error& e) {
    CHECK(e.code() == Exit::data);
    CHECK(e.where() == folder / "tokenizer.json");
    return e.what();
  }
  return "";
}

inline std::string tokenizer_refusal(const Json& json) { return tokenizer_refusal(json.dump()); }

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace kava
