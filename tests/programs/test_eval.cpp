// Evaluation: rows of ids on the golden models, rows of text on a tiny run made here, and the programs' contract.
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_floating_point.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cmath>
#include <iterator>
#include <map>
#include <set>
#include <sstream>

#include "engine/device/op_observer.h"
#include "engine/files/checkpoint.h"
#include "models/adapter.h"
#include "models/evaluate.h"
#include "models/latent_tokens.h"
#include "models/open_model.h"
#include "tests/programs/text_run.h"

using namespace kava;
namespace fs = std::filesystem;
using Catch::Matchers::ContainsSubstring;
using Catch::Matchers::WithinAbs;

TEST_CASE("rows of ids are judged by equal ids, the end of sequence left out") {
  const RunConfig config = load_config(source_dir() + "/tests/golden/cases/kava_defaults.toml");
  TextModel text = open_text_model(config.model.path);
  const auto ops = make_cpu_ops(2);
  Model model(*ops, config, text.shape);
  load_adapter(model, config.model.adapter);
  Arena arena(*ops);
  RowFile file = read_rows(config.data.train[0].path);
  EvalOptions options;
  options.max_new_tokens = 12;
  const auto ids_of = [](const EvalResult& r) {
    std::vector<std::vector<int32_t>> all;
    for (const EvalRecord& record : r.records) {
      std::istringstream ids(record.output);
      all.emplace_back(std::istream_iterator<int32_t>(ids), std::istream_iterator<int32_t>());
    }
    return all;
  };
  let_end(text, ids_of(evaluate(model, arena, text, file, options)));
  const EvalResult first = evaluate(model, arena, text, file, options);
  REQUIRE(first.records.size() == file.rows.size());
  REQUIRE(first.scorers == std::vector<Scorer>{Scorer::strict, Scorer::raw});
  const std::vector<std::vector<int32_t>> written = ids_of(first);
  for (std::size_t i = 0; i < file.rows.size(); ++i) {
    Row& row = file.rows[i];
    row.answer_ids.resize(static_cast<std::size_t>(*row.prompt));
    row.answer_ids.insert(row.answer_ids.end(), written[i].begin(), written[i].end());
    row.answer_ids.push_back(*text.eos);
  }
  const auto ended = std::ranges::find(first.records, false, &EvalRecord::hit_limit) - first.records.begin();
  REQUIRE(ended < first.count());
  CHECK(correct(evaluate(model, arena, text, file, options), Scorer::strict) == first.count() - first.limit_hits());
  Row& row = file.rows[static_cast<std::size_t>(ended)];
  row.answer_ids.insert(row.answer_ids.end() - 1, *text.eos ^ 1);
  const EvalResult changed = evaluate(model, arena, text, file, options);
  CHECK(correct(changed, Scorer::strict) == first.count() - first.limit_hits() - 1);
  CHECK_FALSE(changed.records[static_cast<std::size_t>(ended)].correct[0]);
  options.limit = 2;
  CHECK(evaluate(model, arena, text, file, options).count() == 2);
}

TEST_CASE("the gold of ids without a prompt is the answer behind what the method writes of the trace") {
  TextRun tiny;
  tiny.config.decode.prompt = DecodePrompt::free;
  overwrite(tiny.dir / "config.toml", to_toml(tiny.config));
  Ready ready(tiny.dir);
  const RowFile file = read_rows(tiny.write("ids.jsonl", R"({"question": [1], "trace": [[3, 4], [5]], "answer": [6, 95], "prompt": 0})"));
  const auto gold = [&](std::optional<Method> method, std::optional<int64_t> stage = std::nullopt) {
    EvalOptions options;
    options.method = method, options.stage = stage;
    return ready.evaluate(file, options).records[0].gold;
  };
  CHECK(gold(std::nullopt) == "6");
  CHECK(gold(Method::full_cot) == "3 4 5 6");
  CHECK(gold(Method::icot) == "6");
  CHECK(gold(Method::icot, 2) == "5 6");
}

