#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cmath>
#include <numbers>

#include "engine/device/host.h"
#include "engine/files/json.h"
#include "engine/memory.h"
#include "models/validation.h"
#include "tests/model/train_rig.h"

using namespace kava;
using Catch::Approx;
namespace fs = std::filesystem;

namespace {

const std::string kAdapter = "model.adapter=" + kGolden + "adapters/llama";

std::vector<double> values_after(TinyRun& run, int64_t steps) {
  Trainer trainer(*run.model, run.samples, {});
  for (int64_t i = 0; i < steps; ++i) trainer.step();
  std::vector<double> all;
  for (const Parameter& p : run.model->parameters.all())
    for (double x : run.model->parameters.get(p.value)) all.push_back(x);
  return all;
}

}  // namespace

TEST_CASE("the learning rate warms up from zero and then follows its schedule") {
  RunConfig::Train t;
  t.lr = 1, t.warmup = 0.03, t.schedule = Schedule::cosine;
  // N = 100: W = 3
  CHECK(learning_rate(t, 0, 100) == 0);
  CHECK(learning_rate(t, 1, 100) == Approx(1.0 / 3));
  CHECK(learning_rate(t, 2, 100) == Approx(2.0 / 3));
  CHECK(learning_rate(t, 3, 100) == 1);
  CHECK(learning_rate(t, 99, 100) == Approx((1 + std::cos(std::numbers::pi * 96 / 97)) / 2));
  t.schedule = Schedule::linear;
  CHECK(learning_rate(t, 2, 100) == Approx(2.0 / 3));
  CHECK(learning_rate(t, 3, 100) == 1);
  CHECK(learning_rate(t, 52, 100) == Approx(48.0 / 97));
  t.schedule = Schedule::constant;
  CHECK(learning_rate(t, 1, 100) == Approx(1.0 / 3));
  CHECK(learning_rate(t, 99, 100) == 1);
  t.warmup = 0;
  CHECK(learning_rate(t, 0, 100) == 1);
  t.warmup = 1;
  CHECK(learning_rate(t, 99, 100) == Approx(0.99));
  t.warmup = 0.03;  // N = 10: W = ceil(0.3) = 1
  CHECK(learning_rate(t, 0, 10) == 0);
  CHECK(learning_rate(t, 1, 10) == 1);
}

TEST_CASE("a run takes epochs of whole batches and a partial one, or max_steps") {
  RunConfig::Train t;
  t.epochs = 3, t.batch = 2;
  CHECK(total_steps(t, 5) == 9);
  CHECK(total_steps(t, 1) == 3);
  t.max_steps = 4;
  CHECK(total_steps(t, 5) == 4);

  TinyRun run({"train.epochs=2"});
  Trainer trainer(*run.model, run.samples, {});
  std::vector<int64_t> sizes, epochs, seen;
  for (int i = 0; i < 6; ++i) {
    const StepReport r = trainer.step();
    sizes.push_back(r.batch_samples), epochs.push_back(r.epoch), seen.push_back(r.samples);
  }
  CHECK(sizes == std::vector<int64_t>{2, 2, 1, 2, 2, 1});
  CHECK(epochs == std::vector<int64_t>{0, 0, 0, 1, 1, 1});
  CHECK(seen == std::vector<int64_t>{2, 4, 5, 7, 9, 10});
  CHECK(trainer.state().finished());
}

TEST_CASE("an epoch trains on every sample once, in an order of its own") {
  // With lr = 0 the student's loss of an epoch's batches of one is the multiset of the samples' losses.
  TinyRun run({"train.epochs=2", "train.batch=1", "train.lr=0", "lora.dropout=0"});
  Trainer trainer(*run.model, run.samples, {});
  std::vector<double> first, second;
  for (int i = 0; i < 5; ++i) first.push_back(trainer.step().losses.student_ce);
  for (int i = 0; i < 5; ++i) second.push_back(trainer.step().losses.student_ce);
  CHECK(first != second);
  std::ranges::sort(first), std::ranges::sort(second);
  CHECK(first == second);
  CHECK(std::ranges::adjacent_find(first) == first.end());
}

