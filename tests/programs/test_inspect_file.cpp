#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>

#include "engine/files/checkpoint.h"
#include "engine/files/safetensors.h"
#include "models/starts.h"
#include "tests/programs/text_run.h"

using namespace kava;
namespace fs = std::filesystem;

namespace {

Ended inspect(const std::string& arguments) { return run_command("kava_inspect " + arguments); }

void make_adapter(const fs::path& folder, std::int64_t rank = 2, const std::string& targets = "[\"q_proj\"]") {
  fs::create_directories(folder);
  const std::vector<float> zeros(64);
  overwrite(folder / "adapter_config.json",
            fmt::format("{{\"peft_type\":\"LORA\",\"r\":{},\"lora_alpha\":4,\"target_modules\":{}}}", rank, targets));
  const std::string name = "base_model.model.model.layers.0.self_attn.q_proj.lora_";
  write_safetensors((folder / "adapter_model.safetensors").string(),
                    {{name + "A.weight", "F32", {2, 8}, zeros.data()}, {name + "B.weight", "F32", {4, 2}, zeros.data()}});
  write_safetensors((folder / "kava.safetensors").string(), {{"new_tokens.weight", "F32", {3, 8}, zeros.data()}});
}

}  // namespace

TEST_CASE("kava_inspect file says whose program wrote an adapter") {
  const Ended run = inspect("file '" + source_dir() + "/tests/errors/adapters/codi'");
  CHECK(run.err.empty());
  CHECK(run.out.find("codi.base_model.model.model.embed_tokens.weight  BF16  [64, 16]\n") != std::string::npos);
  CHECK(run.out.ends_with("adapters/codi: LoRA and new tokens as the program of CODI writes them\nok\n"));
}

TEST_CASE("kava_inspect file says JSON only of what begins as an object, and text of other text") {
  const TempFolder folder;
  const std::pair<const char*, const char*> kinds[] = {
      {"[model]\npath = \"x\"\n", "text"}, {"method = \"kava\"\n", "text"}, {"[1, 2, 3]\n", "text"}, {" {\"a\": 1}\n", "JSON"}};
  for (const auto& [bytes, kind] : kinds) {
    overwrite(folder / "c.toml", bytes);
    const Ended run = inspect("file '" + folder / "c.toml" + "'");
    CAPTURE(bytes, run.err);
    CHECK(run.code == 4);
    CHECK(run.err.starts_with("error: " + folder / "c.toml" + ": is a " + kind + " file and no safetensors file; name "));
    CHECK(std::ranges::count(run.err, '\n') == 1);
  }
}

TEST_CASE("kava_inspect file lists tensors and counts what is not finite") {
  TempFolder folder;
  const float values[] = {1, NAN, -INFINITY, INFINITY, 2};
  const std::uint16_t half[] = {0x7c00, 0x7c01, 0x7bff};
  write_safetensors(folder / "a.safetensors", {{"x", "F32", {5}, values}, {"y", "F16", {1, 3}, half}});
  const Ended run = inspect("file '" + folder / "a.safetensors" + "'");
  CHECK(run.code == 0);
  CHECK(run.err.empty());
  CHECK(run.out.find("x  F32  [5]  nan 1 inf 2\n") != std::string::npos);
  CHECK(run.out.find("y  F16  [1, 3]  nan 1 inf 1\n") != std::string::npos);
  CHECK(run.out.ends_with("2 tensors, 8 elements, 26 bytes, nan 2, inf 3\nok\n"));
}

