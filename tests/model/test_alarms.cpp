// What training measures beside its steps, and what it warns of.
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_floating_point.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include "engine/device/host.h"
#include "models/alarms.h"
#include "models/recipe.h"
#include "models/run_folder.h"
#include "tests/model/train_rig.h"
#include "tests/run_snapshot.h"

using namespace kava;
using Catch::Matchers::ContainsSubstring;
using Catch::Matchers::WithinRel;

TEST_CASE("measuring the terms' gradients changes no byte of a run") {
  const auto run = [](const std::string& every, std::vector<StepReport>* reports) {
    TinyRun tiny({"train.max_steps=3", "train.micro_batch=1", "train.log_grads_every=" + every});
    Trainer trainer(*tiny.model, tiny.samples, {});
    for (int i = 0; i < 3; ++i) reports->push_back(trainer.step());
    return tiny.model->parameters.get(tiny.model->parameters.value());
  };
  std::vector<StepReport> plain, measured;
  const std::vector<double> a = run("0", &plain), b = run("2", &measured);
  CHECK(a == b);
  for (std::size_t i = 0; i < 3; ++i) {
    CHECK(plain[i].loss == measured[i].loss);
    CHECK(plain[i].grad_norm == measured[i].grad_norm);
    CHECK(plain[i].term_grads.empty());
    CHECK(measured[i].term_grads.size() == (i == 1 ? 4u : 0u));
  }
  for (const auto& [name, norm] : measured[1].term_grads) {
    CAPTURE(name);
    CHECK(norm > 0);
  }
}

TEST_CASE("a term's gradient is that of a step with this term alone, its weight included") {
  const auto step = [](std::vector<std::string> sets) {
    sets.insert(sets.end(), {"train.max_steps=1", "train.log_grads_every=1", "lora.dropout=0.0"});
    TinyRun tiny(sets);
    Trainer trainer(*tiny.model, tiny.samples, {});
    return trainer.step();
  };
  const StepReport all = step({"codi.weight=3.0"});
  CHECK_THAT(step({"loss.student=0.0", "loss.teacher=0.0", "kv.weight=0.0", "codi.weight=3.0"}).grad_norm,
             WithinRel(all.term_grads.at("grad_codi"), 1e-6));
  CHECK_THAT(step({"loss.teacher=0.0", "kv.weight=0.0", "codi.weight=0.0"}).grad_norm,
             WithinRel(all.term_grads.at("grad_student_ce"), 1e-6));
  CHECK_THAT(step({"loss.student=0.0", "kv.weight=0.0", "codi.weight=0.0"}).grad_norm,
             WithinRel(all.term_grads.at("grad_teacher_ce"), 1e-6));
  CHECK_THAT(step({"loss.student=0.0", "loss.teacher=0.0", "codi.weight=0.0"}).grad_norm, WithinRel(all.term_grads.at("grad_kv"), 1e-6));
  const StepReport chain = step({"method=full_cot"});
  CHECK(chain.term_grads.size() == 1);
  CHECK_FALSE(chain.latent_norm_ratio);
}

TEST_CASE("the latents' norm is that of what the last pass is fed, against the embeddings") {
  for (const char* trainable : {"lora", "all"}) {
    CAPTURE(trainable);
    TinyRun tiny({"train.batch=5", "train.micro_batch=2", "lora.dropout=0.0", std::string("train.trainable=") + trainable});
    const auto squares = [](const auto& values) {
      double sum = 0;
      for (double x : values) sum += x * x;
      return sum;
    };
    Dump dump;
    Arena arena(*tiny.ops);
    StepOptions options;
    options.dump = &dump, options.backward = false;
    run_step(*tiny.model, arena, tiny.samples, batch_totals(tiny.config, recipe_of(tiny.config), tiny.samples), options);
    const DumpTensor& inputs = dump.at("latent.inputs");
    const std::size_t pass = inputs.values.size() / static_cast<std::size_t>(inputs.shape[0]),
                      hidden = static_cast<std::size_t>(inputs.shape[3]);
    const std::span<const double> last(inputs.values.end() - static_cast<int64_t>(pass), inputs.values.end());
    double fed = 0;  // numbers: rows that no pass computes are zero
    for (std::size_t row = 0; row < pass; row += hidden) fed += squares(last.subspan(row, hidden)) > 0 ? static_cast<double>(hidden) : 0;
    const std::vector<double> embedding = to_host(*tiny.ops, tiny.model->embedding);
    const double rms = std::sqrt(squares(embedding) / static_cast<double>(embedding.size()));
    const StepReport first = Trainer(*tiny.model, tiny.samples, {}).step();
    REQUIRE(first.latent_norm_ratio);
    CHECK_THAT(*first.latent_norm_ratio, WithinRel(std::sqrt(squares(last) / fed) / rms, 1e-5));
  }
}