TEST_CASE("the loss falls in every method, with LoRA and with all weights") {
  for (const char* method : {"kava", "pccot", "codi", "full_cot", "no_cot"})
    for (const char* trainable : {"lora", "all"}) {
      INFO(method << " " << trainable);
      TinyRun run({std::string("method=") + method, std::string("train.trainable=") + trainable, "train.batch=5", "train.max_steps=60",
                   "lora.dropout=0", "latent.count=3", "lora.rank=8"});
      Trainer trainer(*run.model, run.samples, {});
      const double before = trainer.step().loss;
      double after = before;
      while (!trainer.state().finished()) after = trainer.step().loss;
      CHECK(after < 0.8 * before);
    }
}

TEST_CASE("training gives the same bytes with one thread and with two") {
  for (const char* dtype : {"model.dtype=f32", "model.dtype=bf16", "model.dtype=f64"}) {
    INFO(dtype);
    TinyRun one({dtype, kAdapter, "train.epochs=3"}, 1), two({dtype, kAdapter, "train.epochs=3"}, 2),
        again({dtype, kAdapter, "train.epochs=3"}, 1);
    const std::vector<double> a = values_after(one, 6);
    CHECK(a == values_after(two, 6));
    CHECK(a == values_after(again, 6));
    TinyRun other({dtype, kAdapter, "train.epochs=3", "seed=43"});
    CHECK(a != values_after(other, 6));
  }
}

TEST_CASE("a batch cut into forwards has the losses and gradients of the whole, with the same dropout") {
  // Without the division by a forward's own std every term is a plain mean.
  const std::vector<std::string> base = {"model.dtype=f64", kAdapter, "train.batch=5", "lora.dropout=0.3", "kv.std=none", "codi.std=none"};
  auto with = [&](const std::string& set) {
    std::vector<std::string> sets = base;
    sets.push_back(set);
    return sets;
  };
  TinyRun whole(base), cut(with("train.micro_batch=2")), dry(with("lora.dropout=0"));
  StepReport reports[3];
  std::vector<double> gradients[3];
  int i = 0;
  for (TinyRun* run : {&whole, &cut, &dry}) {
    reports[i] = Trainer(*run->model, run->samples, {}).step();
    for (const Parameter& p : run->model->parameters.all())
      for (double x : run->model->parameters.get(p.grad)) gradients[i].push_back(x);
    ++i;
  }
  CHECK(reports[1].losses.student_ce == Approx(reports[0].losses.student_ce).epsilon(1e-12));
  CHECK(reports[1].losses.teacher_ce == Approx(reports[0].losses.teacher_ce).epsilon(1e-12));
  CHECK(reports[1].losses.kv == Approx(reports[0].losses.kv).epsilon(1e-12));
  CHECK(reports[1].losses.codi == Approx(reports[0].losses.codi).epsilon(1e-12));
  CHECK(reports[1].grad_norm == Approx(reports[0].grad_norm).epsilon(1e-10));
  double worst = 0;
  for (std::size_t j = 0; j < gradients[0].size(); ++j) worst = std::max(worst, std::abs(gradients[0][j] - gradients[1][j]));
  CHECK(worst < 1e-11 * reports[0].grad_norm);
  CHECK(std::abs(reports[2].loss - reports[0].loss) > 1e-4);  // dropout matters
}

TEST_CASE("steps without a finite loss change nothing and end the run after ten in a row") {
  TempFolder folder;
  TinyRun run({"train.max_steps=40", "train.checkpoint_every=1"});
  std::vector<double> rows(3 * 16, std::nan(""));
  run.model->parameters.set("new_tokens.weight", rows);
  run.model->parameters.refresh();
  const std::vector<double> before = run.model->parameters.get(run.model->parameters.value());
  Trainer trainer(*run.model, run.samples, {});
  CHECK(!trainer.step().updated);
  CHECK(trainer.state().skipped_in_row == 1);
  CHECK(trainer.state().updates == 0);
  const std::vector<double> after = run.model->parameters.get(run.model->parameters.value());
  CHECK(std::equal(before.begin(), before.end(), after.begin(),
                   [](double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }));
  // A checkpoint of it would be worthless, and is refused.
  RunFolder out(folder.path() / "run");
  out.open(run.config, {});
  try {
    trainer.run(&out, {});
    FAIL("a checkpoint was written");
  } catch (const Error& e) {
    CHECK(e.code() == Exit::numeric);
    CHECK(std::string(e.what()).find("new_tokens.weight") != std::string::npos);
  }
  CHECK(!fs::exists(folder.path() / "run" / "checkpoints"));
}