TEST_CASE("where there is a tokenizer, rows of ids are judged by their text") {
  TextRun tiny;
  Ready ready(tiny.dir);
  RowFile file = read_rows(tiny.write("ids.jsonl", R"({"question": [1, 7, 9], "trace": [], "answer": [2, 95], "prompt": 0})"));
  EvalOptions options;
  options.max_new_tokens = 10;
  const Tokenizer& tokenizer = *ready.opened.text.tokenizer;
  std::istringstream ids(ready.evaluate(file, options).records[0].output);
  let_end(ready.opened.text, {std::vector<int32_t>(std::istream_iterator<int32_t>(ids), std::istream_iterator<int32_t>())});
  const EvalRecord first = ready.evaluate(file, options).records[0];
  REQUIRE_FALSE(first.hit_limit);
  file.rows[0].answer_ids = tokenizer.encode(first.text + ",");
  file.rows[0].answer_ids.push_back(*ready.opened.text.eos);
  const EvalRecord again = ready.evaluate(file, options).records[0];
  CHECK(again.gold != again.output);
  CHECK(again.correct[0]);  // strict passes over commas
  CHECK_FALSE(again.correct[1]);
}

TEST_CASE("an answer that ends without its prompt is wrong and counted") {
  TextRun tiny;
  Ready ready(tiny.dir);
  const RowFile file = read_rows(tiny.write("rows.txt", kQuestions));
  EvalOptions options;
  options.method = Method::full_cot, options.max_new_tokens = 10;
  std::vector<std::vector<int32_t>> answers;
  for (const EvalRecord& r : ready.evaluate(file, options).records) answers.push_back(ready.opened.text.tokenizer->encode(r.output));
  let_end(ready.opened.text, answers);
  const EvalResult result = ready.evaluate(file, options);
  REQUIRE(result.limit_hits() < result.count());
  CHECK(result.without_prompt() == result.count() - result.limit_hits());
  CHECK(correct(result, Scorer::strict) == 0);
  CHECK(to_json(result).at("without_prompt") == result.without_prompt());
  options.method = std::nullopt;
  CHECK(ready.evaluate(file, options).without_prompt() == 0);
}

TEST_CASE("no latents take no passes, whether they would be pruned or not") {
  std::vector<double> passes;
  for (bool prune : {true, false}) {
    TextRun tiny;
    tiny.config.step.prune_latents = prune;
    overwrite(tiny.dir / "config.toml", to_toml(tiny.config));
    Ready ready(tiny.dir);
    EvalOptions options;
    options.latents = 0, options.iterations = 2;
    passes.push_back(ready.evaluate(read_rows(tiny.write("rows.txt", kQuestions)), options).passes());
  }
  CHECK(passes[0] == passes[1]);
}

TEST_CASE("rows of text are judged by every scorer, and an answer without a number is wrong") {
  TextRun tiny;
  Ready ready(tiny.dir);
  RowFile file = read_rows(tiny.write("rows.txt", kQuestions));
  EvalOptions options;
  options.max_new_tokens = 10;  // the same for other gold answers
  std::vector<std::vector<int32_t>> answers;
  for (const EvalRecord& r : ready.evaluate(file, options).records) answers.push_back(ready.opened.text.tokenizer->encode(r.output));
  let_end(ready.opened.text, answers);
  const EvalResult first = ready.evaluate(file, options);
  const int64_t ended = first.count() - first.limit_hits();
  REQUIRE(ended > 0);
  REQUIRE(first.scorers == std::vector<Scorer>{Scorer::strict, Scorer::raw, Scorer::codi});
  for (std::size_t i = 0; i < file.rows.size(); ++i) {
    INFO(first.records[i].output);
    file.rows[i].answer = first.records[i].output;
  }
  const EvalResult again = ready.evaluate(file, options);
  CHECK(correct(again, Scorer::strict) == ended);
  CHECK(correct(again, Scorer::raw) == ended);
  int64_t with_digits = 0;
  for (const EvalRecord& r : again.records) with_digits += !r.hit_limit && r.output.find_first_of("0123456789") != std::string::npos;
  CHECK(with_digits < ended);
  CHECK(correct(again, Scorer::codi) == with_digits);
  CHECK(again.accuracy(0) == static_cast<double>(ended) / 4);
  file.rows[static_cast<std::size_t>(std::ranges::find(first.records, false, &EvalRecord::hit_limit) - first.records.begin())].answer +=
      "x";
  CHECK(correct(ready.evaluate(file, options), Scorer::raw) == ended - 1);
}

