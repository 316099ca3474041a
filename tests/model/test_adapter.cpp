// How trainables start, and adapter folders: what is written is read back to the bit, and what does not fit the run is refused.
#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <filesystem>

#include "engine/files/files.h"
#include "engine/files/json.h"
#include "engine/files/safetensors.h"
#include "models/adapter.h"
#include "tests/model/step_rig.h"

namespace fs = std::filesystem;
using namespace kava;
using namespace kava::test;
using Catch::Approx;
using Catch::Matchers::ContainsSubstring;

namespace {

using Sets = std::vector<std::string>;

// Numbers drawn from N(0, std^2): mean, standard deviation and fourth moment within five of their own standard errors.
void check_normal(const std::vector<double>& x, double std) {
  const double n = static_cast<double>(x.size());
  double mean = 0, square = 0, fourth = 0;
  for (double v : x) mean += v / n, square += v * v / n, fourth += v * v * v * v / n;
  CHECK(std::abs(mean) <= 5 * std / std::sqrt(n));
  CHECK(std::abs(std::sqrt(square) / std - 1) <= 5 / std::sqrt(2 * n));
  CHECK(std::abs(fourth / (square * square) - 3) <= 5 * std::sqrt(24 / n));
}

bool all_are(const std::vector<double>& x, double value) {
  return std::ranges::all_of(x, [=](double v) { return v == value; });
}

// Tensors of a file with their values, to change and write again.
struct OpenFile {
  explicit OpenFile(const std::string& file) : path(file) {
    const SafetensorsFile f = SafetensorsFile::open(path);
    for (const TensorInfo& t : f.tensors()) {
      names.push_back(t.name), shapes.push_back(t.shape), values.emplace_back(static_cast<std::size_t>(t.count()));
      f.read_as(t, DType::f32, values.back().data());
    }
  }
  std::size_t at(const std::string& name) const { return static_cast<std::size_t>(std::ranges::find(names, name) - names.begin()); }
  void write() const {
    std::vector<TensorOut> out;
    for (std::size_t i = 0; i < names.size(); ++i) out.push_back({names[i], "F32", shapes[i], values[i].data()});
    write_safetensors(path, out);
  }
  std::string path;
  std::vector<std::string> names;
  std::vector<std::vector<int64_t>> shapes;
  std::vector<std::vector<float>> values;
};

std::vector<std::vector<double>> all_values(const StepRig& rig) {
  std::vector<std::vector<double>> out;
  for (const Parameter& p : rig.model->parameters.all()) out.push_back(rig.value(p.name));
  return out;
}

// The error of loading the folder into a fresh model; "" where there is none.
std::string load_refusal(const Sets& sets, const std::string& folder) {
  StepRig rig(sets, 1, 0);
  try {
    load_adapter(*rig.model, folder);
  } catch (const Error& e) {
    CHECK(e.code() == Exit::data);
    return e.what();
  }
  return "";
}

}  // namespace

TEST_CASE("trainables start as the method says, on every golden model") {
  const Json golden = read_json(source_dir() + "/tests/golden/initial_values.json");
  for (const char* name : {"llama", "llama_scaled", "qwen2"}) {
    INFO(name);
    const std::string path = std::string("model.path=../models/") + name;
    StepRig rig({path, kSeven, "kv.projection=true"}, 1, 0);
    const std::vector<double> rows = rig.value("new_tokens.weight"), gain = rig.value("latent_projection.norm.weight");
    const auto mean = golden.at(name).at("new_token_row").get<std::vector<double>>();
    const std::size_t C = mean.size();
    REQUIRE(rows.size() == 3 * C);
    for (std::size_t i = 0; i < rows.size(); ++i) CHECK(std::abs(rows[i] - mean[i % C]) <= 1e-15);
    CHECK(all_are(gain, gain[0]));
    CHECK(gain[0] == Approx(golden.at(name).at("embedding_rms").get<double>()).epsilon(1e-14));
    for (const char* bias : {"linear1.bias", "linear2.bias", "norm.bias"})
      CHECK(all_are(rig.value(std::string("latent_projection.") + bias), 0));
    int matrices = 0;
    for (const Parameter& p : rig.model->parameters.all()) {
      INFO(p.name);
      const std::vector<double> x = rig.value(p.name);
      if (p.name.ends_with("lora_B.weight")) CHECK(all_are(x, 0));
      if (p.name.ends_with("lora_A.weight")) {
        ++matrices;
        const double bound = 1 / std::sqrt(static_cast<double>(p.cols)),
                     most = std::abs(*std::ranges::max_element(x, {}, [](double v) { return std::abs(v); }));
        CHECK(most <= bound);
        CHECK(most > bound / 2);
      }
      if (p.name.starts_with("kv_projection."))
        for (int64_t r = 0; r < p.rows; ++r)
          for (int64_t c = 0; c < p.cols; ++c) CHECK(x[static_cast<std::size_t>(r * p.cols + c)] == (r == c ? 1 : 0));
    }
    CHECK(matrices == 7 * rig.text.shape.layers);
    StepRig upstream({path, "latent.projection_init=one"}, 1, 0);
    CHECK(all_are(upstream.value("latent_projection.norm.weight"), 1));
  }
}

