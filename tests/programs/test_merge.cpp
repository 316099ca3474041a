#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "engine/files/json.h"
#include "engine/files/safetensors.h"
#include "tests/folders.h"
#include "tests/programs/programs.h"

using namespace kava;
namespace fs = std::filesystem;

namespace {

const std::string kAdapters = source_dir() + "/tests/golden/adapters/", kModels = source_dir() + "/tests/golden/models/";

std::vector<double> values(const SafetensorsFile& file, const std::string& name) {
  const TensorInfo* t = file.find(name);
  INFO(name);
  REQUIRE(t);
  std::vector<double> out(static_cast<std::size_t>(t->count()));
  file.read_as(*t, DType::f64, out.data());
  return out;
}

// The neighbours of x in bf16 are at most this far away.
double bf16_step(double x) { return std::ldexp(1.0, std::ilogb(x == 0 ? 1e-30 : x) - 7); }

Ended merge(const std::string& arguments) { return run_command("kava_merge " + arguments); }

Ended train(const std::string& run, const std::string& more) {
  return run_command("kava_train '" + source_dir() + "/tests/golden/cases/kava_defaults.toml' --set model.path='" + kModels +
                     "llama' --set model.adapter= --set train.max_steps=1 --threads 1 --out '" + run + "' " + more);
}

}  // namespace

TEST_CASE("a merged folder holds the base's tensors with scale B A added, rounded once") {
  const TempFolder folder;
  for (const auto& [adapter, base] : {std::pair{"llama_seven", "llama"}, std::pair{"qwen2", "qwen2"}, std::pair{"llama_plain", "llama"}}) {
    const std::string out = folder / adapter;
    const Ended run = merge("'" + kAdapters + adapter + "' --base '" + kModels + base + "' --out '" + out + "'");
    INFO(run.err);
    REQUIRE(run.code == 0);
    CHECK((run.out.find("left out") != std::string::npos) == fs::exists(kAdapters + adapter + "/kava.safetensors"));
    const Json config = read_json(kAdapters + adapter + "/adapter_config.json");
    const double scale = config["lora_alpha"].get<double>() / config["r"].get<double>();
    const SafetensorsFile merged = SafetensorsFile::open(out + "/model.safetensors"),
                          plain = SafetensorsFile::open(kModels + base + "/model.safetensors"),
                          lora = SafetensorsFile::open(kAdapters + adapter + "/adapter_model.safetensors");
    REQUIRE(merged.tensors().size() == plain.tensors().size());
    std::size_t changed = 0;
    for (const TensorInfo& t : plain.tensors()) {
      CAPTURE(t.name);
      REQUIRE(merged.find(t.name));
      CHECK(merged.find(t.name)->dtype == "BF16");
      std::vector<double> want = values(plain, t.name);
      const std::string pair = "base_model.model." + t.name.substr(0, t.name.rfind(".weight"));
      if (const TensorInfo* a = lora.find(pair + ".lora_A.weight")) {
        const std::vector<double> A = values(lora, a->name), B = values(lora, pair + ".lora_B.weight");
        const std::size_t rank = static_cast<std::size_t>(a->shape[0]), in = static_cast<std::size_t>(a->shape[1]);
        for (std::size_t o = 0; o < B.size() / rank; ++o)
          for (std::size_t i = 0; i < in; ++i)
            for (std::size_t k = 0; k < rank; ++k) want[o * in + i] += scale * B[o * rank + k] * A[k * in + i];
        ++changed;
      }
      const std::vector<double> got = values(merged, t.name);
      // Half a step of bf16, and what sums of a few f64 in another order differ by.
      for (std::size_t i = 0; i < want.size(); ++i) REQUIRE(std::fabs(got[i] - want[i]) <= 0.5 * bf16_step(want[i]) * (1 + 1e-6));
    }
    CHECK(2 * changed == lora.tensors().size());
    CHECK(read_json(out + "/config.json")["torch_dtype"] == "bfloat16");
    CHECK(fs::exists(out + "/tokenizer.json") == fs::exists(kModels + base + "/tokenizer.json"));
  }
}

TEST_CASE("a merged model computes what the base with its adapter does") {
  const TempFolder folder;
  const std::string merged = folder / "merged", from = kAdapters + "llama_plain";
  REQUIRE(merge("'" + from + "' --base '" + kModels + "llama' --dtype f32 --out '" + merged + "'").code == 0);
  const std::string step = "kava_inspect step '" + source_dir() + "/tests/golden/cases/full_cot.toml' --threads 1 --set model.dtype=f32 ";
  REQUIRE(run_command(step + "--adapter '" + from + "' --out '" + folder / "two" + "'").code == 0);
  REQUIRE(run_command(step + "--set 'model.adapter=\"\"' --set model.path='" + merged + "' --out '" + folder / "one" + "'").code == 0);
  const std::vector<double> two = values(SafetensorsFile::open(folder / "two"), "logits.teacher"),
                            one = values(SafetensorsFile::open(folder / "one"), "logits.teacher");
  REQUIRE(one.size() == two.size());
  // Sums of f32 over some hundred terms through two layers, for logits of the size of 1.
  for (std::size_t i = 0; i < one.size(); ++i) REQUIRE(std::fabs(one[i] - two[i]) < 1e-4);
}

