// Curricula: what of a sample a stage runs, where its rows lie, and which stage a step is of.
#include <algorithm>
#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <numeric>

#include "models/curriculum.h"
#include "models/layout.h"
#include "models/text.h"

using namespace kava;

namespace {

Sample of_steps(std::vector<int32_t> steps, int32_t question = 4, int32_t answer = 4) {
  Sample s;
  for (int32_t i = 0; i < question; ++i) s.question.push_back(100 + i);
  for (int32_t i = 0; i < std::accumulate(steps.begin(), steps.end(), 0); ++i) s.trace.push_back(200 + i);
  for (int32_t i = 0; i < answer; ++i) s.answer.push_back(300 + i);
  s.steps = std::move(steps), s.prompt = 1;
  return s;
}

RunConfig coconut(int64_t thoughts = 2, int64_t max_stage = 3) {
  RunConfig c;
  c.method = Method::coconut;
  c.coconut.thoughts = thoughts, c.coconut.max_stage = max_stage;
  return c;
}

RunConfig icot() {
  RunConfig c;
  c.method = Method::icot;
  return c;
}

Layout layout_at(const RunConfig& config, int64_t stage, std::span<const Sample> samples) {
  return make_layout(config, recipe_of(config, stage), samples, 0);
}

}  // namespace

TEST_CASE("coconut puts latents in the place of the first steps, as many for every sample") {
  const RunConfig config = coconut();
  const Sample two = of_steps({7, 7}), none = of_steps({});
  struct Stage {
    int64_t latents, supervised;
  };
  const Stage expected[] = {{0, 18}, {2, 11}, {4, 4}, {6, 4}, {6, 4}};
  for (int64_t k = 0; k < 5; ++k) {
    INFO("stage " << k);
    const Lengths n = lengths_of(recipe_of(config, k), two, 0);
    CHECK(n.latents == expected[k].latents);
    CHECK(n.student_tail == expected[k].supervised);
    CHECK(n.student == 4 + 2 + expected[k].latents + expected[k].supervised);
    CHECK(n.teacher == 0);
    const Lengths empty = lengths_of(recipe_of(config, k), none, 0);
    CHECK(empty.latents == expected[k].latents);
    CHECK(empty.student_tail == 4);
  }
  RunConfig bare = config;
  bare.coconut.pad_to_max = false;
  CHECK(lengths_of(recipe_of(bare, 3), two, 0).latents == 6);
  CHECK(lengths_of(recipe_of(bare, 4), two, 0).latents == 4);
  CHECK(lengths_of(recipe_of(bare, 4), none, 0).latents == 0);
  CHECK(decoding_recipe(bare, 4).latents == 6);
  CHECK(cut_of(decoding_recipe(bare, 4), none, 0).latents == 6);
}

TEST_CASE("coconut's latents run one by one, the last of them with eot and what is left") {
  const std::vector<Sample> one = {of_steps({7, 7})};
  const Layout l = layout_at(coconut(), 1, one);
  REQUIRE(l.passes.size() == 3);
  CHECK(l.passes[0].ids == std::vector<int32_t>{100, 101, 102, 103, kBotId});
  CHECK(l.passes[1].rows() == 1);
  CHECK(l.passes[1].feeds[0].hidden_row == 4);
  CHECK(l.passes[1].positions == std::vector<int32_t>{5});
  CHECK(l.passes[2].feeds[0].hidden_row == 5);
  CHECK(l.passes[2].positions == std::vector<int32_t>{6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18});
  std::vector<int32_t> said = {kEotId};
  for (int32_t i = 7; i < 14; ++i) said.push_back(200 + i);
  for (int32_t i = 0; i < 4; ++i) said.push_back(300 + i);
  CHECK(l.passes[2].ids == said);
  CHECK(l.student.targets == std::vector<int32_t>(said.begin() + 1, said.end()));
  CHECK(l.latents == 2);
  CHECK(l.latent_rows == std::vector<int32_t>{5, 6});
  CHECK(l.passes[2].segments.keys.size() == 7 + 19);  // of the latent, and of what follows it
}

