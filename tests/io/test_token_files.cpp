// Tokens and names in the files beside tokenizer.json. What is expected here is what transformers 4.57.6 and 5.24.0 give
// (tests/golden/transformers_check.py runs more of these folders through the library itself).
#include <catch2/catch_test_macros.hpp>

#include "tests/io/tokenizer_rig.h"

using namespace kava;
using Ids = std::vector<std::int32_t>;

namespace {

struct Files {
  Json config = Json::object(), map = nullptr, added = nullptr;
};

// The small tokenizer with <s> = 260 and </s> = 261.
Json start_end() {
  Json json = small();
  json["added_tokens"] = {added_token(260, "<s>", true), added_token(261, "</s>", true)};
  return json;
}

void write(const TempFolder& folder, const Json& tokenizer, const Files& files) {
  overwrite(folder / "tokenizer.json", tokenizer.dump());
  overwrite(folder / "tokenizer_config.json", files.config.dump());
  if (!files.map.is_null()) overwrite(folder / "special_tokens_map.json", files.map.dump());
  if (!files.added.is_null()) overwrite(folder / "added_tokens.json", files.added.dump());
}

Tokenizer read(const Files& files, const Json& tokenizer = start_end()) {
  TempFolder folder;
  write(folder, tokenizer, files);
  return Tokenizer::load(folder.path().string());
}

// File name and message of the Error(code data); "" when it loads.
std::string refused(const Files& files, const Json& tokenizer = start_end()) {
  TempFolder folder;
  write(folder, tokenizer, files);
  try {
    Tokenizer::load(folder.path().string());
  } catch (const Error& e) {
    CHECK(e.code() == Exit::data);
    CHECK(contains(e.what(), "; "));  // a remedy
    const std::string message = e.what(), path = folder.path().string();
    return message.substr(message.find(path) + path.size() + 1);
  }
  return "";
}

Json decoder(const Json& entries) { return {{"added_tokens_decoder", entries}}; }

Json entry(const std::string& content, bool special) {
  Json token = added_token(0, content, special);
  token.erase("id");
  return token;
}

}  // namespace

TEST_CASE("tokens that only tokenizer_config.json or added_tokens.json names exist") {
  CHECK(read({.config = decoder({{"262", entry("<x>", false)}})}).encode("a<x>") == Ids{'a', 262});
  CHECK(read({.config = decoder({{"262", entry("<x>", true)}})}).encode("<x>") == Ids{'<', 'x', '>'});
  CHECK(read({.config = decoder({{"262", entry("<x>", true)}})}).encode_with_special("a<x>") == Ids{'a', 262});
  CHECK(read({.config = decoder({{"263", entry("<y>", true)}, {"262", entry("<x>", true)}})}).size() == 264);
  CHECK(read({.config = decoder({{"256", entry("ab", false)}})}).encode("cab abc") == Ids{'c', 256, ' ', 256, 'c'});
  CHECK(read({.added = {{"<y>", 263}, {"<x>", 262}}}).encode("<x><y>") == Ids{262, 263});
  CHECK(read({.added = {{"<s>", 260}}}).encode_with_special("<s>") == Ids{260});
  // tokenizer_config.json's list is the whole truth where it has one.
  CHECK_FALSE(read({.config = decoder({{"262", entry("<x>", true)}}), .added = {{"<y>", 263}}}).id_of("<y>"));
  // It also says what tokens are like that tokenizer.json has; what is special stays so.
  Json strip = entry("<s>", true);
  strip["lstrip"] = true;
  CHECK(read({.config = decoder({{"260", strip}})}).encode_with_special("a  <s>") == Ids{'a', 260});
  CHECK(read({.config = decoder({{"260", entry("<s>", false)}})}).encode("<s>") == Ids{'<', 's', '>'});
}

TEST_CASE("a token's default properties are those of the library: normalized where it is not special") {
  Json nfc = start_end();
  nfc["normalizer"] = {{"type", "NFC"}};
  const std::string decomposed = "e\u0301", composed = "\u00e9";
  CHECK(read({.config = decoder({{"262", {{"content", decomposed}}}})}, nfc).encode(composed) == Ids{262});
  CHECK(read({.added = {{decomposed, 262}}}, nfc).encode(composed) == Ids{262});
  const Json named = {{"additional_special_tokens", {decomposed}}};
  CHECK(read({.config = named, .added = {{decomposed, 262}}}, nfc).encode_with_special(composed) == Ids{195, 169});
  CHECK(read({.config = named, .added = {{decomposed, 262}}}, nfc).encode_with_special(decomposed) == Ids{262});
}

TEST_CASE("special tokens that only a name makes exist, numbered in the library's order") {
  const Json config = {
      {"pad_token", "<p>"}, {"eos_token", "<e>"}, {"bos_token", {{"content", "<b>"}}}, {"additional_special_tokens", {"<x>"}}};
  CHECK(read({.config = config}).encode_with_special("<b><e><p><x>") == Ids{262, 263, 264, 265});
  CHECK(read({.map = {{"pad_token", "<p>"}, {"additional_special_tokens", {"<x>"}}}}).encode_with_special("<p><x>") == Ids{262, 263});
  CHECK(read({.config = {{"extra_special_tokens", {{"image_token", "<x>"}}}}}).encode_with_special("<x>") == Ids{262});
  CHECK(
      read({.config = {{"additional_special_tokens", nullptr}, {"pad_token", nullptr}, {"extra_special_tokens", Json::object()}}}).size() ==
      262);
  // A null of special_tokens_map.json takes the name away.
  CHECK(read({.config = {{"pad_token", "<p>"}}, .map = {{"pad_token", nullptr}}}).size() == 262);
  Json plain = start_end();
  plain["added_tokens"][1]["special"] = false;
  CHECK(read({}, plain).encode("</s>") == Ids{261});
  CHECK(read({.config = {{"eos_token", "</s>"}}}, plain).encode("</s>") == Ids{'<', '/', 's', '>'});
}

