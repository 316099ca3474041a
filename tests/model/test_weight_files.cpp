// The weights of a model folder: which names, types, shapes and shards are read.
#include <cmath>
#include <functional>
#include <limits>
#include <map>

#include "models/weights.h"
#include "tests/model/model_config_rig.h"

using namespace kava;
using namespace kava::test;
namespace fs = std::filesystem;

namespace {

// One tensor of each spec, filled with small numbers, in the dtype F32.
struct Weights {
  std::map<std::string, std::vector<float>> values;
  std::map<std::string, std::vector<std::int64_t>> shapes;
  explicit Weights(const ModelConfig& config) {
    for (const WeightSpec& spec : weight_specs(config)) add(spec.name, spec.file_shape());
  }
  void add(const std::string& name, std::vector<std::int64_t> shape) {
    std::int64_t count = 1;
    for (std::int64_t d : shape) count *= d;
    values[name].resize(static_cast<std::size_t>(count));
    for (std::size_t i = 0; i < values[name].size(); ++i) values[name][i] = static_cast<float>(i) + static_cast<float>(name.size()) / 64;
    shapes[name] = shape;
  }
  void remove(const std::string& name) {
    values.erase(name);
    shapes.erase(name);
  }
  void write(
      const std::string& path, const std::function<bool(const std::string&)>& wanted = [](const std::string&) { return true; }) const {
    std::vector<TensorOut> out;
    for (const auto& [name, data] : values)
      if (wanted(name)) out.push_back({name, "F32", shapes.at(name), data.data()});
    write_safetensors(path, out);
  }
};

void read(const WeightFiles& files, const WeightSpec& spec, void* out, DType type) {
  static const std::unique_ptr<Ops> ops = make_cpu_ops(1);
  files.read(spec, *ops, {out, type, spec.rows, spec.cols, spec.cols});
}

}  // namespace

TEST_CASE("weights are read by name, and a missing, extra or misshapen tensor is named") {
  TempFolder folder;
  const ModelConfig config = load(folder, llama());
  const std::string path = folder / "model.safetensors", dir = folder.path().string();
  const auto open = [&] { return WeightFiles::open(dir, config); };
  CHECK(refusal(open).find("model.safetensors") != std::string::npos);
  const Weights good(config);
  good.write(path);
  const WeightFiles files = open();
  for (const WeightSpec& spec : weight_specs(config)) {
    std::vector<float> out(static_cast<std::size_t>(spec.rows * spec.cols));
    read(files, spec, out.data(), DType::f32);
    CHECK(out == good.values.at(spec.name));
  }
  CHECK(files.header_text() == SafetensorsFile::open(path).header_text());

  const auto refused = [&](const std::string& name, const std::function<void(Weights&)>& change) {
    Weights bad = good;
    change(bad);
    bad.write(path);
    CAPTURE(name);
    CHECK(refusal(open).find(name) != std::string::npos);
  };
  const std::string norm = "model.norm.weight", q = "model.layers.1.self_attn.q_proj.weight";
  refused(norm, [&](Weights& w) { w.remove(norm); });
  refused("model.embed_tokens.weight", [&](Weights& w) { w.remove("model.embed_tokens.weight"); });
  refused(norm, [&](Weights& w) { w.add(norm, {1, 8}); });
  refused(q, [&](Weights& w) { w.add(q, {8, 16}); });
  refused(q, [&](Weights& w) { w.add(q, {128}); });
  refused("model.layers.2.mlp.up_proj.weight", [&](Weights& w) { w.add("model.layers.2.mlp.up_proj.weight", {6, 8}); });
  refused("model.layers.0.self_attn.q_proj.bias", [&](Weights& w) { w.add("model.layers.0.self_attn.q_proj.bias", {16}); });
  refused("other", [&](Weights& w) { w.add("other", {1}); });
  refused("rotary_emb.inv_freq", [&](Weights& w) { w.add("rotary_emb.inv_freq", {1}); });
  refused("lm_head.weight", [&](Weights& w) { w.add("lm_head.weight", {10, 8}); });
  Weights accepted = good;
  accepted.add("lm_head.weight", {10, 8});
  accepted.values["lm_head.weight"] = accepted.values["model.embed_tokens.weight"];
  accepted.add("model.layers.0.self_attn.rotary_emb.inv_freq", {4});
  accepted.write(path);
  CHECK(refusal(open) == "");
  accepted.values["lm_head.weight"][79] += 1;
  accepted.write(path);
  CHECK(refusal(open).find("lm_head.weight") != std::string::npos);

  ModelConfig untied = config;
  untied.tied = false;
  good.write(path);
  CHECK(refusal([&] { WeightFiles::open(dir, untied); }).find("lm_head.weight") != std::string::npos);
}

