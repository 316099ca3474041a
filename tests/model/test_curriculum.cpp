// Training through stages: what a step runs, where the optimiser begins anew, resuming, and which validation is the best.
#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>

#include "engine/files/json.h"
#include "engine/files/safetensors.h"
#include "engine/files/writers.h"
#include "models/decode.h"
#include "models/open_model.h"
#include "models/validation.h"
#include "tests/model/train_rig.h"

using namespace kava;
using Catch::Approx;
namespace fs = std::filesystem;
using Strings = std::vector<std::string>;

namespace {

Strings sets_of(const std::string& method, Strings more = {}) {
  Strings sets = {"method=" + method,   "data.train=[\"" + kGolden + "data/steps.jsonl\"]",
                  "latent.token_init=", "model.dtype=f64",
                  "train.warmup=0",     "lora.dropout=0.1"};
  sets.insert(sets.end(), more.begin(), more.end());
  return sets;
}

std::vector<double> values(const TinyRun& run) {
  std::vector<double> all;
  for (const Parameter& p : run.model->parameters.all())
    for (const Tensor& t :
         {p.value, run.model->parameters.part(run.model->parameters.m(), p), run.model->parameters.part(run.model->parameters.v(), p)})
      for (double x : run.model->parameters.get(t)) all.push_back(x);
  return all;
}

double square_of_first_moments(const TinyRun& run) {
  double sum = 0;
  for (const Parameter& p : run.model->parameters.all())
    for (double x : run.model->parameters.get(run.model->parameters.part(run.model->parameters.m(), p))) sum += x * x;
  return sum;
}

}  // namespace

TEST_CASE("a run goes through coconut's stages and says so") {
  TinyRun run(sets_of("coconut", {"train.epochs=5", "stages.epochs=1", "coconut.thoughts=1", "coconut.max_stage=2"}));
  Trainer trainer(*run.model, run.samples, {});
  std::vector<int64_t> stages, latents;
  std::vector<double> left;
  while (!trainer.state().finished()) {
    const StepReport r = trainer.step();
    REQUIRE(r.stage);
    stages.push_back(*r.stage), latents.push_back(r.latents), left.push_back(r.left);
  }
  CHECK(stages == std::vector<int64_t>{0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3});
  CHECK(latents == std::vector<int64_t>{0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2});
  double whole = 0;
  for (std::size_t i = 0; i < 3; ++i) whole += left[i] * (i < 2 ? 2 : 1);
  CHECK(whole == Approx(28));  // tokens of all traces
  CHECK(left.back() == 0);
}

TEST_CASE("the moments begin at zero again where the curriculum says") {
  const Strings more = {"train.epochs=4", "stages.epochs=2", "coconut.max_stage=1", "train.batch=5"};
  auto moments_after = [&](const std::string& reset, int steps, const std::string& rate = "train.lr=0") {
    Strings sets = sets_of("coconut", more);
    sets.push_back("stages.reset_optimizer=" + reset), sets.push_back(rate), sets.push_back("lora.dropout=0");
    TinyRun run(sets);
    Trainer trainer(*run.model, run.samples, {});
    for (int i = 0; i < steps; ++i) trainer.step();
    return std::pair(square_of_first_moments(run), trainer.state().moment_updates);
  };
  // Without a rate the gradient g of a stage is constant: a first moment is 0.1 g after one step and 0.19 g after two.
  const auto one = moments_after("never", 1), two = moments_after("never", 2);
  CHECK(two.first == Approx(one.first * 1.9 * 1.9));
  CHECK((one.second == 1 && two.second == 2));
  CHECK(moments_after("epoch", 2).first == Approx(one.first));
  CHECK(moments_after("epoch", 2).second == 1);
  CHECK(moments_after("stage", 2) == two);
  CHECK(moments_after("stage", 3).second == 1);
  CHECK(moments_after("never", 3).second == 3);
}

TEST_CASE("a resumed curriculum has the bytes of an uninterrupted one, inside a stage and where it changes") {
  const std::string method = GENERATE("coconut", "icot");
  const int stop = GENERATE(2, 3, 4, 6);
  CAPTURE(method, stop);
  const Strings more = method == "coconut" ? Strings{"stages.epochs=1", "stages.mix=0.3", "coconut.thoughts=1"}
                                           : Strings{"icot.remove_per_epoch=2", "icot.smoothing=0.5"};
  Strings sets = sets_of(method, more);
  sets.push_back("train.epochs=4");
  TinyRun whole(sets);
  Trainer all(*whole.model, whole.samples, {});
  while (!all.state().finished()) all.step();

  const TempFolder folder;
  TinyRun first(sets), second(sets, 2);
  Trainer before(*first.model, first.samples, {});
  for (int i = 0; i < stop; ++i) before.step();
  FolderWriter written(folder.path() / "state");
  save_training_state(written, *first.model, before.state());
  written.commit();
  load_optimizer(*second.model, folder.path() / "state");
  Trainer after(*second.model, second.samples, load_training_state(folder.path() / "state"));
  while (!after.state().finished()) after.step();
  CHECK(values(second) == values(whole));
  CHECK(after.state().moment_updates == all.state().moment_updates);
}