TEST_CASE("what cannot be merged is one line with its exit code, and writes nothing") {
  const TempFolder folder;
  const std::string out = folder / "out", adapter = "'" + kAdapters + "llama' ", base = "--base '" + kModels;
  const auto refused = [&](const std::string& arguments, int code) {
    const Ended run = merge(arguments);
    INFO(arguments << ": " << run.err);
    CHECK(run.code == code);
    CHECK(run.err.starts_with("error: "));
    CHECK(std::count(run.err.begin(), run.err.end(), '\n') == 1);
    CHECK(!fs::exists(out));
  };
  refused("", 2);
  refused(adapter + base + "llama' --out ''", 2);
  refused(adapter + base + "llama' --dtype f64 --out '" + out + "'", 2);
  refused(adapter + base + "llama' --out '" + folder.path().parent_path().string() + "'", 2);
  refused(adapter + base + "qwen2' --out '" + out + "'", 4);
  refused(adapter + base + "missing' --out '" + out + "'", 4);
  refused("'" + kModels + "llama' --out '" + out + "'", 4);
  refused("'" + folder / "missing" + "' --out '" + out + "'", 4);
}

TEST_CASE("a base that was drawn at random is not merged with the folder's own weights") {
  const char* method = GENERATE("kava", "full_cot");
  const TempFolder folder;
  const std::string run = folder / "run", out = folder / "out";
  const Ended trained = train(run, std::string("--set model.init=random --set method=") + method);
  INFO(trained.err);
  REQUIRE(trained.code == 0);
  CHECK((trained.out + trained.err).find("draws the base, of which LoRA trains nothing") != std::string::npos);
  CHECK(read_json(run + "/adapter/adapter_config.json")["base_model_name_or_path"].is_null());
  for (const std::string& given : {run, run + "/adapter' --base '" + kModels + "llama"}) {
    const Ended refused = merge("'" + given + "' --out '" + out + "'");
    INFO(refused.err);
    CHECK(refused.code == 4);
    CHECK(refused.err.find("drew the base, which lies in no folder") != std::string::npos);
  }
  const Ended unnamed = merge("'" + run + "/adapter' --out '" + out + "'");
  CHECK(unnamed.code == 4);
  CHECK(unnamed.err.find("--base DIR") != std::string::npos);
  CHECK(!fs::exists(out));
}

TEST_CASE("a merge says where its base is not the one of the training, and refuses what is not finite") {
  const TempFolder folder;
  const std::string adapter = kAdapters + "llama", out = folder / "out";
  fs::copy(kModels + "llama", folder.path() / "other");
  Json config = read_json(folder / "other/config.json");
  config["note"] = "another config.json";
  overwrite(folder / "other/config.json", config.dump());
  REQUIRE(train(folder / "run", "").code == 0);
  const Ended other = merge("'" + folder / "run/adapter" + "' --base '" + folder / "other" + "' --out '" + out + "'");
  INFO(other.err);
  CHECK(other.code == 0);
  CHECK(other.err.find("is not the base that the adapter was trained on") != std::string::npos);
  const Ended own = merge("'" + folder / "run/adapter" + "' --out '" + folder / "own" + "'");
  CHECK((own.code == 0 && own.err.empty()));

  // kava.safetensors names the base as well, alone in older adapters.
  fs::copy(folder / "run/adapter", folder.path() / "older");
  {
    const SafetensorsFile lora = SafetensorsFile::open(folder / "run/adapter/adapter_model.safetensors");
    std::vector<TensorOut> same;
    for (const TensorInfo& t : lora.tensors())
      same.push_back({t.name, "F32", t.shape, nullptr, [&lora, &t](void* to) { lora.read_as(t, DType::f32, to); }});
    write_safetensors(folder / "older/adapter_model.safetensors", std::move(same));
  }
  const Ended older = merge("'" + folder / "older" + "' --base '" + folder / "other" + "' --out '" + folder / "of_older" + "'");
  CHECK((older.code == 0 && older.err.find("is not the base that the adapter was trained on") != std::string::npos));

  fs::copy(adapter, folder.path() / "large");
  const SafetensorsFile file = SafetensorsFile::open(adapter + "/adapter_model.safetensors");
  std::vector<TensorOut> tensors;
  for (const TensorInfo& t : file.tensors())
    tensors.push_back({t.name, "F32", t.shape, nullptr, [&t](void* to) { std::fill_n(static_cast<float*>(to), t.count(), 1e25f); }});
  write_safetensors(folder / "large/adapter_model.safetensors", std::move(tensors));
  const Ended large = merge("'" + folder / "large" + "' --base '" + kModels + "llama' --out '" + folder / "none" + "'");
  CHECK(large.code == 5);
  CHECK(large.err.find("and its LoRA is not finite; merge an earlier checkpoint") != std::string::npos);
  CHECK(!fs::exists(folder / "none"));
}
