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
  for (const char* damaged : {"garbage", "", "[]", "5"}) {
    const std::string there = tiny.write("damaged.json", damaged);
    const Finished over = run("kava_eval " + tiny.dir.string() + " --data " + data + " --out " + there);
    CAPTURE(damaged, over.output);
    CHECK(over.code == 2);
    CHECK_THAT(over.output, ContainsSubstring("add --force"));
  }
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
  for (const char* inside : {"best/new.json", "checkpoints/step_3/adapter/new.json", "checkpoints/../best/./more/new.json"}) {
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