TEST_CASE("a written chain that reaches the limit is wrong and counted") {
  TextRun tiny;
  tiny.config.data.answer_prompt = "";  // the whole text is the answer
  overwrite(tiny.dir / "config.toml", to_toml(tiny.config));
  Ready ready(tiny.dir);
  RowFile file = read_rows(tiny.write("rows.txt", kQuestions));
  EvalOptions options;
  options.method = Method::full_cot, options.max_new_tokens = 6;
  const EvalResult first = ready.evaluate(file, options);
  REQUIRE(first.limit_hits() > 0);
  for (std::size_t i = 0; i < file.rows.size(); ++i) file.rows[i].answer = first.records[i].output;
  const EvalResult again = ready.evaluate(file, options);
  CHECK(again.scorers.back() == Scorer::gsm8k);
  CHECK(correct(again, Scorer::raw) == again.count() - again.limit_hits());
  for (const EvalRecord& r : again.records) CHECK(r.correct[0] != r.hit_limit);
  options.method = Method::no_cot;
  const EvalResult direct = ready.evaluate(file, options);
  CHECK(direct.passes() >= 1);
  CHECK(direct.passes() <= 6);
}

TEST_CASE("what is written of an evaluation does not depend on the batch") {
  TextRun tiny;
  Ready ready(tiny.dir);
  const RowFile file = read_rows(tiny.write("rows.txt", kQuestions));
  EvalOptions options;
  const std::string all = to_json(ready.evaluate(file, options)).dump();
  for (int64_t batch : {1, 3}) {
    options.batch = batch;
    CHECK(to_json(ready.evaluate(file, options)).dump() == all);
  }
}

TEST_CASE("answers that are drawn do not depend on the batch, and follow the seed") {
  TextRun tiny;
  Ready ready(tiny.dir);
  const RowFile file = read_rows(tiny.write("rows.txt", kQuestions));
  EvalOptions options;
  options.max_new_tokens = 12;
  options.sampling = {5, 0.9, 0.8, 7};
  const EvalResult all = ready.evaluate(file, options);
  REQUIRE(all.records.size() == 4);
  std::set<std::string> outputs;
  for (const EvalRecord& r : all.records) {
    REQUIRE(r.samples.size() == 5);
    for (const EvalAnswer& a : r.samples) outputs.insert(a.output);
    CHECK(std::ranges::count(r.samples, r.output, &EvalAnswer::output) > 0);
  }
  CHECK(outputs.size() > 10);
  for (int64_t batch : {1, 3}) {
    options.batch = batch;
    CHECK(to_json(ready.evaluate(file, options)).dump() == to_json(all).dump());
  }
  options.sampling.seed = 8;
  CHECK(to_json(ready.evaluate(file, options)).dump() != to_json(all).dump());
  // The first two of five samples are those of two.
  options.sampling = {2, 0.9, 0.8, 7};
  const EvalResult two = ready.evaluate(file, options);
  for (std::size_t i = 0; i < 4; ++i) CHECK(two.records[i].samples[1].output == all.records[i].samples[1].output);
  // Near temperature 0 every sample is the greedy answer.
  options.sampling = {3, 1e-6, 1, 7};
  const EvalResult cold = ready.evaluate(file, options), greedy = [&] {
    options.sampling = {};
    return ready.evaluate(file, options);
  }();
  for (std::size_t i = 0; i < 4; ++i)
    for (const EvalAnswer& a : cold.records[i].samples) CHECK(a.output == greedy.records[i].output);
}

TEST_CASE("the majority of several answers counts, and pass@k is by the question") {
  TextRun tiny;
  Ready ready(tiny.dir);
  RowFile file = read_rows(tiny.write("rows.txt", kQuestions));
  EvalOptions options;
  options.max_new_tokens = 4;
  options.sampling = {64, 0.05, 1, 7};
  std::vector<std::vector<int32_t>> answers;
  for (const EvalRecord& record : ready.evaluate(file, options).records)
    for (const EvalAnswer& a : record.samples) answers.push_back(ready.opened.text.tokenizer->encode(a.output));
  let_end(ready.opened.text, answers);
  const EvalResult drawn = ready.evaluate(file, options);
  double any = 0;
  for (std::size_t i = 0; i < 4; ++i) {
    const auto& samples = drawn.records[i].samples;
    const auto ended = std::ranges::find(samples, false, &EvalAnswer::hit_limit);
    file.rows[i].answer = ended == samples.end() ? "none" : ended->output;
    any += ended == samples.end() ? 0 : 0.25;
  }
  REQUIRE(any > 0);
  const EvalResult r = ready.evaluate(file, options);
  double one_by_one = 0, by_majority = 0;
  for (const EvalRecord& record : r.records) {
    std::map<std::string, int64_t> votes;
    for (const EvalAnswer& a : record.samples)
      if (a.vote) ++votes[*a.vote];
    for (const auto& [answer, count] : votes) CHECK(count <= votes[*record.vote]);
    one_by_one += static_cast<double>(votes[record.gold]) / (64.0 * 4);
    by_majority += record.correct[0] / 4.0;
  }
  const Json json = to_json(r);
  CHECK_THAT(json.at("pass_at").at("1").get<double>(), WithinAbs(one_by_one, 1e-12));
  CHECK(json.at("pass_at").at("64") == any);
  CHECK(json.at("majority") == by_majority);
  CHECK(json.at("accuracy").at("strict") == by_majority);
  CHECK(json.at("bootstrap").at("strict")[1] >= by_majority);
}

