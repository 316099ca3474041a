// Decoding on the tiny golden models: against the step's own teacher forcing, against recomputation without a cache, and against itself in
// other company.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <cmath>
#include <memory>

#include "engine/device/ops.h"
#include "kernels/philox.h"
#include "models/adapter.h"
#include "models/decode.h"
#include "models/kava.h"
#include "models/text.h"
#include "tests/golden_config.h"

namespace {

using namespace kava;

// A golden case with its model loaded.
struct Loaded {
  explicit Loaded(const std::string& name, const std::vector<std::string>& sets = {}, int threads = 2)
      : config(golden_config(name, sets)),
        text(open_text_model(config.model.path)),
        ops(make_cpu_ops(threads)),
        model(*ops, config, text.shape),
        arena(*ops) {
    if (!config.model.adapter.empty()) load_adapter(model, config.model.adapter);
  }
  std::vector<Sample> rows() const {
    LeftOut left_out;
    return read_samples(text, config, read_train_files(config), &left_out);
  }
  RunConfig config;
  TextModel text;
  std::unique_ptr<Ops> ops;
  Model model;
  Arena arena;
};

// Questions and prompts of many lengths.
std::vector<Sample> drawn_samples(int64_t count, int32_t vocab) {
  std::vector<Sample> samples;
  for (int64_t i = 0; i < count; ++i) {
    const auto at = static_cast<uint32_t>(i);
    auto draw = [&](uint32_t j) { return static_cast<int32_t>(philox({at, j, 0, 0}, {{7, 7}})[0] % static_cast<uint32_t>(vocab)); };
    Sample s;
    const uint32_t n = 1 + at * 5 % 23;
    for (uint32_t j = 0; j < n; ++j) s.question.push_back(draw(j));
    s.prompt = static_cast<int32_t>(at % 4);
    for (uint32_t j = 0; j < 5; ++j) s.answer.push_back(draw(100 + j));
    samples.push_back(s);
  }
  return samples;
}

DecodeOptions up_to(int64_t tokens) {
  DecodeOptions o;
  o.max_new_tokens = tokens;
  return o;
}

std::vector<std::string> typed(const char* dtype) { return {std::string("model.dtype=") + dtype}; }

}  // namespace

TEST_CASE("what is generated is what teacher forcing predicts at every place") {
  const std::string name =
      GENERATE("kava_defaults", "kava_pause", "kava_sequential", "kava_plain_form", "kava_mean_prob_residual", "kava_one_pass",
               "kava_one_latent", "codi", "pccot", "no_cot", "qwen2_kava", "llama_scaled_kava", "coconut_beyond", "icot_all", "codi_exact");
  const char* dtype = GENERATE("f64", "f32");
  CAPTURE(name, dtype);
  Loaded l(name, typed(dtype));
  std::vector<Sample> samples = l.rows();
  for (Sample& s : samples) s.prompt = 0;
  const std::vector<DecodeResult> results = decode(l.model, l.arena, samples, up_to(6));
  for (std::size_t i = 0; i < samples.size(); ++i) {
    REQUIRE(results[i].ids.size() == 6);
    CHECK(results[i].hit_limit);
    samples[i].answer = results[i].ids;
  }
  StepOptions options;
  options.backward = false, options.count_forced = true;
  const auto n = static_cast<int64_t>(samples.size());
  CHECK(run_step(l.model, l.arena, samples, batch_totals(l.config, recipe_of(l.config), samples), options).forced_correct == n);
  samples[0].answer[3] = (samples[0].answer[3] + 1) % static_cast<int32_t>(l.text.shape.vocab);
  CHECK(run_step(l.model, l.arena, samples, batch_totals(l.config, recipe_of(l.config), samples), options).forced_correct == n - 1);
}

TEST_CASE("decoding with the cache equals running everything again for each token") {
  const std::string name = GENERATE("kava_defaults", "kava_pause", "kava_sequential", "no_cot", "full_cot", "qwen2_kava");
  CAPTURE(name);
  Loaded l(name);
  const std::vector<Sample> samples = drawn_samples(9, static_cast<int32_t>(l.text.shape.vocab));
  const std::vector<DecodeResult> cached = decode(l.model, l.arena, samples, up_to(8));
  std::vector<Sample> growing = samples;
  for (std::size_t token = 0; token < 8; ++token) {
    const std::vector<DecodeResult> next = decode(l.model, l.arena, growing, up_to(1));
    for (std::size_t i = 0; i < samples.size(); ++i) {
      REQUIRE(next[i].ids.size() == 1);
      CHECK(next[i].ids[0] == cached[i].ids[token]);
      Sample& s = growing[i];
      if (l.config.method == Method::full_cot) {
        s.question.push_back(next[i].ids[0]);
        continue;
      }
      s.answer.resize(static_cast<std::size_t>(s.prompt));
      s.answer.push_back(next[i].ids[0]);
      ++s.prompt;
    }
  }
}

