// Questions as chats: against what transformers writes and tokenizes (tests/golden/make_chat_golden.py).
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include "engine/data/data.h"
#include "engine/error.h"
#include "engine/files/json.h"
#include "models/chat.h"
#include "tests/programs/text_run.h"

using namespace kava;
namespace fs = std::filesystem;
using Catch::Matchers::ContainsSubstring;

namespace {

Json chat_golden() { return read_json(source_dir() + "/tests/golden/chat_golden.json"); }

}  // namespace

TEST_CASE("a chat is written as the model's template writes it") {
  const Json all = chat_golden();
  REQUIRE(all.at("cases").size() == 5);
  for (const Json& c : all.at("cases")) {
    CAPTURE(c.at("name").get<std::string>());
    const std::string source = c.at("template");
    const ChatText text = chat_text(recognised_chat(source, "here"), source, all.at("bos"));
    for (std::size_t i = 0; i < all.at("questions").size(); ++i) {
      const std::string question = all.at("questions")[i];
      CHECK(text.before + std::string(stripped(question)) + text.after == c.at("texts")[i].get<std::string>());
    }
  }
}

TEST_CASE("a chat has the ids that the library gives it") {
  const std::string shared = shared_data("data/tokenizers");
  if (shared.empty()) SKIP("no shared data: tokenizers");
  const Json all = chat_golden();
  int compared = 0;
  for (const Json& c : all.at("cases")) {
    if (!c.contains("ids")) continue;
    const std::string folder = shared + "/" + c.at("name").get<std::string>();
    const Tokenizer tokenizer = Tokenizer::load(folder);
    const ChatForm form = chat_form("auto", folder, tokenizer);
    SampleOptions options;
    options.chat_before = form.before, options.chat_after = form.after;
    for (std::size_t i = 0; i < all.at("questions").size(); ++i, ++compared)
      CHECK(question_ids(tokenizer, options, stripped(all.at("questions")[i].get<std::string>())) ==
            c.at("ids")[i].get<std::vector<int32_t>>());
  }
  CHECK(compared == 6);
}

TEST_CASE("a template of another family is refused by what it says, and none is no chat") {
  CHECK(recognised_chat("", "here") == ChatFamily::none);
  for (const char* other : {"{{ '[INST] ' + message + ' [/INST]' }}", "{{ '<start_of_turn>user' }}", "{{ '<|user|>' }}",
                            "<|im_start|>user<|im_sep|><|im_end|>", "{{ message }}"}) {
    try {
      recognised_chat(other, "here");
      FAIL(other);
    } catch (const Error& e) {
      CHECK(e.code() == Exit::data);
      CHECK_THAT(e.what(), ContainsSubstring(escaped(other, 60)));
    }
  }
  CHECK(chat_text(ChatFamily::llama3, "", "").before == "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n");
}

TEST_CASE("kava_eval and kava_generate ask in the form of a chat and say so") {
  TextRun tiny;
  const std::string data = tiny.write("rows.txt", kQuestions), dir = tiny.dir.string();
  const fs::path base = tiny.folder.path() / "base";
  // The tokenizer has no such tokens.
  CHECK(run("kava_eval " + dir + " --data " + data + " --chat chatml").code == 4);
  CHECK(run("kava_eval " + dir + " --data " + data + " --chat jinja").code == 2);
  Json tokenizer = Json::parse(tokenizer_json());
  for (const char* name : {"<|im_start|>", "<|im_end|>"}) {
    Json token = tokenizer["added_tokens"][0];
    token["content"] = name, token["id"] = 95 + static_cast<int>(tokenizer["added_tokens"].size());
    tokenizer["added_tokens"].push_back(token);
  }
  overwrite(base / "tokenizer.json", tokenizer.dump());
  Json config = read_json((base / "config.json").string());
  config["vocab_size"] = 98;
  overwrite(base / "config.json", config.dump());
  overwrite(base / "tokenizer_config.json",
            R"({"eos_token": "<end>", "chat_template": "{{'<|im_start|>' + message['role'] + '\\n' + '<|im_end|>'}}"})");
  const std::string plain = base.string();
  const Finished refused = run("kava_generate " + plain + " --chat llama3 Hello");
  CHECK(refused.code == 4);
  CHECK_THAT(refused.output, ContainsSubstring("<|begin_of_text|>"));
  overwrite(base / "tokenizer_config.json", R"({"eos_token": "<end>", "chat_template": "[INST]"})");
  const Finished unknown = run("kava_generate " + plain + " --chat auto Hello");
  CHECK(unknown.code == 4);
  CHECK_THAT(unknown.output, ContainsSubstring("\"[INST]\""));
  CHECK(std::count(unknown.output.begin(), unknown.output.end(), '\n') == 1);
  overwrite(base / "tokenizer_config.json", R"({"eos_token": "<end>"})");
  CHECK_THAT(run("kava_generate " + plain + " --chat auto Hello").output, ContainsSubstring("has no chat template"));
}

TEST_CASE("the bos_token of a template is that of the folder's files") {
  const TempFolder folder;
  CHECK(chat_bos(folder / "").empty());
  overwrite(folder / "special_tokens_map.json", R"({"bos_token": {"content": "<b>"}})");
  CHECK(chat_bos(folder / "") == "<b>");
  overwrite(folder / "tokenizer_config.json", R"({"bos_token": null})");
  CHECK(chat_bos(folder / "").empty());
  overwrite(folder / "tokenizer_config.json", R"({"bos_token": "<s>"})");
  CHECK(chat_bos(folder / "") == "<s>");
}
