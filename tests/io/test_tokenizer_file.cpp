#include <catch2/catch_test_macros.hpp>
#include <filesystem>
#include <functional>

#include "engine/files/files.h"
#include "tests/io/tokenizer_rig.h"

using namespace kava;
using Ids = std::vector<std::int32_t>;

TEST_CASE("BOS is what the template puts first, whatever the configuration says") {
  Json json = small();
  json["added_tokens"] = {added_token(260, "<s>", true), added_token(261, "</s>", true)};
  const Json special = {{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}}, text = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}};
  const Json both = {{"type", "TemplateProcessing"},
                     {"single", {special, text, special}},
                     {"pair", Json::array()},
                     {"special_tokens", {{"<s>", {{"id", "<s>"}, {"ids", {260}}, {"tokens", {"<s>"}}}}}}};
  json["post_processor"] = both;
  CHECK(load(json).bos() == 260);
  CHECK(load(json, {{"add_bos_token", false}}).bos() == 260);
  CHECK(load(json, {{"add_eos_token", true}}).bos() == 260);
  CHECK(load(json, {{"add_bos_token", true}, {"bos_token", {{"content", "</s>"}}}}).bos() == 260);
  CHECK(load(json, {{"eos_token", {{"content", "</s>"}}}}).eos_token() == "</s>");
  json["post_processor"]["single"] = {text, special};
  CHECK_FALSE(load(json).bos());
  CHECK_FALSE(load(json, {{"add_bos_token", true}, {"bos_token", "<s>"}}).bos());
  json["post_processor"]["single"] = {special, special, text};
  CHECK(contains(tokenizer_refusal(json), "post_processor: puts 2 tokens"));
  json["post_processor"]["single"] = {special, text, text};
  CHECK(contains(tokenizer_refusal(json), "post_processor.single[2]: the template of a single sequence must hold it once"));
  json["post_processor"] = {{"type", "Sequence"}, {"processors", {both, both}}};
  CHECK(contains(tokenizer_refusal(json), "post_processor.processors[1]: a second TemplateProcessing"));
  json["post_processor"] = {{"type", "BertProcessing"}};
  CHECK(contains(tokenizer_refusal(json), "BertProcessing"));
  json["post_processor"] = nullptr;
  CHECK_FALSE(load(json, {{"add_bos_token", true}, {"bos_token", "<s>"}}).bos());
}