TEST_CASE("a sample's tokens and latents are the same bytes in any batch and with any number of threads") {
  const std::string name = GENERATE("kava_defaults", "no_cot", "full_cot", "qwen2_kava");
  const char* dtype = GENERATE("bf16", "f32", "f64");
  CAPTURE(name, dtype);
  Loaded first(name, typed(dtype), 1);
  const std::vector<Sample> samples = drawn_samples(70, static_cast<int32_t>(first.text.shape.vocab));
  DecodeOptions options = up_to(7);
  options.eos = 5, options.keep_latents = true;
  const std::vector<DecodeResult> all = decode(first.model, first.arena, samples, options);
  const std::pair<int64_t, int> others[] = {{1, 2}, {7, 2}, {33, 5}, {128, 3}};
  for (const auto& [batch, threads] : others) {
    CAPTURE(batch, threads);
    Loaded other(name, typed(dtype), threads);
    options.batch = batch;
    const std::vector<DecodeResult> again = decode(other.model, other.arena, samples, options);
    REQUIRE(again.size() == all.size());
    bool equal = true;
    for (std::size_t i = 0; i < all.size(); ++i)
      equal = equal && again[i].ids == all[i].ids && again[i].passes == all[i].passes && again[i].latents.values == all[i].latents.values &&
              again[i].latents.hidden == all[i].latents.hidden && again[i].latents.top == all[i].latents.top;
    CHECK(equal);
  }
  for (const DecodeResult& r : all) CHECK(r.latents.top.size() == (recipe_of(first.config).markers ? std::size_t{5} : 0));
}

TEST_CASE("forward passes are counted by the stated rule and the end of sequence is honoured on the first token too") {
  struct Case {
    const char* name;
    int64_t first, merged;  // passes up to the first token
    std::vector<std::string> sets = {};
  };
  // 5 latents: of 7 iterations 5 are run, and all where none are left out.
  const Case c = GENERATE(Case{"kava_defaults", 5, 4}, Case{"kava_pause", 2, 1}, Case{"no_cot", 1, 1}, Case{"full_cot", 1, 1},
                          Case{"kava_defaults", 7, 6, {"latent.iterations=5"}}, Case{"kava_defaults", 7, 6, {"latent.iterations=7"}},
                          Case{"kava_defaults", 9, 8, {"latent.iterations=7", "step.prune_latents=false"}});
  CAPTURE(c.name, c.sets);
  Loaded l(c.name, c.sets);
  const std::vector<Sample> samples = drawn_samples(5, static_cast<int32_t>(l.text.shape.vocab));
  const std::vector<DecodeResult> free = decode(l.model, l.arena, samples, up_to(6));
  for (const DecodeResult& r : free) {
    CHECK(r.hit_limit);
    CHECK(r.passes == c.first + 5);
    CHECK(r.passes_merged == c.merged + 5);
  }
  for (std::size_t place : {std::size_t{0}, std::size_t{3}, std::size_t{5}}) {
    DecodeOptions options = up_to(6);
    options.eos = free[0].ids[place];
    const std::vector<int32_t>& ids = free[0].ids;
    const auto ends = std::find(ids.begin(), ids.end(), options.eos) - ids.begin();  // it may come earlier than at `place`
    const DecodeResult r = decode(l.model, l.arena, samples, options)[0];
    CHECK(r.ids == std::vector<int32_t>(ids.begin(), ids.begin() + ends));
    CHECK_FALSE(r.hit_limit);
    CHECK(r.passes == c.first + ends);
    CHECK(r.passes_merged == c.merged + ends);
  }
}

TEST_CASE("iterations beyond the number of latents, and pruning, change neither latents nor tokens") {
  auto decoded = [](const std::vector<std::string>& sets) {
    Loaded l("kava_defaults", sets);
    DecodeOptions options = up_to(5);
    options.keep_latents = true;
    return decode(l.model, l.arena, drawn_samples(6, static_cast<int32_t>(l.text.shape.vocab)), options);
  };
  auto largest_difference = [](const std::vector<DecodeResult>& a, const std::vector<DecodeResult>& b) {
    double most = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      REQUIRE(a[i].latents.hidden.size() == b[i].latents.hidden.size());
      for (std::size_t j = 0; j < a[i].latents.hidden.size(); ++j)
        most = std::max(most, double(std::abs(a[i].latents.hidden[j] - b[i].latents.hidden[j])));
      CHECK(a[i].ids == b[i].ids);
    }
    return most;
  };
  const auto at_m = decoded({"latent.iterations=5"}), beyond = decoded({"latent.iterations=7"}), below = decoded({"latent.iterations=3"});
  CHECK(largest_difference(at_m, beyond) < 1e-6);
  CHECK(largest_difference(below, decoded({"latent.iterations=3", "step.prune_latents=false"})) < 1e-6);
  // T < M: the first T slots are final.
  const std::size_t width = below[0].latents.hidden.size() / 5;
  for (std::size_t j = 0; j < 3 * width; ++j) CHECK(std::abs(below[0].latents.hidden[j] - at_m[0].latents.hidden[j]) < 1e-6f);
  bool others_differ = false;
  for (std::size_t j = 3 * width; j < 5 * width; ++j)
    others_differ = others_differ || std::abs(below[0].latents.hidden[j] - at_m[0].latents.hidden[j]) > 1e-4f;
  CHECK(others_differ);
}

TEST_CASE("the teacher of a latent model decodes like a plain model with the same adapter") {
  Loaded latent("kava_defaults"), plain("full_cot", {"model.adapter=../adapters/llama_plain"});
  const std::vector<Sample> samples = drawn_samples(4, static_cast<int32_t>(latent.text.shape.vocab));
  for (const Parameter& p : plain.model.parameters.all()) latent.model.parameters.set(p.name, plain.model.parameters.get(p.value));
  latent.model.parameters.refresh();
  DecodeOptions options = up_to(6);
  options.method = Method::full_cot;
  const auto a = decode(latent.model, latent.arena, samples, options), b = decode(plain.model, plain.arena, samples, options);
  for (std::size_t i = 0; i < samples.size(); ++i) CHECK(a[i].ids == b[i].ids);
}