TEST_CASE("samples with fewer latents end in an earlier pass, and predict in the order of the samples") {
  RunConfig config = coconut(1);
  config.coconut.pad_to_max = false;
  const std::vector<Sample> samples = {of_steps({2, 3}, 3, 2), of_steps({}, 2, 3), of_steps({4}, 5, 1)};
  const Layout l = layout_at(config, 4, samples);
  REQUIRE(l.passes.size() == 3);
  CHECK(l.latents == 2);
  CHECK(l.latent_rows[2] == -1);
  CHECK(l.latent_rows[5] == -1);
  CHECK(l.student.targets == std::vector<int32_t>{300, 301, 300, 301, 302, 300});
  // A row predicts from the pass that its sample ends in.
  std::vector<int64_t> pass_of(static_cast<std::size_t>(l.live_rows));
  for (std::size_t t = 0; t < l.passes.size(); ++t)
    for (int64_t r = l.passes[t].live_begin; r < l.passes[t].live_end; ++r) pass_of[static_cast<std::size_t>(r)] = static_cast<int64_t>(t);
  std::vector<int64_t> passes;
  for (int32_t r : l.student.live_rows) passes.push_back(pass_of[static_cast<std::size_t>(r)]);
  CHECK(passes == std::vector<int64_t>{2, 2, 0, 0, 0, 1});
}

TEST_CASE("icot removes tokens of the whole trace from one end") {
  RunConfig config = icot();
  const Sample s = of_steps({7, 8}, 6, 6);
  CHECK(lengths_of(recipe_of(config, 0), s, 0).student_tail == 21);
  const Cut left = cut_of(recipe_of(config, 8), s, 0);
  CHECK((left.begin == 8 && left.end == 15 && left.latents == 0));
  CHECK(lengths_of(recipe_of(config, 8), s, 0).student == 19);
  for (int64_t stage : {15, 16, 1000}) CHECK(cut_of(recipe_of(config, stage), s, 0).rest() == 0);
  config.icot.side = Side::right;
  const Cut right = cut_of(recipe_of(config, 8), s, 0);
  CHECK((right.begin == 0 && right.end == 7));
  config.icot.remove_all_from = 3;
  CHECK(cut_of(recipe_of(config, 2), s, 0).rest() == 13);
  CHECK(cut_of(recipe_of(config, 3), s, 0).rest() == 0);
}

TEST_CASE("kept positions jump at the row before the gap") {
  RunConfig config = icot();
  config.icot.keep_positions = true;
  const std::vector<Sample> one = {of_steps({5}, 3, 2)};
  CHECK(layout_at(config, 2, one).passes[0].positions == std::vector<int32_t>{0, 1, 4, 5, 6, 7, 8, 9});
  CHECK(layout_at(config, 9, one).passes[0].positions == std::vector<int32_t>{0, 1, 7, 8, 9});
  CHECK(layout_at(config, 0, one).passes[0].positions == std::vector<int32_t>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9});
  config.icot.side = Side::right;
  CHECK(layout_at(config, 2, one).passes[0].positions == std::vector<int32_t>{0, 1, 2, 3, 4, 7, 8, 9});
  CHECK(layout_at(config, 9, one).passes[0].positions == std::vector<int32_t>{0, 1, 7, 8, 9});
}

