// The files that evaluations write, and what of a run they read wherever it lies.
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include "models/contents.h"
#include "models/evaluate.h"
#include "models/run_folder.h"
#include "models/training_state.h"
#include "tests/programs/text_run.h"

using namespace kava;
namespace fs = std::filesystem;
using Catch::Matchers::ContainsSubstring;

TEST_CASE("no result in a run is replaced unseen") {
  TextRun tiny;
  const std::string data = tiny.write("rows.txt", kQuestions), dir = tiny.dir.string();
  const fs::path eval = tiny.dir / "eval";
  auto files = [&] { return std::distance(fs::directory_iterator(eval), fs::directory_iterator()); };
  REQUIRE(run("kava_eval " + dir + " --data " + data).code == 0);
  // Equal but for times, places and what changes no result: written again.
  fs::create_directory(tiny.folder.path() / "other");
  fs::copy(data, tiny.folder.path() / "other/rows.txt");
  CHECK(run("kava_eval " + dir + "/best --batch 1 --threads 2 --data " + tiny.folder / "other/rows.txt").code == 0);
  CHECK(files() == 1);
  // Other data of the same name, another limit and another checkpoint have files of their own, in one call and in several.
  tiny.write("other/rows.txt", "Another?||#### 4\n");
  const std::string two = "kava_eval " + dir + " --data " + data + " " + (tiny.folder / "other/rows.txt");
  CHECK(run(two).code == 0);
  CHECK(files() == 2);
  CHECK(run(two + " --limit 1").code == 0);
  CHECK(files() == 4);
  write_checkpoint(tiny.dir, 4, config_hash(tiny.config), [&](FolderWriter& out) {
    for (const auto& file : fs::directory_iterator(tiny.dir / "checkpoints/step_3/adapter"))
      out.write_file("adapter/" + file.path().filename().string(), read_file(file.path().string(), 1 << 20));
  });
  CHECK(run("kava_eval " + dir + "/checkpoints/step_4 --data " + data).code == 0);
  CHECK(files() == 5);
  // Another result is refused: by its options before the work, by its content after it.
  const fs::path first = eval / ("rows-" + sha256(kQuestions).substr(0, 8) + ".step_3.json");
  const std::string before = read_file(first.string(), 1 << 24);
  const Finished longer = run("kava_eval " + dir + " --max-new-tokens 3 --data " + data);
  CHECK(longer.code == 2);
  CHECK(longer.output.starts_with("error: "));
  CHECK_THAT(longer.output, ContainsSubstring("holds a result with other options (max_new_tokens); add --force"));
  Json changed = Json::parse(before);
  changed["results"][0]["records"][0]["output"] = "changed";
  overwrite(first, changed.dump());
  const Finished other = run("kava_eval " + dir + " --data " + data);
  CHECK(other.code == 2);
  CHECK_THAT(other.output, ContainsSubstring("holds another result; add --force"));
  for (const char* damaged : {"garbage", "", "[]", "5", "{}"}) {
    overwrite(first, damaged);
    const Finished over = run("kava_eval " + dir + " --data " + data);
    CAPTURE(damaged, over.output);
    CHECK(over.code == 2);
    CHECK_THAT(over.output, ContainsSubstring(first.filename().string() + ": is no result of kava_eval; add --force to replace it\n"));
  }
  CHECK(run("kava_eval " + dir + " --force --data " + data).code == 0);
  // A folder is in the way of --force too, which is told before the work.
  fs::remove(first);
  fs::create_directory(first);
  for (const char* force : {"", " --force"}) {
    const Finished over = run("kava_eval " + dir + " --data " + data + force);
    CAPTURE(force);
    CHECK(over.code == 2);
    CHECK(over.output.starts_with("error: "));  // no table before it
    CHECK_THAT(over.output, ContainsSubstring(first.filename().string() + ": is a folder in the place of a result; remove it\n"));
  }
  fs::remove(first);
  overwrite(first, changed.dump());
  CHECK(read_file(first.string(), 1 << 24) == changed.dump());
  CHECK(run("kava_eval " + dir + " --data " + data + " --out " + first.string()).code == 2);
  CHECK(run("kava_eval " + dir + " --force --data " + data).code == 0);
  CHECK(read_json(first.string()).at("results").at(0).at("records") == Json::parse(before).at("results").at(0).at("records"));
  const Json options = read_json(first.string()).at("options");
  CHECK(options == Json{{"method", "kava"},
                        {"format", nullptr},
                        {"limit", nullptr},
                        {"batch", kDecodeBatch},
                        {"max_new_tokens", nullptr},
                        {"base", nullptr},
                        {"stage", nullptr},
                        {"samples", 1},
                        {"temperature", 0.0},
                        {"top_p", nullptr},
                        {"seed", nullptr},
                        {"chat", "none"},
                        {"controls", false},
                        {"sweep_latents", nullptr},
                        {"sweep_passes", nullptr}});
  // A name as long as a file's name can be leaves room for the rest.
  CHECK(run("kava_eval " + dir + " --data " + tiny.write(std::string(251, 'n') + ".txt", kQuestions)).code == 0);
}