TEST_CASE("a step that is not finite names the samples that make it so") {
  // A head of its own: the embedding's row is read where its token is fed alone.
  TinyRun run({"train.max_steps=2", "train.batch=5", "train.micro_batch=3", "model.path=" + kGolden + "models/llama_scaled"});
  REQUIRE(run.samples.size() == 5);
  // A token that one sample alone has.
  const auto holds = [](const Sample& s, int32_t id) {
    return std::ranges::count(s.question, id) + std::ranges::count(s.trace, id) + std::ranges::count(s.answer, id) > 0;
  };
  const auto alone = [&](int32_t id) { return std::ranges::count_if(run.samples, [&](const Sample& s) { return holds(s, id); }) == 1; };
  const Sample* guilty = nullptr;
  int32_t token = 0;
  for (const Sample& s : run.samples)
    for (int32_t id : s.question)
      if (alone(id)) guilty = &s, token = id;
  REQUIRE(guilty);
  const Tensor row = run.model->embedding.row_range(token, token + 1);
  const std::vector<double> before = to_host(*run.ops, row);
  run.ops->fill(row, std::nan(""));
  Trainer trainer(*run.model, run.samples, {});
  const StepReport r = trainer.step();
  CHECK_FALSE(r.updated);
  REQUIRE(r.not_finite.size() == 1);
  CHECK(r.not_finite[0]->row == guilty->row);
  CHECK(r.not_finite[0]->line == guilty->row + 1);
  run.ops->fill(row, before[0]);
  CHECK(trainer.step().not_finite.empty());
}

TEST_CASE("ten skipped steps in a row are a numeric failure") {
  TempFolder folder;
  TinyRun run({"train.max_steps=40", "train.checkpoint_every=1000"});
  run.model->parameters.set("new_tokens.weight", std::vector<double>(3 * 16, std::nan("")));
  run.model->parameters.refresh();
  Trainer trainer(*run.model, run.samples, {});
  RunFolder out(folder.path() / "run");
  out.open(run.config, {});
  CHECK_THROWS_AS(trainer.run(&out, {}), Error);
  CHECK(trainer.state().step == 10);
  const std::vector<Json> lines = lines_of(folder.path() / "run" / "metrics.jsonl");
  REQUIRE(lines.size() == 10);
  CHECK(lines[9]["loss"].is_null());
}

TEST_CASE("checkpoints of skipped steps push out none of a sound one") {
  TempFolder folder;
  TinyRun run({"train.max_steps=40", "train.checkpoint_every=1", "train.keep_checkpoints=1"});
  Trainer trainer(*run.model, run.samples, {});
  RunFolder out(folder.path() / "run");
  out.open(run.config, {});
  TrainingHooks hooks;
  int64_t sound = 0;
  hooks.on_step = [&](const StepReport& r, const Speed&) {
    if (r.updated) sound = r.step;
    if (r.step == 3) run.ops->fill(run.model->embedding, std::nan(""));
  };
  CHECK_THROWS_AS(trainer.run(&out, hooks), Error);
  CHECK(sound >= 3);
  CHECK(fs::exists(folder.path() / "run" / "checkpoints" / fmt::format("step_{}", sound)));
}

