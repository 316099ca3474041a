#include <catch2/catch_test_macros.hpp>
#include <chrono>
#include <fstream>
#include <functional>
#include <map>
#include <random>
#include <sstream>
#include <stdexcept>
#include <thread>

#include "engine/error.h"
#include "engine/files.h"
#include "engine/json.h"
#include "engine/split_pattern.h"
#include "engine/tokenizer.h"
#include "engine/unicode.h"
#include "tests/folders.h"

using namespace kava;
using Ids = std::vector<std::int32_t>;

namespace {

const char* const kModels[] = {"llama-3.2-1b-instruct", "qwen2.5-0.5b-instruct", "smollm2-135m-instruct"};

Json golden() { return read_json(KAVA_SOURCE_DIR "/tests/golden/tokenizer_golden.json"); }

// A character of GPT-2's byte alphabet.
std::string symbol(int byte) {
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
Json small() {
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

Json added_token(int id, const std::string& content, bool special) {
  return {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", special}};
}

Json split_step(const Json& pattern, const std::string& behavior, bool invert = false) {
  return {{"type", "Split"}, {"pattern", pattern}, {"behavior", behavior}, {"invert", invert}};
}

// The small tokenizer with a step before ByteLevel.
Json with_step(const Json& step) {
  Json json = small();
  json["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", Json::array({step, json["pre_tokenizer"]})}};
  return json;
}

Tokenizer load(const Json& json, const Json& config = Json::object()) {
  TempFolder folder;
  overwrite(folder / "tokenizer.json", json.dump());
  overwrite(folder / "tokenizer_config.json", config.dump());
  return Tokenizer::load(folder.path().string());
}

// The message of the Error(code data) that loading ends in; "" when it loads.
std::string refusal(const std::string& text) {
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

std::string refusal(const Json& json) { return refusal(json.dump()); }

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// A text cut by a split pattern, each piece decoded: pieces do not merge with each other.
std::vector<std::string> pieces(const std::string& pattern, const std::string& text) {
  std::vector<Stretch> stretches;
  SplitPattern::regex(pattern).find_all(text, stretches);
  std::vector<std::string> out;
  for (const Stretch& s : stretches)
    if (s.begin < s.end) out.push_back(text.substr(s.begin, s.end - s.begin));
  return out;
}

}  // namespace

TEST_CASE("nasty texts give the ids and the decoded text of the tokenizers library") {
  const Json all = golden();
  const std::vector<std::string> texts = all["texts"];
  for (const char* name : kModels) {
    const std::string folder = shared_data(std::string("data/tokenizers/") + name);
    if (folder.empty()) SKIP("no shared data: tokenizers/" << name);
    const Json& expected = all["models"][name];
    REQUIRE(sha256_file(folder + "/tokenizer.json") == expected["sha256"].get<std::string>());
    const Tokenizer tokenizer = Tokenizer::load(folder);
    CHECK(tokenizer.size() == expected["size"].get<int>());
    for (std::size_t i = 0; i < texts.size(); ++i) {
      INFO(name << ": " << escaped(texts[i], 200));
      const Ids ids = expected["with_special"][i];
      CHECK(tokenizer.encode_with_special(texts[i]) == ids);
      CHECK(tokenizer.encode(texts[i]) == expected["plain"][i].get<Ids>());
      CHECK(tokenizer.decode(ids) == expected["decoded"][i].get<std::string>());
      CHECK(tokenizer.decode(ids, true) == expected["decoded_without_special"][i].get<std::string>());
    }
  }
}

TEST_CASE("every line of the real data sets gives the ids of the tokenizers library") {
  const Json all = golden();
  for (const char* name : kModels) {
    const std::string folder = shared_data(std::string("data/tokenizers/") + name);
    if (folder.empty()) SKIP("no shared data: tokenizers/" << name);
    const Tokenizer tokenizer = Tokenizer::load(folder);
    for (const auto& [file, digest] : all["models"][name]["files"].items()) {
      std::istringstream in(read_file(shared_data("data/" + file), std::size_t{1} << 30));
      std::string stream;
      for (std::string line; std::getline(in, line);) {
        if (line.empty()) continue;
        for (std::int32_t id : tokenizer.encode(line)) stream += std::to_string(id) + ' ';
        stream += '\n';
      }
      INFO(name << ", " << file);
      CHECK(sha256(stream) == digest.get<std::string>());
    }
  }
}

TEST_CASE("BOS and EOS of the real tokenizers are those of transformers") {
  const std::string folder = shared_data("data/tokenizers");
  if (folder.empty()) SKIP("no shared data: tokenizers");
  const Tokenizer llama = Tokenizer::load(folder + "/" + kModels[0]);
  CHECK(llama.bos() == 128000);
  CHECK(llama.eos_token() == "<|eot_id|>");
  CHECK(llama.id_of("<|eot_id|>") == 128009);
  const Tokenizer qwen = Tokenizer::load(folder + "/" + kModels[1]);
  CHECK_FALSE(qwen.bos());
  CHECK(qwen.eos_token() == "<|im_end|>");
  const Tokenizer smollm = Tokenizer::load(folder + "/" + kModels[2]);
  CHECK_FALSE(smollm.bos());
  CHECK_FALSE(smollm.eos_token());
}

TEST_CASE("the pair of lowest rank is merged first, the leftmost of equals") {
  const Tokenizer tokenizer = load(small());
  CHECK(tokenizer.encode("aab") == Ids{97, 256});
  CHECK(tokenizer.encode("abcab") == Ids{257, 256});
  CHECK(tokenizer.encode("aaaaaaa") == Ids{259, 258, 97});
  CHECK(tokenizer.encode("").empty());
  CHECK(tokenizer.size() == 260);
}

TEST_CASE("long pieces merge as short ones do") {
  const Tokenizer tokenizer = load(small());
  std::mt19937 random(7);
  for (int round = 0; round < 200; ++round) {
    // A byte that never merges cuts the text: the parts on both sides merge alone.
    std::string text;
    Ids expected;
    for (int part = 0; part < 8; ++part) {
      std::string piece;
      for (unsigned i = random() % 12; i-- > 0;) piece += "aaabc"[random() % 5];
      const Ids ids = tokenizer.encode(piece);
      expected.insert(expected.end(), ids.begin(), ids.end());
      expected.push_back('-');
      text += piece + "-";
    }
    CHECK(tokenizer.encode(text) == expected);
  }
}

TEST_CASE("a megabyte without a split takes little more than its share of time") {
  const Tokenizer tokenizer = load(small());
  auto seconds = [&](std::size_t n) {
    const auto start = std::chrono::steady_clock::now();
    CHECK(tokenizer.encode(std::string(n, 'a')).size() == n / 4);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  seconds(1 << 16);
  CHECK(seconds(1 << 20) < 20);  // a quadratic merge takes minutes
}

TEST_CASE("both spellings of merges mean the same and the last of equal merges wins") {
  Json json = small();
  json["model"]["merges"] = {"#version: 0.2", "a b", "ab c", "a a", "aa aa"};
  CHECK(load(json).encode("aabcaaaa") == load(small()).encode("aabcaaaa"));
  json["model"]["merges"].push_back("a b");  // now of the highest rank
  CHECK(load(json).encode("aab") == Ids{258, 98});
}

TEST_CASE("ignore_merges takes a whole piece that is a token") {
  Json json = small();
  json["model"]["vocab"]["abab"] = 260;
  CHECK(load(json).encode("abab") == Ids{256, 256});
  json["model"]["ignore_merges"] = true;
  CHECK(load(json).encode("abab") == Ids{260});
}

TEST_CASE("a byte without a token becomes unk_token, or nothing where there is none") {
  Json json = small();
  json["model"]["vocab"].erase("z");
  json["model"]["vocab"]["<unk>"] = 122;
  CHECK(load(json).encode("azzb") == Ids{256});
  json["model"]["unk_token"] = "<unk>";
  CHECK(load(json).encode("azzb") == Ids{97, 122, 122, 98});
  json["model"]["fuse_unk"] = true;
  CHECK(load(json).encode("azzb") == Ids{97, 122, 98});
  json["model"]["unk_token"] = "<none>";
  CHECK(contains(refusal(json), "unk_token"));
}

TEST_CASE("split behaviours cut as the library does") {
  struct Case {
    const char* behavior;
    bool invert;
    std::vector<std::string> pieces;
  };
  const Case cases[] = {{"Removed", false, {"The", "final", "countdown"}},
                        {"Isolated", false, {"The", "-", "final", "-", "-", "countdown"}},
                        {"MergedWithPrevious", false, {"The-", "final-", "-", "countdown"}},
                        {"MergedWithNext", false, {"The", "-final", "-", "-countdown"}},
                        {"Contiguous", false, {"The", "-", "final", "--", "countdown"}},
                        {"Removed", true, {"-", "-", "-"}}};
  for (const Case& c : cases)
    for (const Json& pattern : {Json{{"Regex", "-"}}, Json{{"String", "-"}}}) {
      INFO(c.behavior << " " << pattern.dump());
      // A space before every piece shows where they begin.
      Json json = with_step(split_step(pattern, c.behavior, c.invert));
      json["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true;
      const Tokenizer tokenizer = load(json);
      std::string expected;
      for (const std::string& piece : c.pieces) expected += " " + piece;
      CHECK(tokenizer.decode(tokenizer.encode("The-final--countdown")) == expected);
    }
}

TEST_CASE("Digits cuts numeric characters of every script, one by one or in runs") {
  Json json = with_step({{"type", "Digits"}, {"individual_digits", true}});
  json["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true;
  const std::string text = "a12\u0663\u00bdb";
  Tokenizer tokenizer = load(json);
  CHECK(tokenizer.decode(tokenizer.encode(text)) == " a 1 2 \u0663 \u00bd b");
  json["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = false;
  tokenizer = load(json);
  CHECK(tokenizer.decode(tokenizer.encode(text)) == " a 12\u0663\u00bd b");
}

TEST_CASE("split patterns mean what they mean in Oniguruma") {
  using Pieces = std::vector<std::string>;
  CHECK(pieces(R"(\s+)", "a\u180eb c") == Pieces{"a\u180eb", " ", "c"});  // U+180E is no space
  CHECK(pieces(R"(\p{L}+)", "a\U00031350b") == Pieces{"a\U00031350b"});   // a letter since Unicode 15
  CHECK(pieces(R"(\w+)", "a_\u0301\u00b2-") == Pieces{"a_\u0301\u00b2", "-"});
  CHECK(pieces(R"(\w+|[^\w\s]+)", "a\u00b2 -\u00b2") == Pieces{"a\u00b2", " ", "-\u00b2"});  // in brackets the superscripts are no \w
  CHECK(pieces(R"([^\Wa]+)", "bcab-") == Pieces{"bc", "a", "b", "-"});
  CHECK(pieces(R"(\h)", "g f") == Pieces{"g ", "f"});
  CHECK(pieces(R"(^b$)", "a\nb\nc") == Pieces{"a\n", "b", "\nc"});
  CHECK(pieces(R"(a{2}+)", "aaaaa") == Pieces{"aaaa", "a"});
  CHECK(pieces(R"(a{2}?)", "aab") == Pieces{"aa", "b"});
  CHECK(pieces(R"(xa{,2})", "xaaa") == Pieces{"xaa", "a"});
  CHECK(pieces(R"((?m:a.b))", "a\nb") == Pieces{"a\nb"});
  CHECK(pieces(R"(\p{Latin})", "\u202fq") == Pieces{"\u202f", "q"});  // by script, not by script extensions
  CHECK(pieces(R"([[:punct:]]+)", "a$.b") == Pieces{"a", "$.", "b"});
  CHECK(pieces(R"(\u0062)", "abc") == Pieces{"a", "b", "c"});
  CHECK(pieces(R"((.)\1)", "\U00031350\U00031351aa") == Pieces{"\U00031350\U00031351", "aa"});
  CHECK(pieces("x*", "abc") == Pieces{"a", "b", "c"});  // empty matches cut
  for (const char* bad :
       {R"([a&&b])", R"([[a]b])", R"((?s).)", R"(\pL)", R"(\Qa\E)", "(", "[a", R"(\xe4)", R"(\g<1>(a))", "(*FAIL)", "a**"}) {
    INFO(bad);
    CHECK_THROWS_AS(SplitPattern::regex(bad), std::invalid_argument);
  }
}

TEST_CASE("a split pattern that explodes is an error and not a hang") {
  const auto fails = [](const char* pattern, const std::string& text) {
    std::vector<Stretch> out;
    try {
      SplitPattern::regex(pattern).find_all(text, out);
    } catch (const Error& e) {
      return e.code() == Exit::data;
    }
    return false;
  };
  CHECK(fails("(a+)+$", std::string(40, 'a') + "b"));
  CHECK(fails("[ab]+[bc]+d", std::string(1 << 18, 'b') + "xd"));
  std::vector<Stretch> out;  // much text is no explosion
  SplitPattern::regex(R"(\s*[\r\n]+|\s+(?!\S)|\s+)").find_all(std::string(3 << 20, ' ') + "x", out);
  CHECK(out.size() == 3);
}

TEST_CASE("added tokens are found leftmost and longest, special ones only when asked for") {
  Json json = small();
  json["added_tokens"] = {added_token(260, "<s>", true), added_token(261, "<s>x", false), added_token(262, "<t>", false)};
  const Tokenizer tokenizer = load(json);
  CHECK(tokenizer.size() == 263);
  CHECK(tokenizer.encode_with_special("a<s>b<s>x<t>") == Ids{97, 260, 98, 261, 262});
  CHECK(tokenizer.encode("a<s>b<s>x<t>") == Ids{97, '<', 's', '>', 98, 261, 262});
  CHECK(tokenizer.decode(Ids{97, 260, 261, 400, -1}) == "a<s><s>x");
  CHECK(tokenizer.decode(Ids{97, 260, 261}, true) == "a<s>x");
  CHECK(tokenizer.id_of("<t>") == 262);
  CHECK_FALSE(tokenizer.id_of("<u>"));
  CHECK(tokenizer.token(262) == "<t>");
  CHECK(tokenizer.token(' ') == " ");
  CHECK(tokenizer.token(263).empty());
}

TEST_CASE("added tokens that begin, end and lie in one another are found as the leftmost and longest") {
  const std::vector<std::string> contents = {"ab", "abcd", "bc", "bcde", "c", "dee", "e"};
  Json json = small();
  std::map<std::string, std::int32_t> id;
  std::int32_t next = 260;
  for (const std::string& content : contents) {
    id[content] = content == "ab" ? 256 : content.size() == 1 ? content[0] : next++;
    json["added_tokens"].push_back(added_token(id[content], content, false));
  }
  const Tokenizer tokenizer = load(json);
  std::mt19937 random(1);
  for (int k = 0; k < 500; ++k) {
    std::string text(random() % 20, 'a');
    // No two a: the merges of `small` would join them.
    for (std::size_t i = 0; i < text.size(); ++i) text[i] = i > 0 && text[i - 1] == 'a' ? "bcde"[random() % 4] : "abcde"[random() % 5];
    Ids expected;
    for (std::size_t i = 0; i < text.size();) {
      std::string best;
      for (const std::string& content : contents)
        if (text.compare(i, content.size(), content) == 0 && content.size() > best.size()) best = content;
      expected.push_back(best.empty() ? text[i] : id[best]);
      i += std::max<std::size_t>(best.size(), 1);
    }
    INFO(text);
    CHECK(tokenizer.encode(text) == expected);
  }
}

TEST_CASE("added tokens take the time of the text, however long they are and whatever they strip") {
  Json json = small();
  json["added_tokens"] = {added_token(260, " ", false), added_token(261, std::string(100000, 'a') + "b", false)};
  json["added_tokens"][0]["rstrip"] = true;
  const Tokenizer tokenizer = load(json);
  const auto start = std::chrono::steady_clock::now();
  CHECK(tokenizer.encode(std::string(1 << 20, 'a')).size() == 1 << 18);
  CHECK(tokenizer.encode(std::string(1 << 20, ' ')).size() == 1 << 20);
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(60));  // quadratic they take hours
}

TEST_CASE("an added token strips spaces and stands alone where it says so") {
  Json json = small();
  json["added_tokens"] = {added_token(260, "<l>", false), added_token(261, "<r>", false), added_token(262, "one", false)};
  json["added_tokens"][0]["lstrip"] = true;
  json["added_tokens"][1]["rstrip"] = true;
  json["added_tokens"][2]["single_word"] = true;
  const Tokenizer tokenizer = load(json);
  CHECK(tokenizer.encode("x \u3000<l> y") == Ids{'x', 260, ' ', 'y'});
  CHECK(tokenizer.encode("x <r> \n<l>y") == Ids{'x', ' ', 261, 260, 'y'});
  CHECK(tokenizer.encode("one ones") == Ids{262, ' ', 'o', 'n', 'e', 's'});
  CHECK(tokenizer.encode("\u00e9one") == Ids{0xC3, 0xA9, 'o', 'n', 'e'});
}

TEST_CASE("normalized added tokens are found in the normalized text") {
  Json json = small();
  json["normalizer"] = {{"type", "Sequence"}, {"normalizers", Json::array({{{"type", "NFC"}}})}};
  json["added_tokens"] = {added_token(260, "e\u0301", false), added_token(261, "o\u0301", false)};
  json["added_tokens"][0]["normalized"] = true;
  const Tokenizer tokenizer = load(json);
  CHECK(tokenizer.encode("e\u0301 \u00e9") == Ids{260, ' ', 260});
  CHECK(tokenizer.encode("o\u0301 \u00f3") == Ids{261, ' ', 0xC3, 0xB3});
}

TEST_CASE("NFC sorts and composes, and takes a megabyte of marks") {
  CHECK(nfc("s\u0307\u0323 e\u0301 \u212b \u1100\u1161\u11a8") == "\u1e69 \u00e9 \u00c5 \uac01");
  CHECK(nfc("\uac00\u11a7") == "\uac00\u11a7");
  CHECK(nfc("a\u07fd\u0334") == "a\u07fd\u0334");  // U+07FD is younger than the library's table
  std::string marks = "a";
  for (int i = 0; i < 1 << 18; ++i) marks += i % 2 ? "\u0323" : "\u0307";
  CHECK(nfc(marks).size() == marks.size());  // a and the first U+0323, one byte and two, become U+1EA1 of three bytes
}

TEST_CASE("broken UTF-8 is refused in text and replaced in decoding") {
  const Tokenizer tokenizer = load(small());
  for (const char* bad : {"\xff", "a\xc3", "\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xe2\x82"}) {
    try {
      tokenizer.encode(bad);
      FAIL("accepted " << escaped(bad));
    } catch (const Error& e) {
      CHECK(e.code() == Exit::data);
      CHECK(contains(e.what(), "UTF-8"));
    }
  }
  CHECK(tokenizer.decode(Ids{0xC3}) == "\ufffd");
  CHECK(tokenizer.decode(Ids{0xE2, 0x82, 'a', 0xF0, 0x9F, 0x98, 0xFF}) == "\ufffda\ufffd\ufffd");
  CHECK(tokenizer.decode(Ids{0xED, 0xA0, 0x80}) == "\ufffd\ufffd\ufffd");
  CHECK(tokenizer.encode(std::string_view("a\0b", 3)) == Ids{97, 0, 98});
}

TEST_CASE("several threads encode and decode with one tokenizer") {
  Json json = with_step(split_step({{"Regex", R"(\s+|\w+)"}}, "Isolated"));
  const Tokenizer tokenizer = load(json);
  const std::string text = "aab abc aaaa ab \U00031350 e\u0301 ab";
  const Ids expected = tokenizer.encode(text);
  std::vector<std::thread> threads;
  std::array<bool, 4> same{};
  for (bool& ok : same)
    threads.emplace_back([&] {
      ok = true;
      for (int i = 0; i < 500; ++i) ok = ok && tokenizer.encode(text) == expected && tokenizer.decode(expected) == text;
    });
  for (std::thread& t : threads) t.join();
  for (bool ok : same) CHECK(ok);
}

TEST_CASE("BOS is what the post-processor puts first, unless the configuration decides") {
  Json json = small();
  json["added_tokens"] = {added_token(260, "<s>", true), added_token(261, "</s>", true)};
  const Json special = {{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}}, text = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}};
  const Json both = {{"type", "TemplateProcessing"},
                     {"single", {special, text, special}},
                     {"pair", Json::array()},
                     {"special_tokens", {{"<s>", {{"id", "<s>"}, {"ids", {260}}, {"tokens", {"<s>"}}}}}}};
  json["post_processor"] = both;
  CHECK(load(json).bos() == 260);
  CHECK_FALSE(load(json, {{"add_bos_token", false}}).bos());
  CHECK_FALSE(load(json, {{"add_eos_token", true}}).bos());
  CHECK(load(json, {{"add_bos_token", true}, {"bos_token", {{"content", "</s>"}}}}).bos() == 261);
  CHECK(load(json, {{"eos_token", {{"content", "</s>"}}}}).eos_token() == "</s>");
  json["post_processor"]["single"] = {text, special};
  CHECK_FALSE(load(json).bos());
  json["post_processor"]["single"] = {special, special, text};
  CHECK(contains(refusal(json), "post_processor: puts 2 tokens"));
  json["post_processor"]["single"] = {special, text, text};
  CHECK(contains(refusal(json), "post_processor.single[2]: the template of a single sequence must hold it once"));
  json["post_processor"] = {{"type", "Sequence"}, {"processors", {both, both}}};
  CHECK(contains(refusal(json), "post_processor.processors[1]: a second TemplateProcessing"));
  json["post_processor"] = {{"type", "BertProcessing"}};
  CHECK(contains(refusal(json), "BertProcessing"));
}

TEST_CASE("a tokenizer.json that is malformed or not supported is refused with the place and the reason") {
  REQUIRE(refusal(small()).empty());
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
      {"has id 300 here", [](Json& j) { j["added_tokens"] = {added_token(300, "<s>", true)}; }},
      {"has id 5 here", [](Json& j) { j["added_tokens"] = {added_token(5, "<s>", true)}; }},
      {"added_tokens[0].id: must be a whole number", [](Json& j) { j["added_tokens"] = {added_token(-1, "<s>", true)}; }},
      {"added_tokens[0].special: must be true or false",
       [](Json& j) { j["added_tokens"] = {added_token(260, "<s>", true)}, j["added_tokens"][0]["special"] = 1; }},
      {"take more than", [](Json& j) { j["added_tokens"] = {added_token(260, std::string(5000000, 'x'), true)}; }},
      {"added_tokens[1]: the added token \"<s>\" is given twice",
       [](Json& j) {
         j["added_tokens"] = {added_token(260, "<s>", true), added_token(260, "<s>", false)};
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
         j["added_tokens"] = {added_token(260, "s\u0323\u0307", false), added_token(261, "\u1e69", false)};
         for (Json& token : j["added_tokens"]) token["normalized"] = true;
       }},
      {"must be an object", [](Json& j) { j = Json::array(); }},
  };
  for (const Case& c : cases) {
    Json json = small();
    c.spoil(json);
    const std::string message = refusal(json);
    INFO(c.reason << " in: " << message);
    CHECK(contains(message, c.reason));
    CHECK_FALSE(contains(message, "nlohmann"));
    CHECK_FALSE(contains(message, "\n"));
  }
  CHECK(contains(refusal(std::string("{\"model\": {\"vocab\": {\"a\": 0, \"a\": 1}}}")), "given twice"));
  CHECK(contains(refusal(std::string("{\"model\": ")), "not valid JSON"));
  CHECK(contains(refusal(std::string(100000, '[')), "nested deeper"));
  CHECK(contains(refusal(std::string("{\"version\": \"\\ud800\"}")), "not valid JSON"));
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
  CHECK(contains(refusal(json), "has id 5001 here, but its place in the vocabulary gives it 262"));
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
