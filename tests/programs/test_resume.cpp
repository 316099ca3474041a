// How kava_train goes on: runs that died early, moved runs, changed configurations and contents.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>

#include "engine/config/config.h"
#include "engine/files/checkpoint.h"
#include "engine/files/json.h"
#include "models/training_state.h"
#include "tests/model/train_rig.h"
#include "tests/programs/programs.h"

using namespace kava;
namespace fs = std::filesystem;

namespace {

// A project with its configuration, data and model, in which runs are made.
struct Project {
  Project() : root(folder.path() / "a project é") {
    fs::create_directories(root / "data");
    fs::copy(kGolden + "models/llama", root / "model");
    fs::copy(kGolden + "data/rows.jsonl", root / "data/train.jsonl");
    fs::copy(kGolden + "data/rows.jsonl", root / "data/valid.jsonl");
    overwrite(root / "c.toml",
              "[model]\npath = 'model'\ndtype = 'f32'\n[data]\ntrain = ['data/train.jsonl']\nvalid = 'data/valid.jsonl'\n[train]\n"
              "batch = 2\nlr = 0.01\nmax_steps = 6\ncheckpoint_every = 2\n[lora]\nrank = 2\nalpha = 3.0\n[latent]\ncount = 5\n");
  }
  Ended train(const std::string& arguments) const { return run_command("kava_train " + arguments + " --threads 1", root); }
  std::string bytes(const std::string& file) const { return read_file((root / file).string(), 1 << 26); }
  // What a run of six steps leaves when it is stopped after four.
  void cut_back(const std::string& run) const {
    for (const char* name : {"checkpoints/step_6", "adapter", "last", "best"}) fs::remove_all(root / run / name);
    fs::remove_all(root / run / "checkpoints/step_2");
  }

  TempFolder folder;
  fs::path root;
};

void check(const Ended& run, int code, const std::string& about) {
  INFO(run.out << run.err);
  CHECK(run.code == code);
  const bool refused = code != 0 && code != 75;
  CHECK((refused ? run.err : run.out).find(about) != std::string::npos);
  if (refused) CHECK(std::count(run.err.begin(), run.err.end(), '\n') == 1);
}

}  // namespace

TEST_CASE("a run that died before its first checkpoint begins again, with and without --resume") {
  Project p;
  const Ended whole = p.train("c.toml --out whole");
  REQUIRE(whole.code == 0);
  CHECK(whole.out.find("never had a checkpoint") == std::string::npos);  // as of a folder that is new
  const fs::path dead = p.root / "dead";
  for (const char* how : {"c.toml --out dead", "c.toml --out dead --resume", "dead --resume"}) {
    CAPTURE(how);
    fs::create_directories(dead / "checkpoints/.step_2.part/adapter");
    overwrite(dead / "config.toml", to_toml(load_config((p.root / "c.toml").string()), dead.string()));
    overwrite(dead / "metrics.jsonl", "{\"step\":1}\n\n{\"st");
    overwrite(dead / "metrics.jsonl.part", "");
    check(p.train(how), 0, "dead never had a checkpoint: beginning at step 0");
    CHECK(p.bytes("dead/adapter/adapter_model.safetensors") == p.bytes("whole/adapter/adapter_model.safetensors"));
    CHECK(p.bytes("dead/config.toml") == p.bytes("whole/config.toml"));
    fs::remove_all(dead);
  }
  fs::create_directory(dead);
  check(p.train("c.toml --out dead --resume --set train.max_steps=1"), 0, "never had a checkpoint");
  for (const bool parts : {false, true}) {
    fs::remove_all(dead);
    fs::create_directory(dead);
    if (parts) overwrite(dead / ".config.toml.abcdef.part", "");
    const Ended begun = p.train("c.toml --out dead --set train.max_steps=1");
    const std::string line = "dead never had a checkpoint: beginning at step 0\n";
    check(begun, 0, line);
    CHECK(begun.out.find(line) == begun.out.rfind(line));
  }
  // Other files make the folder someone else's; a trace of a checkpoint makes it a run whose checkpoint is lost.
  fs::remove_all(dead);
  fs::create_directory(dead);
  overwrite(dead / "notes", "");
  check(p.train("c.toml --out dead --resume"), 4, "holds no valid checkpoint");
  overwrite(dead / "config.toml", "");
  check(p.train("c.toml --out dead"), 2, "files that are not its own");
  for (const char* trace : {"last", "best", "adapter", "checkpoints/step_3"}) {
    CAPTURE(trace);
    fs::remove_all(dead);
    fs::create_directories(dead / "checkpoints");
    if (std::string(trace).ends_with("st")) fs::create_symlink("checkpoints/step_9", dead / trace);
    else fs::create_directory(dead / trace);
    check(p.train("c.toml --out dead"), 4, "holds no valid checkpoint");
    check(p.train("c.toml --out dead --resume"), 4, "holds no valid checkpoint");
  }
  check(p.train("c.toml --out nowhere --resume"), 4, "no such folder");
  check(p.train("nowhere --resume"), 4, "no such folder");
}

