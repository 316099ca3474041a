// kava_data on files: what check finds, what stats counts, what convert writes.
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include "engine/data/data.h"
#include "tests/programs/programs.h"

using namespace kava;
using Catch::Matchers::ContainsSubstring;

TEST_CASE("check names malformed rows by line and goes on") {
  TempFolder folder;
  overwrite(folder / "a.txt", "q||a #### 1\nno bars\nq 2||<<1+1=3>> #### 3\n||x #### 1\nq||a #### 1\n");
  const Ended e = kava_data("check a.txt", folder);
  CHECK(e.code == 4);
  CHECK_THAT(e.out, ContainsSubstring("a.txt: icot_text, 3 rows, 3 steps, 0 rows without a trace, 1 repeated questions") &&
                        ContainsSubstring("repeated: a.txt:5, as in line 1") && ContainsSubstring("2 malformed rows") &&
                        ContainsSubstring("malformed: a.txt:2: no ||") && ContainsSubstring("malformed: a.txt:4: the question is empty") &&
                        ContainsSubstring("false: a.txt:3: <<1+1=3>>"));
  CHECK_THAT(e.err, ContainsSubstring("error: a.txt:2: no ||") && ContainsSubstring("2 rows of the file are malformed"));
  CHECK(std::count(e.err.begin(), e.err.end(), '\n') == 1);

  overwrite(folder / "b.jsonl", "{\n\"question\": 1\n}\n");
  CHECK(kava_data("check b.jsonl", folder).code == 4);
  overwrite(folder / "c.jsonl", "{broken\n{\"question\": \"q\", \"cot\": \"a\", \"answer\": \"1\"}\n");
  CHECK_THAT(kava_data("check c.jsonl", folder).out, ContainsSubstring("c.jsonl: jsonl, 1 rows"));
}

TEST_CASE("a shared question is an error, a shared trace is told") {
  TempFolder folder;
  overwrite(folder / "a.txt", "q  1||<<1+1=2>> #### 2\nq 2||<<2+2=4>> #### 4\n");
  overwrite(folder / "b.txt", "q 3||<<1+1=2>> #### 2\n");
  overwrite(folder / "c.txt", "q 1||<<9=9>> #### 9\n");
  const Ended trace = kava_data("check a.txt --against b.txt", folder), question = kava_data("check a.txt --against c.txt", folder);
  CHECK(trace.code == 0);
  CHECK_THAT(trace.out, ContainsSubstring("overlap: 0 by question, 1 by trace\n  trace: a.txt:1\n"));
  CHECK(question.code == 4);
  CHECK_THAT(question.out, ContainsSubstring("overlap: 1 by question, 0 by trace\n  question: a.txt:1\n"));
  CHECK_THAT(question.err, ContainsSubstring("error: a.txt:1: 1 rows share their question"));
}

TEST_CASE("check tells answers that the last equation does not give, and they are no fault") {
  TempFolder folder;
  overwrite(folder / "a.txt", "q||<<1+1=2>> <<2*9=18>> #### 18\nr||<<10/3=3.33>> #### 3\ns||<<1+1=2>> #### 999\nt||So it is 5. #### 7\n");
  const Ended e = kava_data("check a.txt", folder);
  CHECK(e.code == 0);
  CHECK_THAT(e.out, ContainsSubstring("  equations: 4 hold, 0 are false, 0 of another form\n"
                                      "  answers: 2 are what the last equation gives, 1 are not\n"
                                      "  other: a.txt:3: <<1+1=2>>, and the answer 999\n"));
}

TEST_CASE("check tells questions that several files have, with both places") {
  TempFolder folder;
  overwrite(folder / "a.txt", "q  1||a #### 1\nq 2||a #### 1\nq 2||a #### 1\n");
  overwrite(folder / "b.txt", "q 3||a #### 1\nq 1||b #### 2\n");
  overwrite(folder / "c.txt", "q 3||a #### 1\nq 2||a #### 1\n");
  const Ended e = kava_data("check a.txt b.txt c.txt", folder);
  CHECK(e.code == 0);
  CHECK_THAT(e.out, ContainsSubstring("between these files: 3 repeated questions\n  repeated: b.txt:2, as a.txt:1\n"
                                      "  repeated: c.txt:1, as b.txt:1\n  repeated: c.txt:2, as a.txt:2\n"));
  CHECK_THAT(e.out, ContainsSubstring("a.txt: icot_text, 3 rows, 3 steps, 0 rows without a trace, 1 repeated questions\n"));
  CHECK_THAT(kava_data("check a.txt", folder).out, !ContainsSubstring("between"));
}