TEST_CASE("state and optimiser of a checkpoint read back to the same bytes") {
  TempFolder folder;
  for (const char* dtype : {"model.dtype=f64", "model.dtype=bf16"}) {
    TinyRun run({dtype, "train.epochs=4"});
    Trainer trainer(*run.model, run.samples, {});
    for (int i = 0; i < 5; ++i) trainer.step();
    TrainingState state = trainer.state();
    state.best = Best{3, 0.4, 2.5}, state.data = {{"data.train", "b", "ids"}}, state.base = "digest", state.validated_step = 3;
    state.model = {{"config.json", "c"}}, state.adapter = {{"d", "e"}};
    FolderWriter written(folder.path() / "state");
    save_training_state(written, *run.model, state);
    written.commit();
    const TrainingState back = load_training_state(folder.path() / "state");
    CHECK(back.step == 5);
    CHECK(back.epoch == 1);
    CHECK(back.cursor == 4);
    CHECK(back.samples == 9);
    CHECK(back.updates == 5);
    CHECK(back.total_steps == 12);
    CHECK(back.best->step == 3);
    CHECK(back.best->score == 0.4);
    CHECK(back.best->loss == 2.5);
    CHECK(back.data == state.data);
    CHECK(back.model == state.model);
    CHECK(back.adapter == state.adapter);
    CHECK(back.epochs == 4);
    CHECK(back.max_steps == 0);
    CHECK(back.micro_batch == 2);
    CHECK(back.device == "cpu");
    CHECK(back.base == "digest");
    CHECK(back.validated_step == 3);
    TinyRun other({dtype, "train.epochs=4"});
    load_optimizer(*other.model, folder.path() / "state");
    const ParameterStore &a = run.model->parameters, &b = other.model->parameters;
    CHECK(a.get(a.value()) == b.get(b.value()));
    CHECK(a.get(a.m()) == b.get(b.m()));
    CHECK(a.get(a.v()) == b.get(b.v()));
    // The steps that follow are those of the run that went on.
    Trainer resumed(*other.model, other.samples, back);
    for (int i = 0; i < 4; ++i) trainer.step(), resumed.step();
    CHECK(a.get(a.value()) == b.get(b.value()));
    TinyRun wider({dtype, "lora.rank=3"});
    CHECK_THROWS_AS(load_optimizer(*wider.model, folder.path() / "state"), Error);
  }
}

TEST_CASE("a run writes nothing more where its folder was moved, nor into what took its place") {
  TempFolder folder;
  TinyRun run({"train.max_steps=1"});
  const fs::path path = folder.path() / "run";
  RunFolder out(path);
  out.open(run.config, {});
  fs::rename(path, folder.path() / "moved");
  for (bool other : {false, true}) {
    if (other) fs::create_directory(path);
    CHECK_THROWS_WITH(out.save(*run.model, {}), Catch::Matchers::ContainsSubstring("run: was moved or replaced"));
    CHECK_THROWS_WITH(out.publish_adapter(1), Catch::Matchers::ContainsSubstring("run: was moved or replaced"));
  }
  CHECK(fs::is_empty(path));
  CHECK(!fs::exists(folder.path() / "moved/checkpoints"));
}

TEST_CASE("an adapter's folder is its configuration and weights, whatever lies beside them") {
  TempFolder folder;
  for (const char* name : {"adapter_config.json", "adapter_model.safetensors", "README.md", "caf\xe9.json", "log.txt"})
    overwrite(folder.path() / name, "x");
  const FileDigests now = folder_digests(folder.path().string());
  CHECK(now.size() == 2);
  FileDigests before = now;
  before["README.md"] = "what an older run recorded";
  CHECK_NOTHROW(require_same_files("model.adapter", folder.path().string(), before, now, ""));
  before["adapter_config.json"] = "another";
  CHECK_THROWS(require_same_files("model.adapter", folder.path().string(), before, now, ""));
}