TEST_CASE("a run goes on wherever it lies, to the same bytes") {
  Project p;
  REQUIRE(p.train("c.toml --out run").code == 0);
  const std::string weights = p.bytes("run/last/optimizer.safetensors"), state = p.bytes("run/config.toml");
  CHECK(state.find(p.folder.path().string()) == std::string::npos);
  p.cut_back("run");
  const fs::path before = p.root;
  p.root = p.folder.path() / "renamed";
  fs::rename(before, p.root);
  fs::create_directory_symlink(p.root / "run", p.folder.path() / "link");
  fs::create_directory(p.root / "elsewhere");
  for (const char* how : {"c.toml --out run --resume", "run --resume", "../link --resume", "./run/ --resume --out ../link"}) {
    CAPTURE(how);
    check(p.train(how), 0, "from step 4 of 6");
    CHECK(p.bytes("run/last/optimizer.safetensors") == weights);
    CHECK(p.bytes("run/config.toml") == state);
    p.cut_back("run");
  }
  check(run_command("kava_train ../run --resume --threads 1", p.root / "elsewhere"), 0, "from step 4 of 6");
  p.cut_back("run");
  check(p.train("run --resume --out other"), 2, "is not the run");

  // What has another name is named, and must hold the same.
  fs::rename(p.root / "data/valid.jsonl", p.root / "elsewhere/v.jsonl");
  fs::rename(p.root / "model", p.root / "elsewhere/m");
  check(p.train("run --resume"), 4, "--set model.path=");
  check(p.train("run --resume --set model.path=elsewhere/m"), 4, "--set data.valid=");
  const std::string named = "run --resume --set model.path=elsewhere/m --set data.valid=elsewhere/v.jsonl";
  check(p.train(named), 0, "from step 4 of 6");
  CHECK(p.bytes("run/last/optimizer.safetensors") == weights);
  CHECK(p.bytes("run/config.toml").find("\"../elsewhere/m\"") != std::string::npos);
  check(p.train("run --resume"), 0, "is finished");
  p.cut_back("run");

  const std::string rows = p.bytes("data/train.jsonl");
  overwrite(p.root / "data/train.jsonl", rows + "\n");
  check(p.train("run --resume"), 4, "data/train.jsonl: has changed since the run began");
  overwrite(p.root / "data/train.jsonl", rows);
  check(p.train("run --resume --set data.valid="), 4, "data.valid");
  check(p.train("run --resume --set 'data.train=[\"data/train.jsonl\", \"data/train.jsonl\"]'"), 4, "data.train: names 2 files");
  std::string model = p.bytes("elsewhere/m/model.safetensors");
  model[model.size() - 2] ^= 1;  // a weight, not the header
  overwrite(p.root / "elsewhere/m/model.safetensors", model);
  check(p.train("run --resume"), 4, "elsewhere/m/model.safetensors: has changed since the run began");
}

