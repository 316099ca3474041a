#include <fmt/ranges.h>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <regex>
#include <set>

#include "engine/data/data.h"
#include "engine/data/equation.h"
#include "engine/data/synth.h"
#include "engine/error.h"
#include "engine/files/json.h"
#include "engine/text/bpe_train.h"
#include "engine/text/tokenizer.h"
#include "tests/programs/programs.h"

using namespace kava;
using Catch::Matchers::ContainsSubstring;
namespace fs = std::filesystem;

namespace {

void write_all(const std::map<std::string, std::string>& files, const TempFolder& folder) {
  fs::create_directory(folder / "model");
  for (const auto& [name, bytes] : files) overwrite(folder / name, bytes);
}

// Works a question out from its text alone.
int answer_from_text(const std::string& question) {
  static const std::regex first(R"(^(\w+) has (\d) \w+\.)"), more(R"( (\w+) has (\d) (more|fewer) than (\w+)\.)"),
      times(R"( (\w+) has (\d) times (\w+)'s\.)"), last(R"( How many \w+ does (\w+) have modulo 10\?$)");
  std::map<std::string, int> has;
  std::smatch m;
  REQUIRE(std::regex_search(question, m, first));
  has[m[1]] = std::stoi(m[2]);
  std::string rest = m.suffix();
  while (std::regex_search(rest, m, more, std::regex_constants::match_continuous) ||
         std::regex_search(rest, m, times, std::regex_constants::match_continuous)) {
    const int b = std::stoi(m[2]);
    if (m.size() == 5) has[m[1]] = (has.at(m[4]) + (m[3] == "more" ? b : 10 - b)) % 10;
    else has[m[1]] = has.at(m[3]) * b % 10;
    rest = std::string(m.suffix());
  }
  REQUIRE(std::regex_match(rest, m, last));
  return has.at(m[1]);
}

std::set<std::string> files_below(const fs::path& folder) {
  std::set<std::string> out;
  for (const auto& entry : fs::recursive_directory_iterator(folder))
    if (entry.is_regular_file()) out.insert(fs::relative(entry.path(), folder).string());
  return out;
}

}  // namespace

TEST_CASE("the answer and the steps of a ring row follow from its question") {
  for (int steps : {1, 3, 15})
    for (int64_t index = 0; index < 300; ++index) {
      const RingRow row = ring_row(5, steps, index);
      REQUIRE(row.steps.size() == static_cast<std::size_t>(steps));
      CHECK(answer_from_text(row.question) == std::stoi(row.answer));
      for (const std::string& step : row.steps) CHECK(judge_equation(step, 10) == Verdict::holds);
      CHECK(row.steps.back().substr(row.steps.back().find('=') + 1) == row.answer + ">>");
      for (std::size_t i = 1; i < row.steps.size(); ++i) CHECK(row.steps[i][2] == row.steps[i - 1][6]);
    }
}