TEST_CASE("stats counts steps and tokens, and traces against the latents") {
  TempFolder folder;
  REQUIRE(kava_data("synth --out r --rows 200", folder).code == 0);
  const Ended text = kava_data("stats r/train.txt", folder),
              tokens = kava_data("stats r/train.txt --tokenizer r/model --latents 8", folder);
  CHECK(text.code == 0);
  CHECK_THAT(text.out, ContainsSubstring("r/train.txt: icot_text, 200 rows") &&
                           ContainsSubstring("  3                                200  100.00 %"));
  CHECK(tokens.code == 0);
  CHECK_THAT(tokens.out,
             ContainsSubstring("n_c against M = 8") && ContainsSubstring("0 of 200 rows would be left out: over max_tokens = 512"));

  overwrite(folder / "ids.jsonl",
            "{\"question\": [1, 2], \"trace\": [], \"answer\": [3]}\n{\"question\": [1], \"trace\": [4, 5, 6, 7], \"answer\": [3]}\n");
  const Ended ids = kava_data("stats ids.jsonl --latents 4 --max-tokens 8", folder);
  CHECK(ids.code == 0);
  CHECK_THAT(ids.out,
             ContainsSubstring("  0                                  1   50.00 %") &&
                 ContainsSubstring("  4                                  1   50.00 %") &&
                 ContainsSubstring("1 of 2 rows would be left out: over max_tokens = 8 (the longest sequence has 9)\n  left out: ") &&
                 ContainsSubstring(": 9 tokens\n"));
  for (const char* option : {"--latents 4", "--max-tokens 8", "--all-steps"}) {
    CAPTURE(option);
    const Ended e = kava_data(std::string("stats r/train.txt ") + option, folder);
    CHECK(e.code == 2);
    const std::string name(option);
    CHECK(e.err ==
          "error: " + name.substr(0, name.find(' ')) + ": counts tokens, which rows of text have by a tokenizer; add --tokenizer DIR\n");
    CHECK(kava_data(std::string("stats r/train.txt ids.jsonl ") + option, folder).code == 0);
  }
  CHECK(kava_data("stats none.txt", folder).code == 4);
  CHECK(kava_data("stats r/train.txt --tokenizer none", folder).code == 4);
}