TEST_CASE("what is read is not written over") {
  TextRun tiny;
  const std::string data = tiny.write("rows.txt", kQuestions), dir = tiny.dir.string();
  fs::create_symlink(data, tiny.folder / "soft");
  fs::create_hard_link(data, tiny.folder / "hard");
  fs::create_hard_link(tiny.folder.path() / "base/tokenizer.json", tiny.folder / "tokens");
  fs::create_hard_link(tiny.dir / "checkpoints/step_3/adapter/adapter_model.safetensors", tiny.folder / "weights");
  const std::string inputs[] = {data,
                                tiny.folder / "soft",
                                tiny.folder / "hard",
                                tiny.folder / "tokens",
                                tiny.folder / "weights",
                                dir + "/config.toml",
                                tiny.write("train.txt", kQuestions),
                                dir + "/checkpoints/step_3/manifest.json",
                                tiny.folder / "base/../rows.txt"};
  for (const std::string& input : inputs) {
    CAPTURE(input);
    const std::string before = read_file(input, 1 << 24);
    const Finished f = run("kava_eval " + dir + " --data " + data + " --out " + input);
    CHECK(f.code == 2);
    CHECK_THAT(f.output, ContainsSubstring("which is read"));
    CHECK(read_file(input, 1 << 24) == before);
  }
  // One more file in a checkpoint, and it is none any more.
  fs::create_directory(tiny.dir / "checkpoints/step_3/adapter/more");
  overwrite(tiny.dir / "checkpoints/step_3/state.json", "{}");
  for (const char* inside : {"best", "best/", "checkpoints/step_3", "checkpoints/step_9/new.json", "best/new.json",
                             "checkpoints/step_3/adapter/new.json", "checkpoints/../best/./more/new.json"}) {
    CAPTURE(inside);
    CHECK_THROWS_AS(require_outside_checkpoints("--out", dir + "/" + inside), Error);
    CHECK_THROWS_AS(require_writable("--out", dir + "/" + inside), Error);
    CHECK_THROWS_AS(require_usable(dir + "/" + inside), Error);
  }
  require_outside_checkpoints("--out", dir + "/checkpoints/new.json");
  require_outside_checkpoints("--out", "new.json");
  fs::remove(tiny.dir / "checkpoints/step_3/adapter/more");
  fs::remove(tiny.dir / "checkpoints/step_3/state.json");
  CHECK(run("kava_eval " + dir + " --data " + data + " --out " + (tiny.folder / "new.json")).code == 0);
  CHECK(run("kava_eval " + dir + " --data " + data + " --out " + (tiny.folder / "new.json")).code == 0);
  fs::copy(source_dir() + "/tests/golden", tiny.folder.path() / "golden", fs::copy_options::recursive);
  const std::string golden = tiny.folder / "golden";
  for (const char* input : {"cases/kava_defaults.toml", "data/rows.jsonl", "models/llama/model.safetensors"}) {
    CAPTURE(input);
    CHECK(run("kava_inspect step " + golden + "/cases/kava_defaults.toml --out " + golden + "/" + input).code == 2);
  }
  const std::string over = tiny.write("over.toml", "include = \"golden/cases/kava_defaults.toml\"\n"),
                    below = golden + "/cases/kava_defaults.toml";
  CHECK(run("kava_inspect step " + over + " --out " + below).code == 2);
  fs::create_directory(tiny.folder.path() / "fresh");
  fs::create_hard_link(below, tiny.folder.path() / "fresh/config.toml");
  CHECK(run("kava_train " + over + " --out " + (tiny.folder / "fresh")).code == 2);
}