TEST_CASE("random starts have the distributions of the method, a stream for each name and seed") {
  TempFolder folder;
  write_random_model(folder);
  const Sets sets = random_model(folder, {"lora.rank=32"});
  StepRig rig(sets, 1, 0);
  // 0.05: initializer_range of config.json
  check_normal(rig.value("latent_projection.linear1.weight"), 0.05);
  check_normal(rig.value("latent_projection.linear2.weight"), 0.05);
  std::vector<double> a;
  for (const Parameter& p : rig.model->parameters.all())
    if (p.name.ends_with("lora_A.weight"))
      for (double x : rig.value(p.name)) a.push_back(x * std::sqrt(static_cast<double>(p.cols)));
  double mean = 0, square = 0;
  for (double x : a) {
    REQUIRE(std::abs(x) <= 1);
    mean += x / static_cast<double>(a.size()), square += x * x / static_cast<double>(a.size());
  }
  // Uniform in +-1: variances 1/3 of x and 4/45 of x^2.
  CHECK(std::abs(mean) <= 5 * std::sqrt(1 / 3.0 / static_cast<double>(a.size())));
  CHECK(std::abs(square - 1 / 3.0) <= 5 * std::sqrt(4 / 45.0 / static_cast<double>(a.size())));

  const std::string q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
                    v = "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight";
  CHECK(rig.value(q) != rig.value(v));
  Sets other = sets, more = sets;
  other.push_back("seed=43");
  more.push_back(kSeven);
  CHECK(StepRig(other, 1, 0).value(q) != rig.value(q));
  CHECK(StepRig(more, 1, 0).value(q) == rig.value(q));
}

TEST_CASE("a model drawn at random has the stated spreads, norms of one and biases of zero") {
  const std::string family = GENERATE("llama", "qwen2");
  TempFolder folder;
  write_random_model(folder, family);
  StepRig rig(random_model(folder, {"train.trainable=all"}), 1, 0);
  int biases = 0;
  for (const Parameter& p : rig.model->parameters.all()) {
    INFO(p.name);
    if (!p.name.starts_with("model.") && p.name != "lm_head.weight") continue;
    const std::vector<double> x = rig.value(p.name);
    if (p.name.ends_with("norm.weight")) {
      CHECK(all_are(x, 1));
    } else if (p.name.ends_with(".bias")) {
      ++biases;
      CHECK(all_are(x, 0));
    } else {
      // N(0, 1/fan_in), N(0, 1/C) for embedding and head, whose columns are C; two layers: a further 1/sqrt(4) for what is added to the
      // residual
      const bool added = p.name.ends_with("o_proj.weight") || p.name.ends_with("down_proj.weight");
      check_normal(x, 1 / std::sqrt(static_cast<double>(p.cols)) / (added ? 2 : 1));
    }
  }
  CHECK(biases == (family == "qwen2" ? 6 : 0));
}