TEST_CASE("coconut's stages last whole epochs, or steps") {
  // first = 1 and three epochs a stage, as upstream's epochs 3 to 24: three epochs each of stages 1, 2, 3 and thirteen of 4.
  RunConfig config = coconut();
  config.stages.first = 1;
  constexpr int64_t kSteps = 10;
  std::vector<int64_t> epochs(5);
  const Curriculum c(config, kSteps);
  for (int64_t t = 0; t < 22 * kSteps; t += kSteps) {
    ++epochs[static_cast<std::size_t>(c.stage(t))];
    CHECK(c.stage(t) == c.stage(t + kSteps - 1));
  }
  CHECK(epochs == std::vector<int64_t>{0, 3, 3, 3, 13});
  config.stages.first = 0, config.stages.hold = 2, config.stages.last = 2;
  CHECK((c.stage(4 * kSteps + 9) == 0 && c.stage(5 * kSteps) == 1 && c.stage(100 * kSteps) == 2));
  config.stages.steps = 3;
  CHECK((c.stage(22) == 0 && c.stage(23) == 1 && c.stage(26) == 2 && c.stage(29) == 2));
  config.stages.fixed = 1;
  CHECK((c.stage(0) == 1 && c.stage(99) == 1));
}

TEST_CASE("icot removes a token every so many steps, halves rounded to even") {
  RunConfig config = icot();
  config.stages.first = 2;
  struct Case {
    int64_t steps;
    double per_epoch;
    int64_t each;
  };
  for (const Case& c : {Case{100, 8, 12}, Case{20, 8, 2}, Case{28, 8, 4}, Case{4, 8, 1}, Case{3, 8, 1}, Case{12, 8, 2}}) {
    INFO(c.steps << " steps");
    config.icot.remove_per_epoch = c.per_epoch;
    const Curriculum curriculum(config, c.steps);
    CHECK(curriculum.stage(c.each - 1) == 2);
    CHECK(curriculum.stage(c.each) == 3);
    CHECK(curriculum.stage(10 * c.each) == 12);
  }
  // Numbers of steps that no int64 holds, and no double.
  for (double few : {1e-18, 1e-300, 5e-324}) {
    config.icot.remove_per_epoch = few;
    CHECK(Curriculum(config, 12).stage(1'000'000) == 2);
  }
  config.icot.remove_per_epoch = 8;
  config.stages.hold = 1;
  const Curriculum held(config, 12);
  CHECK((held.stage(13) == 2 && held.stage(14) == 3));
  CHECK(held.recipe(11).smoothing == 0);
  CHECK(held.recipe(12).smoothing == 4);
}

TEST_CASE("the optimiser begins anew as each method's reset says") {
  const auto left = [] { return true; };
  const auto empty = [] { return false; };
  RunConfig config = coconut();
  const Curriculum c(config, 5);
  CHECK((!c.resets(0, left) && !c.resets(4, left) && c.resets(5, empty) && c.resets(10, left)));
  config.stages.reset_optimizer = ResetOptimizer::stage;
  CHECK((!c.resets(5, left) && c.resets(15, empty) && !c.resets(16, left)));
  config.stages.reset_optimizer = ResetOptimizer::never;
  CHECK((!c.resets(5, left) && !c.resets(15, left)));

  RunConfig removing = icot();
  removing.icot.remove_per_epoch = 2.5, removing.stages.reset_optimizer = ResetOptimizer::stage, removing.icot.remove_all_from = 3;
  const Curriculum i(removing, 5);  // one token every two steps
  CHECK((!i.resets(1, left) && i.resets(2, left) && !i.resets(2, empty) && i.resets(6, left)));
  CHECK(!i.resets(8, left));  // beyond remove_all_from nothing changes

  RunConfig kava;
  const Curriculum none(kava, 5);
  for (int64_t t = 0; t < 20; ++t) CHECK(!none.resets(t, left));
}