TEST_CASE("GSM-Hard is also judged with its relative rule, SVAMP like other text") {
  TextRun tiny;
  Ready ready(tiny.dir);
  const EvalResult hard = ready.evaluate(read_rows(tiny.write("hard.jsonl", R"({"input": "Q?", "code": "", "target": 9300000000000.5})")));
  CHECK(hard.scorers == std::vector<Scorer>{Scorer::strict, Scorer::raw, Scorer::codi, Scorer::gsm_hard});
  CHECK(hard.records[0].gold == "9300000000000.5");
  const EvalResult svamp = ready.evaluate(read_rows(tiny.write(
      "svamp.json", R"([{"ID": "1", "Body": "Dan has 3.", "Question": "How many?", "Answer": 3.0, "Equation": "", "Type": ""}])")));
  CHECK(svamp.records[0].question == "Dan has 3. How many?");
  CHECK(svamp.records[0].gold == "3");
}

TEST_CASE("a question that is too long is not run and counts as wrong") {
  TextRun tiny;
  Ready ready(tiny.dir);
  const EvalResult r = ready.evaluate(read_rows(tiny.write("long.txt", std::string(5000, 'a') + "||#### 1\nshort||#### 1\n")));
  CHECK(r.too_long() == 1);
  CHECK(r.longest_prompt == 4096);
  CHECK(r.count() == 2);
  CHECK(r.records[0].output.empty());
  CHECK_FALSE(r.records[0].correct[0]);
  CHECK(r.passes() >= 4);
}

TEST_CASE("a run gives its best checkpoint while that verifies, else its adapter") {
  TextRun tiny;
  CHECK(open_model(tiny.dir.string()).weights == "checkpoints/step_3 (best)");
  CHECK(open_model((tiny.dir / "best").string()).weights == "checkpoints/step_3");
  CHECK(open_model((tiny.dir / "checkpoints/step_3").string()).config == tiny.config);
  overwrite(tiny.dir / "checkpoints/step_3/adapter/adapter_config.json", "{}");
  const OpenedModel other = open_model(tiny.dir.string());
  CHECK(other.weights == "adapter");
  CHECK_THAT(other.note, ContainsSubstring("passed over"));
  CHECK_THROWS_AS(open_model((tiny.dir / "checkpoints/step_3").string()), Error);
  fs::remove_all(tiny.dir / "adapter");
  CHECK_THROWS_AS(open_model(tiny.dir.string()), Error);
}

TEST_CASE("a checkpoint whose model is open is not pruned") {
  TextRun tiny;
  const fs::path read = tiny.dir / "checkpoints/step_3";
  write_checkpoint(tiny.dir, 4, "hash", [](FolderWriter& folder) { folder.write_file("a", "b"); });
  {
    const OpenedModel open = open_model(tiny.dir.string());
    prune_checkpoints(tiny.dir, 4, 1, {});
    CHECK(fs::exists(read));
  }
  prune_checkpoints(tiny.dir, 4, 1, {});
  CHECK_FALSE(fs::exists(read));
}

TEST_CASE("a model whose adapter is read starts from no values of its own") {
  TextRun tiny;
  const OpenedModel run = open_model(tiny.dir.string());
  const std::unique_ptr<Ops> ops = make_cpu_ops(1);
  OpCounter counter(*ops);
  const Observed counted(*ops, counter);
  const auto model = load_model(*ops, run);
  CHECK(counter.counts().reads == 0);  // of the embedding's mean and deviation
}

