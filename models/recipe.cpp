#include "models/recipe.h"

namespace kava {

namespace {

int64_t count(const std::vector<int32_t>& ids) { return static_cast<int64_t>(ids.size()); }

std::vector<int32_t> joined(std::span<const int32_t> a, const std::vector<int32_t>& b) {
  std::vector<int32_t> out(a.begin(), a.end());
  out.insert(out.end(), b.begin(), b.end());
  return out;
}

}  // namespace

Recipe recipe_of(const RunConfig& config, int64_t) {
  Recipe r;
  r.teacher = r.student = true;
  switch (config.method) {
    case Method::full_cot:
      r.student = false;
      return r;
    case Method::no_cot:
    case Method::icot:
    case Method::coconut:
      r.teacher = false;
      return r;
    case Method::codi:
    case Method::pccot:
    case Method::kava:
      r.markers = true;
      r.latents = static_cast<int32_t>(config.latent.count), r.iterations = static_cast<int32_t>(config.latent.iterations);
      return r;
  }
  return r;
}

Recipe decoding_recipe(const RunConfig& config) {
  Recipe r = recipe_of(config);
  r.forced = r.student;
  r.teacher = false, r.student = true;
  return r;
}

Cut cut_of(const Recipe& recipe, const Sample&) {
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
    n.latents = cut.latents;
    n.student_tail = cut.rest() + answer;
    n.student = question + (recipe.markers ? cut.latents + 2 : 0) + n.student_tail;
  }
  n.tokens = question + (recipe.teacher ? trace : cut.rest()) + answer;
  return n;
}

int64_t longest_sequence(const RunConfig& config, const Sample& sample) { return lengths_of(recipe_of(config), sample).longest(); }

}  // namespace kava
