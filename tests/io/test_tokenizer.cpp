#include <array>
#include <catch2/catch_test_macros.hpp>
#include <chrono>
#include <fstream>
#include <map>
#include <random>
#include <sstream>
#include <stdexcept>
#include <thread>

#include "engine/files/files.h"
#include "engine/text/split_pattern.h"
#include "tests/io/tokenizer_rig.h"

using namespace kava;
using Ids = std::vector<std::int32_t>;

namespace {

const char* const kTokenizers[] = {"llama-3.2-1b-instruct", "qwen2.5-0.5b-instruct", "smollm2-135m-instruct"};

Json tokenizer_golden() { return read_json(source_dir() + "/tests/golden/tokenizer_golden.json"); }

// A text cut by a split pattern, each piece decoded: pieces do not merge with each other.
std::vector<std::string> pieces(const std::string& pattern, const std::string& text) {
  std::vector<Stretch> stretches;
  SplitPattern::regex(pattern).find_all(text, stretches);
  std::vector<std::string> out;
  for (const Stretch& s : stretches)
    if (s.begin < s.end) out.push_back(text.substr(s.begin, s.end - s.begin));
  return out;
}

// The ids, each with a space behind it. Millions of them, in a file that is compiled without optimisation.
void append_line(const Ids& ids, std::string& out) {
  std::vector<char> line(ids.size() * 12 + 1);
  char* at = line.data();
  const std::int32_t* const end = ids.data() + ids.size();
  for (const std::int32_t* id = ids.data(); id < end; ++id) {
    char digits[12];
    int n = 0;
    for (std::int32_t rest = *id; n == 0 || rest > 0; rest /= 10) digits[n++] = static_cast<char>('0' + rest % 10);
    while (n > 0) *at++ = digits[--n];
    *at++ = ' ';
  }
  *at++ = '\n';
  out.append(line.data(), at);
}

}  // namespace

TEST_CASE("nasty texts give the ids and the decoded text of the tokenizers library") {
  const Json all = tokenizer_golden();
  const std::vector<std::string> texts = all["texts"];
  for (const char* name : kTokenizers) {
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
  const Json all = tokenizer_golden();
  for (const char* name : kTokenizers) {
    const std::string folder = shared_data(std::string("data/tokenizers/") + name);
    if (folder.empty()) SKIP("no shared data: tokenizers/" << name);
    const Tokenizer tokenizer = Tokenizer::load(folder);
    for (const auto& [file, digest] : all["models"][name]["files"].items()) {
      std::istringstream in(read_file(shared_data("data/" + file), std::size_t{1} << 30));
      std::string stream;
      for (std::string line; std::getline(in, line);) {
        if (line.empty()) continue;
        append_line(tokenizer.encode(line), stream);
      }
      INFO(name << ", " << file);
      CHECK(sha256(stream) == digest.get<std::string>());
    }
  }
}

TEST_CASE("BOS and EOS of the real tokenizers are those of transformers") {
  const std::string folder = shared_data("data/tokenizers");
  if (folder.empty()) SKIP("no shared data: tokenizers");
  const Tokenizer llama = Tokenizer::load(folder + "/" + kTokenizers[0]);
  CHECK(llama.bos() == 128000);
  CHECK(llama.eos_token() == "<|eot_id|>");
  CHECK(llama.id_of("<|eot_id|>") == 128009);
  const Tokenizer qwen = Tokenizer::load(folder + "/" + kTokenizers[1]);
  CHECK_FALSE(qwen.bos());
  CHECK(qwen.eos_token() == "<|im_end|>");
  const Tokenizer smollm = Tokenizer::load(folder + "/" + kTokenizers[2]);
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
  CHECK(contains(tokenizer_refusal(json), "unk_token"));
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
  CHECK_THROWS_AS(SplitPattern::regex(std::string((64 << 10) + 1, 'a')), std::invalid_argument);
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
