// kava_inspect probe and kava_report: what they write, and that a page needs nothing from elsewhere.
#include <sys/syscall.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cmath>
#include <thread>

#include "engine/files/parts.h"
#include "engine/files/safetensors.h"
#include "tests/io/denied_calls.h"
#include "tests/programs/text_run.h"
#include "tools/report_plot.h"

using namespace kava;
namespace fs = std::filesystem;
using Catch::Matchers::ContainsSubstring;

namespace {

std::string page(const std::string& path) { return read_file(path, 1 << 24); }

// A run's folder with metrics of so many steps, the last 10 of them twice, as a resumed run leaves them.
void write_metrics(const fs::path& run, int steps) {
  std::string lines;
  auto line = [&](int s, double loss) {
    lines += Json{{"step", s},
                  {"loss", loss},
                  {"student_ce", 0.5},
                  {"kv", 0.25},
                  {"grad_norm", 1.5},
                  {"lr", 1e-3},
                  {"samples_per_s", 10.0 + s % 7},
                  {"memory_bytes", 1000000}}
                 .dump() +
             "\n";
  };
  for (int s = 1; s <= steps; ++s) line(s, 5.0 / s + std::sin(s));
  for (int s = std::max(1, steps - 9); s <= steps; ++s) line(s, 3);
  lines += Json{{"valid", {{"step", steps}, {"strict", 0.25}, {"forced", 0.5}, {"loss", 1.25}}}}.dump() + "\n";
  overwrite(run / "metrics.jsonl", lines);
}

}  // namespace

TEST_CASE("a probe holds the latents' words in every pass, similarities and kept tokens") {
  const TextRun tiny;
  const std::string data = tiny.write("rows.txt", "What is 2+2?||<<2+2=4>> <<4+1=5>> <<5+1=6>>#### 6\nTom?||<<1+1=2>> <<2+1=3>>#### 3\n");
  const std::string out = tiny.folder / "probe.safetensors";
  const Finished made = run("kava_inspect probe " + tiny.dir.string() + " --data " + data + " --out " + out);
  INFO(made.output);
  REQUIRE(made.code == 0);
  const SafetensorsFile file = SafetensorsFile::open(out);
  CHECK(file.find("latent.top")->shape == std::vector<int64_t>{3, 2, 4});
  CHECK(file.find("similarity.k")->shape == std::vector<int64_t>{2, 2, 4, 4});
  CHECK(file.find("rkv.kept")->shape == std::vector<int64_t>{2, 2, 2, 4});
  const Json about = Json::parse(file.metadata().at("kava.probe"));
  CHECK(about["passes"] == Json{0, 1, 2});
  CHECK(about["questions"][0]["gold"] == "6");
  // The last pass is what kava_generate tells of the same question.
  std::vector<int32_t> nearest(3 * 2 * 4);
  file.read(*file.find("latent.nearest"), nearest.data());
  const std::string told = run("kava_generate " + tiny.dir.string() + " --latents 'What is 2+2?'").output;
  for (std::size_t m = 0; m < 4; ++m) {
    const std::string token = about["tokens"][std::to_string(nearest[2 * 2 * 4 + m])].get<std::string>();
    CHECK_THAT(told, ContainsSubstring(fmt::format("{:>6}  {:<24}", m, "\"" + token + "\"")));
  }
  std::vector<float> similarity(2 * 2 * 4 * 4);
  file.read(*file.find("similarity.v"), similarity.data());
  for (float v : similarity) CHECK((v >= -1.0001F && v <= 1.0001F));
  CHECK(run("kava_inspect probe " + tiny.dir.string() + " --data " + data + " --out " + data).code == 2);
  CHECK(run("kava_inspect probe " + tiny.dir.string() + " --data " + (tiny.folder / "none") + " --out " + out).code == 4);
}