TEST_CASE("files that contradict each other about a token are refused by file and token") {
  const std::string config = "tokenizer_config.json: added_tokens_decoder.";
  CHECK(contains(refused({.config = decoder({{"265", entry("<x>", true)}})}),
                 config + "265: the token \"<x>\" has id 265 here, but 262 by tokenizer.json"));
  CHECK(contains(refused({.config = decoder({{"262", entry("<s>", true)}})}), config + "262: the token \"<s>\" has id 262 here, but 260"));
  CHECK(contains(refused({.config = decoder({{"260", entry("<x>", true)}})}), "\"<x>\" has id 260 here, but 262"));
  CHECK(contains(refused({.config = decoder({{"256", entry("<x>", true)}})}), "\"<x>\" has id 256 here, but 262"));
  CHECK(contains(refused({.config = decoder({{"262", entry("<x>", true)}, {"263", entry("<x>", true)}})}), "has id 263 here, but 262"));
  CHECK(contains(refused({.config = decoder({{"262", "<x>"}})}), config + "262: must be an object"));
  for (const char* key : {"x", "-1", "262x", "", "4194304", "99999999999"})
    CHECK(contains(refused({.config = decoder({{key, entry("<x>", true)}})}), "the key must be a whole number"));
  CHECK(contains(refused({.added = {{"<x>", 270}}}), "added_tokens.json: the token \"<x>\" has id 270 here, but 262 by tokenizer.json"));
  CHECK(contains(refused({.added = {{"<s>", 262}}}), "added_tokens.json: the token \"<s>\" has id 262 here, but 260"));
  CHECK(contains(refused({.added = {{"<x>", 260}}}), "added_tokens.json: the token \"<x>\" has id 260 here, but 262"));
  CHECK(contains(refused({.added = {{"<x>", nullptr}}}), "added_tokens.json: <x>: must be a whole number"));
  CHECK(contains(refused({.added = Json::array({"<x>"})}), "added_tokens.json: must be an object"));
  CHECK(
      contains(refused({.config = {{"image_token", "<x>"}}}), "tokenizer_config.json: image_token: the token \"<x>\" is in no other file"));
  CHECK(refused({.config = {{"image_token", "<s>"}}}).empty());
  const Json lists = {{"additional_special_tokens", {"<x>"}}};
  CHECK(refused({.config = lists, .map = lists}).empty());
  CHECK(contains(refused({.config = lists, .map = {{"additional_special_tokens", {"<y>"}}}}),
                 "special_tokens_map.json: additional_special_tokens[0]: the token \"<y>\" is in no other file"));
}

TEST_CASE("new tokens are numbered on from the largest added id or the number of tokens of the vocabulary") {
  Json hole = small();
  hole["model"]["vocab"]["zz"] = 5000;
  CHECK(read({.added = {{"<x>", 261}}}, hole).encode("<x>") == Ids{261});
  hole["added_tokens"] = {added_token(261, "<s>", true), added_token(5000, "zz", false)};
  CHECK(read({.added = {{"<x>", 5001}}}, hole).encode("<x>") == Ids{5001});
  CHECK(contains(refused({.added = {{"<x>", 262}}}, hole), "has id 262 here, but 5001"));
}

TEST_CASE("special_tokens_map.json names the end of sequence unless tokenizer_config.json lists its added tokens") {
  const Json of_config = {{"eos_token", "</s>"}}, of_map = {{"eos_token", {{"content", "<s>"}}}};
  const Tokenizer differing = read({.config = of_config, .map = of_map});
  CHECK(differing.eos_token() == "<s>");
  CHECK(contains(differing.note(), "special_tokens_map.json: eos_token is \"<s>\", and \"</s>\" in tokenizer_config.json"));
  Json listed = decoder({{"260", entry("<s>", true)}});
  listed["eos_token"] = "</s>";
  CHECK(read({.config = listed, .map = of_map}).eos_token() == "</s>");
  CHECK(read({.config = listed, .map = of_map}).note().empty());
  CHECK(read({.config = decoder(Json::object()), .map = of_map}).eos_token() == "<s>");
  for (const auto& [config, map] :
       {std::pair(of_config, Json::object()), std::pair(Json::object(), of_config), std::pair(of_config, of_config),
        std::pair(of_config, Json{{"eos_token", nullptr}}), std::pair(Json{{"eos_token", nullptr}}, of_config)}) {
    const Tokenizer one = read({.config = config, .map = map});
    CHECK(one.eos_token() == "</s>");
    CHECK(one.note().empty());
  }
}

TEST_CASE("a token without a row in the embedding is refused by the file that names it") {
  TempFolder folder;
  write(folder, start_end(), {.config = {{"pad_token", "<p>"}}});
  const Tokenizer tokenizer = Tokenizer::load(folder.path().string());
  tokenizer.require_ids_below(263, folder.path().string());
  const auto message = [&](std::int64_t rows) {
    try {
      tokenizer.require_ids_below(rows, folder.path().string());
    } catch (const Error& e) {
      CHECK(e.code() == Exit::data);
      return std::string(e.what());
    }
    return std::string();
  };
  CHECK(contains(message(262), "tokenizer_config.json: pad_token: the token \"<p>\" is not in tokenizer.json and gets the id 262"));
  const Tokenizer bare = load(start_end());
  CHECK_NOTHROW(bare.require_ids_below(262, "m"));
  CHECK_THROWS_AS(bare.require_ids_below(261, "m"), Error);
}