TEST_CASE("a batch of mixed stages cut into forwards has the gradients of the whole") {
  for (const Strings& more : {Strings{"method=coconut", "stages.fixed=1", "stages.mix=0.7", "coconut.thoughts=1"},
                              Strings{"method=icot", "stages.fixed=1", "icot.smoothing=0.4"}}) {
    Strings whole = sets_of("coconut", more), cut = whole;
    for (Strings* s : {&whole, &cut}) s->push_back("train.batch=5"), s->push_back("train.epochs=1");
    cut.push_back("train.micro_batch=2");
    TinyRun a(whole), b(cut);
    Trainer one(*a.model, a.samples, {}), three(*b.model, b.samples, {});
    const StepReport ra = one.step(), rb = three.step();
    CHECK(ra.loss == Approx(rb.loss).epsilon(1e-12));
    CHECK(ra.grad_norm == Approx(rb.grad_norm).epsilon(1e-12));
    CHECK((ra.latents == rb.latents && ra.left == rb.left));
  }
}

TEST_CASE("frozen new rows keep their bytes, and the gradient still passes through the latents") {
  TinyRun run(sets_of("coconut", {"stages.fixed=2", "latent.tokens=frozen", "train.trainable=lora", "train.epochs=3"}));
  const std::vector<double> before = run.model->parameters.get(run.model->parameters.at("new_tokens.weight").value);
  Trainer trainer(*run.model, run.samples, {});
  while (!trainer.state().finished()) trainer.step();
  CHECK(run.model->parameters.get(run.model->parameters.at("new_tokens.weight").value) == before);
}

namespace {

struct Validated {
  std::vector<int64_t> stages;
  int64_t best = -1;
  std::vector<Json> lines;
};

// A run whose early validations would win.
Validated validated(const Strings& sets) {
  TinyRun run(sets);
  const TempFolder folder;
  RunFolder out(folder.path() / "run");
  TrainingState state;
  out.open(run.config, state);
  Trainer trainer(*run.model, run.samples, state);
  Validated v;
  TrainingHooks hooks;
  hooks.validate = [&](Arena&, int64_t stage) {
    v.stages.push_back(stage);
    Validation validation;
    validation.score = 1.0 / static_cast<double>(v.stages.size());
    return std::optional(validation);
  };
  CHECK(trainer.run(&out, hooks));
  if (trainer.state().best) v.best = trainer.state().best->step;
  v.lines = lines_of(folder.path() / "run/metrics.jsonl");
  return v;
}

}  // namespace

TEST_CASE("only validations of the last stage can be the best, and without one the last checkpoint is") {
  const Strings more = {"train.epochs=4", "stages.epochs=1", "coconut.max_stage=1", "data.valid=" + kGolden + "data/steps.jsonl"};
  const Validated last = validated(sets_of("coconut", more));
  CHECK(last.stages == std::vector<int64_t>{0, 1, 2, 2});
  CHECK(last.best == 9);
  CHECK(last.lines.front().at("stage") == 0);
  CHECK(last.lines.front().contains("left"));
  Strings any = sets_of("coconut", more);
  any.push_back("stages.best=any");
  CHECK(validated(any).best == 3);

  const Strings few = {"train.epochs=3", "icot.remove_per_epoch=1", "icot.smoothing=0"};
  CHECK(validated(sets_of("icot", few)).best == 9);
  // Nothing is left from the second epoch on.
  Strings soon = sets_of("icot", few);
  soon.push_back("icot.remove_all_from=1");
  CHECK(validated(soon).best == 6);
}

