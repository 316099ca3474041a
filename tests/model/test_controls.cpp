// Controls of the latents: against the step's own teacher forcing, in cases that are equal to the intact model, and in any batch.
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/matchers/catch_matchers_floating_point.hpp>

#include "models/controls.h"
#include "models/transformer.h"
#include "tests/model/step_rig.h"

using namespace kava;
using Catch::Matchers::WithinAbs;
using kava::test::StepRig;

namespace {

DecodeOptions greedy() {
  DecodeOptions o;
  o.max_new_tokens = 6;
  return o;
}

std::vector<ControlledQuestion> controlled(StepRig& rig, const std::vector<Sample>& samples, const DecodeOptions& options = greedy()) {
  return decode_controls(*rig.model, *rig.arena, samples, options);
}

const DecodeResult& under(const ControlledQuestion& q, Control control) { return q.controls[static_cast<std::size_t>(control)]; }

// The rig's weights in f64: sums of some hundred terms, and a turn there and back.
constexpr double kRounding = 1e-9;

}  // namespace

TEST_CASE("beside controls the intact model decodes as ever and gives the step's cross-entropy") {
  StepRig rig({GENERATE("latent.iterations=3", "latent.iterations=7")});  // on 5 latents
  for (Sample& s : rig.samples) s.prompt = 0;
  const std::vector<ControlledQuestion> all = controlled(rig, rig.samples);
  const std::vector<DecodeResult> plain = decode(*rig.model, *rig.arena, rig.samples, greedy());
  double nll = 0;
  int64_t tokens = 0;
  for (std::size_t i = 0; i < all.size(); ++i) {
    CHECK(all[i].intact.ids == plain[i].ids);
    CHECK(all[i].intact.passes == plain[i].passes);
    for (const DecodeResult& r : all[i].controls) CHECK(r.passes - r.tokens == plain[i].passes - plain[i].tokens);
    nll += all[i].intact.gold_nll, tokens += all[i].intact.gold_tokens;
  }
  StepOptions options;
  options.backward = false;
  const BatchTotals totals = batch_totals(rig.config, recipe_of(rig.config), rig.samples);
  CHECK_THAT(nll / static_cast<double>(tokens),
             WithinAbs(run_step(*rig.model, *rig.arena, rig.samples, totals, options).student_ce, kRounding));
}

TEST_CASE("latents replaced by equal ones change nothing, by others they do") {
  StepRig rig({});
  const Sample a = rig.samples[0], b = rig.samples[1];
  REQUIRE(a.question.size() != b.question.size());
  const ControlledQuestion alone = controlled(rig, {a})[0];
  for (Control same : {Control::mean, Control::shuffle}) {
    CHECK_THAT(under(alone, same).gold_nll, WithinAbs(alone.intact.gold_nll, kRounding));
    CHECK(under(alone, same).ids == alone.intact.ids);
  }
  const std::vector<ControlledQuestion> three = controlled(rig, {a, a, b});
  CHECK_THAT(under(three[0], Control::shuffle).gold_nll, WithinAbs(alone.intact.gold_nll, kRounding));
  for (Control other : {Control::zero, Control::mean, Control::shuffle, Control::boundaries})
    CHECK(std::abs(under(three[1], other).gold_nll - alone.intact.gold_nll) > 1e-4);
  CHECK(std::abs(under(three[1], Control::zero).gold_nll - under(three[1], Control::boundaries).gold_nll) > 1e-4);
}

TEST_CASE("keys are turned to the row's own position") {
  // Where all layers but the last add nothing from attention, and there are no passes over the latents, K before RoPE and V of a latent are
  // the same in every question, which stands at other positions.
  StepRig rig({"latent.iterations=0"});
  const std::vector<ControlledQuestion> before = controlled(rig, rig.samples);
  CHECK(std::abs(under(before[0], Control::shuffle).gold_nll - before[0].intact.gold_nll) > 1e-6);
  for (std::size_t l = 0; l + 1 < rig.model->layers.size(); ++l) rig.ops->fill(rig.model->layers[l].o.map.joined, 0);
  for (const ControlledQuestion& q : controlled(rig, rig.samples)) {
    CHECK_THAT(under(q, Control::shuffle).gold_nll, WithinAbs(q.intact.gold_nll, kRounding));
    CHECK_THAT(under(q, Control::mean).gold_nll, WithinAbs(q.intact.gold_nll, kRounding));
    CHECK(std::abs(under(q, Control::zero).gold_nll - q.intact.gold_nll) > 1e-6);
  }
}