TEST_CASE("a result that is refused leaves --out as it was, and no partial answers") {
  TextRun tiny;
  const std::string data = tiny.write("rows.txt", kQuestions), other = tiny.write("other.txt", "Another?||#### 4\n");
  const std::string command = "kava_eval " + tiny.dir.string() + " --data " + other + " " + data, out = tiny.write("out.json", "old");
  const fs::path eval = tiny.dir / "eval";
  REQUIRE(run(command).code == 0);
  const fs::path second = eval / ("rows-" + sha256(kQuestions).substr(0, 8) + ".step_3.json"),
                 first = eval / ("other-" + sha256("Another?||#### 4\n").substr(0, 8) + ".step_3.json");
  Json changed = read_json(second.string());
  changed["results"][0]["records"][0]["output"] = "changed";
  overwrite(second, changed.dump());
  fs::remove(first);
  const Finished refused = run(command + " --out " + out);
  CHECK(refused.code == 2);
  CHECK_THAT(refused.output, ContainsSubstring("holds another result; add --force"));
  CHECK(read_file(out, 100) == "old");
  CHECK_FALSE(fs::exists(first));
  CHECK(std::distance(fs::directory_iterator(eval), fs::directory_iterator()) == 1);
  // One file cannot hold the results of both and that of one.
  const Finished both = run(command + " --force --out " + second.string());
  CHECK(both.code == 2);
  CHECK_THAT(both.output, ContainsSubstring("is where the run keeps the result of one of the data files"));
  CHECK(read_json(second.string()) == changed);
  CHECK(run(command + " --force --out " + out).code == 0);
  CHECK(read_json(out).at("results").size() == 2);
}

TEST_CASE("no program writes a folder into a checkpoint, or where a run keeps them") {
  TextRun tiny;
  const std::string data = tiny.write("rows.txt", kQuestions), dir = tiny.dir.string(), lone = tiny.folder / "lone";
  fs::copy(tiny.dir / "checkpoints/step_3", lone, fs::copy_options::recursive);
  overwrite(lone + "/state.json", "{}");
  const auto all = [&] {
    std::set<fs::path> paths;
    for (const auto& entry : fs::recursive_directory_iterator(tiny.folder.path())) paths.insert(entry.path());
    return paths;
  };
  const std::set<fs::path> before = all();
  const auto refused = [&](const std::string& command, const std::string& why, const fs::path& folder = ".") {
    const Ended e = run_command(command, folder);
    CAPTURE(command, e.err);
    CHECK(e.code == 2);
    CHECK_THAT(e.err, ContainsSubstring(why));
    CHECK(std::count(e.err.begin(), e.err.end(), '\n') == 1);
    CHECK(all() == before);
  };
  for (const std::string& out : {lone, lone + "/", lone + "/adapter/new/er"}) {
    refused("kava_eval " + dir + " --data " + data + " --log-samples " + out, "lies in the checkpoint ");
    refused("kava_data synth --rows 5 --out " + out, "lies in the checkpoint ");
    refused("kava_merge " + dir + " --out " + out, "lies in the checkpoint ");
  }
  for (const std::string out : {"/best", "/checkpoints/step_3/new", "/checkpoints/step_9"}) {
    refused("kava_eval " + dir + " --data " + data + " --log-samples " + dir + out, "lies among the checkpoints of the run ");
    refused("kava_data synth --rows 5 --out " + dir + out, "lies among the checkpoints of the run ");
    refused("kava_merge " + dir + " --out " + dir + out, "lies among the checkpoints of the run ");
    refused("kava_train '" + source_dir() + "/tests/golden/cases/kava_defaults.toml' --out " + dir + out,
            "lies among the checkpoints of the run ");
  }
  // By a relative path, and by the folder that the model's name makes.
  refused("kava_data synth --rows 5 --out new", "lies in the checkpoint ", lone);
  refused("kava_eval best --data " + data + " --log-samples .", "lies among the checkpoints of the run ", dir);
}