TEST_CASE("alarms are raised with a remedy, said once and counted") {
  RunConfig config;
  config.valid.floor = 0.05, config.train.warmup = 0.1;
  Alarms alarms(config, 100);
  Sample with, without;
  with.trace = {1};
  CHECK(alarms.start(std::vector{with, without}).empty());
  const auto rows = alarms.start(std::vector{with, without, without});
  REQUIRE(rows.size() == 1);
  CHECK_THAT(rows[0], ContainsSubstring("2 of 3 rows") && ContainsSubstring("data.drop_last_step = false"));
  StepReport report;
  report.step = 7, report.latent_norm_ratio = 9.9;
  report.term_grads = {{"grad_kv", 0.94}, {"grad_codi", 0.06}};
  CHECK(alarms.step(report).empty());
  report.latent_norm_ratio = 10.1, report.term_grads = {{"grad_kv", 0.96}, {"grad_codi", 0.04}};
  const auto both = alarms.step(report);
  REQUIRE(both.size() == 2);
  CHECK_THAT(both[0], ContainsSubstring("10.1 times as large as the embeddings; lower train.lr"));
  CHECK_THAT(both[1], ContainsSubstring("grad_kv is 96.0 %") && ContainsSubstring("weight"));
  report.updated = false;
  CHECK(alarms.step(report).empty());
  Validation low;
  low.score = 0.04;
  CHECK(alarms.validation(10, low).empty());  // the warm-up
  const auto floor = alarms.validation(11, low);
  REQUIRE(floor.size() == 1);
  CHECK_THAT(floor[0], ContainsSubstring("4.0 % strict") && ContainsSubstring("valid.floor = 5.0 %"));
  low.score = 0.05;
  CHECK(alarms.validation(20, low).empty());
  CHECK_THAT(alarms.summary(), ContainsSubstring("latents' norm 2 times") && ContainsSubstring("steps without an update 1 time") &&
                                   ContainsSubstring("grad_kv's share 2 times") &&
                                   ContainsSubstring("validation under valid.floor 1 time") &&
                                   ContainsSubstring("rows without a trace 1 time"));
}

TEST_CASE("an alarm of the latents' size names what would change it, and Coconut's plain states are of the model's") {
  const auto told = [](const std::function<void(RunConfig&)>& change) {
    RunConfig config;
    change(config);
    StepReport report;
    report.step = 1, report.latent_norm_ratio = 11;
    const std::vector<std::string> lines = Alarms(config, 100).step(report);
    return lines.empty() ? "" : lines[0];
  };
  CHECK_THAT(told([](RunConfig& c) { c.latent.projection_init = ProjectionInit::one; }),
             ContainsSubstring("set latent.projection_init = "));
  CHECK_THAT(told([](RunConfig& c) { c.latent.projection = false; }), ContainsSubstring("set latent.projection = true"));
  CHECK(told([](RunConfig& c) { c.method = Method::coconut, c.latent.projection = false; }).empty());
}

TEST_CASE("rows without a trace are warned of under every method that makes use of one") {
  const Sample empty;
  const auto lines = [&](Method method, const std::vector<std::string>& sets = {}) {
    TempFolder folder;
    overwrite(folder / "c.toml", "method = \"" + name_of(method) + "\"\n[model]\npath = \"m\"\n[data]\ntrain = [\"rows\"]\n");
    const RunConfig config = load_config(folder / "c.toml", sets);
    return Alarms(config, 100).start(std::vector{empty});
  };
  for (const auto& [method, lost] :
       {std::pair(Method::kava, "L_KV has no target"), std::pair(Method::codi, "the teacher sees no chain"),
        std::pair(Method::codi_exact, "the teacher sees no chain"), std::pair(Method::pccot, "the teacher sees no chain"),
        std::pair(Method::icot, "there is no chain to learn"), std::pair(Method::coconut, "there is no chain to learn"),
        std::pair(Method::full_cot, "there is no chain to learn")}) {
    CAPTURE(name_of(method));
    const std::vector<std::string> told = lines(method);
    REQUIRE(told.size() == 1);
    CHECK_THAT(told[0], ContainsSubstring("1 of 1 rows have no trace token (n_c = 0), so " + std::string(lost)));
    // Where no step is dropped, keeping it is no remedy.
    const bool dropped = method != Method::icot && method != Method::coconut && method != Method::full_cot;
    CHECK((told[0].find("drop_last_step") != std::string::npos) == dropped);
  }
  CHECK(lines(Method::no_cot).empty());
  const std::vector<std::string> unscaled = lines(Method::no_cot, {"lora.alpha=0"});
  REQUIRE(unscaled.size() == 1);
  CHECK_THAT(unscaled[0], ContainsSubstring("lora.alpha = 0 scales LoRA by 0"));
  // Stages that leave nothing of a trace.
  CHECK(lines(Method::coconut, {"coconut.max_stage=3", "stages.fixed=4"}).empty());
  CHECK(lines(Method::coconut, {"coconut.max_stage=3", "stages.fixed=4", "stages.mix=0.5"}).size() == 1);
  CHECK(lines(Method::coconut, {"coconut.max_stage=3", "stages.fixed=3"}).size() == 1);
  CHECK(lines(Method::icot, {"icot.remove_all_from=8", "stages.fixed=8"}).empty());
  CHECK(lines(Method::kava, {"kv.weight=0", "codi.weight=0", "loss.teacher=0"}).empty());
}

