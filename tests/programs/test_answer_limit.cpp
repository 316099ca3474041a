// How many tokens an answer may have, in evaluations of files and of calls.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include "tests/programs/text_run.h"

using namespace kava;
using Catch::Matchers::ContainsSubstring;

TEST_CASE("the limit of new tokens follows the longest gold answer of the whole file") {
  TextRun tiny;
  Ready ready(tiny.dir);
  const std::string gold(23, '1');
  const RowFile file = read_rows(tiny.write("rows.txt", "A||#### 4\nB||#### " + gold + "\nC||#### 123456789012\n"));
  EvalOptions options;
  options.limit = 1;
  CHECK(ready.evaluate(file, options).max_new_tokens == 24);  // a token a digit, and EOS
  CHECK(ready.evaluate(file, options).golds_over() == 0);
  options.max_new_tokens = 13, options.limit = 0;
  CHECK(ready.evaluate(file, options).golds_over() == 1);
  options.max_new_tokens = 12;
  CHECK(ready.evaluate(file, options).golds_over() == 2);
  CHECK(to_json(ready.evaluate(file, options)).at("golds_over_limit") == 2);
  options.max_new_tokens = 0, options.method = Method::full_cot;
  CHECK(ready.evaluate(file, options).max_new_tokens == 256);
  RunConfig kava, no_cot, full_cot, coconut;
  no_cot.method = Method::no_cot, full_cot.method = Method::full_cot, coconut.method = Method::coconut;
  coconut.decode.prompt = DecodePrompt::free;
  auto limit = [](const RunConfig& c, int64_t longest) { return default_new_tokens(c, decoding_recipe(c), longest); };
  CHECK(limit(kava, 9) == 10);
  CHECK(limit(kava, 0) == 32);
  CHECK(limit(no_cot, 1'000'000) == kLongestPrompt);
  CHECK(limit(full_cot, 9) == 256);
  CHECK(limit(coconut, 9) == 256);
  coconut.decode.max_new_tokens = 64;
  CHECK(limit(coconut, 9) == 64);

  TextRun writes;  // its prompt itself: 14 tokens
  writes.config.decode.prompt = DecodePrompt::free, writes.config.data.answer_commas = Commas::remove;
  overwrite(writes.dir / "config.toml", to_toml(writes.config));
  Ready free(writes.dir);
  const RowFile one = read_rows(writes.write("rows.txt", "A||#### 1,234\n"));
  EvalOptions most;
  most.max_new_tokens = 19;  // and 1234 with EOS
  CHECK(free.evaluate(one, most).golds_over() == 0);
  most.max_new_tokens = 18;
  CHECK(free.evaluate(one, most).golds_over() == 1);

  RowFile ids = read_rows(
      tiny.write("ids.jsonl", R"({"question": [1], "trace": [], "answer": [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 95], "prompt": 1})"));
  CHECK(ready.evaluate(ids).max_new_tokens == 12);
  ids.rows[0].answer_ids.pop_back();
  CHECK(ready.evaluate(ids).max_new_tokens == 12);
}

TEST_CASE("each file of a call has its own limit, and the table says what cannot fit") {
  TextRun tiny;
  const std::string shorter = tiny.write("short.txt", kQuestions),
                    longer = tiny.write("long.txt", "A||#### " + std::string(15, '1') + "\n"), out = tiny.folder / "r.json",
                    start = "kava_eval " + tiny.dir.string() + " --data " + shorter + " " + longer + " --out " + out;
  REQUIRE(run(start).code == 0);
  CHECK(read_json(out).at("results").at(0).at("max_new_tokens") == 10);
  CHECK(read_json(out).at("results").at(1).at("max_new_tokens") == 16);
  const Finished given = run(start + " --force --max-new-tokens 10");
  REQUIRE(given.code == 0);
  CHECK_THAT(given.output, ContainsSubstring("long.txt: 1 gold answers with EOS do not fit into 10 new tokens"));
  CHECK(given.output.find("gold answers with EOS") == given.output.rfind("gold answers with EOS"));  // not of short.txt
}

TEST_CASE("an answer that reaches the limit is wrong whatever its text, and counted") {
  TextRun tiny;
  Ready ready(tiny.dir);
  RowFile file = read_rows(tiny.write("rows.txt", kQuestions));
  EvalOptions options;
  options.max_new_tokens = 3;
  for (Method method : {Method::kava, Method::no_cot}) {
    options.method = method;
    const EvalResult first = ready.evaluate(file, options);
    for (std::size_t i = 0; i < file.rows.size(); ++i) file.rows[i].answer = first.records[i].output;
    const EvalResult again = ready.evaluate(file, options);
    REQUIRE(again.limit_hits() == 4);
    for (const EvalRecord& r : again.records) {
      CHECK(r.output == r.gold);
      CHECK(std::ranges::count(r.correct, true) == 0);
      CHECK_FALSE(r.vote);
    }
  }
}