TEST_CASE("where --log-samples could not write is told before the work") {
  TextRun tiny;
  const std::string data = tiny.write("rows.txt", kQuestions);
  fs::create_directory(tiny.folder.path() / "logs");
  tiny.write("logs/run", "a file where the model's folder would be");
  for (const auto& [out, code, why] : {std::tuple("rows.txt/below", 2, "rows.txt is no folder"),
                                       {"logs", 2, "logs/run is no folder"},
                                       {"logs/run", 2, "logs/run is no folder"},
                                       {"/dev/null", 2, "/dev/null is no folder"}}) {
    const Ended e = run_command("kava_eval run --data " + data + " --log-samples " + out, tiny.folder.path());
    CAPTURE(out, e.err);
    CHECK(e.code == code);
    CHECK(e.out.empty());
    CHECK_THAT(e.err, ContainsSubstring(why));
    CHECK(std::count(e.err.begin(), e.err.end(), '\n') == 1);
    CHECK_FALSE(fs::exists(tiny.dir / "eval"));
  }
  const Ended long_name = run_command("kava_eval run --data " + data + " --log-samples " + std::string(300, 'n'), tiny.folder.path());
  CHECK(long_name.code == 3);
  CHECK_FALSE(fs::exists(tiny.dir / "eval"));
  CHECK(run_command("kava_eval run --data " + data + " --log-samples new/logs", tiny.folder.path()).code == 0);
}

TEST_CASE("kava_eval compare names the result that is at fault, and what to do") {
  TextRun tiny;
  const auto result = [&](const std::string& name, bool right) {
    Json records = Json::array();
    for (int i = 0; i < 5; ++i)
      records.push_back({{"question", fmt::format("q{}", i)}, {"gold", "1"}, {"correct", {{"strict", right}, {"raw", right}}}});
    const Json one = {{"data", "rows.txt"}, {"records", records}};
    Json json = {{"model", "m"}, {"results", Json::array({one})}};
    tiny.write(name, json.dump());
    return json;
  };
  const Json sound = result("a.json", false);
  result("b.json", true);
  const auto compare = [&](const std::string& a, const std::string& b) {
    return run_command("kava_eval compare " + a + " " + b, tiny.folder.path());
  };
  const Ended whole = compare("a.json", "b.json");
  INFO(whole.out + whole.err);
  REQUIRE(whole.code == 0);
  CHECK_THAT(whole.out, ContainsSubstring("\nstrict        0.00  100.00  +100.00  +100.00 to +100.00       0       0       5        0"));
  using Pointer = Json::json_pointer;
  const std::tuple<const char*, Json, const char*> faults[] = {
      {"/results/0/records", Json::array(), "results[0].records: holds no question; "},
      {"/results/0/records", 5, "results[0].records: must be an array, is 5; "},
      {"/results", Json::array(), "results: holds no result; "},
      {"/results/0", 5, "results[0]: must be an object, is 5; "},
      {"/results", Json::object(), "results: must be an array, is {}; "},
      {"/model", nullptr, "model: must be a string, is null; "},
      {"/results/0/data", 1, "results[0].data: must be a string, is 1; "},
      {"/results/0/records/3", "x", "results[0].records[3]: must be an object, is "},
      {"/results/0/records/3/gold", 1, "results[0].records[3].gold: must be a string, is 1; "},
      {"/results/0/records/3/correct", Json::object(), "results[0].records[3].correct.raw: the key is missing; "},
      {"/results/0/records/3/correct/strict", 1, "results[0].records[3].correct.strict: must be true or false, is 1; "}};
  for (const auto& [place, value, what] : faults) {
    Json broken = sound;
    broken[Pointer(place)] = value;
    tiny.write("e.json", broken.dump());
    for (const Ended& e : {compare("a.json", "e.json"), compare("e.json", "a.json")}) {
      CAPTURE(place, e.err);
      CHECK(e.code == 4);
      CHECK(e.err.starts_with(std::string("error: e.json: ") + what));
      CHECK(e.err.find("origin") == std::string::npos);
      CHECK(std::count(e.err.begin(), e.err.end(), '\n') == 1);
    }
  }
}

