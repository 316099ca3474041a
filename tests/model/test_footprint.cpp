// What a step takes: operations and memory.
#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include "models/flops.h"
#include "models/footprint.h"
#include "models/validation.h"
#include "tests/model/resident.h"
#include "tests/model/train_rig.h"

using namespace kava;
using Catch::Approx;

namespace {

// A sample of given lengths; ids do not matter to its cost.
Sample of_lengths(std::size_t question, std::size_t trace, std::size_t answer) {
  Sample s;
  s.question.assign(question, 1), s.trace.assign(trace, 1), s.answer.assign(answer, 1);
  s.prompt = 3;
  return s;
}

ModelConfig llama_1b() {
  ModelConfig m;
  m.family = "llama", m.layers = 16, m.hidden = 2048, m.heads = 32, m.kv_heads = 8, m.head_dim = 64, m.mlp = 8192, m.vocab = 128256;
  m.tied = true;
  return m;
}

}  // namespace

TEST_CASE("the minimum FLOPs of a step agree with the published arithmetic") {
  // 1B, LoRA of rank 128 on q,k,v,o, M = 24, T = 3: question 46, trace 13, prompt + answer + EOS 6. By hand, per row and layer:
  RunConfig config;
  const ModelConfig m = llama_1b();
  const std::vector<Sample> one = {of_lengths(46, 13, 6)};
  const double flops = minimum_flops(config, recipe_of(config), m, one);
  CHECK(flops == Approx(665e9).epsilon(0.02));  // at the mean lengths 45.6 / 12.6 / 6.3
  const std::vector<Sample> two = {one[0], one[0]};
  CHECK(minimum_flops(config, recipe_of(config), m, two) == Approx(2 * flops).epsilon(1e-12));
  RunConfig plain = config;
  plain.step.prefix_sharing = plain.step.prune_latents = false;
  CHECK(minimum_flops(plain, recipe_of(plain), m, one) == flops);

  // no_cot with all weights trained: n rows of one causal sequence, everything by hand.
  RunConfig all;
  all.method = Method::no_cot, all.train.trainable = Trainable::all;
  const double n = 52, C = 2048, kv = 2 * C * 512, q = C * C, rest = C * C + 3 * C * 8192,
               live = 7;  // live: the last question row and 6 answer rows
  const double inner = n * 6 * (q + kv + rest) + 14 * C * n * (n + 1) / 2;
  const double last = n * 6 * kv + live * 6 * (q + rest) + 14 * C * (n * (n + 1) / 2 - 45.0 * 46 / 2);
  CHECK(minimum_flops(all, recipe_of(all), m, one) == Approx(15 * inner + last + 6 * 6 * 128256 * C).epsilon(1e-9));
  CHECK(token_count(recipe_of(config), one) == 65);
  CHECK(token_count({.student = true}, one) == 52);
}

TEST_CASE("memory is planned from the run's own steps, and the remedy names what fits") {
  constexpr int64_t kPlenty = int64_t{1} << 40;
  for (const std::vector<std::string>& sets : {std::vector<std::string>{},
                                               {"train.recompute=block"},
                                               {"train.batch=4", "train.micro_batch=3"},
                                               {"method=coconut", "latent.token_init=\"\"", "lora.dropout=0.1"},
                                               {"model.dtype=bf16"}}) {
    CAPTURE(sets);
    TinyRun run(sets, 3);
    run.config.train.batch = 4, run.config.train.max_steps = 3;
    Model model(*run.ops, run.config, run.text.shape);
    run.model.reset();
    const MemoryPlanner planner(*run.ops, run.config, run.text.shape, run.samples, nullptr, 1);
    const MemoryPlan plan = planner.plan(planner.asked_micro_batch(), kPlenty);
    Trainer trainer(model, run.samples, {});
    while (!trainer.state().finished()) trainer.step();
    CHECK(trainer.arena().peak_bytes() == plan.device.activations + plan.device.temporaries);
    CHECK(run.ops->held_bytes() - trainer.arena().committed_bytes() == plan.device.weights + plan.device.trainables);
    CHECK(plan.device.temporaries > 0);
    CHECK(plan.samples == planner.asked_micro_batch());
  }
  TinyRun run({"train.batch=4"});
  const MemoryPlanner planner(*run.ops, run.config, run.text.shape, run.samples, nullptr, 1);
  auto refusal = [&](int64_t available) -> std::string {
    try {
      require_memory(planner, run.config, run.text.shape, available);
    } catch (const Error& e) {
      CHECK(e.code() == Exit::preflight);
      return e.what();
    }
    return "";
  };
  auto total = [&](int64_t micro) { return planner.plan(micro, kPlenty).total(true); };
  CHECK(total(4) > total(2) + 1000);
  CHECK(refusal(total(4)).empty());
  CHECK(refusal(total(4) - 1).find("train.micro_batch = 3,") != std::string::npos);
  CHECK(refusal(total(2)).find("train.micro_batch = 2,") != std::string::npos);
  CHECK(refusal(total(1)).find("train.micro_batch = 1,") != std::string::npos);
  CHECK(refusal(total(1) - 1).find("not even one sample") != std::string::npos);
  CHECK(refusal(1000).find("the model and its optimiser") != std::string::npos);
}