TEST_CASE("a model saved without its head, or with the tied head alone, is read") {
  TempFolder folder;
  const ModelConfig config = load(folder, llama());
  const std::string path = folder / "model.safetensors", dir = folder.path().string();
  const Weights good(config);
  const auto check_read = [&] {
    const WeightFiles files = WeightFiles::open(dir, config);
    for (const WeightSpec& spec : weight_specs(config)) {
      std::vector<float> out(static_cast<std::size_t>(spec.rows * spec.cols));
      read(files, spec, out.data(), DType::f32);
      CHECK(out == good.values.at(spec.name));
    }
  };
  const auto renamed = [&](const std::function<std::string(const std::string&)>& name) {
    Weights w = good;
    w.values.clear(), w.shapes.clear();
    for (const auto& [old, data] : good.values) w.values[name(old)] = data, w.shapes[name(old)] = good.shapes.at(old);
    return w;
  };
  const auto bare = [](const std::string& name) { return name.substr(std::string("model.").size()); };
  const std::string embedding = "model.embed_tokens.weight", head = "lm_head.weight";
  Weights headless = renamed(bare);
  headless.add("layers.0.self_attn.rotary_emb.inv_freq", {4});
  headless.write(path);
  check_read();
  renamed([&](const std::string& name) { return name == embedding ? head : name; }).write(path);
  check_read();
  renamed([&](const std::string& name) { return name == embedding ? head : bare(name); }).write(path);
  check_read();
  // Names of both kinds are those of no model.
  renamed([&](const std::string& name) { return name.find("layers.1") == std::string::npos ? name : bare(name); }).write(path);
  CHECK(refusal([&] { WeightFiles::open(dir, config); }).find("model.layers.1") != std::string::npos);
  ModelConfig untied = config;
  untied.tied = false;
  renamed([&](const std::string& name) { return name == embedding ? head : name; }).write(path);
  CHECK(refusal([&] { WeightFiles::open(dir, untied); }).find(embedding) != std::string::npos);
  renamed(bare).write(path);
  CHECK(refusal([&] { WeightFiles::open(dir, untied); }).find(head) != std::string::npos);
}

TEST_CASE("weights of a type that is no floating number, or that are not finite, are refused by name") {
  TempFolder folder;
  const ModelConfig config = load(folder, llama());
  const std::string path = folder / "model.safetensors";
  Weights weights(config);
  std::vector<TensorOut> out;
  for (const auto& [name, data] : weights.values)
    out.push_back({name, name == "model.norm.weight" ? "I32" : "F32", weights.shapes.at(name), data.data()});
  write_safetensors(path, out);
  CHECK(refusal([&] { WeightFiles::open(folder.path().string(), config); }).find("model.norm.weight") != std::string::npos);

  const WeightSpec norm{"model.norm.weight", WeightSpec::Role::gain, 1, 8};
  std::vector<double> room(8);
  for (float bad : {std::nanf(""), std::numeric_limits<float>::infinity(), 3.4e38f}) {
    weights.values[norm.name][7] = bad;
    weights.write(path);
    const WeightFiles files = WeightFiles::open(folder.path().string(), config);
    for (DType type : {DType::f32, DType::f64, DType::bf16}) {
      const bool fits = bad == 3.4e38f && type != DType::bf16;
      CHECK((refusal([&] { read(files, norm, room.data(), type); }).find(norm.name) == std::string::npos) == fits);
    }
  }
}