TEST_CASE("methods that the weights cannot do are refused by name") {
  TextRun tiny;
  OpenedModel run = open_model(tiny.dir.string());
  CHECK_NOTHROW(require_method(run, Method::full_cot));
  CHECK_NOTHROW(require_method(run, Method::codi));
  CHECK_THROWS_AS(require_method(run, Method::icot), Error);
  CHECK_THROWS_AS(require_stage(run, std::nullopt, 1), Error);
  OpenedModel staged = open_model(tiny.dir.string());
  staged.config.method = Method::coconut;
  CHECK_NOTHROW(require_stage(staged, std::nullopt, 4));
  CHECK_THROWS_AS(require_stage(staged, std::nullopt, 5), Error);
  CHECK_THROWS_AS(require_stage(staged, std::nullopt, -1), Error);
  run.config.method = Method::no_cot;
  CHECK_THROWS_AS(require_method(run, Method::kava), Error);
  CHECK_NOTHROW(require_method(run, Method::full_cot));
  run.run_dir.clear(), run.config.method = Method::full_cot;
  CHECK_THROWS_AS(require_method(run, Method::no_cot), Error);
}

TEST_CASE("the token nearest to a token's own value row is that token") {
  TextRun tiny;
  Ready ready(tiny.dir);
  Model& m = *ready.model;
  std::vector<float> values;
  for (int32_t id : {5, 40, 96}) {
    ArenaScope scope(ready.arena);
    const int64_t C = m.shape.hidden, width = m.shape.kv_heads * m.shape.head_dim;
    std::vector<float> row(static_cast<std::size_t>(C)), norm(row.size()), w(static_cast<std::size_t>(width * C));
    m.ops.download(row.data(), m.embedding.row_range(id, id + 1));
    m.ops.download(norm.data(), m.layers[0].norm1.gain);
    m.ops.download(w.data(), m.layers[0].qkv.map.out_range(m.layers[0].qkv.map.outs() - width, m.layers[0].qkv.map.outs()).w());
    double square = 0;
    for (float x : row) square += double(x) * x;
    const double rstd = 1 / std::sqrt(square / static_cast<double>(C) + m.shape.norm_eps);
    for (int64_t o = 0; o < width; ++o) {
      double sum = 0;
      for (int64_t c = 0; c < C; ++c)
        sum += double(row[static_cast<std::size_t>(c)]) * rstd * norm[static_cast<std::size_t>(c)] * w[static_cast<std::size_t>(o * C + c)];
      values.push_back(static_cast<float>(sum));
    }
  }
  const std::vector<NearestToken> nearest = nearest_tokens(m, ready.arena, values, 97);
  REQUIRE(nearest.size() == 3);
  CHECK(nearest[0].id == 5);
  CHECK(nearest[1].id == 40);
  CHECK(nearest[2].id == 96);
  for (const NearestToken& n : nearest) CHECK(n.distance < 1e-4);
  CHECK(nearest_tokens(m, ready.arena, values, 96)[2].id != 96);
}

TEST_CASE("the exact McNemar test gives the binomial tails") {
  CHECK(mcnemar_p(0, 0) == 1);
  CHECK(mcnemar_p(5, 5) == 1);
  CHECK(mcnemar_p(4, 5) == 1);
  CHECK(mcnemar_p(1, 9) == 22.0 / 1024);
  CHECK(mcnemar_p(9, 1) == 22.0 / 1024);
  CHECK(mcnemar_p(0, 3) == 0.25);
  CHECK(mcnemar_p(8, 0) == 0.0078125);
  CHECK(mcnemar_p(20, 40) == std::ldexp(7776048412324714.0, -59));  // the sum of C(60, k) up to 20
  // 2^-899, in the middle of what doubles hold, and 2^-1543, below it.
  CHECK(mcnemar_p(900, 0) == std::ldexp(1.0, -899));
  CHECK(mcnemar_p(1544, 0) == kLeastP);
  CHECK(p_text(mcnemar_p(1544, 0)) == "< 1e-300");
  CHECK_THAT(mcnemar_p(100000, 100000), WithinAbs(1, 1e-12));
}