TEST_CASE("a probe leaves out questions that are too long to decode, and counts them") {
  const TempFolder folder;
  const std::string golden = source_dir() + "/tests/golden/", out = folder / "run", probe = folder / "probe.safetensors";
  REQUIRE(
      run_command("kava_train '" + golden + "cases/full_cot.toml' --set train.max_steps=1 --set data.max_tokens=10000 --out '" + out + "'")
          .code == 0);
  std::string ids = "1";
  for (int i = 0; i < 4200; ++i) ids += ", 2";
  overwrite(folder / "rows.jsonl", R"({"question": [1, 2], "trace": [3, 4], "answer": [7, 8, 2], "prompt": 1})"
                                   "\n{\"question\": [" +
                                       ids +
                                       R"(], "trace": [3, 4], "answer": [7, 8, 2], "prompt": 1})"
                                       "\n");
  const Ended made = run_command("kava_inspect probe '" + out + "' --data '" + folder / "rows.jsonl" + "' --out '" + probe + "'");
  INFO(made.err);
  CHECK(made.code == 0);
  CHECK_THAT(made.err, ContainsSubstring("rows left out: 1 over 4096 tokens of a question"));
  CHECK_THAT(made.out, ContainsSubstring("1 questions"));
}

TEST_CASE("a page takes the place of no file that it is made of") {
  const TextRun tiny;
  const std::string run = tiny.dir.string();
  write_metrics(run, 12);
  fs::create_directories(run + "/eval");
  overwrite(run + "/eval/x.json", "{}");
  for (const char* file : {"/config.toml", "/metrics.jsonl", "/eval/x.json"}) {
    const std::string before = page(run + file);
    for (const char* how : {" --out '", " --figure loss --png '"}) {
      const Ended made = run_command("kava_report '" + run + "'" + how + run + file + "'");
      INFO(made.err);
      CHECK(made.code == 2);
      CHECK_THAT(made.err, ContainsSubstring(": is ") && ContainsSubstring(file));
    }
    CHECK(page(run + file) == before);
  }
  fs::remove(run + "/eval/x.json");
  for (int time = 0; time < 2; ++time) CHECK(run_command("kava_report '" + run + "'").code == 0);
}

TEST_CASE("validations without a right answer are a flat line at 0") {
  const TextRun tiny;
  std::string lines;
  for (int step : {2, 4}) {
    lines += Json{{"step", step}, {"loss", 1.5}, {"kv", 0}}.dump() + "\n";
    lines += Json{{"valid", {{"step", step}, {"strict", 0.0}, {"forced", 0.0}, {"loss", 1.25}}}}.dump() + "\n";
  }
  overwrite(tiny.dir / "metrics.jsonl", lines);
  const std::string out = tiny.folder / "page.html";
  REQUIRE(run("kava_report " + tiny.dir.string() + " --out " + out).code == 0);
  const std::string html = page(out);
  const auto begin = html.find("<figure id=\"validation\"");
  REQUIRE(begin != html.npos);
  const std::string figure = html.substr(begin, html.find("</figure>", begin) - begin);
  // On the ground: at the tick 0.
  CHECK_THAT(figure, ContainsSubstring("\">0</text>") && ContainsSubstring("</i>strict<") && ContainsSubstring("</i>forced<"));
  CHECK_THAT(figure, !ContainsSubstring(">-"));
  CHECK_THAT(html, !ContainsSubstring("</i>kv<"));  // a term that the run has not
}

TEST_CASE("values that differ in their last digit, or are smaller than any, have few ticks") {
  using Points = std::vector<std::pair<double, double>>;
  for (const Points& points : {Points{{1, 0.6439850888713335}, {2, 0.6439850888713337}}, Points{{1, -7}, {2, std::nextafter(-7, 0)}},
                               Points{{1, 0}, {2, 1e-310}}, Points{{1, 0}, {2, 5e-324}}, Points{{1, -1e308}, {2, 1e308}}})
    for (bool log : {false, true}) {
      INFO(points[0].second << " and " << points[1].second << (log ? ", logarithmic" : ""));
      CHECK(report::line_plot("loss", "loss", "loss", {{"a run", points}}, log).size() < 5000);
    }
}

