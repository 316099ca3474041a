// The forms in which people have data: which keys hold question, chain and answer, as a list or line by line, and what is refused how.
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include "engine/data/data.h"
#include "engine/error.h"
#include "tests/io/row_rig.h"
#include "tests/programs/programs.h"

using namespace kava;
using namespace kava::test;
using Catch::Matchers::ContainsSubstring;
using Strings = std::vector<std::string>;

TEST_CASE("a trace that mixes equations with other text is text") {
  CHECK(read_text("q||<<3+4=7>> and <<7*2=14>>. Then 15. #### 15").rows[0].steps == Strings{"<<3+4=7>> and <<7*2=14>>.", "Then 15."});
  CHECK(read_text("q||<<3+4=7>> <<7*2=14>>. #### 14").rows[0].steps == Strings{"<<3+4=7>> <<7*2=14>>."});
  CHECK(read_text("q||<<3+4=7>>> #### 7").rows[0].steps == Strings{"<<3+4=7>>>"});
  CHECK(read_text("q||<<3+4=7 and more #### 7").rows[0].steps == Strings{"<<3+4=7 and more"});
  CHECK(read_text("q||So <<3+4=7>> <<7*2=14>> #### 14").rows[0].steps == Strings{"So <<3+4=7>> <<7*2=14>>"});
  CHECK(read_text(R"({"question": "q", "cot": "<<1+1=2>> a. b\n<<2+2=4>> c", "answer": "4"})").rows[0].steps ==
        Strings{"<<1+1=2>> a. b", "<<2+2=4>> c"});
}