TEST_CASE("where training fits and its validation does not, the refusal says so") {
  const TempFolder folder;
  const std::string rows = read_file(kGolden + "data/rows.jsonl", 1 << 20);
  overwrite(folder / "valid.jsonl", rows + rows + rows + rows);
  TinyRun run({"train.batch=1", "data.valid=" + (folder / "valid.jsonl")});
  const Validator valid(run.text, run.config);
  const MemoryPlanner both(*run.ops, run.config, run.text.shape, run.samples, &valid, 1);
  constexpr int64_t kPlenty = int64_t{1} << 40;
  MemoryPlan plan = both.plan(1, kPlenty);
  const int64_t all = plan.total(true);
  plan.device.decoding = plan.host.decoding = 0;
  const int64_t alone = plan.total(true);
  REQUIRE(all > alone + 1);
  const auto refusal = [&](int64_t available) { require_memory(both, run.config, run.text.shape, available); };
  CHECK_NOTHROW(refusal(all));
  for (const int64_t available : {alone, all - 1}) CHECK_THROWS_WITH(refusal(available), Catch::Matchers::StartsWith("data.valid: its"));
  CHECK_THROWS_WITH(refusal(alone - 1), Catch::Matchers::ContainsSubstring("not even one sample"));
}

TEST_CASE("memory is planned from every stage of steps, however late it begins") {
  TinyRun run({"method=coconut", "latent.token_init=\"\"", "coconut.thoughts=8", "coconut.max_stage=3", "stages.epochs=300000",
               "train.epochs=1000000", "train.batch=6"});
  const MemoryPlanner planner(*run.ops, run.config, run.text.shape, run.samples, nullptr, 1);
  CHECK(planner.plan(6, int64_t{1} << 40).stage == 3);
}

TEST_CASE("a plan's operations are the mean over the steps of every stage, however few these are") {
  const std::vector<std::string> sets = {"method=coconut", "latent.token_init=\"\"", "coconut.max_stage=3", "train.max_steps=40",
                                         "train.batch=100"};
  const auto flops = [&](const std::string& stages) {
    std::vector<std::string> all = sets;
    all.push_back(stages);
    TinyRun run(all);
    return MemoryPlanner(*run.ops, run.config, run.text.shape, run.samples, nullptr, 1).flops_per_step();
  };
  double sum = 36 * flops("stages.fixed=4");
  for (int stage = 0; stage < 4; ++stage) sum += flops(fmt::format("stages.fixed={}", stage));
  CHECK(flops("stages.steps=1") == Approx(sum / 40).epsilon(1e-12));
}

TEST_CASE("the samples of a forward are a batch's part on each rank where train.micro_batch is 0") {
  RunConfig config;
  config.train.batch = 16;
  CHECK(forward_samples(config, 100, 1) == 16);
  CHECK(forward_samples(config, 100, 3) == 6);
  CHECK(forward_samples(config, 5, 2) == 3);  // of the rows, where they are fewer than a batch
  CHECK(forward_samples(config, 5, 8) == 1);
  config.train.micro_batch = 8;
  CHECK(forward_samples(config, 100, 3) == 8);
  CHECK(forward_samples(config, 5, 2) == 5);
}

TEST_CASE("a forward that is far too large is refused without laying it out") {
  // Its key lists alone would take some 3 GB.
  TinyRun run({"train.batch=4", "data.max_tokens=10000", "latent.count=4096", "latent.iterations=4096", "step.prune_latents=false"});
  if (!forget_highest()) SKIP("/proc/self/clear_refs cannot be written");
  const std::int64_t before = status_bytes("VmRSS");
  const MemoryPlanner planner(*run.ops, run.config, run.text.shape, run.samples, nullptr, 1);
  CHECK_THROWS_WITH(require_memory(planner, run.config, run.text.shape, int64_t{1} << 30),
                    Catch::Matchers::ContainsSubstring("not even one sample"));
  CHECK(status_bytes("VmHWM") - before < std::int64_t{256} << 20);
}