TEST_CASE("shards are read as their index says and nothing else is") {
  TempFolder folder;
  const ModelConfig config = load(folder, llama());
  const std::string dir = folder.path().string(), index = folder / "model.safetensors.index.json";
  const Weights weights(config);
  const auto second = [](const std::string& name) { return name.find("layers.1") != std::string::npos; };
  const auto first = [&](const std::string& name) { return !second(name); };
  const auto write_all = [&] {
    weights.write(folder / "a.safetensors", first);
    weights.write(folder / "b.safetensors", second);
  };
  Json map;
  for (const auto& [name, data] : weights.values) map[name] = second(name) ? "b.safetensors" : "a.safetensors";
  const auto open = [&](const Json& weight_map) {
    overwrite(index, Json{{"metadata", {{"total_size", 1}}}, {"weight_map", weight_map}}.dump());
    return refusal([&] { WeightFiles::open(dir, config); });
  };
  write_all();
  overwrite(folder / "c.safetensors", "not read");
  CHECK(open(map) == "");
  const WeightFiles files = WeightFiles::open(dir, config);
  std::vector<float> out(16 * 8);
  read(files, {"model.layers.1.self_attn.q_proj.weight", WeightSpec::Role::linear, 16, 8}, out.data(), DType::f32);
  CHECK(out == weights.values.at("model.layers.1.self_attn.q_proj.weight"));

  const std::string norm = "model.norm.weight";
  const auto with = [&](const Json& value) {
    Json changed = map;
    changed[norm] = value;
    return open(changed);
  };
  for (const char* name :
       {"../a.safetensors", "/a.safetensors", "", ".", "..", "x/a.safetensors", "b.safetensors", "c.safetensors", "missing.safetensors"}) {
    CAPTURE(name);
    CHECK(with(name) != "");
  }
  CHECK(with(7).find(norm) != std::string::npos);
  Json less = map;
  less.erase(norm);
  CHECK(open(less).find(norm) != std::string::npos);
  Json more = map;
  more["model.other"] = "a.safetensors";
  CHECK(open(more).find("model.other") != std::string::npos);
  CHECK(open(Json::object()) != "");
  CHECK(open(7) != "");
  for (const char* text : {"", "[]", "{}", "{\"weight_map\": null}"}) {
    overwrite(index, text);
    CHECK(refusal([&] { WeightFiles::open(dir, config); }) != "");
  }
  // A tensor in both shards.
  weights.write(folder / "b.safetensors", [&](const std::string& name) { return second(name) || name == norm; });
  CHECK(open(map).find(norm) != std::string::npos);
  write_all();
  CHECK(open(map) == "");
  // model.safetensors comes before any index.
  overwrite(index, "broken");
  weights.write(folder / "model.safetensors");
  CHECK(refusal([&] { WeightFiles::open(dir, config); }) == "");
  fs::remove(folder / "model.safetensors");
  fs::create_symlink("gone", folder / "model.safetensors");
  CHECK(open(map).find("model.safetensors") != std::string::npos);
}

TEST_CASE("the real weights of stories260k fit their configuration in every type") {
  const std::string dir = shared_data("data/models/stories260k");
  if (dir.empty()) SKIP("no shared data");
  const ModelConfig config = ModelConfig::load(dir);
  const WeightFiles files = WeightFiles::open(dir, config);
  for (const WeightSpec& spec : weight_specs(config)) {
    const auto n = static_cast<std::size_t>(spec.rows * spec.cols);
    std::vector<float> single(n);
    std::vector<double> wide(n);
    std::vector<bf16> brain(n);
    read(files, spec, single.data(), DType::f32);
    read(files, spec, wide.data(), DType::f64);
    read(files, spec, brain.data(), DType::bf16);
    for (std::size_t i = 0; i < n; ++i)
      if (wide[i] != single[i] || std::fabs(to_float(brain[i]) - single[i]) > std::fabs(single[i]) * 0x1p-8f)
        FAIL(spec.name << " element " << i);
  }
}
