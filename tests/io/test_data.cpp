#include <sys/stat.h>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <map>
#include <numeric>
#include <set>

#include "engine/data/data.h"
#include "engine/error.h"
#include "engine/text/tokenizer.h"
#include "kernels/philox.h"
#include "models/text.h"
#include "tests/io/row_rig.h"

using namespace kava;
using namespace kava::test;
using Catch::Matchers::ContainsSubstring;
using Strings = std::vector<std::string>;
using Ids = std::vector<int32_t>;

TEST_CASE("iCoT text splits at the first bars and the last marks") {
  const RowFile f = read_text(" How  many, a? ||<<1+2=3>>  <<3*1,000=3000>>\t####  3,000 \nQ||x||y #### z #### 4\nQ ####||#### -5\n");
  REQUIRE(f.rows.size() == 3);
  CHECK(f.format == DataFormat::icot_text);
  CHECK(f.rows[0].question == "How  many, a?");
  CHECK(f.rows[0].steps == Strings{"<<1+2=3>>", "<<3*1,000=3000>>"});
  CHECK(f.rows[0].answer == "3,000");
  CHECK(f.rows[0].has_trace);
  CHECK(f.rows[1].steps == Strings{"x||y #### z"});
  CHECK(f.rows[1].answer == "4");
  CHECK(f.rows[2].question == "Q ####");
  CHECK(f.rows[2].steps.empty());
  CHECK(f.rows[2].answer == "-5");
  CHECK(f.rows[2].line == 3);
}

TEST_CASE("sentences split after a full stop and a space, equations at white space alone") {
  CHECK(read_text("q||One is 1.5.  Two. . Three #### 1").rows[0].steps == Strings{"One is 1.5.", "Two.", ".", "Three"});
  CHECK(read_text("q||<<1+1=2. 3>> <<4=4>>\t<<5=5>><<6=6>> #### 1").rows[0].steps ==
        Strings{"<<1+1=2.", "3>>", "<<4=4>>", "<<5=5>><<6=6>>"});
}

TEST_CASE("marks at the start, blank lines, CRLF and NUL are read as documented") {
  const RowFile f = read_text(std::string("\xEF\xBB\xBF\r\n  \nq\0 1||a. b #### 2\r\n\n\nq||#### 3", 38));
  REQUIRE(f.rows.size() == 2);
  CHECK(f.rows[0].question == std::string("q\0 1", 4));
  CHECK(f.rows[0].steps == Strings{"a.", "b"});
  CHECK(f.rows[0].answer == "2");
  CHECK(f.rows[0].line == 3);
  CHECK(f.rows[1].line == 6);
}