TEST_CASE("kava_inspect file verifies adapters and checkpoints") {
  TempFolder folder;
  make_adapter(folder / "good");
  CHECK(inspect("file '" + folder / "good" + "'").code == 0);
  make_adapter(folder / "rank", 3);
  CHECK(inspect("file '" + folder / "rank" + "'").code == 4);
  make_adapter(folder / "targets", 2, "[\"q_proj\",\"v_proj\"]");
  CHECK(inspect("file '" + folder / "targets" + "'").code == 4);
  make_adapter(folder / "pattern", 2, R"(".*\\.q_proj")");
  CHECK(inspect("file '" + folder / "pattern" + "'").out.find("LoRA adapter of rank 2 on \".*") != std::string::npos);
  make_adapter(folder / "nothing", 2, "\"\"");
  CHECK(inspect("file '" + folder / "nothing" + "'").code == 4);
  make_adapter(folder / "rows");
  const std::vector<float> zeros(64);
  write_safetensors(folder / "rows/kava.safetensors", {{"new_tokens.weight", "F32", {4, 8}, zeros.data()}});
  CHECK(inspect("file '" + folder / "rows" + "'").code == 4);

  make_adapter(folder / "made");
  const fs::path checkpoint = write_checkpoint(folder.path(), 7, "abc", [&](FolderWriter& out) {
    for (const char* name : {"adapter_config.json", "adapter_model.safetensors", "kava.safetensors"})
      out.write_file(std::string("adapter/") + name, read_file(folder / "made" + "/" + name, 1 << 20));
    FileWriter optimizer = out.file("optimizer.safetensors");
    write_safetensors(optimizer, {{"m", "F32", {2}, zeros.data()}});
    out.write_file("state.json", "{}");
  });
  const Ended run = inspect("file '" + checkpoint.string() + "'");
  CHECK(run.code == 0);
  CHECK(run.out.find("checkpoint of step 7, configuration abc, 5 files verified") != std::string::npos);
  overwrite(checkpoint / "state.json", "[]");
  const Ended broken = inspect("file '" + checkpoint.string() + "'");
  CHECK(broken.code == 4);
  CHECK(broken.err.find("state.json: has another SHA-256") != std::string::npos);
}

TEST_CASE("a run in the place of an adapter or a model is told what of it to give") {
  const TextRun tiny;
  tiny.write("train.txt", "What is 2+2+1?||<<2+2=4>> <<4+1=5>>#### 5\n");
  const std::string run = tiny.dir.string(), whole = tiny.folder / "whole";
  fs::create_directories(whole + "/adapter");
  for (const char* file : {"config.json", "tokenizer.json", "tokenizer_config.json"})
    fs::copy_file(tiny.folder.path() / "base" / file, whole + "/adapter/" + file);
  overwrite(whole + "/config.toml", "");
  const auto step = [&](const std::string& more) {
    return inspect("step '" + run + "/config.toml' --threads 1 --out '" + tiny.folder / "step.safetensors" + "' " + more);
  };
  const auto is_told = [](const Ended& e, const std::string& line) {
    INFO(e.err);
    CHECK(e.code == 4);
    CHECK(e.err == "error: " + line + "\n");
  };
  CHECK(step("--adapter '" + run + "/adapter'").code == 0);
  is_told(step("--adapter '" + run + "'"), run + ": is the folder of a run; give " + run + "/adapter");
  is_told(step("--set model.adapter='" + run + "'"), run + ": is the folder of a run; give " + run + "/adapter");
  const std::string checkpoint = run + "/checkpoints/step_3";
  is_told(step("--adapter '" + checkpoint + "'"), checkpoint + ": is the folder of a checkpoint; give " + checkpoint + "/adapter");
  is_told(step("--adapter '" + whole + "'"),
          whole + ": is the folder of a run that trained the whole model; give " + whole + "/adapter in model.path");
  is_told(step("--set model.path='" + whole + "'"), whole + ": is the folder of a run; give " + whole + "/adapter");
  is_told(step("--set model.path='" + run + "'"), run +
                                                      ": is the folder of a run that trained an adapter; give its base in model.path and " +
                                                      run + "/adapter in model.adapter, or the folder that kava_merge makes of them");
  fs::remove_all(run + "/adapter");
  set_link(tiny.dir, "last", 3);
  is_told(step("--adapter '" + run + "'"), run + ": is the folder of a run; give " + run + "/last/adapter");
}