TEST_CASE("a longer run keeps the best of a shorter one only where its stage is still the last") {
  const auto best_of_longer = [](const char* method, const Strings& more, const std::string& longer, int64_t epochs = 1) {
    Strings sets = sets_of(method, more);
    sets.push_back(longer);
    TinyRun run(sets);
    TrainingState state;
    state.step = state.total_steps = state.validated_step = 3 * epochs, state.max_steps = 0, state.epochs = epochs,
    state.micro_batch = run.config.train.batch;
    state.best = Best{state.step, 1.0, 0.5}, state.last_stage = 0;
    return Trainer(*run.model, run.samples, state).state().best.has_value();
  };
  const Strings stages = {"stages.epochs=1", "coconut.max_stage=1", "stages.hold=1"};
  CHECK(best_of_longer("coconut", stages, "train.epochs=2"));
  CHECK_FALSE(best_of_longer("coconut", stages, "train.epochs=4"));
  CHECK(best_of_longer("coconut", {"stages.best=any", "stages.epochs=1"}, "train.epochs=4"));
  // Traces of which something was left; then none.
  CHECK_FALSE(best_of_longer("icot", {"icot.remove_per_epoch=1", "icot.smoothing=0"}, "train.epochs=3"));
  CHECK(best_of_longer("icot", {"icot.remove_per_epoch=1", "icot.remove_all_from=1", "icot.smoothing=0"}, "train.epochs=3", 2));
}

TEST_CASE("a free prompt is written by the model, and the second EOS ends an answer with separators") {
  TinyRun run(sets_of("icot", {"stages.fixed=3"}));
  Arena arena(*run.ops);
  DecodeOptions options;
  options.max_new_tokens = 6;
  std::vector<Sample> samples(run.samples.begin(), run.samples.begin() + 1);
  const std::vector<DecodeResult> written = decode(*run.model, arena, samples, options);
  REQUIRE(written[0].ids.size() == 6);
  CHECK(written[0].passes == 6);
  // The model's first token as EOS: it is no end yet where a separator comes first.
  options.eos = written[0].ids[0];
  const auto again = std::ranges::find(written[0].ids.begin() + 1, written[0].ids.end(), options.eos);
  const std::vector<DecodeResult> ended = decode(*run.model, arena, samples, options);
  CHECK(ended[0].ids.size() == static_cast<std::size_t>(again - written[0].ids.begin()));
  CHECK(ended[0].hit_limit == (again == written[0].ids.end()));

  TinyRun plain(sets_of("icot", {"stages.fixed=3", "data.separator=none"}));
  CHECK(decode(*plain.model, arena, samples, options)[0].ids.empty());
  TinyRun forced(sets_of("icot", {"stages.fixed=3", "decode.prompt=forced"}));
  options.eos = -1;
  const Recipe recipe = decoding_recipe(forced.config);
  CHECK(prompt_length(recipe, samples[0]) == std::ssize(samples[0].question) + samples[0].prompt);
}

TEST_CASE("coconut's forward passes are one, one for each latent, one for eot, and one for each further token") {
  TinyRun run(sets_of("coconut", {}));
  Arena arena(*run.ops);
  DecodeOptions options;
  options.max_new_tokens = 4;
  auto passes = [&](std::optional<int64_t> stage) {
    options.stage = stage;
    const DecodeResult r = decode(*run.model, arena, std::span(run.samples).first(1), options)[0];
    CHECK(r.passes == r.passes_merged + 1);
    return r.passes;
  };
  CHECK(passes(std::nullopt) == 1 + 6 + 1 + 3);
  CHECK(passes(4) == 1 + 6 + 1 + 3);
  CHECK(passes(1) == 1 + 2 + 1 + 3);
  CHECK(passes(0) == 1 + 1 + 3);
  TinyRun pause(sets_of("coconut", {"coconut.feedback=none"}));
  CHECK(decode(*pause.model, arena, std::span(run.samples).first(1), options)[0].passes == 1 + 1 + 3);
}

TEST_CASE("a run is decoded with the latents of the stage that it reaches") {
  const auto trained = [](const Strings& more) {
    Strings sets = sets_of("coconut", {"train.epochs=2", "stages.epochs=1"});
    sets.insert(sets.end(), more.begin(), more.end());
    TinyRun run(sets);
    const TempFolder folder;
    {
      RunFolder out(folder.path() / "run");
      out.open(run.config, {});
      Trainer trainer(*run.model, run.samples, {});
      CHECK(trainer.run(&out, {}));
      out.publish_adapter(trainer.state().step);
    }
    const auto latents = [&] { return decoding_of(open_model((folder.path() / "run").string()).config, {}).recipe.latents; };
    const int32_t of_checkpoint = latents();
    const auto named = SafetensorsFile::open(folder / "run/adapter/kava.safetensors").metadata().at("kava.latents");
    CHECK(named == std::to_string(of_checkpoint));
    fs::remove(folder.path() / "run/best");
    CHECK(latents() == of_checkpoint);
    return of_checkpoint;
  };
  CHECK(trained({}) == 2);
  CHECK(trained({"stages.first=1"}) == 4);
  CHECK(trained({"stages.fixed=3"}) == 6);
  CHECK(trained({"train.epochs=6"}) == 6);
}