TEST_CASE("the JSON forms are recognised and read") {
  const RowFile jsonl = read_text(R"({"question": " q ", "steps": [" a\n", " ", "b. c"], "answer": " 1,0 ", "more": 1})");
  CHECK(jsonl.format == DataFormat::jsonl);
  CHECK(jsonl.rows[0].question == "q");
  CHECK(jsonl.rows[0].steps == Strings{"a", "b. c"});
  CHECK(jsonl.rows[0].answer == "1,0");

  const RowFile gsm8k = read_text(R"({"question": "q", "answer": "A <<1+1=2>>2 b. c\r\n\nD<<x\n>>\n#### 1,000\n"})");
  CHECK(gsm8k.format == DataFormat::gsm8k);
  CHECK(gsm8k.rows[0].steps == Strings{"A 2 b. c", "D"});
  CHECK(gsm8k.rows[0].answer == "1,000");
  CHECK(read_text(R"({"question": "q", "answer": "A. B\n#### 1"})").rows[0].steps == Strings{"A.", "B"});
  CHECK(read_text(R"({"question": "q", "answer": "#### 1"})").rows[0].steps.empty());

  const RowFile hard = read_text("{\"input\": \"q\", \"code\": \"\", \"target\": 9284017268534.4}\n{\"input\": \"q\", \"target\": -7.0}\n");
  CHECK(hard.format == DataFormat::gsm_hard);
  CHECK(hard.rows[0].answer == "9284017268534.4");
  CHECK(hard.rows[1].answer == "-7");
  CHECK(!hard.rows[0].has_trace);

  const RowFile svamp = read_text(
      "[\n {\"Body\": \"b \\\"]\", \"Question\": \"q?\",\n \"Answer\": 51.0}, {\"Body\": \"[c,\", \"Question\": \"r\", \"Answer\": "
      "2}\n]\n");
  CHECK(svamp.format == DataFormat::svamp);
  REQUIRE(svamp.rows.size() == 2);
  CHECK(svamp.rows[0].question == "b \"] q?");
  CHECK(svamp.rows[0].answer == "51");
  CHECK((svamp.rows[0].line == 2 && svamp.rows[1].line == 3));
  CHECK(svamp.rows[1].question == "[c, r");

  const RowFile ids = read_text(R"({"question": [1, 2], "trace": [], "answer": [3, 2147483647], "prompt": 1})");
  CHECK(ids.format == DataFormat::ids);
  CHECK(ids.rows[0].is_ids);
  CHECK(ids.rows[0].question_ids == Ids{1, 2});
  CHECK(ids.rows[0].answer_ids == Ids{3, 2147483647});
  CHECK(ids.rows[0].prompt == 1);
}

TEST_CASE("a given format overrides what the first row looks like") {
  CHECK(read_text("[a note] q||s #### 1", DataFormat::icot_text).rows[0].question == "[a note] q");
  CHECK_THAT(refused_text("[a note] q||s #### 1"), ContainsSubstring("rows:1: not valid JSON"));
  CHECK_THAT(refused_text(R"({"question": "q", "answer": "1"})", DataFormat::jsonl), ContainsSubstring("no \"steps\""));
  CHECK_THAT(refused_text("q||s #### 1", DataFormat::ids), ContainsSubstring("rows:1: not valid JSON"));
}

TEST_CASE("numbers become answers without point or exponent where they are whole") {
  CHECK(answer_text(51.0) == "51");
  CHECK(answer_text(-0.0) == "0");
  CHECK(answer_text(9.3e12) == "9300000000000");
  CHECK(answer_text(1e21) == "1000000000000000000000");
  CHECK(answer_text(1e22) == "10000000000000000000000");
  CHECK(answer_text(1e23) == "100000000000000000000000");
  CHECK(answer_text(-1.5e25) == "-15000000000000000000000000");
  CHECK(answer_text(10) == "10");
  CHECK(answer_text(0.5) == "0.5");
  CHECK(answer_text(0.0016791648) == "0.0016791648");
  CHECK(answer_text(1.5e-7) == "0.00000015");
  CHECK(answer_text(14053029.666666666) == "14053029.666666666");
  CHECK(answer_text(-388147.4117647059) == "-388147.4117647059");
  for (double x : {5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, 123456789.12345678}) {
    CHECK(std::strtod(answer_text(x).c_str(), nullptr) == x);
    CHECK(answer_text(x).find('e') == std::string::npos);
  }
  CHECK(read_text(R"({"input": "q", "target": 18446744073709551615})").rows[0].answer == "18446744073709551615");
  CHECK(read_text(R"({"input": "q", "target": -9007199254740993})").rows[0].answer == "-9007199254740993");
  CHECK(read_text(R"({"input": "q", "target": 18446744073709551616})").rows[0].answer == "18446744073709551616");
  CHECK(read_text(R"({"input": "q", "target": -123456789012345678901})").rows[0].answer == "-123456789012345678901");
}

TEST_CASE("the first malformed row ends with its file and line") {
  const std::string good = "q||a #### 1\n";
  const std::string line =
      GENERATE(as<std::string>{}, "no bars #### 1", "q||no marks", "q #### 1", "||a #### 1", " \t||a #### 1", "q||a ####", "q||a #### \t",
               "q\x80||a #### 1", "q\xed\xa0\x80||a #### 1", "q||\xc0\xaf #### 1", R"({"question": "q", "steps": [], "answer": "1"})");
  CAPTURE(line);
  CHECK_THAT(refused_text(good + "\n" + line + "\n" + good), ContainsSubstring("rows:3: "));
}

TEST_CASE("a malformed JSON row ends with its file and line") {
  const std::string row = GENERATE(
      as<std::string>{}, "{", "{\"question\": 1", "[]", "3", "null", "x||y #### 1", R"({"question": "q", "steps": "s", "answer": "1"})",
      R"({"question": "q", "steps": [1], "answer": "1"})", R"({"question": "q", "steps": [["a"]], "answer": "1"})",
      R"({"question": "q", "steps": [], "answer": 1})", R"({"question": "q", "steps": [], "answer": null})",
      R"({"question": 3, "steps": [], "answer": "1"})", R"({"question": "q", "steps": []})",
      R"({"question": "", "steps": [], "answer": "1"})", R"({"question": "q", "steps": [], "answer": "  "})",
      R"({"question": "\ud800", "steps": [], "answer": "1"})", "{\"question\": \"\xff\", \"steps\": [], \"answer\": \"1\"}",
      R"({"question": "q", "question": "r", "steps": [], "answer": "1"})", R"({"question": [1], "trace": [], "answer": [1]})",
      R"({"question": "q", "steps": [], "answer": "1"} x)", R"({"question": "q", "steps": [], "answer": NaN})",
      R"({"question": "q", "steps": [], "answer": 1e999})", "{\"question\": \"q\x01\", \"steps\": [], \"answer\": \"1\"}");
  CAPTURE(row);
  CHECK_THAT(refused_text(std::string(R"({"question": "q", "steps": [], "answer": "1"})") + "\r\n" + row + "\n"),
             ContainsSubstring("rows:2: "));
}

TEST_CASE("a malformed row of the other JSON forms is refused") {
  CHECK_THAT(refused_text(R"({"question": "q", "answer": "no marks"})"), ContainsSubstring("rows:1: no ####"));
  CHECK_THAT(refused_text(R"({"question": "q", "answer": "#### 1\nmore"})"), ContainsSubstring("rows:1: no ####"));
  CHECK_THAT(refused_text(R"({"question": "q", "answer": "a\n####"})"), ContainsSubstring("answer is empty"));
  CHECK_THAT(refused_text(R"({"input": "q", "target": "one"})"), ContainsSubstring("must be a number, not \"one\""));
  CHECK_THAT(refused_text(R"({"input": "q", "target": true})"), ContainsSubstring("must be a number"));
  CHECK_THAT(refused_text(R"({"input": "q", "target": 1e999})"), ContainsSubstring("rows:1: "));
  CHECK_THAT(refused_text(R"({"input": "q"})"), ContainsSubstring("no \"target\""));
  CHECK_THAT(
      refused_text("[{\"Body\": \"b\", \"Question\": \"q\", \"Answer\": 1},\n{\"Body\": \"b\", \"Question\": \" \", \"Answer\": 1}]"),
      ContainsSubstring("rows:2: \"Question\" is empty"));
  CHECK_THAT(refused_text("[{\"Body\": \"b\", \"Question\": \"q\", \"Answer\": 1},\n"), ContainsSubstring("rows:2: "));
  CHECK_THAT(refused_text("[{\"Body\": \"b\", \"Question\": \"q\", \"Answer\": 1}"), ContainsSubstring("missing"));
  CHECK_THAT(refused_text("[{\"Body\": \"b\", \"Question\": \"q\", \"Answer\": 1}]\nx"), ContainsSubstring("rows:2: "));
  CHECK_THAT(refused_text("[{\"Body\": \"b\", \"Question\": \"q\", \"Answer\": 1},]"), ContainsSubstring("rows:1: "));
  CHECK_THAT(refused_text("[1, 2]"), ContainsSubstring("must be a JSON object"));
  CHECK_THAT(refused_text("[" + std::string(100'000, '[')), ContainsSubstring("rows:1: "));
  CHECK_THAT(refused_text("[]"), ContainsSubstring("holds no row"));
}

TEST_CASE("ids rows are checked") {
  auto ids = [](const std::string& q, const std::string& t, const std::string& a, const std::string& more = "") {
    return refused_text("{\"question\": " + q + ", \"trace\": " + t + ", \"answer\": " + a + more + "}");
  };
  CHECK(ids("[1]", "[2]", "[3]") == "accepted");
  CHECK_THAT(ids("[]", "[2]", "[3]"), ContainsSubstring("question is empty"));
  CHECK_THAT(ids("[1]", "[2]", "[]"), ContainsSubstring("answer is empty"));
  CHECK_THAT(ids("[-1]", "[2]", "[3]"), ContainsSubstring("holds -1, which is no token id"));
  CHECK_THAT(ids("[1]", "[2.0]", "[3]"), ContainsSubstring("holds 2.0"));
  CHECK_THAT(ids("[1]", "[2147483648]", "[3]"), ContainsSubstring("holds 2147483648"));
  CHECK_THAT(ids("[1]", "[2]", "[1e3]"), ContainsSubstring("rows:1"));
  CHECK_THAT(ids("[1]", "[2]", "[\"3\"]"), ContainsSubstring("rows:1"));
  CHECK_THAT(ids("[1]", "\"2\"", "[3]"), ContainsSubstring("list of token ids"));
  CHECK_THAT(refused_text("{\"question\": [1], \"answer\": [3]}"), ContainsSubstring("no \"trace\""));
  CHECK_THAT(ids("[1]", "[2]", "[3, 4]", ", \"prompt\": 2"), ContainsSubstring("from 0 to 1"));
  CHECK_THAT(ids("[1]", "[2]", "[3, 4]", ", \"prompt\": -1"), ContainsSubstring("prompt"));
  CHECK_THAT(ids("[1]", "[2]", "[3, 4]", ", \"prompt\": 1.0"), ContainsSubstring("prompt"));
  CHECK_THAT(ids("[1]", "[2]", "[3, 4]", ", \"prompt\": null"), ContainsSubstring("prompt"));
  CHECK(ids("[1]", "[2]", "[3, 4]", ", \"prompt\": 1") == "accepted");
}

TEST_CASE("a file that is none is refused") {
  TempFolder folder;
  auto code = [](const std::string& path) {
    try {
      read_rows(path);
    } catch (const Error& e) {
      return e.code();
    }
    return Exit::ok;
  };
  CHECK(code((folder.path() / "none").string()) == Exit::data);
  CHECK(code(folder.path().string()) == Exit::data);
  REQUIRE(mkfifo((folder.path() / "pipe").c_str(), 0600) == 0);
  CHECK(code((folder.path() / "pipe").string()) == Exit::data);
  CHECK(code("/dev/zero") == Exit::data);
  CHECK_THAT(refused_text(""), ContainsSubstring("rows: holds no row"));
  CHECK_THAT(refused_text("\xEF\xBB\xBF \n\r\n"), ContainsSubstring("holds no row"));
  CHECK_THAT(refused_text(" ", DataFormat::svamp), ContainsSubstring("holds no row"));
}

TEST_CASE("a very long line is read whole") {
  const std::string question(20'000'000, 'a');
  CHECK(read_text(question + "||s #### 1").rows[0].question.size() == question.size());
  CHECK_THAT(refused_text(question), ContainsSubstring("rows:1: no ||"));
}

TEST_CASE("ids rows become samples as they are") {
  const std::vector<RowFile> files = {
      read_text("{\"question\": [1, 2], \"trace\": [3, 4, 5], \"answer\": [6, 7, 8], \"prompt\": 1}\n{\"question\": [9], \"trace\": [], "
                "\"answer\": [6]}")};
  SampleOptions options;
  options.vocab_size = 10;
  LeftOut left_out;
  const auto samples = make_samples(files, nullptr, options, &left_out);
  REQUIRE(samples.size() == 2);
  CHECK(left_out.all() == 0);
  CHECK(samples[0].question == Ids{1, 2});
  CHECK(samples[0].trace == Ids{3, 4, 5});
  CHECK(samples[0].answer == Ids{6, 7, 8});
  CHECK((samples[0].prompt == 1 && samples[1].prompt == 0 && samples[1].row == 1));

  auto fault = [&](SampleOptions o) {
    try {
      make_samples(files, nullptr, o, &left_out);
    } catch (const Error& e) {
      CHECK(e.code() == Exit::data);
      return std::string(e.what());
    }
    return std::string();
  };
  options.vocab_size = 9;
  CHECK_THAT(fault(options), ContainsSubstring("rows:2: token id 9 is outside the model's vocabulary of 9"));
  options.vocab_size = 10;
  options.needs_prompt = true;
  CHECK_THAT(fault(options), ContainsSubstring("rows:2: the row has no \"prompt\""));
}

TEST_CASE("only weights that depend on the prompt need it") {
  RunConfig c;
  CHECK(sample_options(c, 2, 10).needs_prompt);
  c.codi.weight = 0;
  CHECK(!sample_options(c, 2, 10).needs_prompt);
  c.rkv.queries = Queries::answer;
  CHECK(sample_options(c, 2, 10).needs_prompt);
  c.kv.weight = 0;
  CHECK(!sample_options(c, 2, 10).needs_prompt);
}

TEST_CASE("a sample longer than max_tokens by the longest sequence of its method is dropped and counted") {
  // Q 2, C 5, A 3: teacher 10, student with M = 4 latents 2 + 1 + 4 + 1 + 3 = 11, without latents 5.
  const std::vector<RowFile> files = {read_text(R"({"question": [1, 2], "trace": [3, 4, 5, 6, 7], "answer": [6, 7, 8], "prompt": 1})")};
  struct Case {
    Method method;
    int64_t longest;
  };
  const Case c = GENERATE(Case{Method::kava, 11}, Case{Method::pccot, 11}, Case{Method::codi, 11}, Case{Method::full_cot, 10},
                          Case{Method::no_cot, 5});
  RunConfig config;
  config.method = c.method, config.latent.count = 4, config.data.max_tokens = c.longest;
  SampleOptions options = sample_options(config, 2, 10);
  options.needs_prompt = false;
  LeftOut left_out;
  const std::vector<Sample> all = make_samples(files, nullptr, options, &left_out);
  ModelConfig llama;
  llama.family = "llama";
  const auto left = [&] {
    std::vector<Sample> samples = all;
    left_out = {};
    leave_out_long(samples, config, llama, left_out);
    return samples.size();
  };
  CHECK(left() == 1);
  CHECK(left_out.all() == 0);
  config.data.max_tokens = c.longest - 1;
  CHECK(left() == 0);
  CHECK((left_out.too_long == 1 && left_out.all() == 1));
  config.latent.count = 1, config.data.max_tokens = 9;  // student 8: the teacher is longer now
  CHECK(left() == (c.method == Method::no_cot ? 1u : 0u));
}

TEST_CASE("rows of text without a tokenizer are refused") {
  const std::vector<RowFile> files = {read_text("q||s #### 1")};
  LeftOut left_out;
  CHECK_THROWS_AS(make_samples(files, nullptr, {}, &left_out), Error);
}

TEST_CASE("the chosen fraction depends on the seed and not on the order of the draw") {
  const auto half = chosen_rows(1000, 0.5, 1);
  CHECK(half.size() == 500);
  CHECK(std::is_sorted(half.begin(), half.end()));
  CHECK(std::adjacent_find(half.begin(), half.end()) == half.end());
  CHECK(half == chosen_rows(1000, 0.5, 1));
  CHECK(half != chosen_rows(1000, 0.5, 2));
  const auto quarter = chosen_rows(1000, 0.25, 1);
  CHECK(std::includes(half.begin(), half.end(), quarter.begin(), quarter.end()));
  CHECK(chosen_rows(3, 1e-9, 1).size() == 1);
  CHECK(chosen_rows(3, 1.0, 1) == std::vector<int64_t>{0, 1, 2});
  CHECK(chosen_rows(0, 0.5, 1).empty());
}

TEST_CASE("the order of an epoch is a permutation of seed and epoch, and even") {
  auto sorted = epoch_order(100, 7, 3);
  CHECK(sorted == epoch_order(100, 7, 3));
  CHECK(sorted != epoch_order(100, 7, 4));
  CHECK(sorted != epoch_order(100, 8, 3));
  std::sort(sorted.begin(), sorted.end());
  std::vector<int64_t> all(100);
  std::iota(all.begin(), all.end(), 0);
  CHECK(sorted == all);
  // Each of 4! orders in 24,000 epochs: 1,000 on average, standard deviation 31.
  std::map<std::vector<int64_t>, int> counts;
  for (int epoch = 0; epoch < 24'000; ++epoch) ++counts[epoch_order(4, 1, epoch)];
  CHECK(counts.size() == 24);
  for (const auto& [order, count] : counts) CHECK(std::abs(count - 1000) < 160);
  CHECK(epoch_order(0, 1, 1).empty());
}

TEST_CASE("no two seeds share a key") {
  for (Purpose p : {Purpose::dropout, Purpose::init, Purpose::synth}) {
    std::set<std::array<uint32_t, 2>> keys;
    for (uint64_t low : {uint64_t{0}, uint64_t{1} << 32, (uint64_t{1} << 56) - 1})
      for (uint64_t top = 0; top < 256; ++top) keys.insert(philox_key(p, top << 56 | low));
    CHECK(keys.size() == 3 * 256);
    // What runs with seeds below 2^56 have always drawn.
    CHECK(philox_key(p, 0x00abcdef12345678) == std::array<uint32_t, 2>{0xabcdef00 ^ static_cast<uint32_t>(p), 0x12345678});
  }
  CHECK(epoch_order(50, 7, 0) != epoch_order(50, 7 + (int64_t{1} << 56), 0));
}

TEST_CASE("Philox gives the published known answers") {
  CHECK(philox({0, 0, 0, 0}, {{0, 0}}) == std::array<uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  constexpr uint32_t f = 0xffffffff;
  CHECK(philox({f, f, f, f}, {{f, f}}) == std::array<uint32_t, 4>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  CHECK(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {{0xa4093822, 0x299f31d0}}) ==
        std::array<uint32_t, 4>{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("the real sets are read row for row") {
  const std::string shared = shared_data("data");
  if (shared.empty()) SKIP("no shared data beside the sources, and KAVA_SHARED is not set");
  struct Set {
    const char* path;
    DataFormat format;
    std::size_t rows, without_steps;
  };
  const Set s =
      GENERATE(Set{"gsm8k_aug/train.txt", DataFormat::icot_text, 10432, 1}, Set{"gsm8k_aug/valid.txt", DataFormat::icot_text, 500, 6},
               Set{"gsm8k_aug/test.txt", DataFormat::icot_text, 1319, 18},
               Set{"gsm8k_equations/train.txt", DataFormat::icot_text, 6973, 89}, Set{"gsm8k_nl/train.txt", DataFormat::icot_text, 6973, 0},
               Set{"gsm8k_nl/valid.txt", DataFormat::icot_text, 500, 0}, Set{"gsm8k_nl/test.txt", DataFormat::icot_text, 1319, 0},
               Set{"gsm8k/train.jsonl", DataFormat::gsm8k, 7473, 0}, Set{"gsm8k/test.jsonl", DataFormat::gsm8k, 1319, 0},
               Set{"gsm_hard/gsmhardv2.jsonl", DataFormat::gsm_hard, 1319, 1319}, Set{"svamp/SVAMP.json", DataFormat::svamp, 1000, 1000});
  CAPTURE(s.path);
  const RowFile file = read_rows(shared + "/" + s.path);
  CHECK(file.format == s.format);
  CHECK(file.rows.size() == s.rows);
  CHECK(static_cast<std::size_t>(std::count_if(file.rows.begin(), file.rows.end(), [](const Row& r) { return r.steps.empty(); })) ==
        s.without_steps);
  CHECK(file.sha256.size() == 64);
}

TEST_CASE("samples of real rows are their parts tokenised alone") {
  const std::string shared = shared_data("data");
  if (shared.empty()) SKIP("no shared data beside the sources, and KAVA_SHARED is not set");
  const Tokenizer tokenizer = Tokenizer::load(shared + "/tokenizers/llama-3.2-1b-instruct");
  const std::vector<RowFile> files = {read_rows(shared + "/gsm8k_aug/train.txt")};
  SampleOptions options;
  options.eos = 128009;
  options.vocab_size = 128256;
  LeftOut left_out;
  const auto samples = make_samples(files, &tokenizer, options, &left_out);
  CHECK(samples.size() + static_cast<std::size_t>(left_out.all()) == 10432);
  const Sample& first = samples.front();  // 4 steps, of which 3 are kept
  CHECK(first.question.front() == 128000);
  CHECK(first.answer.back() == 128009);
  CHECK(tokenizer.decode(first.trace) == "<<600*30/100=180>><<600*10/100=60>><<180+60=240>>");
  CHECK(tokenizer.decode(std::span(first.answer).first(static_cast<std::size_t>(first.prompt))) == "The answer is:");
  Ids trace;
  for (const char* step : {"<<600*30/100=180>>", "<<600*10/100=60>>", "<<180+60=240>>"})
    for (int32_t id : tokenizer.encode(step)) trace.push_back(id);
  CHECK(first.trace == trace);

  // The mean lengths of docs: question 45.6 with BOS, trace 12.6, answer chunk 6.3 over the official file; this part of it is close.
  double question = 0, steps = 0, answer = 0;
  for (const Sample& s : samples) question += s.question.size(), steps += s.trace.size(), answer += s.answer.size();
  const double n = static_cast<double>(samples.size());
  CHECK(std::abs(question / n - 45.6) < 1.5);
  CHECK(std::abs(steps / n - 12.6) < 1.5);
  CHECK(std::abs(answer / n - 6.3) < 0.3);

  options.drop_last_step = false;
  options.step_separator = " ";
  const auto joined = make_samples(files, &tokenizer, options, &left_out);
  CHECK(tokenizer.decode(joined.front().trace) == "<<600*30/100=180>> <<600*10/100=60>> <<180+60=240>> <<600-240=360>>");
}

TEST_CASE("a question without a token of the vocabulary is refused with its line") {
  const std::string shared = shared_data("data");
  if (shared.empty()) SKIP("no shared data beside the sources, and KAVA_SHARED is not set");
  const Tokenizer tokenizer = Tokenizer::load(shared + "/tokenizers/smollm2-135m-instruct");
  REQUIRE(tokenizer.encode("\x04").empty());
  SampleOptions options;
  options.vocab_size = 49152;
  LeftOut left_out;
  const std::vector<RowFile> files = {read_text("one||<<1+1=2>> #### 2\n\x04||<<1+1=2>> #### 2\n")};
  CHECK_THROWS_WITH(make_samples(files, &tokenizer, options, &left_out), ContainsSubstring(":2: the question has no token"));
}
