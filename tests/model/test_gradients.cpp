// Gradients of whole steps against finite differences, and where there must be none.
//
// Targets of the distillation losses and the std that divides them are constants of the step, so the function that is differenced keeps
// them: the losses are computed here, by the method's formulas, from the student's side of the moved step and the teacher's side of the
// step at rest. At rest they have to equal the step's own losses, which checks those too. Dropout's masks are functions of counters, so
// every evaluation has the same.
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <set>

#include "tests/model/step_rig.h"

using namespace kava;
using namespace kava::test;

namespace {

double distance(Distance kind, double d) {
  if (kind == Distance::mse) return d * d;
  if (kind == Distance::l1) return std::abs(d);
  return std::abs(d) < 1 ? d * d / 2 : std::abs(d) - 0.5;
}

// 1 / the unbiased standard deviation; 0 where that is zero or undefined.
double inverse_std(const std::vector<double>& x) {
  double mean = 0, square = 0;
  for (double v : x) mean += v / static_cast<double>(x.size());
  for (double v : x) square += (v - mean) * (v - mean);
  return x.size() < 2 || square == 0 ? 0 : 1 / std::sqrt(square / static_cast<double>(x.size() - 1));
}

// Sum over layers of the distances of paired elements, each layer's divided by its target's std.
double distilled(const std::vector<std::vector<double>>& student, const std::vector<std::vector<double>>& target, Distance kind, Std std) {
  std::vector<double> all;
  for (const auto& t : target) all.insert(all.end(), t.begin(), t.end());
  double sum = 0;
  for (std::size_t l = 0; l < target.size(); ++l) {
    const double scale = std == Std::none ? 1 : inverse_std(std == Std::global ? all : target[l]);
    for (std::size_t i = 0; i < target[l].size(); ++i) sum += scale * distance(kind, student[l][i] - target[l][i]);
  }
  return sum;
}

// Valid elements of a dumped [L, B, K, M, D], by layer.
std::vector<std::vector<double>> valid_slots(const DumpTensor& t, const RunConfig& c, std::span<const Sample> samples) {
  std::vector<std::vector<double>> layers(static_cast<std::size_t>(t.shape[0]));
  std::size_t at = 0;
  for (auto& layer : layers)
    for (const Sample& s : samples)
      for (int64_t k = 0; k < t.shape[2]; ++k)
        for (int64_t m = 0; m < t.shape[3]; ++m)
          for (int64_t d = 0; d < t.shape[4]; ++d, ++at)
            if (c.rkv.short_ == Short::zero || m < static_cast<int64_t>(s.trace.size())) layer.push_back(t.values[at]);
  return layers;
}

double kv_loss(const RunConfig& c, std::span<const Sample> samples, const Dump& student, const Dump& teacher) {
  double sum = 0, slots = 0;
  for (const char* which : {"k", "v"})
    sum += distilled(valid_slots(student.at(std::string("latent.") + which), c, samples),
                     valid_slots(teacher.at(std::string("target.") + which), c, samples), c.kv.loss, c.kv.std) /
           2;
  for (const Sample& s : samples)
    slots += static_cast<double>(c.rkv.short_ == Short::zero ? c.latent.count : std::min<int64_t>(c.latent.count, std::ssize(s.trace)));
  const std::vector<int64_t>& shape = teacher.at("target.k").shape;
  return slots == 0 ? 0
                    : sum / slots / (c.kv.reduction == KvReduction::slot_sum ? 1.0 : static_cast<double>(shape[0] * shape[2] * shape[4]));
}

double codi_loss(const RunConfig& c, const Dump& student, const Dump& teacher) {
  auto layers = [](const DumpTensor& t) {
    std::vector<std::vector<double>> out;
    const auto width = t.shape[1] * t.shape[2];
    for (int64_t l = 0; l < t.shape[0]; ++l) out.emplace_back(t.values.begin() + l * width, t.values.begin() + (l + 1) * width);
    return out;
  };
  const DumpTensor& t = teacher.at("codi.teacher");
  return distilled(layers(student.at("codi.student")), layers(t), c.codi.loss, c.codi.std) / static_cast<double>(t.values.size());
}

// The total of `moved` with the targets of `rest`.
double frozen_total(const RunConfig& c, std::span<const Sample> samples, const StepRun& moved, const Dump& rest) {
  double total = c.loss.student * moved.losses.student_ce + c.loss.teacher * moved.losses.teacher_ce;
  if (c.kv.weight > 0) total += c.kv.weight * kv_loss(c, samples, moved.dump, rest);
  if (c.codi.weight > 0) total += c.codi.weight * codi_loss(c, moved.dump, rest);
  return total;
}

// Derivative of the frozen total along a direction, by differences of fourth order. The second derivative of smooth L1 jumps: the step is
// so small that hardly an element crosses the jump, and rounding of a total near 50 still leaves only some 1e-9.
double slope(StepRig& rig, std::span<const Sample> samples, const StepRun& rest, const std::string& name,
             const std::vector<double>& direction) {
  constexpr double h = 1e-5;
  const std::vector<double> value = rig.value(name);
  auto at = [&](double shift) {
    std::vector<double> x = value;
    for (std::size_t i = 0; i < x.size(); ++i) x[i] += shift * direction[i];
    rig.model->parameters.set(name, x);
    rig.model->parameters.refresh();
    StepOptions options;
    options.backward = false;
    return frozen_total(rig.config, samples, rig.run(samples, options), rest.dump);
  };
  const double found = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h);
  rig.model->parameters.set(name, value);
  rig.model->parameters.refresh();
  return found;
}