TEST_CASE("kava_eval writes its results, also into the run, and compares them") {
  TextRun tiny;
  const std::string data = tiny.write("rows.txt", kQuestions), out = tiny.folder / "a.json", other = tiny.folder / "b.json";
  const std::string dir = tiny.dir.string();
  const Finished done = run("kava_eval " + dir + " --data " + data + " --out " + out);
  INFO(done.output);
  REQUIRE(done.code == 0);
  CHECK_THAT(done.output, ContainsSubstring("checkpoints/step_3 (best)"));
  const Json result = read_json(out).at("results").at(0);
  CHECK(result.at("questions") == 4);
  CHECK(result.at("records").size() == 4);
  const std::string name = "rows-" + sha256(kQuestions).substr(0, 8) + ".step_3";
  const fs::path in_run = tiny.dir / "eval" / (name + ".json");
  CHECK_THAT(done.output, ContainsSubstring(in_run.filename().string()));
  CHECK(read_json(in_run.string()).at("results").at(0).at("records") == result.at("records"));
  REQUIRE(run("kava_eval " + dir + " --data " + data + " --method no_cot --limit 3 --out " + other).code == 0);
  CHECK(fs::exists(tiny.dir / "eval" / (name + ".no_cot.limit3.json")));
  const Finished compared = run("kava_eval compare " + out + " " + other);
  CHECK(compared.code == 0);
  CHECK_THAT(compared.output, ContainsSubstring("3 questions (1 more"));
  CHECK_THAT(compared.output, ContainsSubstring("McNemar"));
  tiny.write("others.txt", "Another?||#### 4\nB||#### 3\nC||#### 1\nD||#### 1\n");
  REQUIRE(run("kava_eval " + dir + " --data " + (tiny.folder / "others.txt") + " --out " + other).code == 0);
  CHECK(run("kava_eval compare " + out + " " + other).code == 4);
  CHECK(run("kava_eval compare " + out + " " + data).code == 4);
  for (const char* other_json : {"{}", "[]", "7"})
    CHECK_THAT(run("kava_eval compare " + out + " " + tiny.write("other.json", other_json)).output,
               ContainsSubstring("other.json: is no result of kava_eval"));
}

TEST_CASE("kava_eval controls and sweeps the latents against the intact model") {
  TextRun tiny;
  const std::string data = tiny.write("rows.txt", kQuestions), dir = tiny.dir.string();
  const std::string name = "rows-" + sha256(kQuestions).substr(0, 8) + ".step_3";
  const auto result = [&](const std::string& kind) {
    return read_json((tiny.dir / "eval" / (name + kind + ".json")).string()).at("results").at(0);
  };
  const Finished controls = run("kava_eval " + dir + " --data " + data + " --controls");
  INFO(controls.output);
  REQUIRE(controls.code == 0);
  const Json json = result(".controls");
  for (const char* control : {"zero", "mean", "shuffle", "boundaries"}) {
    const Json& c = json.at("controls").at(control);
    CHECK(c.at("accuracy").is_number());
    CHECK(c.at("answer_ce").get<double>() > 0);
    CHECK(c.at("mcnemar_p").get<double>() <= 1);
    CHECK(c.at("bootstrap").size() == 2);
    CHECK_THAT(controls.output, ContainsSubstring(std::string("\n  ") + control + " "));
  }
  REQUIRE(run("kava_eval " + dir + " --data " + data + " --sweep-latents 0..5 --sweep-passes 1..3").code == 0);
  const Json sweep = result(".sweep").at("sweep");
  REQUIRE(sweep.at("latents").size() == 6);
  REQUIRE(sweep.at("passes").size() == 3);
  for (int64_t n = 0; n < 6; ++n) {
    CHECK(sweep.at("latents").at(static_cast<std::size_t>(n)).at("latents") == n);
    const Json& point = sweep.at("latents").at(static_cast<std::size_t>(n));
    CHECK(point.at("iterations") == 2);
    // Pass 0, the 2 iterations or the latents where they are fewer, and one for each token.
    CHECK(point.at("passes").get<double>() == 1 + std::min<double>(2, static_cast<double>(n)) + point.at("tokens_written").get<double>());
  }
  const double base = sweep.at("passes").at(1).at("passes").get<double>();
  CHECK(result(".sweep").at("passes") == base);
  CHECK(sweep.at("passes").at(1).at("difference") == 0.0);
  CHECK(sweep.at("latents").at(5).at("too_long") == 0);
  const Finished many = run("kava_eval " + dir + " --data " + data + " --sweep-latents 4096 --force");
  CHECK(many.code == 0);
  CHECK_THAT(many.output, ContainsSubstring("\nrows.txt, 4096 latents, 2 iterations: 4 questions are over 4096 tokens; they were not run"));
  CHECK(result(".sweep").at("sweep").at("latents").at(0).at("too_long") == 4);
  for (const auto& [arguments, about] : std::map<std::string, std::string>{{" --controls --samples 2", "--controls"},
                                                                           {" --controls --sweep-passes 1", "--controls"},
                                                                           {" --controls --method no_cot", "--controls"},
                                                                           {" --sweep-latents 3..1", "--sweep-latents"},
                                                                           {" --sweep-passes x", "--sweep-passes"}}) {
    const Finished f = run("kava_eval " + dir + " --data " + data + arguments);
    CAPTURE(arguments, f.output);
    CHECK(f.code == 2);
    CHECK(f.output.starts_with("error: " + about));
    CHECK(std::count(f.output.begin(), f.output.end(), '\n') == 1);
  }
}