TEST_CASE("an adapter that was written is read back to the bit") {
  const std::string dtype = GENERATE("f32", "bf16");
  const Sets more =
      GENERATE(Sets{kSeven, "kv.projection=true"}, Sets{"method=full_cot"}, Sets{"lora.targets=[\"down_proj\"]", "latent.projection=false"},
               Sets{"train.trainable=all"}, Sets{"train.trainable=all", "method=no_cot"},
               Sets{"train.trainable=all", "model.path=../models/llama_scaled"}, Sets{"train.trainable=all", "model.path=../models/qwen2"});
  CAPTURE(dtype, more);
  Sets sets = more;
  sets.push_back("model.dtype=" + dtype);
  TempFolder folder;
  StepRig rig(sets), fresh(sets, 1, 0);
  save_adapter(*rig.model, folder / "a");
  REQUIRE(all_values(fresh) != all_values(rig));
  load_adapter(*fresh.model, folder / "a");
  CHECK(all_values(fresh) == all_values(rig));
  // Not only the values: what the products read, too.
  CHECK(fresh.run().total == rig.run().total);
  CHECK(fs::exists(folder / "a/kava.safetensors") == recipe_of(rig.config).markers);
  save_adapter(*fresh.model, folder / "b");
  for (const auto& entry : fs::directory_iterator(folder / "a")) {
    INFO(entry.path());
    CHECK(read_file(entry.path().string(), 1 << 20) == read_file(folder / ("b/" + entry.path().filename().string()), 1 << 20));
  }
}

TEST_CASE("a folder of all weights is a model of its own") {
  TempFolder folder;
  StepRig rig({"train.trainable=all", "model.dtype=f32"});
  save_adapter(*rig.model, folder.path().string());
  CHECK_FALSE(SafetensorsFile::open(folder / "model.safetensors").find("lm_head.weight"));
  StepRig base({"train.trainable=all", "model.dtype=f32", "model.path=\"" + folder.path().string() + "\""}, 1, 0);
  for (const Parameter& p : base.model->parameters.all()) {
    INFO(p.name);
    if (p.name.starts_with("model.")) CHECK(base.value(p.name) == rig.value(p.name));
  }
  // kava.safetensors is not read there: the new tokens start again.
  CHECK(base.value("new_tokens.weight") != rig.value("new_tokens.weight"));
}

TEST_CASE("a tensor that is missing, extra, misshapen or not finite is refused by its name") {
  struct Case {
    Sets sets;
    const char *file, *tensor;
  };
  const Case c = GENERATE(Case{{}, "adapter_model.safetensors", "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"},
                          Case{{}, "kava.safetensors", "latent_projection.linear2.bias"}, Case{{}, "kava.safetensors", "new_tokens.weight"},
                          Case{{"train.trainable=all"}, "model.safetensors", "model.layers.0.mlp.up_proj.weight"});
  CAPTURE(c.file, c.tensor);
  TempFolder folder;
  StepRig rig(c.sets);
  save_adapter(*rig.model, folder.path().string());
  REQUIRE(load_refusal(c.sets, folder.path().string()).empty());
  const OpenFile good(folder / c.file);
  const std::size_t at = good.at(c.tensor);
  REQUIRE(at < good.names.size());
  auto refused = [&](OpenFile bad) {
    bad.write();
    return load_refusal(c.sets, folder.path().string());
  };
  OpenFile bad = good;
  bad.names[at] = "another." + bad.names[at];
  CHECK_THAT(refused(bad), ContainsSubstring(c.tensor));
  bad = good;
  bad.names.push_back("one.more.weight"), bad.shapes.push_back({2}), bad.values.push_back({1, 2});
  CHECK_THAT(refused(bad), ContainsSubstring("one.more.weight"));
  bad = good;
  bad.shapes[at].insert(bad.shapes[at].begin(), 1);
  CHECK_THAT(refused(bad), ContainsSubstring(c.tensor));
  bad = good;
  bad.shapes[at][0] -= 1;
  bad.values[at].resize(bad.values[at].size() / static_cast<std::size_t>(good.shapes[at][0]) * static_cast<std::size_t>(bad.shapes[at][0]));
  CHECK_THAT(refused(bad), ContainsSubstring(c.tensor));
  for (float value : {NAN, INFINITY, -INFINITY}) {
    bad = good;
    bad.values[at].back() = value;
    CHECK_THAT(refused(bad), ContainsSubstring(c.tensor));
  }
  CHECK(refused(good).empty());
  fs::remove(folder / c.file);
  CHECK_THAT(load_refusal(c.sets, folder.path().string()), ContainsSubstring(c.file));
}