TEST_CASE("the length of a run and the parts of its batches change only with --extend, which tells what changes") {
  Project p;
  REQUIRE(p.train("c.toml --out run").code == 0);
  check(p.train("run --resume --set train.max_steps=8"), 2, "train.max_steps: 6 -> 8; add --extend");
  check(p.train("run --resume --set train.epochs=3"), 2, "train.epochs: 10 -> 3; add --extend");
  check(p.train("run --resume --set train.micro_batch=1"), 2, "train.micro_batch: 2 -> 1; add --extend");
  check(p.train("run --extend --set train.lr=1.0"), 2, "train.lr: 0.01 -> 1.0");
  check(p.train("run --extend --set train.max_steps=5"), 2, "has done 6 steps");
  // Nothing is extended by what changes nothing, and 2 samples are what a forward has had.
  check(p.train("run --extend"), 0, "is finished");
  check(p.train("run --resume --set train.micro_batch=2"), 0, "is finished");
  check(p.train("c.toml --out run --resume"), 0, "is finished");
  check(p.train("run --resume --extend --set train.max_steps=8 --set train.micro_batch=1"), 0, "extended: 6 -> 8 steps; from step 6 on");
  CHECK(load_training_state(p.root / "run/last").step == 8);
  CHECK(load_training_state(p.root / "run/last").micro_batch == 1);
  check(p.train("run --resume"), 0, "is finished: 8 steps of 8");
  // At a constant rate a longer run is no other run; a shorter one is.
  const std::string constant = "c.toml --out flat --set train.schedule=constant ";
  REQUIRE(p.train(constant).code == 0);
  check(p.train(constant + "--resume --set train.max_steps=8"), 0, "6 -> 8 steps");
  check(p.train(constant + "--resume"), 2, "train.max_steps: 8 -> 6");
  // Where the longer run's warm-up is not over, the rate is not that of the shorter one.
  const std::string warm = "c.toml --out warm --set train.schedule=constant --set train.warmup=0.5 ";
  REQUIRE(p.train(warm).code == 0);
  check(p.train(warm + "--resume --set train.max_steps=13"), 2, "train.max_steps: 6 -> 13; add --extend");
  check(p.train(warm + "--resume --set train.max_steps=12"), 0, "6 -> 12 steps");
}

TEST_CASE("an extended run says so in its checkpoint before it goes on") {
  Project p;
  REQUIRE(p.train("c.toml --out run").code == 0);
  // Stops after its first step, so nothing but the extension itself can have written step 6 again.
  check(p.train("run --extend --set train.max_steps=20 --set train.max_hours=1e-9"), 75, "after train.max_hours");
  CHECK(load_training_state(p.root / "run/checkpoints/step_6").max_steps == 20);
  CHECK(load_training_state(p.root / "run/last").step == 7);
}

TEST_CASE("train.max_hours stops with a checkpoint after at least one step") {
  Project p;
  for (int step = 1; step < 6; ++step) {
    const std::string how = step == 1 ? "c.toml --out run" : "run --resume";
    check(p.train(how + " --set train.max_hours=1e-9 --set train.valid_every=1"), 75, "");
    CHECK(load_training_state(p.root / "run/last").step == step);
  }
  REQUIRE(p.train("c.toml --out whole --set train.valid_every=1").code == 0);
  check(p.train("run --resume --set train.max_hours=0"), 0, "0 % in every one");
  CHECK(p.bytes("run/last/optimizer.safetensors") == p.bytes("whole/last/optimizer.safetensors"));
}

TEST_CASE("a run of the version before goes on, and without its configuration is refused") {
  Project p;
  REQUIRE(p.train("c.toml --out run").code == 0);
  p.cut_back("run");
  const fs::path state_file = p.root / "run/checkpoints/step_4/state.json";
  Json state = read_json(state_file.string());
  state["format_version"] = 1;
  for (const char* key : {"max_steps", "epochs", "micro_batch", "device", "model", "adapter"}) state.erase(key);
  for (Json& data : state["data"]) data = {{"path", "/old"}, {"sha256", data["sha256"]}};
  fs::rename(p.root / "run/checkpoints/step_4", p.root / "whole");
  write_checkpoint(p.root / "run", 4, "its hash covered other keys", [&](FolderWriter& out) {
    for (const auto& file : fs::recursive_directory_iterator(p.root / "whole"))
      if (const std::string name = file.path().lexically_relative(p.root / "whole"); file.is_regular_file() && !name.ends_with(".json"))
        out.write_file(name, p.bytes("whole/" + name));
    out.write_file("adapter/adapter_config.json", p.bytes("whole/adapter/adapter_config.json"));
    out.write_file("state.json", state.dump());
  });
  check(p.train("run --resume --set train.lr=1.0"), 2, "train.lr");
  check(p.train("run --resume --set train.max_steps=8"), 2, "train.max_steps: 6 -> 8");
  fs::copy(p.root / "run", p.root / "bare", fs::copy_options::recursive | fs::copy_options::copy_symlinks);
  fs::remove(p.root / "bare/config.toml");
  check(p.train("c.toml --out bare --resume"), 4, "was trained by an older version");
  check(p.train("c.toml --out run --resume"), 0, "from step 4 of 6");
  CHECK_FALSE(load_training_state(p.root / "run/last").older);
}

