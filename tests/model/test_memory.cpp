// Who owns a model's memory, and how much of it there is.
#include <sys/syscall.h>

#include <catch2/catch_test_macros.hpp>
#include <cerrno>
#include <cmath>

#include "engine/device/buffer.h"
#include "engine/files/safetensors.h"
#include "models/adapter.h"
#include "models/decode.h"
#include "models/footprint.h"
#include "tests/golden_config.h"
#include "tests/io/denied_calls.h"
#include "tests/model/train_rig.h"

namespace kava {

namespace {

const std::vector<std::vector<std::string>> kForms = {
    {}, {"train.trainable=all"}, {"kv.projection=true"}, {"train.trainable=all", "method=full_cot"}, {"method=full_cot"}};

// One copy of every weight in storage type.
int64_t least_bytes(const Model& model) {
  int64_t elements = 0;
  for (const WeightSpec& w : weight_specs(model.shape)) elements += w.rows * w.cols;
  for (const TrainableSpec& t : trainable_specs(model.config, model.shape))
    if (t.start != TrainableSpec::Start::base) elements += t.rows * t.cols;
  return elements * size_of(model.storage);
}

// Parameters begin on boundaries, and the B of a group lie in its joined tensor too, beside zeros.
int64_t gaps_and_joined(const Model& model) {
  int64_t elements = static_cast<int64_t>(model.parameters.all().size()) * 16;
  for (const LayerWeights& l : model.layers)
    for (const TrainedGroup* g : {&l.qkv, &l.o, &l.gate_up, &l.down}) elements += g->map.joined.rows * g->map.ranks();
  return elements * size_of(model.storage);
}

int64_t rotary_bytes(const Model& model) { return 2 * model.cosine.count() * size_of(model.cosine.dtype); }

std::vector<std::vector<double>> values_of(const Model& model) {
  std::vector<std::vector<double>> all;
  for (const Parameter& p : model.parameters.all()) all.push_back(model.parameters.get(p.compute));
  return all;
}

}  // namespace

TEST_CASE("a buffer gives its memory back once") {
  const std::unique_ptr<Ops> ops = make_cpu_ops(1);
  {
    Buffer a(*ops, DType::bf16, 3, 5), b(*ops, DType::f64, 1, 7), none;
    CHECK(ops->held_bytes() == 30 + 56);
    CHECK(a.tensor().cols == 5);
    CHECK(!none.tensor());
    Buffer c = std::move(a);
    CHECK(ops->held_bytes() == 30 + 56);
    b = std::move(c);
    CHECK(b.tensor().count() == 15);
  }
  CHECK(ops->held_bytes() == 0);
}

TEST_CASE("a model that cannot be made gives back what it had") {
  TempFolder folder;
  std::filesystem::copy(source_dir() + "/tests/golden/models/llama", folder.path(), std::filesystem::copy_options::recursive);
  TinyRun run({"model.path=\"" + folder.path().string() + "\""});
  const SafetensorsFile file = SafetensorsFile::open(folder / "model.safetensors");
  std::vector<TensorOut> tensors;
  std::vector<std::vector<float>> values;
  for (const TensorInfo& t : file.tensors()) {
    values.emplace_back(static_cast<std::size_t>(t.count()));
    file.read_as(t, DType::f32, values.back().data());
    if (t.name == "model.norm.weight") values.back()[1] = std::nanf("");
  }
  for (std::size_t i = 0; i < values.size(); ++i)
    tensors.push_back({file.tensors()[i].name, "F32", file.tensors()[i].shape, values[i].data()});
  write_safetensors(folder / "model.safetensors", tensors);
  const int64_t before = run.ops->held_bytes();
  CHECK(before > 0);
  for (Values from : {Values::start, Values::loaded}) CHECK_THROWS_AS(Model(*run.ops, run.config, run.text.shape, from), Error);
  CHECK(run.ops->held_bytes() == before);
}

TEST_CASE("inference keeps the weights in storage type and nothing else") {
  for (const char* dtype : {"bf16", "f32"})
    for (std::vector<std::string> sets : kForms) {
      sets.push_back(std::string("model.dtype=") + dtype);
      CAPTURE(sets);
      TinyRun run(sets);
      const TempFolder folder;
      save_adapter(*run.model, folder.path().string());
      const std::unique_ptr<Ops> ops = make_cpu_ops(1);
      Model model(*ops, run.config, run.text.shape, Values::loaded, ModelUse::inference);
      load_adapter(model, folder.path().string());
      CHECK(ops->held_bytes() == inference_bytes(run.config, run.text.shape));
      CHECK(ops->held_bytes() >= least_bytes(model));
      CHECK(ops->held_bytes() <= least_bytes(model) + gaps_and_joined(model));
      CHECK(values_of(model) == values_of(*run.model));
      Arena arena(*ops), trained(*run.ops);
      DecodeOptions options;
      options.max_new_tokens = 5;
      const std::vector<DecodeResult> a = decode(model, arena, run.samples, options), b = decode(*run.model, trained, run.samples, options);
      for (std::size_t i = 0; i < a.size(); ++i) CHECK(a[i].ids == b[i].ids);
    }
}

TEST_CASE("the rows of a step are counted without its layout") {
  int cases = 0;
  for (const auto& entry : std::filesystem::directory_iterator(kGolden + "cases")) {
    if (entry.path().extension() != ".toml") continue;
    const RunConfig config = golden_config(entry.path().stem().string(), {});
    const TextModel text = open_text_model(config.model.path);
    LeftOut left_out;
    int64_t rows = 0, index = 0;
    const std::vector<Sample> samples = read_samples(text, config, read_train_files(config), &left_out);
    const Recipe recipe = recipe_of(config);
    for (const Sample& s : samples) rows += step_rows(config, recipe, s, index++);
    INFO(entry.path().string());
    CHECK(rows == make_layout(config, recipe, samples, 0).rows);
    ++cases;
  }
  REQUIRE(cases == 85);
}

TEST_CASE("where an adapter is read nothing is drawn") {
  for (std::vector<std::string> sets : kForms) {
    CAPTURE(sets);
    const TinyRun run(sets);
    const Model model(*run.ops, run.config, run.text.shape, Values::loaded);
    for (const Parameter& p : model.parameters.all())
      for (double x : model.parameters.get(p.value)) CHECK(x == 0);
  }
}

TEST_CASE("starts do not depend on the number of threads") {
  for (const char* init : {"pretrained", "random"}) {
    const TinyRun one({std::string("model.init=") + init}, 1), three({std::string("model.init=") + init}, 3);
    CHECK(values_of(*one.model) == values_of(*three.model));
    CHECK(one.model->parameters.get(one.model->embedding) == three.model->parameters.get(three.model->embedding));
    CHECK(one.model->parameters.get(one.model->layers[1].down.map.joined) ==
          three.model->parameters.get(three.model->layers[1].down.map.joined));
  }
}

TEST_CASE("starts on one thread begin no other") {
#if defined(KAVA_ASAN) || defined(KAVA_TSAN)
  SKIP("a sanitizer has threads of its own");
#endif
  for (const char* init : {"model.init=pretrained", "model.init=random"})
    CHECK(ends_well_without({{SYS_clone3, EAGAIN}, {SYS_clone, EAGAIN}}, [&] { const TinyRun run({init}, 1); }));
}

TEST_CASE("longer rotary tables take the place of the shorter ones") {
  const TinyRun run;
  const std::unique_ptr<Ops> ops = make_cpu_ops(1);
  Model model(*ops, run.config, run.text.shape);
  const int64_t before = ops->held_bytes();
  for (int64_t positions : {3, 100, 1000}) model.ensure_positions(positions);
  CHECK(ops->held_bytes() == before + rotary_bytes(model));
}

}  // namespace kava