// Every trainable tensor along a direction of random signs, which all of its entries enter, and along its entry of the largest gradient.
void check_gradients(const std::vector<std::string>& sets) {
  StepRig rig(sets);
  const std::span<const Sample> samples = std::span(rig.samples).first(4);
  const StepRun rest = rig.run(samples);
  REQUIRE(std::isfinite(rest.total));
  CHECK(std::abs(frozen_total(rig.config, samples, rest, rest.dump) - rest.total) <= 1e-12 * rest.total);
  for (const auto& [name, gradient] : rest.gradients) {
    CAPTURE(name);
    const double size = norm(gradient);
    // With T = 0 no latent is projected.
    const bool unused = rig.config.latent.iterations == 0 && name.starts_with("latent_projection.");
    CHECK((size == 0) == unused);
    std::vector<double> signs = drawn("direction of " + name, gradient.size()), entry(gradient.size(), 0.0);
    for (double& s : signs) s = (s < 0 ? -1 : 1) / std::sqrt(static_cast<double>(signs.size()));
    entry[static_cast<std::size_t>(std::ranges::max_element(gradient, {}, [](double g) { return std::abs(g); }) - gradient.begin())] = 1;
    for (const std::vector<double>& direction : {signs, entry}) {
      double expected = 0;
      for (std::size_t i = 0; i < gradient.size(); ++i) expected += gradient[i] * direction[i];
      const double found = slope(rig, samples, rest, name, direction);
      CAPTURE(expected, found);
      CHECK(std::abs(found - expected) <= 3e-8 * size + 1e-9);
    }
  }
}

std::vector<std::string> method_sets(const std::string& method) {
  std::vector<std::string> sets = {"method=" + method};
  if (method == "codi") sets.push_back("latent.iterations=5");
  return sets;
}

}  // namespace

TEST_CASE("gradients of LoRA on all linears are those of finite differences in every method, with and without dropout") {
  const char* method = GENERATE("kava", "pccot", "codi", "full_cot", "no_cot");
  const char* dropout = GENERATE("0.0", "0.3");
  CAPTURE(method, dropout);
  std::vector<std::string> sets = method_sets(method);
  sets.insert(sets.end(), {kSeven, std::string("lora.dropout=") + dropout});
  check_gradients(sets);
}

TEST_CASE("gradients of all weights are those of finite differences in every method") {
  const char* method = GENERATE("kava", "pccot", "codi", "full_cot", "no_cot");
  CAPTURE(method);
  std::vector<std::string> sets = method_sets(method);
  sets.push_back("train.trainable=all");
  check_gradients(sets);
}

TEST_CASE("gradients are those of finite differences under the switches of latents and losses") {
  using Sets = std::vector<std::string>;
  const Sets sets = GENERATE(Sets{"latent.iterations=0"}, Sets{"latent.iterations=5", "latent.projection=false"},
                             Sets{"latent.update=residual", "kv.projection=true", "kv.keys=pre_rope", "kv.loss=mse", "kv.std=global"},
                             Sets{"rkv.short=zero", "kv.reduction=slot_sum", "kv.weight=0.05", "codi.std=global", "codi.loss=mse"},
                             Sets{"step.prefix_sharing=false", "step.prune_latents=false", "latent.update=residual", "lora.dropout=0.3"},
                             Sets{"model.path=../models/qwen2", "kv.projection=true", "kv.std=none", "codi.std=none", "lora.dropout=0.3"},
                             Sets{"model.path=../models/qwen2", "train.trainable=all", "kv.keys=pre_rope"},
                             Sets{"model.path=../models/llama_scaled", "train.trainable=all", "loss.student=0.5", "loss.teacher=2.0"});
  CAPTURE(sets);
  check_gradients(sets);
}