TEST_CASE("an adapter of other trainables is refused") {
  TempFolder folder;
  auto saved = [&](const Sets& sets, const char* name) {
    save_adapter(*StepRig(sets).model, folder / name);
    return folder / name;
  };
  const std::string kava = saved({}, "kava"), plain = saved({"method=full_cot"}, "plain"), all = saved({"train.trainable=all"}, "all");
  const std::string mapped = saved({"kv.projection=true"}, "mapped"), bare = saved({"latent.projection=false"}, "bare");
  CHECK_THAT(load_refusal({"method=full_cot"}, kava), ContainsSubstring("kava.safetensors"));
  CHECK_THAT(load_refusal({}, plain), ContainsSubstring("kava.safetensors"));
  CHECK_THAT(load_refusal({}, all), ContainsSubstring("is a whole model and no LoRA adapter"));
  CHECK_THAT(load_refusal({"train.trainable=all"}, kava), ContainsSubstring("is a LoRA adapter and no whole model"));
  CHECK_THAT(load_refusal({}, mapped), ContainsSubstring("kv_projection.0.k.weight"));
  CHECK_THAT(load_refusal({"kv.projection=true"}, kava), ContainsSubstring("kv_projection.0.k.weight"));
  CHECK_THAT(load_refusal({}, bare), ContainsSubstring("latent_projection."));
  CHECK_THAT(load_refusal({"latent.projection=false"}, kava), ContainsSubstring("latent_projection."));
  CHECK_THAT(load_refusal({"model.path=../models/llama_scaled", "train.trainable=all"}, all), ContainsSubstring("model.safetensors"));
  CHECK(load_refusal({"method=pccot"}, kava).empty());
}

TEST_CASE("a folder of all weights says the type of its weights and has every tokenizer file of the base") {
  TempFolder folder;
  const fs::path base = folder.path() / "base", written = folder.path() / "written";
  fs::copy(fs::path(source_dir()) / "tests/golden/models/llama", base);
  Json config = read_json((base / "config.json").string(), 1 << 20);
  config["dtype"] = config["torch_dtype"] = "bfloat16";
  overwrite((base / "config.json").string(), config.dump());
  const char* copied[] = {"generation_config.json",
                          "added_tokens.json",
                          "vocab.json",
                          "merges.txt",
                          "chat_template.jinja",
                          "additional_chat_templates/tool.jinja"};
  fs::create_directory(base / "additional_chat_templates");
  for (const char* name : copied) overwrite((base / name).string(), std::string("text of ") + name);
  save_adapter(*StepRig({"train.trainable=all", "model.path=" + base.string()}).model, written.string());
  for (const char* name : copied) CHECK(read_file((written / name).string(), 100) == std::string("text of ") + name);
  config["dtype"] = config["torch_dtype"] = "float32";
  CHECK(read_json((written / "config.json").string(), 1 << 20) == config);
  const SafetensorsFile weights = SafetensorsFile::open((written / "model.safetensors").string());
  for (const TensorInfo& t : weights.tensors()) CHECK(t.dtype == "F32");
}

TEST_CASE("a folder of all weights whose config.json describes another function is refused") {
  const Sets sets = {"train.trainable=all", "model.path=../models/llama_scaled"};
  TempFolder folder;
  save_adapter(*StepRig(sets).model, folder.path().string());
  const std::string path = folder / "config.json";
  const Json good = read_json(path, 1 << 20);
  auto refused = [&](const char* pointer, Json value) {
    Json other = good;
    other[Json::json_pointer(pointer)] = std::move(value);
    overwrite(path, other.dump());
    return load_refusal(sets, folder.path().string());
  };
  CHECK(refused("/max_position_embeddings", 1024).empty());
  const std::pair<const char*, Json> wrong[] = {{"/rope_parameters/rope_theta", 200.0},
                                                {"/rope_parameters/factor", 4.0},
                                                {"/rope_parameters/low_freq_factor", 2.0},
                                                {"/rope_parameters/original_max_position_embeddings", 32},
                                                {"/rms_norm_eps", 1e-5},
                                                {"/num_attention_heads", 4},
                                                {"/tie_word_embeddings", true}};
  for (const auto& [pointer, value] : wrong) {
    INFO(pointer);
    CHECK_THAT(refused(pointer, value), ContainsSubstring("config.json"));
  }
}