TEST_CASE("controls are the same in any batch") {
  StepRig rig({});
  const std::vector<ControlledQuestion> all = controlled(rig, rig.samples);
  for (int64_t batch : {1, 3}) {
    DecodeOptions options = greedy();
    options.batch = batch;
    const std::vector<ControlledQuestion> some = controlled(rig, rig.samples, options);
    for (std::size_t i = 0; i < all.size(); ++i)
      for (std::size_t c = 0; c < kControls; ++c) {
        CHECK(some[i].controls[c].ids == all[i].controls[c].ids);
        CHECK(some[i].controls[c].gold_nll == all[i].controls[c].gold_nll);
      }
  }
}

TEST_CASE("controls go on from what is known of them, to the same bytes, and decode no part of it again") {
  StepRig rig({});
  std::vector<std::pair<std::size_t, std::vector<DecodeResult>>> told;
  ControlWork work;
  work.answered = [&](std::size_t question, std::span<const DecodeResult> answers) {
    told.emplace_back(question, std::vector(answers.begin(), answers.end()));
  };
  const std::vector<ControlledQuestion> all = decode_controls(*rig.model, *rig.arena, rig.samples, greedy(), work);
  const std::size_t n = rig.samples.size();
  REQUIRE(told.size() == 2 * n);
  const auto whole = std::move(told);
  for (std::size_t parts = 0; parts <= 2 * n; ++parts) {
    ControlWork rest;
    for (std::size_t i = 0; i < parts; ++i) {
      auto& known = rest.known[whole[i].first];
      known.insert(known.end(), whole[i].second.begin(), whole[i].second.end());
    }
    std::size_t more = 0;
    rest.answered = [&](std::size_t, std::span<const DecodeResult>) { ++more; };
    const std::vector<ControlledQuestion> again = decode_controls(*rig.model, *rig.arena, rig.samples, greedy(), rest);
    CAPTURE(parts);
    CHECK(more == 2 * n - parts);
    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t c = 0; c < kControls; ++c) {
        CHECK(again[i].controls[c].ids == all[i].controls[c].ids);
        CHECK(again[i].controls[c].gold_nll == all[i].controls[c].gold_nll);
        CHECK(again[i].intact.gold_nll == all[i].intact.gold_nll);
      }
  }
}

TEST_CASE("a gold answer that ends behind the model's last position is left out, and no position beyond it is read") {
  StepRig rig({"model.path=../models/gpt2", "model.dropout=off", "lora.targets=[\"c_attn\"]"});
  const int64_t positions = rig.model->shape.position_limit();
  REQUIRE(positions > 0);
  Sample fits = rig.samples[0];
  fits.answer.resize(static_cast<std::size_t>(positions - 2 - recipe_of(rig.config).latents) - fits.question.size(), 33);
  Sample beyond = fits;
  beyond.answer.push_back(33);
  const std::vector<ControlledQuestion> all = controlled(rig, {fits, beyond});
  CHECK(all[0].intact.gold_tokens == std::ssize(fits.answer) - fits.prompt);
  CHECK(all[1].intact.gold_tokens == 0);
  CHECK(all[1].intact.ids == all[0].intact.ids);
  for (std::size_t c = 0; c < kControls; ++c) {
    CHECK(all[0].controls[c].gold_nll > 0);
    CHECK(all[1].controls[c].gold_nll == 0);
    CHECK(all[1].controls[c].ids == all[0].controls[c].ids);
  }
  CHECK(controlled(rig, {beyond})[0].intact.ids == all[0].intact.ids);
  Pass pass;
  pass.positions = {static_cast<int32_t>(positions - 1)};
  CHECK_NOTHROW(check_pass(*rig.model, pass));
  pass.positions = {static_cast<int32_t>(positions)};
  CHECK_THROWS_AS(check_pass(*rig.model, pass), Error);
}

TEST_CASE("a cross-entropy of gold answers that is no number is refused") {
  StepRig rig({"model.path=../models/qwen3_untied"});
  REQUIRE_FALSE(rig.model->shape.tied);
  rig.ops->fill(rig.model->head, NAN);
  try {
    controlled(rig, rig.samples);
    FAIL("no error");
  } catch (const Error& e) {
    CHECK(e.code() == Exit::numeric);
  }
}