TEST_CASE("a tokenizer.json that is malformed or not supported is refused with the place and the reason") {
  REQUIRE(tokenizer_refusal(small()).empty());
  struct Case {
    const char* reason;
    std::function<void(Json&)> spoil;
  };
  const Case cases[] = {
      {"Unigram", [](Json& j) { j["model"]["type"] = "Unigram"; }},
      {"WordPiece", [](Json& j) { j["model"]["type"] = "WordPiece"; }},
      {"model: the key is missing", [](Json& j) { j.erase("model"); }},
      {"vocab: the key is missing", [](Json& j) { j["model"].erase("vocab"); }},
      {"merges: the key is missing", [](Json& j) { j["model"].erase("merges"); }},
      {"model.vocab: is empty", [](Json& j) { j["model"]["vocab"] = Json::object(); }},
      {"model.vocab: must be an object", [](Json& j) { j["model"]["vocab"] = Json::array(); }},
      {"the id of \"ab\"", [](Json& j) { j["model"]["vocab"]["ab"] = -1; }},
      {"the id of \"ab\"", [](Json& j) { j["model"]["vocab"]["ab"] = 1.5; }},
      {"the id of \"ab\"", [](Json& j) { j["model"]["vocab"]["ab"] = "256"; }},
      {"the id of \"ab\" must be a whole number below 4194304, is {\"model\":{\"vocab\":{}}}",
       [](Json& j) {
         j["model"]["vocab"]["ab"] = {{"model", {{"vocab", Json::object()}}}};
       }},
      {"the id of \"ab\"", [](Json& j) { j["model"]["vocab"]["ab"] = 4294967295u; }},
      {"have the same id 257", [](Json& j) { j["model"]["vocab"]["ab"] = 257; }},
      {"model.merges[0]", [](Json& j) { j["model"]["merges"][0] = {"a"}; }},
      {"model.merges[0]",
       [](Json& j) {
         j["model"]["merges"][0] = {"a", 1};
       }},
      {"model.merges[1]: merges of both spellings", [](Json& j) { j["model"]["merges"][1] = "ab c"; }},
      {"the token \"qq\" is not in the vocabulary",
       [](Json& j) {
         j["model"]["merges"][0] = {"qq", "a"};
       }},
      {"the token \"ac\" is not in the vocabulary",
       [](Json& j) {
         j["model"]["merges"][0] = {"a", "c"};
       }},
      {"not two tokens", [](Json& j) { j["model"]["merges"] = {"a b c"}; }},
      {"model.merges: must be an array", [](Json& j) { j["model"]["merges"] = "a b"; }},
      {"dropout", [](Json& j) { j["model"]["dropout"] = 0.1; }},
      {"byte_fallback", [](Json& j) { j["model"]["byte_fallback"] = true; }},
      {"byte_fallback: must be true or false", [](Json& j) { j["model"]["byte_fallback"] = "yes"; }},
      {"continuing_subword_prefix", [](Json& j) { j["model"]["continuing_subword_prefix"] = "##"; }},
      {"end_of_word_suffix", [](Json& j) { j["model"]["end_of_word_suffix"] = "</w>"; }},
      {"version \"2.0\"", [](Json& j) { j["version"] = "2.0"; }},
      {"the normalizer Lowercase",
       [](Json& j) {
         j["normalizer"] = {{"type", "Lowercase"}};
       }},
      {"normalizer.type: the key is missing", [](Json& j) { j["normalizer"] = Json::object(); }},
      {"no ByteLevel", [](Json& j) { j["pre_tokenizer"] = nullptr; }},
      {"the pre-tokenizer Metaspace",
       [](Json& j) {
         j["pre_tokenizer"] = {{"type", "Metaspace"}};
       }},
      {"add_prefix_space: the key is missing", [](Json& j) { j["pre_tokenizer"].erase("add_prefix_space"); }},
      {"after ByteLevel",
       [](Json& j) {
         j["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", {j["pre_tokenizer"], j["pre_tokenizer"]}}};
       }},
      {"the split pattern \"[a\"",
       [](Json& j) {
         j = with_step(split_step({{"Regex", "[a"}}, "Isolated"));
       }},
      {"split behavior \"Kept\"",
       [](Json& j) {
         j = with_step(split_step({{"Regex", "a"}}, "Kept"));
       }},
      {"either \"Regex\" or \"String\"",
       [](Json& j) {
         j = with_step(split_step({{"Glob", "a"}}, "Isolated"));
       }},
      {"the decoder WordPiece",
       [](Json& j) {
         j["decoder"] = {{"type", "WordPiece"}};
       }},
      {"has id 300 here", [](Json& j) { j["added_tokens"] = Json::array({added_token(300, "<s>", true)}); }},
      {"has id 5 here", [](Json& j) { j["added_tokens"] = Json::array({added_token(5, "<s>", true)}); }},
      {"added_tokens[0].id: must be a whole number", [](Json& j) { j["added_tokens"] = Json::array({added_token(-1, "<s>", true)}); }},
      {"added_tokens[0].special: must be true or false",
       [](Json& j) { j["added_tokens"] = Json::array({added_token(260, "<s>", true)}), j["added_tokens"][0]["special"] = 1; }},
      {"take more than", [](Json& j) { j["added_tokens"] = Json::array({added_token(260, std::string(5000000, 'x'), true)}); }},
      {"added_tokens[1]: the added token \"<s>\" is given twice",
       [](Json& j) {
         j["added_tokens"] = Json::array({added_token(260, "<s>", true), added_token(260, "<s>", false)});
       }},
      {"pretokenizers[100]: more than 100",
       [](Json& j) {
         j = with_step(split_step({{"Regex", "a"}}, "Isolated"));
         Json& steps = j["pre_tokenizer"]["pretokenizers"];
         while (steps.size() < 101) steps.insert(steps.begin(), steps[0]);
       }},
      {"pattern.String: a text of more than",
       [](Json& j) {
         j = with_step(split_step({{"String", std::string(5000, 'a')}}, "Isolated"));
       }},
      {"both \"\u1e69\" once normalized",
       [](Json& j) {
         j["normalizer"] = {{"type", "NFC"}};
         j["added_tokens"] = Json::array({added_token(260, "s\u0323\u0307", false), added_token(261, "\u1e69", false)});
         for (Json& token : j["added_tokens"]) token["normalized"] = true;
       }},
      {"must be an object", [](Json& j) { j = Json::array(); }},
  };
  for (const Case& c : cases) {
    Json json = small();
    c.spoil(json);
    const std::string message = tokenizer_refusal(json);
    INFO(c.reason << " in: " << message);
    CHECK(contains(message, c.reason));
    CHECK_FALSE(contains(message, "nlohmann"));
    CHECK_FALSE(contains(message, "\n"));
  }
  CHECK(contains(tokenizer_refusal(std::string("{\"model\": {\"vocab\": {\"a\": 0, \"a\": 1}}}")),
                 "model.vocab: the token \"a\" is given twice"));
  CHECK(contains(tokenizer_refusal(std::string("{\"model\": ")), "not valid JSON"));
  CHECK(contains(tokenizer_refusal(std::string(100000, '[')), "nested deeper"));
  CHECK(contains(tokenizer_refusal(std::string("{\"version\": \"\\ud800\"}")), "not valid JSON"));
}