TEST_CASE("a run is evaluated wherever it and its base lie, on the base that it was trained on") {
  TextRun tiny;
  const fs::path root = tiny.folder.path();
  const std::string data = tiny.write("rows.txt", kQuestions);
  const auto ops = make_cpu_ops(1);
  Model model(*ops, tiny.config, ModelConfig::load(tiny.config.model.path));
  TrainingState state;
  const std::string& base = tiny.config.model.path;
  state.step = state.total_steps = 5, state.model = model_digests(base, ModelConfig::load(base), Init::random);
  write_checkpoint(tiny.dir, 5, config_hash(tiny.config), [&](FolderWriter& out) {
    save_adapter(model, out, "adapter/");
    save_training_state(out, model, state);
  });
  set_link(tiny.dir, "best", 5);
  overwrite(tiny.dir / "config.toml", to_toml(tiny.config, tiny.dir.string()));
  fs::create_directory(root / "moved é");
  fs::rename(tiny.dir, root / "moved é/run");
  fs::rename(root / "base", root / "moved é/base");
  CHECK(run("kava_eval '" + (root / "moved é/run").string() + "' --data " + data).code == 0);
  fs::rename(root / "moved é/base", root / "base");
  fs::rename(root / "moved é/run", root / "run");
  fs::rename(root / "base", root / "other");
  const std::string moved = "kava_eval " + (root / "run").string() + " --data " + data;
  const Finished lost = run(moved);
  CHECK(lost.code == 4);
  CHECK_THAT(lost.output, ContainsSubstring("name it where it lies now with --base DIR"));
  CHECK(run(moved + " --base " + (root / "other").string()).code == 0);
  CHECK(run("kava_generate " + (root / "run").string() + " A --base " + (root / "other").string()).code == 0);
  CHECK(run("kava_eval " + (root / "other").string() + " --base x --data " + data).code == 2);
  overwrite(root / "other/tokenizer_config.json", R"({"eos_token": "<end>" })");
  const Finished changed = run(moved + " --base " + (root / "other").string());
  CHECK(changed.code == 4);
  CHECK_THAT(changed.output, ContainsSubstring("other/tokenizer_config.json: has changed since the run began"));
  const std::string given = " " + (root / "run").string(), elsewhere = " --base " + (root / "other").string();
  for (const std::string& command :
       {"kava_merge" + given + elsewhere + " --out " + (root / "merged").string(), "kava_generate" + given + " A" + elsewhere}) {
    INFO(command);
    const Finished refused = run(command);
    CHECK(refused.code == 4);
    CHECK_THAT(refused.output, ContainsSubstring("other/tokenizer_config.json: has changed since the run began"));
  }
  // A base of another size is told as another one, not by the tensors that do not fit to it.
  Json shape = Json::parse(read_file((root / "other/config.json").string(), 1 << 20));
  shape["num_hidden_layers"] = shape["num_hidden_layers"].get<int>() + 1;
  overwrite(root / "other/config.json", shape.dump());
  const Finished larger = run(moved + " --base " + (root / "other").string());
  CHECK(larger.code == 4);
  CHECK_THAT(larger.output, ContainsSubstring("other/config.json: has changed since the run began"));
}