TEST_CASE("a checkpoint whose counts contradict each other is none to go on from") {
  Project p;
  REQUIRE(p.train("c.toml --out run").code == 0);
  p.cut_back("run");
  fs::rename(p.root / "run/checkpoints/step_4", p.root / "whole");
  const Json state = read_json((p.root / "whole/state.json").string());
  const auto resumed = [&](const char* key, const Json& value) {
    Json other = state;
    other[key] = value;
    write_checkpoint(p.root / "run", 4, read_manifest(p.root / "whole").config_hash, [&](FolderWriter& out) {
      for (const ManifestFile& file : read_manifest(p.root / "whole").files)
        out.write_file(file.name, file.name == "state.json" ? other.dump() : p.bytes("whole/" + file.name));
    });
    fs::remove_all(p.root / "copy");
    fs::copy(p.root / "run", p.root / "copy", fs::copy_options::recursive | fs::copy_options::copy_symlinks);
    return p.train("c.toml --out copy --resume");
  };
  const std::pair<const char*, Json> wrong[] = {{"moment_updates", std::int64_t{1} << 31},
                                                {"moment_updates", 5},
                                                {"updates", 5},
                                                {"skipped_in_row", 1},
                                                {"cursor", std::int64_t{1} << 32},
                                                {"cursor", 0},
                                                {"epoch", 7},
                                                {"samples", 1000},
                                                {"step", 3},
                                                {"step", 5},
                                                {"step", 0},
                                                {"total_steps", 0},
                                                {"validated_step", 5}};
  for (const auto& [key, value] : wrong) {
    INFO(key << " = " << value.dump());
    check(resumed(key, value), 4, "use another checkpoint");
  }
  check(resumed("step", 4), 0, "from step 4 of 6");
}

TEST_CASE("a leading ~ is the home folder wherever the shell leaves it") {
  Project p;
  const std::string home = "env HOME='" + p.root.string() + "' '" + bin_dir() + "'/kava_train ";
  auto train = [&](const std::string& arguments) { return run_command("kava_train --version; " + home + arguments); };
  check(train("'~/c.toml' --out='~/run' --set train.max_steps=1"), 0, "finished at step 1");
  check(train("--resume '~/run' --set data.valid='~/data/valid.jsonl'"), 0, "is finished");
}

TEST_CASE("no run is made over what it reads") {
  Project p;
  fs::create_directory(p.root / "x");
  fs::copy(p.root / "c.toml", p.root / "x/config.toml");
  const std::string there = " --set model.path=model --set 'data.train=[\"data/train.jsonl\"]' --set data.valid=";
  for (const char* how : {"x/config.toml --out x", "x/config.toml --out x --resume", "x --resume"})
    check(p.train(how + there), 2, "config.toml, which is read");
  check(p.train("c.toml --out model"), 2, "which is read");
  fs::create_hard_link(p.root / "data/train.jsonl", p.root / "model/metrics.jsonl");
  fs::rename(p.root / "model/metrics.jsonl", p.root / "x/metrics.jsonl");
  fs::remove(p.root / "x/config.toml");
  check(p.train("c.toml --out x"), 2, "which is read");
  fs::rename(p.root / "model", p.root / "x/adapter");
  check(p.train("c.toml --out x --set model.path=x/adapter"), 2, "which is read");
}

TEST_CASE("no configuration and no plan takes the place of what it is read with") {
  Project p;
  check(p.train("c.toml --out c.toml"), 2, "would write over c.toml, which is read");
  REQUIRE(p.train("c.toml --out run --set train.max_steps=1").code == 0);
  fs::copy_file(p.root / "c.toml", p.root / "base.toml");
  overwrite(p.root / "over.toml", "include = 'base.toml'\n");
  for (const char* file : {"c.toml", "model/config.json", "model/model.safetensors", "data/train.jsonl", "data/valid.jsonl"}) {
    const std::string before = p.bytes(file);
    check(p.train("c.toml --plan --json " + std::string(file)), 2, "--json " + std::string(file) + ": is ");
    CHECK(p.bytes(file) == before);
  }
  check(p.train("over.toml --plan --json base.toml"), 2, "--json base.toml: is ");
  check(p.train("run --plan --json run/config.toml"), 2, "--json run/config.toml: is ");
  check(p.train("run --plan --json run/metrics.jsonl"), 2, "--json run/metrics.jsonl: is ");
  for (int time = 0; time < 2; ++time) {
    check(p.train("c.toml --plan --json plan.json"), 0, "steps");
    check(p.train("run --plan --json run/plan.json"), 0, "steps");
  }
}