TEST_CASE("kava_eval tells of a seed or share of what is drawn where nothing is") {
  TextRun tiny;
  const std::string command = "kava_eval " + tiny.dir.string() + " --data " + tiny.write("rows.txt", kQuestions) + " --force";
  for (const auto& [options, note] : {std::pair("--seed 1", "note: --seed is without effect"),
                                      std::pair("--top-p 0.5 --temperature 0", "note: --top-p is without effect"),
                                      std::pair("--top-p 0.5 --seed 9223372036854775806", "note: --top-p and --seed are without effect"),
                                      std::pair("--samples 2 --top-p 0.5 --seed 9223372036854775806", ""), std::pair("", "")}) {
    const Ended e = run_command(command + " " + options);
    CAPTURE(options, e.err);
    CHECK(e.code == 0);
    CHECK(e.err.starts_with(note));
    CHECK((e.err.find("note:") != std::string::npos) == (*note != '\0'));
  }
}

TEST_CASE("kava_eval refuses what it cannot do before the work") {
  TextRun tiny;
  const std::string data = tiny.write("rows.txt", kQuestions), dir = tiny.dir.string();
  const std::pair<std::string, int> refused[] = {{" --data " + data + " --out /nowhere/at/all.json", 3},
                                                 {" --data " + data + " --out " + dir, 3},
                                                 {" --data " + data + " --limit 0", 2},
                                                 {" --data " + data + " --batch 0", 2},
                                                 {" --data " + data + " --max-new-tokens 0", 2},
                                                 {" --data " + data + " --threads 0", 2},
                                                 {" --data " + data + " --samples 0", 2},
                                                 {" --data " + data + " --temperature -0.5", 2},
                                                 {" --data " + data + " --temperature nan", 2},
                                                 {" --data " + data + " --top-p 0", 2},
                                                 {" --data " + data + " --samples 2 --seed -1", 2},
                                                 {" --data " + data + " --samples 2 --seed 9223372036854775807", 2},
                                                 {" --data " + data + " --samples 2 --seed 99999999999999999999", 2},
                                                 {" --data " + data + " --samples 2 --seed -99999999999999999999", 2},
                                                 {" --data " + data + " --samples 2 --seed 1.5", 2},
                                                 {" --data " + data + " --method nothing", 2},
                                                 {" --data " + data + " --method coconut", 2},
                                                 {" --data " + data + " --stage 1", 2},
                                                 {" --data " + data + " --dtype f16", 2},
                                                 {" --data " + data + " --device tpu", 2},
                                                 {" --data " + data + " --threads ''", 2},
                                                 {" --data " + data + " --method ''", 2},
                                                 {" --data " + data + " --out ''", 2},
                                                 {" --data ''", 2},
                                                 {"", 2},
                                                 {" --data /nowhere.txt", 4}};
  for (const auto& [arguments, code] : refused) {
    const Finished f = run("kava_eval " + dir + arguments);
    CAPTURE(arguments, f.output);
    CHECK(f.code == code);
    CHECK(f.output.starts_with("error: "));
    CHECK(std::count(f.output.begin(), f.output.end(), '\n') == 1);
  }
  CHECK(run("kava_eval /nowhere --data " + data).code == 4);
  CHECK(run("kava_eval '' --data " + data).code == 2);
  CHECK(run("kava_eval " + tiny.folder.path().string() + " --data " + data).code == 4);
  CHECK_FALSE(fs::exists(tiny.dir / "eval"));
  // A table that cannot be printed costs nobody the result.
  CHECK(run("kava_eval " + dir + " --data " + data + " --out " + (tiny.folder / "a.json") + " 2>&1 > /dev/full").code == 7);
  CHECK(read_json(tiny.folder / "a.json").at("results").size() == 1);
  CHECK(fs::exists(tiny.dir / "eval"));
}

