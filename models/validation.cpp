#include "models/validation.h"

#include <algorithm>

namespace kava {

namespace {

struct Stopped {};

}  // namespace

Validator::Validator(const TextModel& text, const RunConfig& config) : text_(&text), file_(read_rows(config.data.valid)) {
  RunConfig whole = config;
  whole.data.fraction = 1;
  samples_ = read_samples(text, whole, {file_}, &left_out_);
  require_samples(config, text.shape, file_.path, samples_, left_out_);
}

std::optional<Validation> Validator::run(Model& model, Arena& arena, int64_t stage, const std::function<bool()>& stop,
                                         const std::function<void(int64_t, int64_t, int64_t)>& progress, Comm* comm) const {
  Validation v;
  const auto end_if_stopped = [&] {
    if (stop && stop()) throw Stopped();
  };
  EvalOptions options;
  options.comm = comm;
  const Recipe recipe = recipe_of(model.config, stage);
  if (recipe.has_stages()) options.stage = stage;
  options.progress = [&](int64_t done, int64_t total, int64_t correct) {
    if (progress) progress(done, total, correct);
    end_if_stopped();
  };
  const std::span<const Sample> all(samples_);
  const auto at_once =
      static_cast<std::size_t>(model.config.train.micro_batch > 0 ? model.config.train.micro_batch : model.config.train.batch);
  const BatchTotals totals = batch_totals(model.config, recipe, all, static_cast<int64_t>(at_once));
  const std::vector<BatchTotals> forwards = totals_of_forwards(model.config, recipe, totals, all, static_cast<int64_t>(at_once));
  StepLosses losses;
  try {
    const EvalResult result = evaluate(model, arena, *text_, file_, options);
    for (std::size_t i = 0; i < result.scorers.size(); ++i) {
      v.values[name_of(result.scorers[i])] = result.accuracy(i);
      if (result.scorers[i] == Scorer::strict) v.score = result.accuracy(i);
    }
    v.values["passes"] = result.passes(), v.values["passes_merged"] = result.passes_merged();
    v.values["limit_hits"] = static_cast<double>(result.limit_hits()), v.values["too_long"] = static_cast<double>(result.too_long());
    const std::size_t ranks = comm ? static_cast<std::size_t>(comm->size()) : 1, rank = comm ? static_cast<std::size_t>(comm->rank()) : 0;
    for (std::size_t i = 0; i < forwards.size(); i += ranks) {
      StepLosses mine;
      if (const std::size_t own = i + rank; own < forwards.size()) {
        const std::size_t first = own * at_once;
        StepOptions step;
        step.recipe = recipe, step.first_index = static_cast<int64_t>(first);
        step.backward = step.dropout = false;
        step.count_forced = true;
        mine = run_step(model, arena, all.subspan(first, std::min(at_once, all.size() - first)), forwards[own], step);
      }
      std::vector<StepLosses> round(ranks, mine);
      if (comm) comm->gather(round.data(), &mine, sizeof mine, "validation");
      for (const StepLosses& one : round) losses += one;
      end_if_stopped();
    }
  } catch (const Stopped&) {
    return std::nullopt;
  }
  v.values["forced"] = static_cast<double>(losses.forced_correct) / static_cast<double>(all.size());
  v.loss = v.values["loss"] = losses.total(model.config);
  v.values["student_ce"] = losses.student_ce, v.values["teacher_ce"] = losses.teacher_ce;
  return v;
}

}  // namespace kava
