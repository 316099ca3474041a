#include <algorithm>
#include <numeric>
#include <span>

#include "models/evaluate.h"

namespace kava {

namespace {

template <class F>
int64_t count_of(const EvalResult& r, F f) {
  return std::count_if(r.records.begin(), r.records.end(), f);
}

std::span<const EvalAnswer> answers_of(const EvalRecord& r) {
  return r.samples.empty() ? std::span<const EvalAnswer>(static_cast<const EvalAnswer*>(&r), 1) : std::span<const EvalAnswer>(r.samples);
}

template <class F>
double mean_of(const EvalResult& r, F f) {
  double sum = 0;
  for (const EvalRecord& record : r.records)
    for (const EvalAnswer& a : answers_of(record)) sum += static_cast<double>(f(a));
  const int64_t run = (r.count() - r.too_long()) * r.samples;
  return run > 0 ? sum / static_cast<double>(run) : 0;
}

template <class F>
std::vector<double> by_question(const EvalResult& r, F f) {
  std::vector<double> values;
  for (const EvalRecord& record : r.records) values.push_back(f(record));
  return values;
}

double mean(const std::vector<double>& values) {
  return values.empty() ? 0 : std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

Json pair_of(const Interval& i) { return Json::array({i.low, i.high}); }

}  // namespace

int64_t EvalResult::correct(std::size_t s) const {
  return count_of(*this, [s](const EvalRecord& r) { return static_cast<bool>(r.correct[s]); });
}
double EvalResult::accuracy(std::size_t s) const {
  return count() > 0 ? static_cast<double>(correct(s)) / static_cast<double>(count()) : 0;
}
double EvalResult::passes() const {
  return mean_of(*this, [](const EvalAnswer& a) { return a.passes; });
}
double EvalResult::passes_merged() const {
  return mean_of(*this, [](const EvalAnswer& a) { return a.passes_merged; });
}
double EvalResult::tokens() const {
  return mean_of(*this, [](const EvalAnswer& a) { return a.tokens; });
}
double EvalResult::ms_per_question() const { return timed > 0 ? 1000 * seconds / static_cast<double>(timed) : 0; }
std::vector<double> EvalResult::verdicts(std::size_t s) const {
  return by_question(*this, [s](const EvalRecord& r) { return r.correct[s] ? 1.0 : 0.0; });
}
std::vector<double> EvalResult::pass_at_1(std::size_t s) const {
  return by_question(*this, [s](const EvalRecord& r) {
    const auto answers = answers_of(r);
    return static_cast<double>(std::ranges::count_if(answers, [s](const EvalAnswer& a) { return a.correct[s]; })) /
           static_cast<double>(answers.size());
  });
}
std::vector<double> EvalResult::pass_at_all(std::size_t s) const {
  return by_question(*this, [s](const EvalRecord& r) {
    return std::ranges::any_of(answers_of(r), [s](const EvalAnswer& a) { return a.correct[s]; }) ? 1.0 : 0.0;
  });
}
int64_t EvalResult::limit_hits() const {
  return count_of(*this, [](const EvalRecord& r) { return r.hit_limit; });
}
int64_t EvalResult::too_long() const {
  return count_of(*this, [](const EvalRecord& r) { return r.too_long; });
}

int64_t EvalResult::without_prompt() const {
  return count_of(*this, [](const EvalRecord& r) { return !r.too_long && !r.hit_limit && !r.vote; });
}
int64_t EvalResult::golds_over() const {
  return count_of(*this, [](const EvalRecord& r) { return r.gold_over; });
}

namespace {

Json verdicts_json(const EvalResult& result, const EvalAnswer& a) {
  Json verdicts = Json::object();
  for (std::size_t s = 0; s < result.scorers.size(); ++s) verdicts[name_of(result.scorers[s])] = static_cast<bool>(a.correct[s]);
  return verdicts;
}

Json record_json(const EvalResult& result, const EvalRecord& r) {
  Json json = {{"question", r.question}, {"gold", r.gold},
               {"output", r.output},     {"correct", verdicts_json(result, r)},
               {"passes", r.passes},     {"passes_merged", r.passes_merged},
               {"tokens", r.tokens},     {"hit_limit", r.hit_limit},
               {"too_long", r.too_long}};
  for (const EvalAnswer& a : r.samples)
    json["samples"].push_back(
        {{"output", a.output}, {"correct", verdicts_json(result, a)}, {"tokens", a.tokens}, {"hit_limit", a.hit_limit}});
  return json;
}

// A share of right answers by the strict scorer, against the intact model's on the same questions.
Json paired_json(const std::vector<double>& intact, const std::vector<double>& verdicts) {
  std::vector<double> differences;
  int64_t only_intact = 0, only_this = 0;
  for (std::size_t i = 0; i < intact.size(); ++i) {
    differences.push_back(verdicts[i] - intact[i]);
    only_intact += differences[i]<0, only_this += differences[i]> 0;
  }
  const std::vector<Interval> intervals = bootstrap_means({verdicts, differences});
  return {{"accuracy", mean(verdicts)},
          {"bootstrap", pair_of(intervals[0])},
          {"difference", mean(differences)},
          {"bootstrap_difference", pair_of(intervals[1])},
          {"mcnemar_p", mcnemar_p(only_intact, only_this)}};
}

Json controls_json(const EvalResult& result) {
  Json json = Json::object();
  for (const ControlResult& c : result.controls) {
    std::vector<double> verdicts;
    for (const EvalAnswer& a : c.answers) verdicts.push_back(a.correct[0] ? 1 : 0);
    Json control = paired_json(result.verdicts(0), verdicts);
    control["answer_ce"] = c.answer_ce;
    json[name_of(c.control)] = std::move(control);
  }
  return json;
}

// What several answers to a question add, by the strict scorer.
Json sampling_json(const EvalResult& result) {
  const std::vector<double> one = result.pass_at_1(0), all = result.pass_at_all(0);
  const std::vector<Interval> intervals = bootstrap_means({one, all});
  const std::string n = std::to_string(result.samples);
  return {{"samples", result.samples},
          {"majority", result.accuracy(0)},
          {"pass_at", {{"1", mean(one)}, {n, mean(all)}}},
          {"bootstrap_pass_at", {{"1", pair_of(intervals[0])}, {n, pair_of(intervals[1])}}}};
}

}  // namespace

Json to_json(const EvalResult& result) {
  Json accuracy = Json::object(), correct = Json::object(), bootstrap = Json::object(), records = Json::array();
  std::vector<std::vector<double>> columns;
  for (std::size_t s = 0; s < result.scorers.size(); ++s) columns.push_back(result.verdicts(s));
  const std::vector<Interval> intervals = bootstrap_means(columns);
  for (std::size_t s = 0; s < result.scorers.size(); ++s) {
    const std::string& name = name_of(result.scorers[s]);
    accuracy[name] = result.accuracy(s), correct[name] = result.correct(s), bootstrap[name] = pair_of(intervals[s]);
  }
  for (const EvalRecord& r : result.records) records.push_back(record_json(result, r));
  for (const ControlResult& c : result.controls)
    for (std::size_t i = 0; i < records.size(); ++i)
      records[i]["controls"][name_of(c.control)] = {{"output", c.answers[i].output}, {"correct", verdicts_json(result, c.answers[i])}};
  Json json = {{"method", name_of(result.method)},
               {"prompt", name_of(result.prompt)},
               {"format", name_of(result.format)},
               {"max_new_tokens", result.max_new_tokens},
               {"questions", result.count()},
               {"accuracy", std::move(accuracy)},
               {"correct", std::move(correct)},
               {"bootstrap", std::move(bootstrap)},
               {"passes", result.passes()},
               {"passes_merged", result.passes_merged()},
               {"tokens_written", result.tokens()},
               {"limit_hits", result.limit_hits()},
               {"too_long", result.too_long()},
               {"without_prompt", result.without_prompt()},
               {"golds_over_limit", result.golds_over()},
               {"records", std::move(records)}};
  if (result.samples > 1 || result.temperature > 0) json.update(sampling_json(result));
  if (!result.controls.empty())
    json.update({{"answer_ce", result.answer_ce}, {"golds_beyond_positions", result.golds_beyond}}),
        json["controls"] = controls_json(result);
  return json;
}

Json sweep_json(const EvalResult& intact, const std::vector<SweepPoint>& points) {
  Json json = Json::array();
  for (const SweepPoint& point : points) {
    const EvalResult& r = point.result;
    Json one = paired_json(intact.verdicts(0), r.verdicts(0));
    one.update({{"latents", point.latents},
                {"iterations", point.iterations},
                {"passes", r.passes()},
                {"passes_merged", r.passes_merged()},
                {"tokens_written", r.tokens()},
                {"too_long", r.too_long()},
                {"ms_per_question", r.timed > 0 ? Json(r.ms_per_question()) : Json()},
                {"ms_batch_1", r.ms_batch_1 ? Json(*r.ms_batch_1) : Json()}});
    json.push_back(std::move(one));
  }
  return json;
}

}  // namespace kava