TEST_CASE("a name that is not UTF-8 is escaped in what kava_eval writes") {
  TextRun tiny;
  const std::string data = tiny.write("\xff.txt", kQuestions), out = tiny.folder / "a.json";
  REQUIRE(run("kava_eval " + tiny.dir.string() + " --data " + data + " --out " + out).code == 0);
  CHECK(read_json(out).at("results").at(0).at("data").get<std::string>().ends_with("\\xff.txt"));
}

TEST_CASE("kava_eval logs its answers in the layout of lm-evaluation-harness") {
  TextRun tiny;
  const std::string data = tiny.write("my rows.txt", "How many?||<<1+1=2>> #### 2\nSay \"\xC3\xA9\\n\" twice\t?||#### 1,234\n"),
                    out = (tiny.dir / "logs").string(),
                    command = "kava_eval " + tiny.dir.string() + " --data '" + data + "' --threads 1 --log-samples " + out;
  const Finished finished = run(command + " --samples 3 --temperature 0.5 --seed 1");
  INFO(finished.output);
  REQUIRE(finished.code == 0);
  std::vector<fs::path> files;
  for (const auto& e : fs::recursive_directory_iterator(out))
    if (e.is_regular_file()) files.push_back(e.path());
  std::ranges::sort(files);
  REQUIRE(files.size() == 2);
  const std::string results = files[0].filename().string(), samples = files[1].filename().string();
  REQUIRE((results.starts_with("results_20") && samples.starts_with("samples_my_rows_20")));
  CHECK(results.substr(8, results.size() - 13) == samples.substr(16, samples.size() - 22));
  CHECK(files[0].parent_path().filename().string().find("__") != std::string::npos);
  const Json summary = read_json(files[0].string()), &task = summary.at("results").at("my_rows");
  CHECK(task.at("sample_len") == 2);
  CHECK(task.contains("exact_match,strict-match"));
  CHECK(task.contains("exact_match_stderr,flexible-extract"));
  std::istringstream lines(read_file(files[1].string(), 1 << 20));
  std::string hashes;
  int64_t n = 0;
  for (std::string text; std::getline(lines, text); ++n) {
    const Json line = Json::parse(text);
    for (const char* key : {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics", "doc_hash",
                            "prompt_hash", "target_hash", "exact_match"})
      CHECK(line.contains(key));
    CHECK(line.size() == 12);
    CHECK(line.at("resps").at(0).size() == 3);
    CHECK(line.at("target_hash") == sha256(line.at("target").get<std::string>()));
    CHECK(line.at("prompt_hash") == sha256(line.at("arguments").at("gen_args_0").at("arg_0").get<std::string>()));
    hashes +=
        line.at("doc_hash").get<std::string>() + line.at("prompt_hash").get<std::string>() + line.at("target_hash").get<std::string>();
    if (line.at("doc_id") == 1)
      CHECK(line.at("doc_hash") == sha256("{\n  \"question\": \"Say \\\"\xC3\xA9\\\\n\\\" twice\\t?\",\n  \"answer\": \"1,234\"\n}"));
  }
  CHECK(n == 2 * 3);  // a line for each question and scorer
  CHECK(summary.at("task_hashes").at("my_rows") == sha256(hashes));
  // The number of an answer in ids is that of their text, and none where the limit was reached.
  const std::string ids = tiny.write("ids.jsonl", R"({"question": [1], "trace": [], "answer": [2, 95], "prompt": 0})");
  REQUIRE(run("kava_eval " + tiny.dir.string() + " --data " + ids + " --threads 1 --max-new-tokens 1 --log-samples " + out + "_ids").code ==
          0);
  for (const auto& e : fs::recursive_directory_iterator(out + "_ids"))
    if (e.path().filename().string().starts_with("samples_"))
      CHECK_THAT(read_file(e.path().string(), 1 << 20), ContainsSubstring(R"("filtered_resps":["[invalid]"],"filter":"flexible-extract")"));
  const Finished refused = run(command.substr(0, command.rfind(' ')) + " '" + data + "'");
  CHECK(refused.code == 2);
  CHECK_THAT(refused.output, ContainsSubstring("--log-samples"));
}