TEST_CASE("metrics.jsonl has one object a logged step with exactly its keys, and the batch's losses") {
  TempFolder folder;
  TinyRun run({"train.max_steps=7", "train.log_every=3"});
  Trainer trainer(*run.model, run.samples, {});
  RunFolder out(folder.path());
  out.open(run.config, {});
  std::vector<StepReport> reports;
  TrainingHooks hooks;
  hooks.matrix_rate = [](double reached) { return std::max(1e9, reached); };
  hooks.on_step = [&](const StepReport& r, const Speed&) { reports.push_back(r); };
  const int64_t memory = peak_resident_memory();
  CHECK(trainer.run(&out, hooks));
  const std::vector<Json> lines = lines_of(folder.path() / "metrics.jsonl");
  REQUIRE(lines.size() == 3);
  CHECK(lines[0]["step"] == 3);
  CHECK(lines[1]["step"] == 6);
  CHECK(lines[2]["step"] == 7);  // the last one always
  for (const Json& line : lines) {
    std::vector<std::string> keys;
    for (const auto& [key, value] : line.items()) keys.push_back(key);
    CHECK(keys == std::vector<std::string>{"codi", "epoch", "grad_norm", "kv", "latent_norm_ratio", "loss", "lr", "memory_bytes", "mfu",
                                           "samples", "samples_per_s", "seconds", "step", "student_ce", "teacher_ce", "tokens_per_s"});
    const StepReport& r = reports[line["step"].get<std::size_t>() - 1];
    CHECK(line["loss"] == r.loss);
    CHECK(r.loss == Approx(r.losses.student_ce + r.losses.teacher_ce + r.losses.kv + 10 * r.losses.codi));
    CHECK(line["samples_per_s"].get<double>() > 0);
    CHECK(line["mfu"].get<double>() > 0);
    CHECK(line["memory_bytes"].get<int64_t>() >= memory);
    CHECK(line["memory_bytes"].get<int64_t>() <= peak_resident_memory());
  }
}

TEST_CASE("the best checkpoint is that of the highest score, then of the lowest loss, then the first, and outlives newer ones") {
  TempFolder folder;
  TinyRun run({"train.max_steps=6", "train.valid_every=1", "train.checkpoint_every=100", "train.keep_checkpoints=1"});
  Trainer trainer(*run.model, run.samples, {});
  RunFolder out(folder.path());
  out.open(run.config, {});
  const double scores[] = {0.5, 0.5, 0.2, 0.5, 0.5, 0.4}, losses[] = {3, 2, 1, 2, 2.5, 0.5};
  int at = 0;
  TrainingHooks hooks;
  hooks.validate = [&](Arena&, int64_t) {
    const int i = at++;
    return std::optional(Validation{scores[i], {{"strict", 0.5}}, losses[i]});
  };
  CHECK(trainer.run(&out, hooks));
  CHECK(at == 6);
  CHECK(linked_step(folder.path(), "best") == 2);
  CHECK(linked_step(folder.path(), "last") == 6);
  CHECK(verify_checkpoint(folder.path() / "best").step == 2);
  CHECK(verify_checkpoint(folder.path() / "last").step == 6);
  CHECK(std::distance(fs::directory_iterator(folder.path() / "checkpoints"), fs::directory_iterator()) == 2);
  const std::vector<Json> lines = lines_of(folder.path() / "metrics.jsonl");
  CHECK(lines.size() == 12);
  CHECK(lines[1]["valid"]["step"] == 1);
}

TEST_CASE("a validation of weights that blew up names the step and the rate of learning, which helps") {
  TinyRun run({"train.max_steps=4", "train.valid_every=2"});
  Trainer trainer(*run.model, run.samples, {});
  TrainingHooks hooks;
  hooks.validate = [&](Arena& arena, int64_t) {
    for (const Parameter& p : run.model->parameters.all())
      run.model->parameters.set(p.name, std::vector<double>(static_cast<std::size_t>(p.value.count()), INFINITY));
    DecodeOptions options;
    decode(*run.model, arena, std::span(run.samples).first(1), options);
    return std::optional<Validation>();
  };
  CHECK_THROWS_WITH(trainer.run(nullptr, hooks), "step 2: the logits of the validation are not finite; lower train.lr");
}

TEST_CASE("a stop between steps leaves a checkpoint from which the run goes on, and a stopped validation is made up for") {
  TempFolder folder;
  TinyRun run({"train.max_steps=4", "train.valid_every=2", "train.checkpoint_every=100"});
  bool stop = false;
  int validations = 0;
  TrainingHooks hooks;
  hooks.stop = [&] { return stop; };
  hooks.validate = [&](Arena&, int64_t) {
    ++validations;
    stop = true;
    return std::optional<Validation>();
  };
  {
    Trainer trainer(*run.model, run.samples, {});
    RunFolder out(folder.path());
    out.open(run.config, {});
    CHECK(!trainer.run(&out, hooks));
    CHECK(trainer.state().step == 2);
  }
  stop = false;
  hooks.validate = [&](Arena&, int64_t) { return ++validations, std::optional(Validation{0.5, {}}); };
  const TrainingState state = load_training_state(folder.path() / "checkpoints" / "step_2");
  CHECK(state.validated_step == -1);
  Trainer trainer(*run.model, run.samples, state);
  RunFolder out(folder.path());
  out.open(run.config, state);
  CHECK(trainer.run(&out, hooks));
  CHECK(validations == 3);
  CHECK(lines_of(folder.path() / "metrics.jsonl").size() == 6);
  CHECK(linked_step(folder.path(), "best") == 2);
}