TEST_CASE("holes in the vocabulary are no tokens and count in the size") {
  Json json = small();
  json["model"]["vocab"]["zz"] = 5000;
  const Tokenizer tokenizer = load(json);
  CHECK(tokenizer.size() == 5001);
  CHECK(tokenizer.decode(Ids{4000, 5000}) == "zz");
  // Added tokens are numbered on from the number of tokens, whatever ids those have.
  json["added_tokens"] = {added_token(261, "<s>", true), added_token(5000, "zz", false), added_token(262, "<t>", false)};
  CHECK(load(json).encode_with_special("<s>zz<t>") == Ids{261, 5000, 262});
  json["added_tokens"][2]["id"] = 5001;
  CHECK(contains(tokenizer_refusal(json), "has id 5001 here, but its place in the vocabulary gives it 262"));
}

TEST_CASE("a folder without a tokenizer.json is refused by the file's name") {
  TempFolder folder;
  try {
    Tokenizer::load(folder.path().string());
    FAIL("loaded");
  } catch (const Error& e) {
    CHECK(e.code() == Exit::data);
    CHECK(e.where() == folder / "tokenizer.json");
  }
}

TEST_CASE("a tokenizer file that is a link to nowhere or in a circle is refused and not taken for missing") {
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"})
    for (const char* target : {"gone", name}) {
      TempFolder folder;
      overwrite(folder / "tokenizer.json", small().dump());
      std::filesystem::remove(folder / name);
      std::filesystem::create_symlink(target, folder / name);
      CHECK(is_there(folder / name));
      try {
        Tokenizer::load(folder.path().string());
        FAIL("loaded");
      } catch (const Error& e) {
        CHECK(e.code() == Exit::data);
        CHECK(e.where() == folder / name);
      }
    }
}

TEST_CASE("truncation and padding of the file are ignored") {
  Json json = small();
  json["truncation"] = {{"direction", "Right"}, {"max_length", 2}, {"strategy", "LongestFirst"}, {"stride", 0}};
  json["padding"] = {{"strategy", {{"Fixed", 9}}}, {"direction", "Right"}, {"pad_id", 0}, {"pad_type_id", 0}, {"pad_token", "!"}};
  CHECK(load(json).encode("cccc") == Ids{'c', 'c', 'c', 'c'});
}