TEST_CASE("half of the steps are products, and the answers are even") {
  std::map<char, int> kinds, answers;
  for (int64_t index = 0; index < 10'000; ++index) {
    const RingRow row = ring_row(1, 2, index);
    for (const std::string& step : row.steps) ++kinds[step[3]];
    ++answers[row.answer[0]];
  }
  CHECK(std::abs(kinds['*'] - 10'000) < 350);  // 5 standard deviations
  CHECK(std::abs(kinds['+'] - 5'000) < 310);
  CHECK(std::abs(kinds['-'] - 5'000) < 310);
  for (const auto& [answer, count] : answers) CHECK(std::abs(count - 1000) < 150);
}

TEST_CASE("the files share no question and no trace, and two runs give the same bytes") {
  const auto files = synthesize({.rows = 2000, .steps = 3, .seed = 7});
  CHECK(files == synthesize({.rows = 2000, .steps = 3, .seed = 7}));
  const auto other = synthesize({.rows = 2000, .steps = 3, .seed = 8});
  CHECK(files.at("train.txt") != other.at("train.txt"));
  CHECK(files.at("model/tokenizer.json") == other.at("model/tokenizer.json"));

  TempFolder folder;
  write_all(files, folder);
  std::map<std::string, RowFile> read;
  for (const char* name : {"train.txt", "base.txt", "valid.txt", "test.txt"}) read.emplace(name, read_rows(folder / name));
  CHECK(read.at("train.txt").rows.size() == 2000);
  CHECK(read.at("valid.txt").rows.size() == 2000);
  CHECK(read.at("test.txt").rows.size() == 2000);

  auto trace = [](const Row& row) { return fmt::format("{}", fmt::join(row.steps, " ")); };
  std::set<std::string> questions, traces;
  for (const Row& row : read.at("train.txt").rows) {
    CHECK(questions.insert(row.question).second);
    traces.insert(trace(row));
  }
  for (const char* name : {"valid.txt", "test.txt"})
    for (const Row& row : read.at(name).rows) {
      CHECK(questions.insert(row.question).second);
      CHECK_FALSE(traces.contains(trace(row)));
      CHECK(row.steps.size() == 3);
    }

  int shorter = 0;
  for (std::size_t i = 0; i < 2000; ++i) {
    const Row &base = read.at("base.txt").rows[i], &full = read.at("train.txt").rows[i];
    CHECK((base.question == full.question && base.answer == full.answer));
    CHECK(std::equal(base.steps.begin(), base.steps.end(), full.steps.begin()));
    shorter += base.steps.size() == 2;
  }
  CHECK(std::abs(shorter - 800) < 110);  // 40 %, 5 standard deviations
}

TEST_CASE("the bytes of a seed are the same on every machine") {
  std::string all;
  for (const auto& [name, bytes] : synthesize({.rows = 100, .steps = 3, .seed = 42})) all += name + "\n" + bytes;
  CHECK(sha256(all) == "554b0a704b524c74672b54b0a752d7bed33647f0835d75681af848b9075188de");
}

TEST_CASE("the trained tokenizer has one token for each word, number and mark") {
  const auto files = synthesize({.rows = 500, .steps = 3, .seed = 1});
  TempFolder folder;
  write_all(files, folder);
  const Tokenizer tokenizer = Tokenizer::load(folder / "model");
  CHECK(tokenizer.eos_token() == "<|end|>");
  CHECK_FALSE(tokenizer.bos());
  const Json config = read_json(folder / "model/config.json");
  CHECK(config["eos_token_id"] == *tokenizer.id_of("<|end|>"));
  CHECK(config["vocab_size"].get<int>() >= tokenizer.size());
  CHECK(config["vocab_size"].get<int>() % 8 == 0);
  CHECK(config["rope_theta"] == 100.0);

  const std::vector<RowFile> rows = {read_rows(folder / "train.txt")};
  SampleOptions options;
  options.drop_last_step = false;
  options.eos = *tokenizer.id_of("<|end|>");
  LeftOut left_out;
  for (const Sample& s : make_samples(rows, &tokenizer, options, &left_out)) {
    CHECK(s.question.size() == 35);
    CHECK(s.trace.size() == 21);
    CHECK(s.prompt == 4);
    CHECK(s.answer.size() == 6);
    CHECK(tokenizer.decode(s.question) == rows[0].rows[static_cast<std::size_t>(s.row)].question);
  }
  CHECK(tokenizer.encode(" 3") != tokenizer.encode("3"));
  CHECK(tokenizer.encode(" 3").size() == 1);
  CHECK(tokenizer.decode(tokenizer.encode("other text: \xC3\xA9\x01")) == "other text: \xC3\xA9\x01");
}

TEST_CASE("BPE training merges the most frequent pair first") {
  const auto v = train_bpe({{"aab", 3}, {"ab", 2}, {"bc", 4}}, 100);
  using Pairs = std::vector<std::pair<std::string, std::string>>;
  CHECK(v.merges == Pairs{{"a", "b"}, {"b", "c"}, {"a", "ab"}});
  CHECK(v.tokens.size() == 259);
  CHECK(train_bpe({{"aab", 3}, {"ab", 2}, {"bc", 4}}, 1).merges == Pairs{{"a", "b"}});
  CHECK(train_bpe({{"aaa", 1}}, 100).merges == Pairs{{"a", "a"}, {"aa", "a"}});
  CHECK(train_bpe({}, 100).tokens.size() == 256);
  CHECK(train_bpe({}, 100).tokens[' '] == "\xC4\xA0");
}

TEST_CASE("too many rows of a small task are refused") {
  CHECK_THROWS_AS(synthesize({.rows = 120'000, .steps = 1, .seed = 1}), Error);
  CHECK(synthesize({.rows = 110'000, .steps = 1, .seed = 1}).size() == 7);
}

TEST_CASE("equations are judged") {
  using enum Verdict;
  CHECK(judge_equation("<<2+3*4=14>>") == holds);
  CHECK(judge_equation("<<(2+3)*4=20>>") == holds);
  CHECK(judge_equation("<<600*30/100=180>>") == holds);
  CHECK(judge_equation("<<16-3-4=9>>") == holds);
  CHECK(judge_equation("<<-2*-3=6>>") == holds);
  CHECK(judge_equation("<<.5*4=2.>>") == holds);
  CHECK(judge_equation("<<10/3=3.33>>") == holds);
  CHECK(judge_equation("<<20/3=6.66>>") == holds);
  CHECK(judge_equation("<<5/1.4=3.57142>>") == holds);
  CHECK(judge_equation("<<-20/3=-6.66>>") == holds);
  CHECK(judge_equation("<<20/3=6.65>>") == fails);
  CHECK(judge_equation("<<20/3=-6.66>>") == fails);
  CHECK(judge_equation("<<0.1+0.2=0.3>>") == holds);
  CHECK(judge_equation("<<1035=1035>>") == holds);
  CHECK(judge_equation("<<10/3=3>>") == holds);
  CHECK(judge_equation("<<590/3=197>>") == holds);
  CHECK(judge_equation("<<35/2=17>>") == holds);
  CHECK(judge_equation("<<-11/4=-2>>") == holds);
  CHECK(judge_equation("<<10/3=4>>") == fails);
  CHECK(judge_equation("<<32/6=6>>") == fails);
  CHECK(judge_equation("<<3*4=11>>") == fails);
  CHECK(judge_equation("<<0.7*10=6>>") == fails);
  CHECK(judge_equation("<<5-6=0>>") == fails);
  CHECK(judge_equation("<<10/3=3.34>>") == fails);
  CHECK(judge_equation("<<1+1=3>>") == fails);
  CHECK(judge_equation("<<1-4=7>>") == fails);
  CHECK(judge_equation("<<1-4=7>>", 10) == holds);
  CHECK(judge_equation("<<9*7=3>>", 10) == holds);
  CHECK(judge_equation("<<9*7=4>>", 10) == fails);
  CHECK(judge_equation("<<1/2=0.5>>", 10) == unreadable);
  for (const char* step : {"<<20%=0.2>>", "<<1+1>>", "<<=2>>", "<<1+=2>>", "<<1=1=1>>", "<<x=2>>", "<<1/0=2>>", "<<(1=1>>", "<<1)=1>>",
                           "1+1=2", "<<>>", "<<", "<<1 1=2>>", "<<1,000=1000>>", "<<1e3=1000>>", "<<.=1>>"})
    CHECK(judge_equation(step) == unreadable);
  CHECK(judge_equation("<<" + std::string(1'000'000, '(') + "=1>>") == unreadable);
  CHECK(judge_equation("<<" + std::string(1'000'000, '-') + "1=1>>") == unreadable);
  CHECK(judge_equation("<<" + std::string(1'000'000, '9') + "=1>>") == unreadable);
}

TEST_CASE("answers are judged by the last equation") {
  using enum Verdict;
  CHECK(judge_answer("<<13+1=14>>", "14") == holds);
  CHECK(judge_answer("<<13+1=14>>", "14.00") == holds);
  CHECK(judge_answer("<<13+1=14>>", "999") == fails);
  CHECK(judge_answer("<<10/3=3.33>>", "3") == holds);
  CHECK(judge_answer("<<10/3=3.33>>", "3.3333") == holds);  // of the expression
  CHECK(judge_answer("<<10/3=3.33>>", "3.34") == fails);
  CHECK(judge_answer("<<7/2=3.5>>", "4") == holds);
  CHECK(judge_answer("<<1+1=3>>", "3") == holds);  // a false equation, which is judged by itself
  CHECK(judge_answer("<<1+1=3>>", "2") == holds);
  CHECK(judge_answer("<<1000*3=3000>>", "$3,000") == holds);
  CHECK(judge_answer("<<4-7=-3>>", "3") == fails);
  CHECK(judge_answer("<<9*7=3>>", "3", 10) == holds);
  CHECK(judge_answer("<<9*7=3>>", "4", 10) == fails);
  for (const char* answer : {"3 apples", "three", "", "x=3", "20%"}) CHECK(judge_answer("<<1+2=3>>", answer) == unreadable);
  for (const char* step : {"1+2=3", "<<20%=0.2>>", "<<3>>", "<<", ""}) CHECK(judge_answer(step, "3") == unreadable);
}

TEST_CASE("kava_data synth writes its files once and replaces none") {
  TempFolder folder;
  const Ended first = kava_data("synth --out a/b --rows 50 --seed 3", folder);
  CHECK((first.code == 0 && first.err.empty()));
  const std::set<std::string> all = {"base.txt",  "model/config.json", "model/tokenizer.json", "model/tokenizer_config.json", "test.txt",
                                     "train.txt", "valid.txt"};
  CHECK(files_below(folder.path() / "a/b") == all);
  const std::string train = read_file(folder / "a/b/train.txt", 1 << 20);
  CHECK(train == synthesize({.rows = 50, .steps = 3, .seed = 3}).at("train.txt"));

  CHECK(kava_data("synth --out a/b --rows 50 --seed 3", folder).code == 0);
  const Ended other = kava_data("synth --out a/b --rows 50 --seed 4", folder);
  CHECK(other.code == 2);
  CHECK_THAT(other.err, ContainsSubstring("error: --out a/b: base.txt is there and is another file"));
  CHECK(read_file(folder / "a/b/train.txt", 1 << 20) == train);

  fs::create_directories(folder.path() / "c");
  overwrite(folder / "c/train.txt", "mine\n");
  overwrite(folder / "c/notes.txt", "mine\n");
  CHECK(kava_data("synth --out c --rows 50", folder).code == 2);
  CHECK(files_below(folder.path() / "c") == std::set<std::string>{"notes.txt", "train.txt"});

  overwrite(folder / "file", "x");
  CHECK(kava_data("synth --out file --rows 50", folder).code == 3);
  CHECK(kava_data("synth --out file/x --rows 50", folder).code == 3);
  CHECK(kava_data("synth --out full --rows 50 >/dev/full", folder).code == 7);
  CHECK(!fs::exists(folder.path() / "full"));
}

TEST_CASE("kava_data check reports what it finds and exits by it") {
  TempFolder folder;
  REQUIRE(kava_data("synth --out r --rows 200", folder).code == 0);
  const Ended clean = kava_data("check r/train.txt r/base.txt --against r/test.txt r/valid.txt --modulo 10", folder);
  CHECK(clean.code == 0);
  CHECK_THAT(clean.out, ContainsSubstring("overlap: 0 by question, 0 by trace\n") && ContainsSubstring("200 rows, 600 steps") &&
                            ContainsSubstring("600 hold, 0 are false, 0 of another form"));

  overwrite(folder / "a.txt", "q 1||<<1+1=2>> <<2+2=5>> #### 5\nq 2||<<20%=0.2>> #### 3\nq 2||Two. #### 3\nq 3||#### 1\n");
  overwrite(folder / "b.txt", "q 2||<<9=9>> #### 3\nq 9||<<20%=0.2>> #### 3\nq 8||#### 1\n");
  const Ended alone = kava_data("check a.txt", folder);
  CHECK(alone.code == 0);
  CHECK_THAT(alone.out, ContainsSubstring("a.txt: icot_text, 4 rows, 4 steps, 1 rows without a trace, 1 repeated questions") &&
                            ContainsSubstring("1 hold, 1 are false, 1 of another form") && ContainsSubstring("false: a.txt:1: <<2+2=5>>"));
  const Ended overlap = kava_data("check a.txt --against b.txt", folder);
  CHECK(overlap.code == 4);
  CHECK_THAT(overlap.out, ContainsSubstring("overlap: 2 by question, 1 by trace\n"));
  CHECK_THAT(overlap.err, ContainsSubstring("error: a.txt:2: "));

  overwrite(folder / "bad.txt", "q||a #### 1\nno marks\n");
  const Ended bad = kava_data("check bad.txt", folder);
  CHECK(bad.code == 4);
  CHECK_THAT(bad.err, ContainsSubstring("error: bad.txt:2: no ||"));
  CHECK(kava_data("check none.txt", folder).code == 4);
}

TEST_CASE("kava_data refuses wrong options") {
  TempFolder folder;
  for (const char* arguments : {"",
                                "foo",
                                "synth",
                                "synth --out x --rows 0",
                                "synth --out x --rows 1.5",
                                "synth --out x --rows 99999999999999999999",
                                "synth --out x --steps 0",
                                "synth --out x --steps 16",
                                "synth --out x --seed -1",
                                "synth --out x --seed 9223372036854775808",
                                "synth --out x --foo",
                                "synth --out ''",
                                "synth --out x --rows 400000 --steps 1",
                                "check",
                                "check a --modulo 0",
                                "stats",
                                "stats a --latents 0",
                                "convert a",
                                "convert a b --to svamp",
                                "convert a b --format x",
                                "check a --format x",
                                "stats a --format x"}) {
    CAPTURE(arguments);
    const Ended run = kava_data(arguments, folder);
    CHECK(run.code == 2);
    CHECK(run.err.starts_with("error: "));
    CHECK(std::count(run.err.begin(), run.err.end(), '\n') == 1);
    CHECK(run.out.empty());
  }
  CHECK(files_below(folder.path()).empty());
  for (const char* arguments : {"--help", "synth --help", "check --help", "stats --help", "convert --help"}) {
    const Ended help = kava_data(arguments, folder);
    CHECK(help.code == 0);
    CHECK_THAT(help.out, ContainsSubstring("\nExample") && ContainsSubstring(":\n  " + bin_dir() + "/kava_data "));  // as it was called
  }
}