TEST_CASE("convert writes rows of any form, and what reads back as the same rows") {
  TempFolder folder;
  overwrite(folder / "a.json",
            R"([{"question": "q é", "cot": "<<1+1=2>> <<2+2=4>>", "answer": "4"}, {"question": "r", "cot": "One. Two.", "answer": "3"}])");
  REQUIRE(kava_data("convert a.json a.jsonl", folder).code == 0);
  REQUIRE(kava_data("convert a.jsonl a.txt", folder).code == 0);
  CHECK(read_file(folder / "a.txt", 1 << 20) == "q é||<<1+1=2>> <<2+2=4>> #### 4\nr||One. Two. #### 3\n");
  const RowFile from = read_rows(folder / "a.json"), lines = read_rows(folder / "a.jsonl"), text = read_rows(folder / "a.txt");
  for (std::size_t i = 0; i < 2; ++i)
    for (const RowFile* f : {&lines, &text}) {
      CHECK(f->rows[i].question == from.rows[i].question);
      CHECK(f->rows[i].steps == from.rows[i].steps);
      CHECK(f->rows[i].answer == from.rows[i].answer);
    }
  for (const char* steps : {R"(["a b", "c"])", R"(["a\nb"])", R"(["<<1=1>>", "then"])", R"(["a #### 3"])"}) {
    overwrite(folder / "b.jsonl", std::string(R"({"question": "q", "steps": )") + steps + R"(, "answer": "4"})");
    const Ended e = kava_data("convert b.jsonl b.txt", folder);
    CAPTURE(steps, e.err);
    CHECK((e.code == 4) == (std::string(steps) != R"(["a #### 3"])"));
  }
  overwrite(folder / "c.txt", "q||a #### 1\nbroken\n");
  CHECK(kava_data("convert c.txt c.jsonl", folder).code == 4);
  CHECK_FALSE(std::filesystem::exists(folder / "c.jsonl"));
  const Ended skipped = kava_data("convert c.txt c.jsonl --skip-malformed", folder);
  CHECK(skipped.code == 0);
  CHECK_THAT(skipped.err, ContainsSubstring("left out: c.txt:2: no ||"));
  CHECK(read_file(folder / "c.jsonl", 1 << 20) == "{\"answer\":\"1\",\"question\":\"q\",\"steps\":[\"a\"]}\n");
  CHECK(kava_data("convert c.txt ./c.txt", folder).code == 2);
  overwrite(folder / "i.jsonl",
            "{\"question\": [1], \"trace\": [[3, 4], [5]], \"answer\": [6]}\n{\"question\": [1], \"trace\": [7], \"answer\": [6]}\n");
  REQUIRE(kava_data("convert i.jsonl o.jsonl", folder).code == 0);
  const RowFile ids = read_rows(folder / "o.jsonl");
  CHECK((ids.rows[0].step_lengths == std::vector<std::int32_t>{2, 1} && ids.rows[0].trace_ids == std::vector<std::int32_t>{3, 4, 5}));
  CHECK(ids.rows[1].step_lengths == std::vector<std::int32_t>{1});
  for (const char* name : {"y.csv", "y.TSV", "y.parquet", "y.jsonl.gz"}) {
    const Ended e = kava_data(std::string("convert a.jsonl ") + name, folder);
    CAPTURE(name, e.err);
    CHECK(e.code == 2);
    CHECK_THAT(e.err,
               ContainsSubstring("error: OUT: ") && ContainsSubstring("; name it .jsonl or .txt, or give --to jsonl or icot_text\n"));
    CHECK(std::count(e.err.begin(), e.err.end(), '\n') == 1);
    CHECK_FALSE(std::filesystem::exists(folder / name));
    CHECK(kava_data(std::string("convert a.jsonl ") + name + " --to jsonl", folder).code == 0);
  }
}

TEST_CASE("a table of text becomes JSON lines where its first line names the columns") {
  TempFolder folder;
  const auto convert = [&](const std::string& table) {
    overwrite(folder / "t.tsv", table);
    return run_command(
        fmt::format("kava_inspect --version > /dev/null; python3 '{}/tools/parquet_to_jsonl.py' t.tsv t.jsonl", source_dir()),
        folder.path());
  };
  const Ended done = convert("question\tanswer\nQ one?\t18\nQ two?\t3\n");
  if (done.code == 127) SKIP("there is no python3");
  INFO(done.err);
  REQUIRE(done.code == 0);
  CHECK_THAT(kava_data("convert t.jsonl o.jsonl", folder).out, ContainsSubstring("2 rows"));
  // A chain in a cell is one text, or a list as it is printed.
  REQUIRE(convert("question\tSteps\tanswer\nQ one?\t<<1+1=2>> <<2*9=18>>\t18\nQ two?\t\t3\n"
                  "Q three?\t['<<1+1=2>>', '<<2=2>>']\t2\nQ four?\t\"[\"\"<<3=3>>\"\"]\"\t3\n")
              .code == 0);
  const RowFile rows = read_rows(folder / "t.jsonl");
  REQUIRE(rows.rows.size() == 4);
  CHECK(rows.rows[0].steps == std::vector<std::string>{"<<1+1=2>>", "<<2*9=18>>"});
  CHECK(rows.rows[1].steps.empty());
  CHECK(rows.rows[2].steps == std::vector<std::string>{"<<1+1=2>>", "<<2=2>>"});
  CHECK(rows.rows[3].steps == std::vector<std::string>{"<<3=3>>"});
  REQUIRE(convert("question\tcot\tsteps\tanswer\nQ one?\tA.\tB.\t18\nQ two?\tA.\t\t3\n").code == 0);
  CHECK(read_rows(folder / "t.jsonl").rows[0].steps == std::vector<std::string>{"B."});  // the first that holds something
  CHECK(read_rows(folder / "t.jsonl").rows[1].steps == std::vector<std::string>{"A."});
  // numpy prints a list without commas; what is cut by "..." is none, and a number counts the steps of a chain.
  REQUIRE(convert("question\tsteps\tcot\tanswer\nQ one?\t\"['<<a>>' '<<b>>'\n '<<c>>']\"\t\t18\nQ two?\t2.0\tA. B.\t3\n").code == 0);
  CHECK(read_rows(folder / "t.jsonl").rows[0].steps == std::vector<std::string>{"<<a>>", "<<b>>", "<<c>>"});
  CHECK(read_rows(folder / "t.jsonl").rows[1].steps.size() == 2);
  for (const char* cell : {"['a' ... 'b']", "['a', 'b' 'c']", "[{'a': 'b'}]", "[['a' 'b']]", "[b'a' b'b']", "2"}) {
    REQUIRE(convert(std::string("question\tsteps\tanswer\nQ one?\t") + cell + "\t18\n").code == 0);
    CHECK_THROWS_AS(read_rows(folder / "t.jsonl"), Error);
  }
  std::filesystem::remove(folder / "t.jsonl");
  for (const auto& [table, about] : {std::pair("Q one?\t18\nQ two?\t3\n", "t.tsv:1: a cell of the first line is a number"),
                                     std::pair("Q one?\t1,800.5\n", "t.tsv:1: a cell of the first line is a number"),
                                     std::pair("question\tanswer\n\n", "t.tsv: no row behind the first line")}) {
    const Ended e = convert(table);
    CAPTURE(table, e.err);
    CHECK(e.code == 4);
    CHECK(e.err.starts_with(std::string("error: ") + about));
    CHECK(std::count(e.err.begin(), e.err.end(), '\n') == 1);
    CHECK_FALSE(std::filesystem::exists(folder / "t.jsonl"));
  }
}
