// What a step asks of a backend besides its ops.
#include <catch2/catch_test_macros.hpp>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>

#include "engine/device/op_observer.h"
#include "models/curriculum.h"
#include "simt.h"
#include "tests/golden_config.h"
#include "tests/model/train_rig.h"
#include "tests/ops/op_rig.h"

using namespace kava;
using namespace kava::test;

namespace {

struct Backend {
  const char* name;
  std::function<std::unique_ptr<Ops>()> make;
};

std::vector<Backend> backends() {
  std::vector<Backend> all{{"cpu", [] { return make_cpu_ops(1); }}};
  if (simt::supported()) all.push_back({"cuda", make_emulated_cuda});
  return all;
}

// What of a step's work a run has no use for twice, or at all.
struct WorkWatcher final : OpObserver {
  const Tensor gradient;
  int sums = 0, heads = 0, judged = 0;
  explicit WorkWatcher(const Model& model) : gradient(model.parameters.grad()) {}
  void before(const OpCall& call) override {
    const std::string_view name = call.name;
    const auto* at = static_cast<const char*>(call.inputs.empty() ? nullptr : call.inputs[0].data);
    const auto* begin = static_cast<const char*>(gradient.data);
    if (name == "sum_squares") sums += at >= begin && at < begin + gradient.count() * size_of(gradient.dtype);  // any part of it
    if (name == "head_argmax") ++judged;
    if (name != "head_cross_entropy") return;
    ++heads;
    for (const Tensor& t : call.outputs) judged += t && t.dtype == DType::i32;
  }
};

// A batch's gradients and its update, and what was asked for in between.
void check_step(Ops& ops, const RunConfig& config, int64_t step) {
  const TextModel text = open_text_model(config.model.path);
  LeftOut left_out;
  const std::vector<Sample> samples = read_samples(text, config, read_train_files(config), &left_out);
  Model model(ops, config, text.shape);
  Arena arena(ops);
  const Tensor sums = arena.alloc(DType::f64, 1, kStepSums), grad_square = arena.alloc(DType::f64, 1, 1);
  StepOptions options;
  options.recipe = Curriculum(config, 1).recipe(step);
  const BatchTotals totals = batch_totals(config, *options.recipe, samples);
  const auto run = [&] {
    OpCounter counter(ops);
    const Observed observed(ops, counter);
    add_step(model, arena, samples, totals, options, sums);
    model.parameters.update(arena, {1e-4, 0.9, 0.999, 1e-8, 0.1, 2}, grad_square, sums);
    return counter.counts();
  };
  const OpCounter::Counts first = run(), second = run();
  CHECK(second.uploads == 1);
  CHECK(second.reads == 0);
  CHECK(second.allocations == 0);
  CHECK(second.calls == first.calls);
  CHECK(second.launches == first.launches);
  CHECK((second.launches > second.calls) == ops.queues());
}

}  // namespace

TEST_CASE("a forward with its backward sends all lists at once, reads nothing and asks for no memory, in every method on every backend") {
  take_schedule(0);
  for (const Backend& backend : backends()) {
    int cases = 0;
    for (const auto& entry : std::filesystem::directory_iterator(kGolden + "cases")) {
      if (entry.path().extension() != ".toml") continue;
      const std::string name = entry.path().stem().string();
      INFO(name << " on " << backend.name);
      const std::unique_ptr<Ops> ops = backend.make();
      check_step(*ops, golden_config(name, {"model.dtype=f32"}), 0);
      ++cases;
    }
    CHECK(cases == 85);
  }
}

TEST_CASE("nor does it with dropout, a teacher by itself, later stages or another recompute") {
  take_schedule(0);
  const std::vector<std::string> forms[] = {{"method=codi", "latent.iterations=5", "codi.target=separate", "lora.dropout=0.3"},
                                            {"method=codi_exact", "latent.iterations=5", "lora.dropout=0.3"},
                                            {"method=icot"},
                                            {"method=coconut", "latent.token_init="},
                                            {"train.recompute=cheap"},
                                            {"train.recompute=block", "kv.keys=pre_rope", "kv.projection=true"}};
  for (const Backend& backend : backends())
    for (std::vector<std::string> form : forms) {
      INFO(form[0] << " on " << backend.name);
      form.insert(form.end(), {"model.dtype=bf16", "model.adapter=\"\""});
      const std::unique_ptr<Ops> ops = backend.make();
      check_step(*ops, golden_config("kava_defaults", form), 2);
    }
}

TEST_CASE("a run's step sums its gradient's squares once, reads its scalars once, and judges no prediction") {
  take_schedule(0);
  for (const Backend& backend : backends())
    for (const char* method : {"method=kava", "method=codi", "method=no_cot"}) {
      INFO(method << " on " << backend.name);
      TinyRun run({method}, 1, backend.make());
      Trainer trainer(*run.model, run.samples, {});
      trainer.step();
      WorkWatcher work(*run.model);
      OpCounter counter(*run.ops);
      const Observed watched(*run.ops, work), counted(*run.ops, counter);
      trainer.step();
      CHECK(counter.counts().reads == 1);
      CHECK(work.sums == 1);
      CHECK((work.heads > 0 && work.judged == 0));
    }
}

// A validation keeps nothing of a layer behind it, so that what the objective reads is taken on the way.
TEST_CASE("a step without a backward has the losses of one with it, in every golden configuration") {
  int cases = 0;
  for (const auto& entry : std::filesystem::directory_iterator(kGolden + "cases")) {
    if (entry.path().extension() != ".toml") continue;
    const std::string name = entry.path().stem().string();
    INFO(name);
    const RunConfig config = golden_config(name, {});
    const TextModel text = open_text_model(config.model.path);
    LeftOut left_out;
    const std::vector<Sample> samples = read_samples(text, config, read_train_files(config), &left_out);
    const std::unique_ptr<Ops> ops = make_cpu_ops(1);
    Model model(*ops, config, text.shape);
    Arena arena(*ops);
    const BatchTotals totals = batch_totals(config, recipe_of(config), samples);
    const auto losses = [&](bool backward) {
      StepOptions options;
      options.dropout = false, options.backward = backward;
      const StepLosses l = run_step(model, arena, samples, totals, options);
      return std::vector{l.student_ce, l.teacher_ce, l.kv, l.codi};
    };
    CHECK(losses(false) == losses(true));
    ++cases;
  }
  REQUIRE(cases == 85);
}

TEST_CASE("a run's tables of rotations reach its longest sample from the start") {
  for (const char* method : {"method=kava", "method=coconut", "method=icot"}) {
    TinyRun run({method, "train.batch=1", "train.epochs=1", "latent.token_init="});
    Trainer trainer(*run.model, run.samples, {});
    const Tensor before = run.model->cosine;
    REQUIRE(before);
    for (std::size_t i = 0; i < run.samples.size(); ++i) trainer.step();
    CHECK(run.model->cosine.data == before.data);
  }
}
