#include "engine/text/named_tokens.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <filesystem>
#include <string_view>
#include <unordered_set>

#include "engine/files/files.h"
#include "engine/text/bpe.h"

namespace kava {

namespace {

// In the library's order.
constexpr std::array kAttributes = {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"};
constexpr const char* kDecoder = "added_tokens_decoder";
constexpr const char* kAdditional = "additional_special_tokens";
constexpr const char* kExtra = "extra_special_tokens";

NamedToken described(const JsonAt& entry, const std::string& place) {
  NamedToken token{.content = entry.at("content").string()};
  token.special = entry.boolean_or("special", false);
  token.single_word = entry.boolean_or("single_word", false);
  token.lstrip = entry.boolean_or("lstrip", false);
  token.rstrip = entry.boolean_or("rstrip", false);
  token.normalized = entry.boolean_or("normalized", !token.special);
  token.file = entry.file(), token.place = place;
  return token;
}

// A string, or an object with "content".
NamedToken special_token(const JsonAt& value, const std::string& place) {
  NamedToken token;
  if (value.value().is_object()) {
    token = described(value, place);
    token.special = true;
    token.normalized = value.boolean_or("normalized", false);
  } else {
    token.content = value.string();
  }
  token.file = value.file(), token.place = place;
  return token;
}

std::optional<std::string> named(const JsonAt& root, const char* key) {
  if (!root.has(key)) return std::nullopt;
  return special_token(root.at(key), key).content;
}

std::unordered_set<std::string_view> contents_of(const std::vector<NamedToken>& tokens) {
  std::unordered_set<std::string_view> contents;
  for (const NamedToken& token : tokens) contents.insert(token.content);
  return contents;
}

// A list, or an object whose values are tokens.
std::vector<NamedToken> listed(const JsonAt& root, const char* key) {
  std::vector<NamedToken> tokens;
  if (!root.has(key)) return tokens;
  const JsonAt list = root.at(key);
  if (list.value().is_object())
    for (const auto& [name, value] : list.object())
      tokens.push_back(special_token(list.at(name.c_str()), fmt::format("{}.{}", key, escaped(name))));
  else
    for (std::size_t i = 0; i < list.array().size(); ++i) tokens.push_back(special_token(list.at(i), fmt::format("{}[{}]", key, i)));
  return tokens;
}

// Strings under keys that the library knows only as <anything>_token.
std::vector<NamedToken> model_specific(const JsonAt& root) {
  std::vector<NamedToken> tokens;
  for (const auto& [key, value] : root.object()) {
    const bool known = std::any_of(kAttributes.begin(), kAttributes.end(), [&](const char* name) { return key == name; });
    if (known || !key.ends_with("_token") || !value.is_string()) continue;
    tokens.push_back(special_token(root.at(key.c_str()), escaped(key)));
    tokens.back().must_exist = true;
  }
  return tokens;
}

}  // namespace

TokenFiles::File::File(std::string file) : path(std::move(file)), json(is_there(path) ? read_json(path) : Json::object()) {}

TokenFiles::TokenFiles(const std::string& folder)
    : config_((std::filesystem::path(folder) / "tokenizer_config.json").string()),
      map_((std::filesystem::path(folder) / "special_tokens_map.json").string()),
      added_((std::filesystem::path(folder) / "added_tokens.json").string()) {}

bool TokenFiles::has_decoder() const { return config_.root().has(kDecoder); }

std::vector<NamedToken> TokenFiles::tokens() const {
  const std::vector<NamedToken> special = special_tokens();
  std::vector<NamedToken> all;
  if (has_decoder()) append_decoder(all);
  else append_added(all, special);
  all.insert(all.end(), special.begin(), special.end());
  return all;
}

void TokenFiles::append_decoder(std::vector<NamedToken>& all) const {
  const JsonAt section = config_.root().at(kDecoder);
  for (const auto& [key, value] : section.object()) {
    const JsonAt entry = section.at(key.c_str());
    std::int32_t id = -1;
    const auto read = std::from_chars(key.data(), key.data() + key.size(), id);
    if (read.ec != std::errc() || read.ptr != key.data() + key.size() || id < 0 || id >= kMostTokenIds)
      entry.refuse(fmt::format("the key must be a whole number from 0 to {}", kMostTokenIds - 1));
    all.push_back(described(entry, fmt::format("{}.{}", kDecoder, id)));
    all.back().id = id, all.back().replaces = true;
  }
  std::stable_sort(all.begin(), all.end(), [](const NamedToken& a, const NamedToken& b) { return *a.id < *b.id; });
}

void TokenFiles::append_added(std::vector<NamedToken>& all, const std::vector<NamedToken>& special) const {
  const auto specials = contents_of(special);
  for (const auto& [content, id] : added_.root().object()) {
    NamedToken token{.content = content, .id = JsonAt(id, added_.path, escaped(content)).whole(kMostTokenIds - 1)};
    token.special = specials.contains(content);
    token.normalized = !token.special;
    token.file = added_.path;
    all.push_back(std::move(token));
  }
  std::stable_sort(all.begin(), all.end(), [](const NamedToken& a, const NamedToken& b) { return *a.id < *b.id; });
}

std::vector<NamedToken> TokenFiles::special_tokens() const {
  const JsonAt config = config_.root(), map = map_.root();
  const bool with_map = !has_decoder();
  std::vector<NamedToken> all;
  for (const char* key : kAttributes) {
    // A null of special_tokens_map.json takes the name away.
    const JsonAt& from = with_map && map.object().contains(key) ? map : config;
    if (from.has(key)) all.push_back(special_token(from.at(key), key));
  }
  // Versions agree on what these lists make only where one of them stands alone.
  bool alone = true;
  for (const JsonAt* root : {&config, &map})
    for (const char* key : {kAdditional, kExtra}) {
      if (root == &map && !with_map) continue;
      std::vector<NamedToken> tokens = listed(*root, key);
      const auto before = contents_of(all);
      for (NamedToken& token : tokens) token.must_exist = !alone && !before.contains(token.content);
      alone = alone && tokens.empty();
      all.insert(all.end(), tokens.begin(), tokens.end());
    }
  for (const JsonAt* root : {&config, &map}) {
    if (root == &map && !with_map) continue;
    std::vector<NamedToken> tokens = model_specific(*root);
    const auto before = contents_of(all);
    for (NamedToken& token : tokens) token.must_exist = !before.contains(token.content);
    all.insert(all.end(), tokens.begin(), tokens.end());
  }
  return all;
}

std::optional<std::string> TokenFiles::eos_token() const {
  const auto of_config = named(config_.root(), "eos_token"), of_map = named(map_.root(), "eos_token");
  if (of_map && !has_decoder()) return of_map;
  return of_config ? of_config : of_map;
}

std::string TokenFiles::note() const {
  const auto of_config = named(config_.root(), "eos_token"), of_map = named(map_.root(), "eos_token");
  if (!of_config || !of_map || *of_config == *of_map || has_decoder()) return "";
  return fmt::format(
      "{}: eos_token is \"{}\", and \"{}\" in tokenizer_config.json; special_tokens_map.json is followed, as in transformers, because "
      "tokenizer_config.json has no {}",
      shown_path(map_.path), escaped(*of_map), escaped(*of_config), kDecoder);
}

}  // namespace kava
