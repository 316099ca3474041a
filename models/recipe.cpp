#include "models/recipe.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "engine/rng.h"

namespace kava {

namespace {

constexpr int64_t kEverything = std::numeric_limits<int64_t>::max();
constexpr int64_t kMostOffset = 99;

int64_t count(const std::vector<int32_t>& ids) { return static_cast<int64_t>(ids.size()); }

std::vector<int32_t> joined(std::span<const int32_t> a, const std::vector<int32_t>& b) {
  std::vector<int32_t> out(a.begin(), a.end());
  out.insert(out.end(), b.begin(), b.end());
  return out;
}

std::array<uint32_t, 4> drawn(const Recipe& r, Purpose purpose, int64_t index) {
  return philox({static_cast<uint32_t>(index), static_cast<uint32_t>(r.step), 0, 0}, philox_key(purpose, static_cast<uint64_t>(r.seed)));
}

Recipe coconut(const RunConfig& config, int64_t stage) {
  const RunConfig::Coconut& c = config.coconut;
  Recipe r;
  r.student = true, r.markers = c.markers;
  r.rest = Recipe::Rest::steps, r.removed = stage;
  r.thoughts = static_cast<int32_t>(c.thoughts), r.max_stage = static_cast<int32_t>(c.max_stage);
  r.pad_to_max = c.pad_to_max, r.feedback = c.feedback == Feedback::hidden;
  r.latents = static_cast<int32_t>(std::min(stage, c.max_stage)) * r.thoughts;
  r.iterations = r.feedback ? r.latents : 0;
  return r;
}

Recipe icot(const RunConfig& config, int64_t stage) {
  const RunConfig::Icot& c = config.icot;
  Recipe r;
  r.student = true;
  r.rest = Recipe::Rest::tokens;
  r.removed = c.remove_all_from > 0 && stage >= c.remove_all_from ? kEverything : stage;
  r.from_right = c.side == Side::right, r.keep_positions = c.keep_positions;
  return r;
}

// The first `removed` steps go, and latents stand in their place: at every stage up to max_stage as many for a sample with fewer steps.
Cut without_steps(const Recipe& r, const Sample& s, int64_t index) {
  const int64_t steps = count(s.steps);
  int64_t stage = r.removed;
  if (r.mix > 0) {
    const auto words = drawn(r, Purpose::stage, index);
    if (uniform01(words[0]) < r.mix) stage = static_cast<int64_t>(uniform01(words[1]) * static_cast<double>(steps + 1));
  }
  const bool beyond = stage > r.max_stage;
  Cut c;
  c.latents = r.thoughts * static_cast<int32_t>(!beyond ? stage : r.pad_to_max ? r.max_stage : std::min<int64_t>(r.max_stage, steps));
  c.iterations = r.feedback ? c.latents : 0;
  c.begin = std::accumulate(s.steps.begin(), s.steps.begin() + (beyond ? steps : std::min(stage, steps)), 0);
  c.end = static_cast<int32_t>(s.trace.size());
  return c;
}

Cut without_tokens(const Recipe& r, const Sample& s, int64_t index) {
  int64_t removed = std::min(r.removed, count(s.trace));
  if (r.smoothing > 0) {
    const double u = (drawn(r, Purpose::offset, index)[0] + 1.0) * 0x1p-32;
    removed += static_cast<int64_t>(std::min(static_cast<double>(kMostOffset), std::floor(-std::log(u) / r.smoothing)));
  }
  const auto n = static_cast<int32_t>(s.trace.size()), gone = static_cast<int32_t>(std::min<int64_t>(removed, n));
  Cut c;
  c.begin = r.from_right ? 0 : gone, c.end = r.from_right ? n - gone : n;
  if (r.keep_positions) {
    c.shift = gone;
    // The row in front of the gap moves too.
    c.gap = static_cast<int32_t>(s.question.size()) - 1 + (r.from_right ? c.end : 0);
  }
  return c;
}

}  // namespace

Recipe recipe_of(const RunConfig& config, int64_t stage) {
  Recipe r;
  switch (config.method) {
    case Method::full_cot:
      r.teacher = true;
      break;
    case Method::no_cot:
      r.student = true;
      break;
    case Method::icot:
      return icot(config, stage);
    case Method::coconut:
      return coconut(config, stage);
    case Method::codi:
    case Method::codi_exact:
    case Method::pccot:
    case Method::kava:
      r.teacher = r.student = r.markers = true;
      r.latents = static_cast<int32_t>(config.latent.count), r.iterations = static_cast<int32_t>(config.latent.iterations);
      break;
  }
  return r;
}

Recipe recipe_of(const RunConfig& config) { return recipe_of(config, first_stage(config)); }

int64_t first_stage(const RunConfig& config) { return config.stages.fixed >= 0 ? config.stages.fixed : config.stages.first; }

int64_t last_stage(const RunConfig& config) {
  if (config.stages.fixed >= 0) return config.stages.fixed;
  if (config.method != Method::coconut && config.method != Method::icot) return 0;
  if (config.stages.last >= 0) return config.stages.last;
  return config.method == Method::coconut ? config.coconut.max_stage + 1 : kEverything;
}

Recipe decoding_recipe(const RunConfig& config, int64_t stage) {
  Recipe r = recipe_of(config, stage);
  r.forced = r.student && config.decode.prompt == DecodePrompt::forced;
  if (!r.forced && config.data.separator == Separator::eos) r.ends = 2;
  r.teacher = false, r.student = true;
  // Nothing of a trace is given; a sample without steps has all the latents.
  r.pad_to_max = true;
  return r;
}

Recipe decoding_recipe(const RunConfig& config) { return decoding_recipe(config, last_stage(config)); }

Cut cut_of(const Recipe& recipe, const Sample& sample, int64_t index) {
  if (recipe.rest == Recipe::Rest::steps) return without_steps(recipe, sample, index);
  if (recipe.rest == Recipe::Rest::tokens) return without_tokens(recipe, sample, index);
  Cut c;
  c.latents = recipe.latents, c.iterations = recipe.iterations;
  return c;
}

std::vector<int32_t> teacher_tail(const Sample& sample) { return joined(sample.trace, sample.answer); }

std::vector<int32_t> student_tail(const Sample& sample, const Cut& cut) {
  return joined(std::span(sample.trace).subspan(static_cast<std::size_t>(cut.begin), static_cast<std::size_t>(cut.rest())), sample.answer);
}

Lengths lengths_of(const Recipe& recipe, const Sample& sample, const Cut& cut) {
  const int64_t question = count(sample.question), trace = count(sample.trace), answer = count(sample.answer);
  Lengths n;
  if (recipe.teacher) n.teacher_tail = trace + answer, n.teacher = question + n.teacher_tail;
  if (recipe.student) {
    n.latents = cut.latents, n.rest = cut.rest();
    n.student_tail = n.rest + answer;
    n.student = question + (recipe.markers ? n.latents + 2 : 0) + n.student_tail;
  }
  n.tokens = question + (recipe.teacher ? trace : n.rest) + answer;
  return n;
}

std::vector<int64_t> planned_stages(const RunConfig& config) {
  const int64_t first = first_stage(config);
  if (config.method != Method::coconut) return {first};
  std::vector<int64_t> stages;
  for (int64_t k = first; k <= std::max(first, last_stage(config)); ++k) stages.push_back(k);
  return stages;
}

int64_t longest_sequence(const RunConfig& config, const Sample& sample) {
  int64_t longest = 0;
  for (int64_t stage : planned_stages(config)) longest = std::max(longest, lengths_of(recipe_of(config, stage), sample, 0).longest());
  return longest;
}

int64_t needed_positions(const RunConfig& config, const Sample& sample) {
  int64_t most = longest_sequence(config, sample);
  if (config.method == Method::icot && config.icot.keep_positions)
    most = std::max(most, count(sample.question) + count(sample.trace) + count(sample.answer));
  if (config.method == Method::coconut && config.stages.mix > 0)
    for (int64_t stage = 0; stage <= std::min<int64_t>(std::ssize(sample.steps), config.coconut.max_stage + 1); ++stage)
      most = std::max(most, lengths_of(recipe_of(config, stage), sample, 0).longest());
  return most;
}

}  // namespace kava