TEST_CASE("a page of a run has its figures, needs nothing from elsewhere, and stays small") {
  const TextRun tiny;
  write_metrics(tiny.dir, 10'000);
  const std::string data = tiny.write("rows.txt", kQuestions), probe = tiny.folder / "p.safetensors", out = tiny.folder / "page.html";
  REQUIRE(run("kava_eval " + tiny.dir.string() + " --data " + data).code == 0);
  REQUIRE(run("kava_inspect probe " + tiny.dir.string() + " --data " + data + " --out " + probe).code == 0);
  const Finished made = run("kava_report " + tiny.dir.string() + " --probe " + probe + " --out " + out);
  INFO(made.output);
  REQUIRE(made.code == 0);
  const std::string html = page(out);
  for (const char* name : {"loss", "validation", "rate", "gradient", "throughput", "memory", "results", "questions", "latents",
                           "similarity_k", "similarity_v", "kept"}) {
    INFO(name);
    CHECK_THAT(html, ContainsSubstring("<figure id=\"" + std::string(name) + "\""));
  }
  for (const char* outside : {"http:", "https:", "<script", "@import", "url(", "nan", "inf\""})
    CHECK_THAT(html, !ContainsSubstring(outside));
  CHECK_THAT(html, ContainsSubstring("prefers-color-scheme:dark"));
  CHECK_THAT(html, ContainsSubstring("@media print"));
  CHECK(html.size() <= 3'000'000);
}

TEST_CASE("a page takes the probe of its run alone, and one that does not say whose it is") {
  const TextRun tiny;
  write_metrics(tiny.dir, 3);
  const std::string dir = tiny.dir.string(), data = tiny.write("rows.txt", kQuestions), probe = tiny.folder / "p.safetensors",
                    other = tiny.folder / "other", out = tiny.folder / "page.html";
  REQUIRE(run("kava_inspect probe " + dir + " --data " + data + " --out " + probe).code == 0);
  const SafetensorsFile file = SafetensorsFile::open(probe);
  Json about = Json::parse(file.metadata().at("kava.probe"));
  CHECK(about["config_hash"] == config_hash(tiny.config));
  RunConfig config = load_run_config(dir);
  config.seed = 7;
  fs::create_directory(other);
  overwrite(other + "/config.toml", to_toml(config));
  const Ended refused = run_command("kava_report " + other + " --probe " + probe + " --out " + out);
  CHECK(refused.code == 2);
  CHECK(refused.err == "error: --probe " + probe + ": is of another run than " + other +
                           "; name the probe of this run, or make it with kava_inspect probe\n");
  CHECK(!fs::exists(out));
  CHECK(run("kava_report " + other + " " + other + " --probe " + probe + " --out " + out).code == 2);
  CHECK(run("kava_report " + other + " " + dir + " --probe " + probe + " --out " + out).code == 0);
  // As an earlier version wrote it.
  about.erase("config_hash");
  std::vector<std::vector<char>> bytes;
  std::vector<TensorOut> tensors;
  for (const TensorInfo& t : file.tensors()) {
    bytes.emplace_back(t.end - t.begin);
    file.read(t, bytes.back().data());
    tensors.push_back({t.name, t.dtype, t.shape, bytes.back().data()});
  }
  const std::string older = tiny.folder / "older.safetensors";
  write_safetensors(older, tensors, {{"kava.probe", about.dump()}});
  CHECK(run("kava_report " + other + " --probe " + older + " --out " + out).code == 0);
}

TEST_CASE("several runs are drawn in one figure each, with what each of them changes") {
  const TextRun tiny;
  write_metrics(tiny.dir, 20);
  const std::string other = tiny.folder / "other", out = tiny.folder / "page.html";
  fs::create_directory(other);
  RunConfig config = load_run_config(tiny.dir.string());
  config.train.lr = 0.25;
  overwrite(other + "/config.toml", to_toml(config));
  write_metrics(other, 30);
  // The third has no validation; with the seventh the colours come again.
  const std::string bare = tiny.folder / "bare";
  fs::create_directory(bare);
  overwrite(bare + "/config.toml", to_toml(config));
  overwrite(bare + "/metrics.jsonl", R"({"step": 1, "loss": 2.0, "student_ce": 0.0})"
                                     "\n");
  std::string runs = "kava_report " + tiny.dir.string() + " " + other + " " + bare;
  for (int i = 0; i < 4; ++i) runs += " " + other;
  REQUIRE(run(runs + " --out " + out).code == 0);
  const std::string html = page(out);
  const auto figure = [&](const std::string& name) {
    const auto begin = html.find("<figure id=\"" + name + "\"");
    return begin == html.npos ? std::string() : html.substr(begin, html.find("</figure>", begin) - begin);
  };
  const auto lines = [](const std::string& text) {
    int n = 0;
    for (auto at = text.find("<path class=\"line"); at != text.npos; at = text.find("<path class=\"line", at + 1)) ++n;
    return n;
  };
  CHECK(lines(figure("loss")) == 7);
  for (const char* name : {"student_ce", "validation", "validation_loss"}) {
    CHECK(lines(figure(name)) == 6);
    CHECK_THAT(figure(name), !ContainsSubstring("line c2 d0") && !ContainsSubstring("/bare<"));
    CHECK_THAT(figure(name), ContainsSubstring("line c3 d0") && ContainsSubstring("line c0 d1"));
  }
  CHECK_THAT(figure("loss"), ContainsSubstring("line c2 d0") && ContainsSubstring("</i>2 ") && ContainsSubstring("/other<"));
  CHECK(!figure("1_loss").empty());
  CHECK(!figure("7_loss").empty());
  CHECK_THAT(html, ContainsSubstring("train.lr: ") && ContainsSubstring(" -&gt; 0.25"));
  // One run has no other beside it.
  REQUIRE(run("kava_report " + other + " --out " + out).code == 0);
  CHECK_THAT(page(out), !ContainsSubstring("side by side"));
}

TEST_CASE("a page escapes what files say") {
  const TextRun tiny;
  const std::string data = tiny.write("rows.txt", "<script>alert(1)</script> & \"x\"||#### 4\n"), out = tiny.folder / "page.html";
  REQUIRE(run("kava_eval " + tiny.dir.string() + " --data " + data).code == 0);
  REQUIRE(run("kava_report " + tiny.dir.string() + " --out " + out).code == 0);
  CHECK_THAT(page(out), ContainsSubstring("&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;x&quot;"));
  CHECK_THAT(page(out), !ContainsSubstring("<script"));
}

TEST_CASE("kava_report refuses what it cannot show in one line") {
  const TextRun tiny;
  const std::string dir = tiny.dir.string(), out = tiny.folder / "page.html";
  overwrite(tiny.dir / "metrics.jsonl", "{\"step\": 1, \"loss\": 2}\nbroken\n{\"step\": 2}\n");
  tiny.write("no.safetensors", "x");
  const std::pair<std::string, int> refused[] = {{"kava_report " + (tiny.folder / "none"), 4},
                                                 {"kava_report " + dir, 4},
                                                 {"kava_report " + dir + " --probe " + (tiny.folder / "no.safetensors"), 4},
                                                 {"kava_report " + dir + " --figure loss", 2},
                                                 {"kava_report", 2}};
  for (const auto& [command, code] : refused) {
    INFO(command);
    const Finished f = run(command);
    CHECK(f.code == code);
    CHECK(f.output.starts_with("error: "));
    CHECK(std::ranges::count(f.output, '\n') == 1);
  }
  const std::string table = tiny.folder / "table.json";
  for (const char* rows : {"", R"(, "rows": 3)",
                           R"(, "rows": [{"name": "r", "block": "", "title": "t", "cells": [{"column": "c",)"
                           R"( "measure": "accuracy", "n": 0, "mean": null, "sd": null, "published": [{"value": 1}]}]}])"}) {
    overwrite(table,
              R"({"title": "t", "columns": [{"name": "c", "title": "c", "data": "d", "scorer": "strict"}], "measures": ["accuracy"],)"
              R"( "seeds": [1], "comparisons": [], "notes": [])" +
                  std::string(rows) + "}");
    const Finished f = run("kava_report " + table);
    CAPTURE(f.output);
    CHECK(f.code == 4);
    CHECK(f.output.starts_with("error: " + table));
  }
  write_metrics(tiny.dir, 3);
  fs::create_directories(tiny.dir / "eval");
  overwrite(tiny.dir / "eval/rows.json",
            R"({"results": [{"accuracy": {}, "passes": 1, "records": [{"question": "q", "correct": {"strict": "yes"}}]}]})");
  CHECK(run("kava_report " + dir + " --out " + out).code == 0);
  fs::remove(out);
  CHECK(run("kava_report " + dir + " --figure loss --png " + (tiny.folder / "x.png") + " --out " + out).code == 2);
  const Finished unknown = run("kava_report " + dir + " --figure none --png " + (tiny.folder / "x.png"));
  CHECK(unknown.code == 2);
  CHECK_THAT(unknown.output, ContainsSubstring("give one of loss, validation"));
  CHECK(!fs::exists(tiny.dir / "report.html"));
}

TEST_CASE("metrics that no tracker can take are refused by line") {
  const TextRun tiny;
  fs::create_directories(tiny.folder / "tensorboard");  // no package, but one of its name: the metrics are read before it is used
  overwrite(tiny.folder / "tensorboard/__init__.py", "");
  const auto hand_on = [&](const fs::path& folder) {
    return run("kava_inspect --version > /dev/null; PYTHONPATH=" + tiny.folder.path().string() + " PYTHONDONTWRITEBYTECODE=1 python3 " +
               source_dir() + "/tools/export_metrics.py --to tensorboard " + folder.string());
  };
  for (const std::string& line : {std::string("{\"step\": 2, \"x\": \"\xff\"}"), std::string("{\"step\": Infinity}"),
                                  "{\"step\": 2, \"x\": 1" + std::string(400, '0') + "}", std::string("{\"x\": 1}"), std::string("[]")}) {
    overwrite(tiny.dir / "metrics.jsonl", "{\"step\": 1, \"loss\": 2}\n" + line + "\n");
    const Finished f = hand_on(tiny.dir);
    if (f.code == 127) SKIP("there is no python3");
    CAPTURE(line, f.output);
    CHECK(f.code == 4);
    CHECK_THAT(f.output, ContainsSubstring("metrics.jsonl:2: is no object with a step and numbers; remove the line"));
    CHECK(std::ranges::count(f.output, '\n') == 1);
  }
  const Finished other = hand_on(tiny.folder.path() / "base");
  CHECK(other.code == 4);
  CHECK_THAT(other.output, ContainsSubstring("/base: is no run: it holds no config.toml; name the folder that kava_train wrote\n"));
}

namespace {

// export_metrics.py --follow of a run, to a trackio that takes everything.
Finished follow(const TextRun& tiny) {
  overwrite(tiny.folder / "trackio.py", "def init(**_): pass\ndef log(*_, **__): pass\ndef finish(): pass\n");
  return run("kava_inspect --version > /dev/null; PYTHONPATH=" + tiny.folder.path().string() +
             " PYTHONDONTWRITEBYTECODE=1 timeout 60 python3 " + source_dir() + "/tools/export_metrics.py --to trackio --follow " +
             tiny.dir.string());
}

}  // namespace

TEST_CASE("an export that follows ends once no process holds the run") {
  const TextRun tiny;
  fs::remove_all(tiny.dir / "adapter");
  overwrite(tiny.dir / "metrics.jsonl", "{\"step\": 1, \"loss\": 2}\n");
  auto training = std::make_unique<PathLock>(tiny.dir, PathLock::Kind::exclusive, false);
  REQUIRE(training->error() == 0);
  std::thread trainer([&] {
    std::this_thread::sleep_for(std::chrono::seconds(1));
    overwrite(tiny.dir / "metrics.jsonl", "{\"step\": 1, \"loss\": 2}\n{\"step\": 2, \"loss\": 1}\n");
    training.reset();
  });
  const Finished f = follow(tiny);
  trainer.join();
  if (f.code == 127) SKIP("there is no python3");
  INFO(f.output);
  CHECK(f.code == 0);
  CHECK_THAT(f.output, ContainsSubstring(": 2 steps"));
  // It takes no lock itself, not even for a moment: kava_train could begin then.
  CHECK(ends_well_without({{SYS_flock, ENOLCK}}, [&] {
    if (follow(tiny).code != 0) throw std::runtime_error("it took a lock");
  }));
}