TEST_CASE("what only the teacher reads gets exactly no gradient from the distillation losses") {
  const char* loss = GENERATE("kv", "codi");
  const char* sharing = GENERATE("true", "false");
  CAPTURE(loss, sharing);
  std::vector<std::string> sets = {"model.path=../models/llama_scaled", "train.trainable=all",
                                   std::string("step.prefix_sharing=") + sharing};
  const std::vector<std::string> distilling = {"loss.student=0.0", "loss.teacher=0.0",
                                               loss == std::string("kv") ? "codi.weight=0.0" : "kv.weight=0.0"};
  std::set<int32_t> of_trace, elsewhere, of_question;
  std::vector<std::string> quiet = sets;
  quiet.insert(quiet.end(), distilling.begin(), distilling.end());
  StepRig rig(quiet);
  for (const Sample& s : rig.samples) {
    of_trace.insert(s.trace.begin(), s.trace.end());
    for (const auto* ids : {&s.question, &s.answer}) elsewhere.insert(ids->begin(), ids->end());
    if (!s.trace.empty()) of_question.insert(s.question.begin(), s.question.end());
  }
  for (int32_t id : elsewhere) of_trace.erase(id);
  REQUIRE(of_trace.size() >= 5);
  auto row_norm = [&](const StepRun& r, int32_t id) {
    const auto begin = r.gradients.at("model.embed_tokens.weight").begin() + id * rig.text.shape.hidden;
    return norm(std::vector<double>(begin, begin + rig.text.shape.hidden));
  };
  const StepRun distilled_only = rig.run();
  for (int32_t id : of_trace) CHECK(row_norm(distilled_only, id) == 0);
  for (int32_t id : of_question) CHECK(row_norm(distilled_only, id) > 0);
  CHECK(norm(distilled_only.gradients.at("lm_head.weight")) == 0);
  const StepRun everything = StepRig(sets).run();
  for (int32_t id : of_trace) CHECK(row_norm(everything, id) > 0);
}

TEST_CASE("the total is the weighted sum of its terms, in value and in gradient") {
  using Sets = std::vector<std::string>;
  const double weights[4] = {0.7, 1.3, 2.5, 0.4};
  const std::string keys[4] = {"loss.student", "loss.teacher", "codi.weight", "kv.weight"};
  auto with = [&](const std::array<double, 4>& w) {
    Sets sets;
    for (std::size_t i = 0; i < 4; ++i) sets.push_back(fmt::format("{}={}", keys[i], w[i]));
    return StepRig(sets).run();
  };
  const StepRun all = with({weights[0], weights[1], weights[2], weights[3]});
  double total = 0;
  std::map<std::string, std::vector<double>> sum;
  for (std::size_t i = 0; i < 4; ++i) {
    std::array<double, 4> one{};
    one[i] = 1;
    const StepRun r = with(one);
    const double terms[4] = {r.losses.student_ce, r.losses.teacher_ce, r.losses.codi, r.losses.kv};
    const double of_all[4] = {all.losses.student_ce, all.losses.teacher_ce, all.losses.codi, all.losses.kv};
    CHECK(terms[i] == of_all[i]);
    CHECK(terms[i] > 0);
    CHECK(r.total == terms[i]);
    // Cross-entropies are computed at weight 0 too.
    CHECK(terms[0] == of_all[0]);
    CHECK(terms[1] == of_all[1]);
    if (i != 2) CHECK(r.losses.codi == 0);
    if (i != 3) CHECK(r.losses.kv == 0);
    total += weights[i] * terms[i];
    for (const auto& [name, g] : r.gradients) {
      std::vector<double>& to = sum[name];
      to.resize(g.size());
      for (std::size_t j = 0; j < g.size(); ++j) to[j] += weights[i] * g[j];
    }
  }
  CHECK(std::abs(all.total - total) <= 1e-14 * total);
  for (const auto& [name, g] : all.gradients) {
    INFO(name);
    CHECK(relative_error(sum.at(name), g) < 1e-12);
  }
  // All weights twice: twice the gradient, to the last bit, as two is a power of two.
  const StepRun twice = with({2 * weights[0], 2 * weights[1], 2 * weights[2], 2 * weights[3]});
  for (const auto& [name, g] : all.gradients) {
    std::vector<double> doubled = g;
    for (double& x : doubled) x *= 2;
    INFO(name);
    CHECK(twice.gradients.at(name) == doubled);
  }
}