TEST_CASE("a chain is read under any key of its kind, as text or as a list") {
  for (const char* key : {"cot", "CoT", "chain_of_thought", "chainOfThought", "Chain-of-Thought", "rationale", "Reasoning", "chain",
                          "solution", "explanation", "thoughts", "reasoning_steps"}) {
    CAPTURE(key);
    const std::string start = std::string(R"({"question": "q", ")") + key + "\": ";
    const RowFile text = read_text(start + R"("<<1+1=2>> <<2+2=4>>", "answer": "4"})"),
                  list = read_text(start + R"([" a. b ", "", "c"], "answer": "4"})");
    CHECK((text.format == DataFormat::jsonl && list.format == DataFormat::jsonl));
    CHECK(text.rows[0].steps == Strings{"<<1+1=2>>", "<<2+2=4>>"});
    CHECK(list.rows[0].steps == Strings{"a. b", "c"});
    CHECK_THAT(refused_text(start + R"({"a": 1}, "answer": "4"})"),
               ContainsSubstring(std::string(key) + "\" must be a list of strings, not object"));
    CHECK_THAT(refused_text(start + R"([{"a": 1}], "answer": "4"})"),
               ContainsSubstring(std::string(key) + "\" must hold strings, not object"));
  }
  CHECK(read_text(R"({"question": "q", "steps": null, "answer": "4"})").rows[0].steps.empty());
  CHECK(read_text(R"({"question": "q", "steps": null, "cot": "a", "answer": "4"})").rows[0].steps == Strings{"a"});
  // What holds nothing gives way to what holds a chain, whatever the row's first form.
  CHECK(read_text(R"({"question": "q", "steps": [], "cot": "a", "answer": "4"})").rows[0].steps == Strings{"a"});
  CHECK(read_text(R"({"question": "q", "cot": " ", "solution": ["a"], "answer": "4"})").rows[0].steps == Strings{"a"});
  const std::string answers = "{\"question\": \"q\", \"answer\": \"a\\n#### 4\"}\n";
  CHECK(read_text(answers + R"({"question": "q", "cot": "b", "answer": "#### 4"})").rows[1].steps == Strings{"b"});
  CHECK(read_text(answers + R"({"question": "q", "cot": "b", "answer": "c\n#### 4"})").rows[1].steps == Strings{"c"});
  CHECK(read_text(R"({"question": "q", "cot": "a", "answer": "#### 4"})").rows[0].answer == "4");
  const RowFile hard = read_text(R"({"input": "q", "target": 4, "rationale": "a. b"})");
  CHECK(hard.format == DataFormat::gsm_hard);
  CHECK(hard.rows[0].has_trace);
  CHECK(hard.rows[0].steps == Strings{"a.", "b"});
}

TEST_CASE("rows of GSM8K, steps and SVAMP are read as they are, whatever other keys are known") {
  // A row of GSM8K's, whose answer ends with #### a, is one under any other key of a chain; only "steps" and "cot" are more than that.
  for (const char* key : {"solution", "rationale", "thought"}) {
    const RowFile file = read_text(R"({"question": "q", ")" + std::string(key) + R"(": "b", "answer": "a\n#### 4"})");
    CHECK(file.format == DataFormat::gsm8k);
    CHECK(file.rows[0].steps == Strings{"a"});
  }
  CHECK(read_text(R"({"question": "q", "cot": "b", "answer": "a\n#### 4"})").format == DataFormat::jsonl);
  CHECK(read_text(R"({"question": "q", "steps": ["a"], "answer": "#### 4"})").rows[0].answer == "#### 4");
  CHECK(read_text(R"([{"Body": "A b", "Question": "A b c?", "Answer": 4}])").rows[0].question == "A b A b c?");
}

TEST_CASE("layout and fields are recognised apart") {
  const std::string row = GENERATE(
      as<std::string>{}, R"({"question": "q", "steps": ["a"], "answer": "7"})", R"({"question": "q", "cot": "a", "answer": "7"})",
      R"({"question": "q", "answer": "a\n#### 7"})", R"({"input": "q", "code": "", "target": 7.0})",
      R"({"instruction": "q", "response": "7.0"})", R"({"Body": "b", "Question": "q", "Answer": "7.0", "question_concat": "b q"})",
      R"({"question": "q", "final_ans": "7"})", R"({"sQuestion": "q", "lEquations": ["X=3+4"], "lSolutions": [7.0]})",
      R"j({"body": "b", "question": "q", "answer": "7 (apples)", "formula": "3+4=7"})j",
      R"({"problem": "q", "solution": "a", "answer": "7"})", R"({"question": "q", "answer": 7})",
      R"({"question": [1], "trace": [2], "answer": [7]})", R"({"instruction": "q", "input": "", "output": "a", "answer": "7.0"})",
      R"({"problem": "q", "generated_solution": "a", "expected_answer": "7"})", R"({"original_text": "q", "ans": "7"})",
      R"({"Problem": "q", "Solution": "a", "Answer": 7})", R"({"question": "q", "answer": null, "answer_number": 7})",
      R"({"question": "q", "ground_truth": "7"})", R"({"instruction": "q", "input": "", "output": "a\n#### 7"})",
      R"({"instruction": "q", "response": "a\n#### 7"})", R"({"input": "q", "output": "7.0"})",
      R"({"prompt": "q", "completion": "a\n#### 7"})", R"({"original_question": "p", "new_question": "q", "answer": "7"})",
      R"({"question": "q", "solution": "a\n#### 7", "answer": "7"})", R"({"question": "q", "answer": "$7.0"})",
      R"j({"Body": "b", "Question": "q", "Answer": "7 (apples)", "Formula": "3+4=7", "Solution-Type": "Addition"})j",
      R"j({"Body": "b", "Question": "q", "Answer": "7 (apples)"})j", R"({"Body": "b", "Question": "q", "Answer": 7, "Formula": ""})",
      R"({"row_idx": 0, "row": {"question": "q", "answer": "a\n#### 7"}, "truncated_cells": []})");
  CAPTURE(row);
  const RowFile line = read_text(row + "\n" + row + "\n"), list = read_text("[" + row + ",\n " + row + "]\n");
  CHECK(line.format == list.format);
  REQUIRE((line.rows.size() == 2 && list.rows.size() == 2));
  for (const RowFile* f : {&line, &list})
    for (const Row& r : f->rows) {
      if (r.is_ids) continue;
      CHECK((r.question == "q" || r.question == "b q"));
      CHECK(r.answer == "7");
      CHECK((r.steps.empty() || r.steps == Strings{"a"}));
    }
  CHECK(read_text("[" + row + "]", line.format).rows.size() == 1);
}

TEST_CASE("rows lie in a list inside one object, or one row is all of a file") {
  const std::string row = R"({"question": "q, ] }", "answer": "a\n#### 7"})", broken = R"({"question": "q"})";
  const auto size = [](const std::string& text) { return read_text(text).rows.size(); };
  CHECK(size("{\"data\": [" + row + ", " + row + "]}") == 2);
  CHECK(size("\xEF\xBB\xBF\r\n{\r\n \"version\": [1, {}], \"data\": [\r\n" + row + ",\r\n" + row + "\r\n]\r\n}\r\n") == 2);
  CHECK(size(R"({"features": [{"name": "question"}], "rows": [{"row_idx": 0, "row": )" + row + R"(, "truncated_cells": []}]})") == 1);
  CHECK(read_text("\n{\n\"question\": \"q\",\n\"answer\": 7\n}\n").rows[0].line == 2);
  CHECK(size(R"({"question": "q", "answer": 7, "facts": [{"text": "t"}]})") == 1);
  CHECK_THAT(refused_text("{\n\"data\": [\n" + row + ",\n" + broken + "]}"), ContainsSubstring("rows:4: the row has no \"answer\""));
  CHECK_THAT(refused_text("{\"data\": [" + row + "}"), ContainsSubstring("rows:1: not valid JSON"));
  CHECK_THAT(refused_text("{\"train\": [" + row + "], \"test\": [" + row + "]}"),
             ContainsSubstring("several lists of rows, under \"train\""));
  CHECK_THAT(refused_text("{\"data\": []}"), ContainsSubstring("its keys are data"));
  CHECK_THAT(refused_text(R"({"rows": [{"row_idx": 0, "row": {"question": "q", "answer": "7"}, "truncated_cells": ["answer"]}]})"),
             ContainsSubstring("has cut cells of this row off"));
  TempFolder folder;
  overwrite(folder / "rows.csv", "question,answer\nq,7\n");
  CHECK_THAT(refused_file(folder / "rows.csv"),
             ContainsSubstring("is a table of text; turn it into JSON lines by tools/parquet_to_jsonl.py"));
}

TEST_CASE("numbers in strings are read as numbers where a form has numbers") {
  auto answer = [](const std::string& text) { return read_text("{\"question\": \"q\", \"final_ans\": \"" + text + "\"}").rows[0].answer; };
  CHECK(answer("145.0") == "145");
  CHECK(answer(" -7.50 ") == "-7.5");
  CHECK(answer("+12") == "12");
  CHECK(answer("1,234.0") == "1234");
  CHECK(answer("-1,00,000") == "-100000");
  // Not the groups of one number: what stands there is no number.
  for (const char* text : {"10,20", "3,5", "1,2345", "1234,567", "1.234,5", ",123", "1,,234", "1,234,"}) CHECK(answer(text) == text);
  CHECK(answer("-0.0") == "0");
  CHECK(answer(".5") == "0.5");
  CHECK(answer("007") == "7");
  CHECK(answer("1e3") == "1000");
  CHECK(answer("-2.5E-1") == "-0.25");
  CHECK(answer("123456789012345678901234567890") == "123456789012345678901234567890");
  CHECK(answer("9 (apples)") == "9");
  CHECK(answer("10:30") == "10:30");
  CHECK(answer("1/2 (of it)") == "1/2");
  CHECK(answer("9 (apples (red))") == "9");
  // More than a number and its unit is kept whole.
  CHECK(answer("5 (red); 3 (blue)") == "5 (red); 3 (blue)");
  CHECK(answer("5 (red) (blue)") == "5 (red) (blue)");
  CHECK(read_text(R"j({"body": "b.", "question": "q?", "answer": "20 (a); 10 (b)"})j").rows[0].answer == "20 (a); 10 (b)");
  CHECK(answer("1e999") == "1e999");
  CHECK(answer("yes") == "yes");
  CHECK_THAT(refused_text(R"({"question": "q", "final_ans": [1, 2]})"), ContainsSubstring("a number or text"));
  CHECK_THAT(refused_text("{\"question\": \"q\", \"answer\": 7}\n{\"question\": \"q\", \"answer\": \"a\\n#### 7\"}"),
             ContainsSubstring("rows:2: \"answer\" holds a chain"));
}

TEST_CASE("a question's places for numbers are filled in") {
  const auto question = [](const std::string& members) { return read_text("{" + members + R"(, "Answer": 7.0})").rows[0].question; };
  CHECK(question(R"("Question": "N_00 pens, N_01 away .", "Numbers": "9.0 2.5")") == "9 pens, 2.5 away .");
  CHECK(question(R"("Question": "number1 and number0", "Numbers": [9, "1,000"])") == "1000 and 9");
  CHECK(question(R"("Body": "N_00 pens .", "Question": "N_00 pens . N_01 ?", "Numbers": "9,2")") == "9 pens . 2 ?");
  CHECK(question(R"("Question": "Is number0 N_1 or XN_00 ?", "Equation": "")") == "Is number0 N_1 or XN_00 ?");
  CHECK_THAT(refused_text(R"({"Question": "N_00 ?", "Answer": 7})"), ContainsSubstring("places for numbers"));
  CHECK_THAT(refused_text(R"({"Question": "N_02 ?", "Numbers": "9 2", "Answer": 7})"),
             ContainsSubstring("has 2 numbers, and the question asks for N_02"));
  CHECK_THAT(refused_text(R"({"Question": "N_00 ?", "Numbers": "nine", "Answer": 7})"), ContainsSubstring("holds what is no number"));
}

TEST_CASE("a refusal names the keys that the rows have") {
  CHECK_THAT(refused_text(R"({"question": "q", "options": ["A)1", "B)2"], "rationale": "r", "correct": "B"})"),
             ContainsSubstring("one of several options") && ContainsSubstring("the right option's text under \"answer\""));
  CHECK_THAT(refused_text(R"({"messages": [{"role": "user", "content": "q"}]})"), ContainsSubstring("a conversation under \"messages\""));
  CHECK_THAT(refused_text(R"({"query": "q", "response": "a"})"), ContainsSubstring("the last line of \"response\" must be #### ANSWER"));
  CHECK_THAT(refused_text(R"({"text": "q", "label": "7"})"), ContainsSubstring("keys are label, text"));
  CHECK_THAT(refused_text(R"({"question": ["q"], "answer": ["7"]})"), ContainsSubstring("the row holds whole columns"));
  CHECK_THAT(refused_text(R"({"question": {"0": "q"}, "answer": {"0": "7"}})"), ContainsSubstring("not object; write one text"));
  CHECK_THAT(refused_text(R"({"problem": "q", "level": "1", "solution": "a"})"),
             ContainsSubstring("no \"answer\"; its keys are level, problem, solution"));
  CHECK_THAT(refused_text(R"({"question": "q", "choices": ["a"], "answer": "B"})"),
             ContainsSubstring("keys are answer, choices, question"));
  const std::string one = R"({"data": [{"question": "q"}]})";
  CHECK_THAT(refused_text(one + "\n" + one), ContainsSubstring("the rows lie in a list under \"data\""));
  CHECK_THAT(refused_text("{\n  \"question\": \"q\"\n}\n{}"), ContainsSubstring("rows:1: a JSON object over several lines"));
  CHECK_THAT(refused_text("PAR1\x15\x04"), ContainsSubstring("tools/parquet_to_jsonl.py"));
  CHECK_THAT(refused_text("\x1f\x8b\x08"), ContainsSubstring("gunzip"));
  for (const char* xml : {"<?xml version=\"1.0\"?>\n<a/>\n", "<Machine-Reading-Corpus-File>\n<ProblemSet>\n", "<!-- c -->\n<a>q||r</a>\n"})
    CHECK_THAT(refused_text(xml), ContainsSubstring("is XML; turn it into JSON lines"));
  for (const char* page : {"<html>\n", "<!doctype html>\n"}) CHECK_THAT(refused_text(page), ContainsSubstring("is a web page"));
  CHECK_THAT(refused_text("< 3 apples\n"), ContainsSubstring("no || after the question"));
  CHECK(read_text("<b>q</b>||a #### 7\n").rows[0].question == "<b>q</b>");
  const std::string number = R"({"Body": "b", "Question": "q", "Answer": 7})", text = R"({"Body": "b", "Question": "q", "Answer": "two"})";
  CHECK_THAT(refused_text(number + "\n" + text),
             ContainsSubstring("rows:2: \"Answer\" must be a number, not \"two\"") && ContainsSubstring("name the form qa"));
  CHECK(read_text(number + "\n" + text, DataFormat::qa).rows[1].answer == "two");
  // Null is nothing that quotation marks would mend.
  const std::string remedy = " is null; give the answer, or leave the row out";
  for (const std::string row : {R"({"question": "q", "steps": ["a"], "answer": null})", R"({"question": "q", "cot": "a", "answer": null})",
                                R"({"question": "q", "answer": null})"})
    CHECK_THAT(refused_text(row), ContainsSubstring("rows:1: \"answer\"" + remedy));
  CHECK_THAT(refused_text(number + "\n" + R"({"Body": "b", "Question": "q", "Answer": null})"),
             ContainsSubstring("rows:2: \"Answer\" is null; give the Answer, or leave the row out"));
  CHECK_THAT(refused_text("version https://git-lfs.github.com/spec/v1\n"), ContainsSubstring("Git LFS"));
}

TEST_CASE("training data without a trace token is refused where a loss needs one") {
  TempFolder folder;
  REQUIRE(run_command("kava_data synth --out ring --rows 10", folder.path()).code == 0);
  const auto step = [&](const std::string& rows, const std::string& method, const std::string& sets = "") {
    overwrite(folder / "rows.jsonl", rows);
    overwrite(folder / "t.toml",
              "method = \"" + method + "\"\n[model]\npath = \"ring/model\"\ninit = \"random\"\n[data]\ntrain = [\"rows.jsonl\"]\n");
    return run_command("kava_inspect step t.toml --out o.safetensors --threads 1 " + sets, folder.path());
  };
  const std::string unread = "{\"question\": \"q\", \"answer\": \"7\", \"working\": \"3+4=7\"}\n",
                    one_step = "{\"question\": \"q\", \"cot\": \"<<3+4=7>>\", \"answer\": \"7\"}\n",
                    two_steps = "{\"question\": \"q\", \"rationale\": \"<<1+2=3>> <<3+4=7>>\", \"answer\": \"7\"}\n";
  for (const char* method : {"kava", "full_cot"}) {
    const Ended e = step(unread, method);
    CAPTURE(method, e.err);
    CHECK(e.code == 4);
    CHECK_THAT(e.err, ContainsSubstring("no trace token in data.train") && ContainsSubstring("its keys are answer, question, working"));
    CHECK(std::count(e.err.begin(), e.err.end(), '\n') == 1);
    CHECK_FALSE(std::filesystem::exists(folder / "o.safetensors"));
  }
  const Ended dropped = step(one_step, "kava");
  CHECK(dropped.code == 4);
  CHECK_THAT(dropped.err, ContainsSubstring("data.drop_last_step = false"));
  CHECK(step(one_step, "kava", "--set data.drop_last_step=false").code == 0);
  CHECK(step(one_step, "full_cot").code == 0);
  for (const char* method : {"icot", "coconut"}) {
    const Ended e = step(unread, method);
    CAPTURE(method, e.err);
    CHECK(e.code == 4);
    CHECK_THAT(e.err, ContainsSubstring("no trace token in data.train") && ContainsSubstring("learns to write one"));
  }
  CHECK(step(unread, "no_cot").err.empty());
  const Ended told = step(unread, "pccot");
  CHECK(told.code == 0);
  CHECK_THAT(told.err, ContainsSubstring("the teacher sees no chain"));
  // Rows without a trace among others are normal.
  CHECK(step(two_steps + one_step + unread.substr(0, unread.find(", \"working")) + ", \"cot\": null}\n", "kava").err.empty());
  overwrite(folder / "more.jsonl", unread);
  const std::string both = "--set 'data.train=[\"rows.jsonl\", \"more.jsonl\"]'";
  const Ended half = step(two_steps, "kava", both);
  CHECK(half.code == 0);
  CHECK_THAT(half.err, ContainsSubstring("more.jsonl: no row has a chain; its keys are answer, question, working"));
  CHECK(step(two_steps, "no_cot", both).err.empty());
  const Ended longer = step(two_steps + "{\"question\": \"" + std::string(400, 'q') + "\", \"cot\": \"a\", \"answer\": \"7\"}\n", "kava",
                            "--set data.max_tokens=100");
  CHECK(longer.code == 0);
  CHECK_THAT(longer.err, ContainsSubstring("rows left out: 1 over data.max_tokens = 100\n"));
  // Rows that data.answers does not take are not among those that are too long.
  const std::string negative = R"({"question": "q", "cot": "a", "answer": "-7"})", digit = "--set data.answers=digit";
  const Ended answers = step(two_steps + negative + "\n", "kava", digit);
  CHECK_THAT(answers.err, ContainsSubstring("rows left out: 1 by data.answers = \"digit\"\n"));
  CHECK_THAT(answers.out, ContainsSubstring(" samples (left out: 1 by data.answers = \"digit\"), loss "));
  CHECK_THAT(step(two_steps, "kava", digit).out, ContainsSubstring(" samples (none left out), loss "));
  const std::string far = "{\"question\": \"" + std::string(400, 'q') + "\", \"cot\": \"a\", \"answer\": \"7\"}\n";
  CHECK_THAT(step(two_steps + negative + "\n" + far, "kava", digit + " --set data.max_tokens=100").err,
             ContainsSubstring("rows left out: 1 over data.max_tokens = 100, 1 by data.answers = \"digit\"\n"));
  const Ended run = run_command(
      "kava_train t.toml --set data.max_tokens=512 --set data.valid=rows.jsonl --set train.max_steps=1 --out run " + digit, folder.path());
  CHECK_THAT(run.out, ContainsSubstring("samples     2 (left out: 1 by data.answers = \"digit\")\n") &&
                          ContainsSubstring("validation  3 rows; for the losses left out: 1 by data.answers = \"digit\"\n"));
  const Ended none = step(negative, "kava", digit);
  CHECK(none.code == 4);
  CHECK_THAT(none.err, ContainsSubstring("no row is left: the answers of all 1 do not begin with a digit; set data.answers = \"all\"\n"));
  CHECK_THAT(step(negative + "\n" + far, "kava", digit + " --set data.max_tokens=100").err,
             ContainsSubstring("no row is left: 1 are longer than data.max_tokens = 100, the answers of 1 do not begin with a digit; raise "
                               "data.max_tokens, set data.answers = \"all\"\n"));
}