TEST_CASE("a run goes on with nothing that is named anew and is not what it was") {
  Project p;
  REQUIRE(p.train("c.toml --out run --profile").code == 0);
  overwrite(p.root / "data/other.jsonl", p.bytes("data/train.jsonl") + p.bytes("data/train.jsonl"));
  const std::string trace = p.bytes("run/log/profile.trace.json"), told = p.bytes("run/config.toml");
  // Finished runs too.
  check(p.train("run --resume --set 'data.train=[\"data/other.jsonl\"]'"), 4, "data/other.jsonl");
  check(p.train("run --resume --set data.valid=data/other.jsonl"), 4, "data.valid");
  // What is not there is no other content: a run that was moved is named as before by those who started it.
  for (const char* absent : {"'data.train=[\"absent\"]'", "model.adapter=absent", "model.path=absent", "data.valid=absent"})
    check(p.train(std::string("run --resume --set ") + absent), 0, "is finished");
  fs::copy_file(p.root / "data/train.jsonl", p.root / "data/same.jsonl");
  CHECK(p.bytes("run/config.toml") == told);
  check(p.train("run --resume --set 'data.train=[\"data/same.jsonl\"]'"), 0, "is finished");
  CHECK(p.bytes("run/config.toml").find("same.jsonl") != std::string::npos);
  // Nothing was computed, so the profile stays.
  check(p.train("run --resume --profile"), 0, "is finished");
  CHECK(p.bytes("run/log/profile.trace.json") == trace);

  REQUIRE(p.train("c.toml --out more --set model.adapter=run/adapter --set train.max_steps=2").code == 0);
  const std::string longer = "more --extend --set train.max_steps=4 --set model.adapter=";
  check(p.train(longer + "absent"), 4, "absent: is not there");
  check(p.train(longer), 4, "model.adapter: is empty, and was ");
  fs::rename(p.root / "run", p.root / "gone");
  check(p.train("more --extend --set train.max_steps=4"), 0, "2 -> 4 steps");
}

TEST_CASE("a run of GPT-2 whose base is gone is finished, whatever names it") {
  Project p;
  fs::copy(kGolden + "models/gpt2", p.root / "gpt2");
  const std::string run = "c.toml --out run --set model.path=gpt2 --set model.dropout=off";
  REQUIRE(p.train(run + " --set train.max_steps=1").code == 0);
  const std::string told = p.bytes("run/config.toml");
  fs::rename(p.root / "gpt2", p.root / "elsewhere");
  check(p.train(run + " --set train.max_steps=1 --resume"), 0, "is finished");
  CHECK(p.bytes("run/config.toml") == told);
  check(p.train(run + " --set train.max_steps=2 --extend"), 4, "gpt2: is not there");
}

TEST_CASE("an adapter of the other kind is named as that") {
  Project p;
  REQUIRE(p.train("c.toml --out lora --set train.max_steps=1").code == 0);
  REQUIRE(p.train("c.toml --out all --set train.max_steps=1 --set train.trainable=all").code == 0);
  for (const char* how : {" --plan", " --out next"}) {
    check(p.train("c.toml --set model.adapter=all/adapter" + std::string(how)), 4, "all/adapter: is a whole model and no LoRA adapter");
    check(p.train("c.toml --set train.trainable=all --set model.adapter=lora/adapter" + std::string(how)), 4,
          "lora/adapter: is a LoRA adapter and no whole model");
  }
  CHECK(!fs::exists(p.root / "next"));
  const Ended plain = run_command("kava_eval all/adapter --data data/train.jsonl --max-new-tokens 2", p.root);
  CHECK(plain.code == 0);
  CHECK(plain.err.find("kava.safetensors in the folder is of a run's latents and not read") != std::string::npos);
}

TEST_CASE("progress.json is of the step at which a run stopped") {
  Project p;
  check(p.train("c.toml --out run --set train.max_hours=1e-9"), 75, "");
  check(p.train("run --resume --set train.max_hours=1e-7"), 75, "");
  const int64_t step = load_training_state(p.root / "run/last").step;
  CHECK(read_json((p.root / "run/progress.json").string()).at("step") == step);
}