TEST_CASE("an adapter_config.json that contradicts the configuration is refused by its key") {
  TempFolder folder;
  StepRig rig(Sets{});
  save_adapter(*rig.model, folder.path().string());
  const std::string path = folder / "adapter_config.json";
  const Json good = read_json(path, 1 << 20);
  auto refused = [&](const char* key, Json value) {
    Json bad = good;
    bad[key] = std::move(value);
    overwrite(path, bad.dump());
    return load_refusal({}, folder.path().string());
  };
  const std::pair<const char*, Json> wrong[] = {{"r", 4},
                                                {"r", "2"},
                                                {"r", nullptr},
                                                {"lora_alpha", 3.5},
                                                {"lora_alpha", true},
                                                {"target_modules", {"q_proj", "k_proj", "v_proj"}},
                                                {"target_modules", {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj"}},
                                                {"target_modules", "all-linear"},
                                                {"target_modules", {1, 2}},
                                                {"target_modules", ".*_proj"},
                                                {"target_modules", ".*layers.0.self_attn.*_proj"},
                                                {"target_modules", "self_attn.(q|k|v|o)_proj"},
                                                {"target_modules", "("},
                                                {"target_modules", {"q_proj", "k_proj", "v_proj", "layers.1.self_attn.o_proj"}},
                                                {"exclude_modules", Json::array({"v_proj"})},
                                                {"exclude_modules", "model.layers.1.*"},
                                                {"exclude_modules", 7},
                                                {"layers_to_transform", {0, 7}},
                                                {"layers_pattern", "h"},
                                                {"use_rslora", true},
                                                {"use_dora", true},
                                                {"rank_pattern", {{"q_proj", 4}}},
                                                {"alpha_pattern", {{"q_proj", 4}}},
                                                {"layers_to_transform", {0}},
                                                {"layers_to_transform", 1},
                                                {"layers_to_transform", 0},
                                                {"init_lora_weights", "pissa_niter_16"},
                                                {"arrow_config", {{"top_k", 3}}},
                                                {"modules_to_save", {"lm_head"}},
                                                {"fan_in_fan_out", true},
                                                {"trainable_token_indices", {1}},
                                                {"layer_replication", Json::parse("[[0, 1]]")},
                                                {"bias", "all"},
                                                {"bias", "lora_only"},
                                                {"peft_type", "IA3"}};
  for (const auto& [key, value] : wrong) {
    INFO(key << " = " << value.dump());
    CHECK_THAT(refused(key, value), ContainsSubstring(key));
  }
  // In another order, as another number type, with another dropout, with keys that are off: no contradiction.
  const std::pair<const char*, Json> harmless[] = {{"target_modules", {"q_proj", "k_proj", "v_proj", "self_attn.o_proj", "c_attn"}},
                                                   {"target_modules", ".*\\.self_attn\\.(q|k|v|o)_proj"},
                                                   {"target_modules", "model\\.layers\\.\\d+\\.self_attn\\..*_proj$"},
                                                   {"exclude_modules", {"lm_head", "up_proj"}},
                                                   {"exclude_modules", ".*mlp.*"},
                                                   {"layers_to_transform", {1, 0}},
                                                   {"rank_pattern", {{"q_proj", 2}, {"v_proj", 2}}},
                                                   {"alpha_pattern", {{"q_proj", 3.0}}},
                                                   {"target_modules", {"o_proj", "v_proj", "k_proj", "q_proj"}},
                                                   {"lora_alpha", 3.0},
                                                   {"r", 2.0},
                                                   {"lora_dropout", 0.9},
                                                   {"init_lora_weights", "gaussian"},
                                                   {"use_rslora", nullptr},
                                                   {"layer_replication", Json::array()},
                                                   {"trainable_token_indices", nullptr}};
  for (const auto& [key, value] : harmless) {
    INFO(key << " = " << value.dump());
    CHECK(refused(key, value).empty());
  }
  for (const char* key : {"r", "lora_alpha", "target_modules", "peft_type"}) {
    INFO(key);
    Json bad = good;
    bad.erase(key);
    overwrite(path, bad.dump());
    CHECK_THAT(load_refusal({}, folder.path().string()), ContainsSubstring(key));
  }
  for (const char* text : {"", "{", "[]", "null", "{\"r\": 2, \"r\": 2}"}) {
    INFO(text);
    overwrite(path, text);
    CHECK_THAT(load_refusal({}, folder.path().string()), ContainsSubstring("adapter_config.json"));
  }
}