TEST_CASE("metrics.jsonl is cut back to what the checkpoint knows") {
  TempFolder folder;
  TinyRun run;
  overwrite(folder / "metrics.jsonl",
            "{\"step\":1}\n{\"step\":2}\n{\"valid\":{\"step\":2}}\n{\"step\":3}\n{\"valid\":{\"step\":3}}\n{\"ste");
  TrainingState state;
  state.step = 2;
  { RunFolder(folder.path()).open(run.config, state); }
  CHECK(lines_of(folder.path() / "metrics.jsonl").size() == 2);
  overwrite(folder / "metrics.jsonl", "{\"step\":1}\n{\"step\":2}\n{\"valid\":{\"step\":2}}\n{\"step\":3}\n");
  state.validated_step = 2;
  { RunFolder(folder.path()).open(run.config, state); }
  CHECK(lines_of(folder.path() / "metrics.jsonl").size() == 3);
  // Behind that, anything may stand that a lost power supply leaves.
  overwrite(folder / "metrics.jsonl", std::string("{\"step\":1}\n{\"step\":2}\nno\0nsense\n{\"step\":3}\n", 43));
  { RunFolder(folder.path()).open(run.config, state); }
  CHECK(lines_of(folder.path() / "metrics.jsonl").size() == 2);
  overwrite(folder / "metrics.jsonl", "nonsense\n");
  { RunFolder(folder.path()).open(run.config, {}); }
  CHECK(lines_of(folder.path() / "metrics.jsonl").empty());
  overwrite(folder / "metrics.jsonl", "nonsense\n{\"step\":2}\n");
  RunFolder out(folder.path());
  CHECK_THROWS_AS(out.open(run.config, state), Error);
}

TEST_CASE("a run folder belongs to one process at a time") {
  TempFolder folder;
  RunFolder out(folder.path() / "run");
  CHECK_THROWS_AS(RunFolder(folder.path() / "run"), Error);
}

TEST_CASE("validation reports exact match by decoding, teacher-forced accuracy and passes") {
  for (const char* method : {"kava", "full_cot", "no_cot"}) {
    INFO(method);
    TinyRun run({std::string("method=") + method, "train.trainable=all", "train.batch=5", "train.max_steps=400", "train.lr=0.02",
                 "lora.dropout=0", "latent.count=3", "data.valid=" + kGolden + "data/rows.jsonl"});
    const Validator validator(run.text, run.config);
    CHECK(validator.rows() == 5);
    Arena arena(*run.ops);
    const Validation before = *validator.run(*run.model, arena, 0, {});
    CHECK(before.score == 0);
    Trainer trainer(*run.model, run.samples, {});
    while (!trainer.state().finished()) trainer.step();
    const Validation after = *validator.run(*run.model, arena, 0, {});
    // Five rows learnt by heart: what teacher forcing gives is then also what decoding gives.
    CHECK(after.values.at("forced") == 1);
    CHECK(after.values.at("strict") == 1);
    CHECK(after.score == 1);
    // Pass T and the prompt are one, where there are latents.
    CHECK(after.values.at("passes") == Approx(after.values.at("passes_merged") + recipe_of(run.config).markers));
    CHECK(!validator.run(*run.model, arena, 0, [] { return true; }));
  }
}

TEST_CASE("validation judges the model without dropout") {
  Validation found[2];
  int i = 0;
  for (const char* dropout : {"lora.dropout=0", "lora.dropout=0.5"}) {
    TinyRun run({kAdapter, dropout, "data.valid=" + kGolden + "data/rows.jsonl"});
    Arena arena(*run.ops);
    found[i++] = *Validator(run.text, run.config).run(*run.model, arena, 0, {});
  }
  CHECK(found[0].values == found[1].values);
}
