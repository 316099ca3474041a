// Controls of the latents: against the step's own teacher forcing, in cases that are equal to the intact model, and in any batch.
#include <catch2/catch_test_macros.hpp>
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
  return decode_controls(*rig.model, *rig.arena, samples, options, {});
}

const Controlled& under(const ControlledQuestion& q, Control control) { return q.controls[static_cast<std::size_t>(control)]; }

// The rig's weights in f64: sums of some hundred terms, and a turn there and back.
constexpr double kRounding = 1e-9;

}  // namespace

TEST_CASE("beside controls the intact model decodes as ever and gives the step's cross-entropy") {
  StepRig rig({});
  for (Sample& s : rig.samples) s.prompt = 0;
  const std::vector<ControlledQuestion> all = controlled(rig, rig.samples);
  const std::vector<DecodeResult> plain = decode(*rig.model, *rig.arena, rig.samples, greedy());
  double nll = 0;
  int64_t tokens = 0;
  for (std::size_t i = 0; i < all.size(); ++i) {
    CHECK(all[i].intact.answer.ids == plain[i].ids);
    CHECK(all[i].intact.answer.passes == plain[i].passes);
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
    CHECK(under(alone, same).answer.ids == alone.intact.answer.ids);
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
        CHECK(some[i].controls[c].answer.ids == all[i].controls[c].answer.ids);
        CHECK(some[i].controls[c].gold_nll == all[i].controls[c].gold_nll);
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
  CHECK(all[1].intact.answer.ids == all[0].intact.answer.ids);
  for (std::size_t c = 0; c < kControls; ++c) {
    CHECK(all[0].controls[c].gold_nll > 0);
    CHECK(all[1].controls[c].gold_nll == 0);
    CHECK(all[1].controls[c].answer.ids == all[0].controls[c].answer.ids);
  }
  CHECK(controlled(rig, {beyond})[0].intact.answer.ids == all[0].intact.answer.ids);
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