TEST_CASE("an offset removes further tokens with its probability, and belongs to the sample in the batch") {
  Recipe r = recipe_of(icot(), 0);
  r.smoothing = 4, r.seed = 42;
  const Sample s = of_steps({200});
  int64_t zero = 0, one = 0;
  for (int64_t i = 0; i < 20000; ++i) {
    const int32_t gone = cut_of(r, s, i).begin;
    zero += gone == 0, one += gone == 1;
  }
  // 98.17 % and 1.80 %: six standard deviations of a binomial count.
  CHECK(std::abs(zero - 19634) < 6 * 19);
  CHECK(std::abs(one - 360) < 6 * 19);
  r.smoothing = 1e-3;
  CHECK(cut_of(r, s, 0).begin <= 99);
  std::vector<int32_t> first, again, later;
  for (int64_t i = 0; i < 8; ++i) first.push_back(cut_of(r, s, i).begin), again.push_back(cut_of(r, s, i).begin);
  r.step = 1;
  for (int64_t i = 0; i < 8; ++i) later.push_back(cut_of(r, s, i).begin);
  CHECK(first == again);
  CHECK(first != later);
}

TEST_CASE("mixing draws a stage from the sample's own number of steps") {
  Recipe r = recipe_of(coconut(1, 3), 1);
  r.mix = 0.5;
  const Sample s = of_steps({1, 1, 1, 1, 1});  // stages 0..5: 4 and 5 are beyond the last, with three latents
  std::vector<int64_t> latents(4), left(6);
  for (int64_t i = 0; i < 12000; ++i) {
    const Cut c = cut_of(r, s, i);
    ++latents[static_cast<std::size_t>(c.latents)], ++left[static_cast<std::size_t>(c.rest())];
  }
  // Half stay at stage 1; of the others a sixth is at each of 0..5.
  CHECK(std::abs(latents[0] - 1000) < 6 * 31);
  CHECK(std::abs(latents[1] - 7000) < 6 * 55);
  CHECK(std::abs(latents[2] - 1000) < 6 * 31);
  CHECK(std::abs(latents[3] - 3000) < 6 * 48);
  CHECK(std::abs(left[0] - 2000) < 6 * 41);
}

TEST_CASE("the longest sequence is that of the stages a run goes through") {
  RunConfig config = coconut();
  const Sample s = of_steps({1, 9});
  CHECK(longest_sequence(config, s) == 4 + 2 + 2 + 9 + 4);  // stage 1
  config.stages.first = 2;
  CHECK(longest_sequence(config, s) == 4 + 2 + 6 + 4);  // stage 3
  config.stages.fixed = 0;
  CHECK(longest_sequence(config, s) == 4 + 2 + 10 + 4);
  RunConfig removing = icot();
  removing.stages.first = 3;
  CHECK(longest_sequence(removing, s) == 4 + 7 + 4);
}

TEST_CASE("positions are needed for the stages that a sample can be drawn for, and a sample is counted by what it passes") {
  RunConfig config = coconut();
  config.stages.fixed = 0, config.stages.mix = 0.5;
  const Sample one = of_steps({1});
  // Of one step: stages 0 and 1.
  CHECK(needed_positions(config, one) ==
        std::max(lengths_of(recipe_of(config, 0), one, 0).longest(), lengths_of(recipe_of(config, 1), one, 0).longest()));
  CHECK(lengths_of(recipe_of(config, 3), one, 0).longest() > needed_positions(config, one));
  ModelConfig gpt2;
  gpt2.family = "gpt2", gpt2.max_positions = needed_positions(config, one);
  const auto counted = [&] {
    LeftOut left_out;
    std::vector<Sample> samples = {one};
    leave_out_long(samples, config, gpt2, left_out);
    CHECK(static_cast<int64_t>(samples.size()) == 1 - left_out.all());
    return std::pair(left_out.too_long, left_out.by_positions);
  };
  CHECK(counted() == std::pair<int64_t, int64_t>(0, 0));
  --gpt2.max_positions;
  CHECK(counted() == std::pair<int64_t, int64_t>(0, 1));
  ++gpt2.max_positions, config.data.max_tokens = longest_sequence(config, one) - 1;
  CHECK(counted() == std::pair<int64_t, int64_t>(1, 0));
}