TEST_CASE("spikes stand apart from what was before, however that varies") {
  std::vector<double> steady;
  for (int i = 0; i < 40; ++i) steady.push_back(2 + 0.05 * ((i * 7) % 5));
  CHECK(Alarms::is_spike(4, steady));
  CHECK_FALSE(Alarms::is_spike(2.3, steady));
  CHECK_FALSE(Alarms::is_spike(0.1, steady));                                          // a fall is none
  CHECK_FALSE(Alarms::is_spike(4, std::vector(steady.begin(), steady.begin() + 19)));  // too few to tell
  // One earlier spike moves the mean and the variance, not the median.
  steady[20] = 1e6;
  CHECK(Alarms::is_spike(4, steady));
  // Where nothing varies a small rise is none.
  CHECK_FALSE(Alarms::is_spike(2.1, std::vector<double>(30, 2.0)));
  CHECK(Alarms::is_spike(2.3, std::vector<double>(30, 2.0)));
}

TEST_CASE("every spike is told, and a long rise is not one for ever") {
  RunConfig config;
  Alarms alarms(config, 1000);
  StepReport report;
  const auto told = [&](double loss) {
    ++report.step, report.loss = loss;
    return alarms.step(report);
  };
  report.grad_norm = 1;
  for (int i = 0; i < 100; ++i) CHECK(told(3 + 0.01 * (i % 3)).empty());
  const auto first = told(9), second = told(8);
  REQUIRE((first.size() == 1 && second.size() == 1));
  CHECK_THAT(first[0], ContainsSubstring("step 101: a spike of the loss, 9; the median of the 100 steps before is 3.01"));
  CHECK_THAT(first[0], ContainsSubstring("lower train.lr"));
  int64_t spikes = 0;
  for (int i = 0; i < 100; ++i) spikes += std::ssize(told(6));
  CHECK(spikes == 48);  // until the rise is the median of the window
  report.grad_norm = 50;
  CHECK_THAT(told(6).at(0), ContainsSubstring("a spike of the gradient's norm, 50"));
  CHECK_THAT(alarms.summary(),
             ContainsSubstring("spikes of the loss 50 times") && ContainsSubstring("spikes of the gradient's norm 1 time"));
}

TEST_CASE("the terms' gradients are in the first line after every so many steps, wherever the run was cut") {
  const auto lines = [](int64_t stop_at) {
    const std::vector<std::string> sets{"train.max_steps=7", "train.log_every=2", "train.log_grads_every=3", "train.checkpoint_every=100"};
    const TempFolder folder;
    TrainingState state;
    for (const int64_t stop : {stop_at, int64_t{-1}}) {
      TinyRun run(sets);
      if (state.step > 0) load_optimizer(*run.model, folder.path() / "last");
      RunFolder out(folder.path());
      out.open(run.config, state);
      Trainer trainer(*run.model, run.samples, state);
      TrainingHooks hooks;
      hooks.stop = [&] { return trainer.state().step == stop; };
      if (trainer.run(&out, hooks)) break;
      state = load_training_state(folder.path() / "last");
      CHECK(state.step == stop);
    }
    return content_of(folder.path() / "metrics.jsonl");
  };
  const std::string whole = lines(-1);
  std::istringstream read(whole);
  for (std::string line; std::getline(read, line);) {
    const Json json = Json::parse(line);
    CAPTURE(line);
    CHECK(json.contains("grad_kv") == (json["step"] == 4 || json["step"] == 6));
  }
  for (int64_t stop = 1; stop < 7; ++stop) {
    CAPTURE(stop);
    CHECK(lines(stop) == whole);
  }
}