TEST_CASE("a name of the hub that its cache does not hold is told with how to get the model") {
  const TempFolder folder;
  const WithVariable cache("HF_HUB_CACHE", folder / "hub");
  overwrite(folder / "data.txt", kQuestions);
  const std::string what = "not in the hub's local cache " + folder / "hub" +
                           "; check the path, or get the model by tools/fetch.sh model org/tiny --from URL and give weights/tiny\n";
  const Ended named = run_command("kava_generate org/tiny Hi", folder.path());
  CHECK(named.code == 4);
  CHECK(named.err == "error: org/tiny: is no folder, and " + what);
  const Ended configured =
      run_command("kava_train '" + source_dir() + "/tests/golden/cases/full_cot.toml' --set model.path=org/tiny --out run", folder.path());
  CHECK(configured.code == 4);
  CHECK(configured.err.ends_with("/org/tiny: is no folder, and org/tiny " + what));
  const Ended adapter = run_command(
      "kava_train '" + source_dir() + "/tests/golden/cases/full_cot.toml' --set model.adapter=org/tiny --out run", folder.path());
  CHECK(adapter.code == 4);
  CHECK(adapter.err.find("fetch.sh") == std::string::npos);
}

TEST_CASE("kava_inspect step takes an adapter by its name in the hub's cache") {
  const TextRun tiny;
  tiny.write("train.txt", kQuestions);
  const WithVariable cache("HF_HUB_CACHE", tiny.folder / "hub");
  const fs::path snapshot = tiny.folder.path() / "hub/models--org--tiny/snapshots/1";
  fs::create_directories(snapshot.parent_path().parent_path() / "refs");
  fs::create_directories(snapshot);
  fs::copy(tiny.dir / "adapter", snapshot);
  overwrite(snapshot.parent_path().parent_path() / "refs/main", "1");
  const Ended step = inspect("step '" + tiny.dir.string() + "/config.toml' --set data.drop_last_step=false --adapter org/tiny --out '" +
                             tiny.folder / "step.safetensors" + "'");
  INFO(step.err);
  CHECK(step.code == 0);
}

TEST_CASE("the latents' token may start as a special token") {
  TextRun tiny;
  for (const char* token : {"<end>", "a"}) {
    tiny.config.latent.token_init = token;
    CHECK_NOTHROW(require_token_init(tiny.config));
  }
  tiny.config.latent.token_init = "ab";
  CHECK_THROWS(require_token_init(tiny.config));
}

TEST_CASE("what kava_inspect cannot do is one error line with its exit code") {
  TempFolder folder;
  overwrite(folder / "short", "abc");
  const auto one_line = [](const Ended& run, int code) {
    CHECK(run.code == code);
    CHECK(run.err.starts_with("error: "));
    CHECK(std::count(run.err.begin(), run.err.end(), '\n') == 1);
  };
  one_line(inspect("file '" + folder / "short" + "'"), 4);
  one_line(inspect("file '" + folder / "missing" + "'"), 4);
  one_line(inspect("file '" + folder.path().string() + "'"), 4);
  one_line(inspect("file"), 2);
  one_line(inspect(""), 2);
  one_line(inspect("doctor --device gpu"), 2);
  one_line(inspect("file --no-such-option x"), 2);
  one_line(inspect("--version >/dev/full"), 7);
  const std::string step = "step '" + source_dir() + "/tests/golden/cases/kava_defaults.toml' --threads 1 --out ",
                    out = folder / "step.safetensors";
  one_line(inspect(step + "''"), 2);
  one_line(inspect(step + "'" + folder.path().string() + "'"), 3);
  one_line(inspect(step + "'" + folder / "short" + "/x'"), 3);
  one_line(inspect(step + "/dev/full"), 7);
  one_line(inspect(step + "'" + out + "' >/dev/full"), 7);
  CHECK(!fs::exists(out));
  CHECK(inspect("--help").out.find("\nExamples:\n") != std::string::npos);
  CHECK(inspect("--version").out.starts_with("kava_inspect "));
}
