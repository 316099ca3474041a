#include "models/evaluate.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <span>

#include "models/score.h"

namespace kava {

namespace {

std::vector<Scorer> scorers_for(Method method, DataFormat format, bool tokenizer) {
  if (format == DataFormat::ids) {
    std::vector<Scorer> s{Scorer::strict, Scorer::raw};
    if (tokenizer) s.push_back(Scorer::codi);
    return s;
  }
  std::vector<Scorer> s{Scorer::strict, Scorer::raw, Scorer::codi};
  if (method == Method::full_cot) s.push_back(Scorer::gsm8k);
  if (format == DataFormat::gsm_hard) s.push_back(Scorer::gsm_hard);
  return s;
}

std::string joined(std::span<const int32_t> ids) { return fmt::format("{}", fmt::join(ids, " ")); }

bool holds(Scorer scorer, std::string_view text, const std::optional<std::string>& answer, std::string_view gold) {
  switch (scorer) {
    case Scorer::strict:
      return answer && strict_match(*answer, gold);
    case Scorer::raw:
      return answer && raw_match(*answer, gold);
    case Scorer::codi:
      return codi_match(text, gold);
    case Scorer::gsm8k:
      return gsm8k_match(text, gold);
    case Scorer::gsm_hard:
      return gsm_hard_match(text, gold);
  }
  return false;
}

// What a row of ids should have given, without EOS, and what of the output stands for it: a written chain's part after its last prompt; the
// whole chain where the row has no prompt that would mark the answer's start.
struct IdsAnswer {
  std::vector<int32_t> gold;
  std::optional<std::vector<int32_t>> found;
};

IdsAnswer ids_answer(const Sample& s, const std::vector<int32_t>& output, const Recipe& recipe, std::optional<int32_t> eos) {
  IdsAnswer a;
  a.gold.assign(s.answer.begin() + s.prompt, s.answer.end());
  if (eos && !a.gold.empty() && a.gold.back() == *eos) a.gold.pop_back();
  if (recipe.forced) {
    a.found = output;
  } else if (s.prompt == 0) {
    a.gold.insert(a.gold.begin(), s.trace.begin(), s.trace.end());
    a.found = output;
  } else {
    const auto prompt_end = s.answer.begin() + s.prompt;
    const auto at = std::find_end(output.begin(), output.end(), s.answer.begin(), prompt_end);
    if (at != output.end()) a.found.emplace(at + s.prompt, output.end());
  }
  return a;
}

// One evaluation of one file.
class Evaluation {
 public:
  Evaluation(Model& model, Arena& arena, const TextModel& text, const RowFile& file, const EvalOptions& options)
      : model_(model),
        arena_(arena),
        text_(text),
        file_(file),
        options_(options),
        config_(decoding_config(model.config, options.method)),
        recipe_(options.stage ? decoding_recipe(config_, *options.stage) : decoding_recipe(config_)) {
    result_.max_new_tokens = options.max_new_tokens > 0 ? options.max_new_tokens : default_new_tokens(config_, recipe_, longest_gold());
    if (options.limit > 0 && options.limit < static_cast<int64_t>(file_.rows.size()))
      file_.rows.resize(static_cast<std::size_t>(options.limit));
    result_.method = config_.method;
    result_.prompt = recipe_.forced ? DecodePrompt::forced : DecodePrompt::free;
    result_.format = file.format;
    result_.scorers = scorers_for(config_.method, file.format, text.tokenizer.has_value());
  }

  EvalResult run() {
    const std::vector<Sample> samples = all_samples();
    result_.records.resize(samples.size());
    std::vector<std::size_t> runnable;
    for (std::size_t i = 0; i < samples.size(); ++i) {
      if (prompt_length(recipe_, samples[i]) <= kLongestPrompt) runnable.push_back(i);
      else result_.records[i].too_long = true;
    }
    const auto start = std::chrono::steady_clock::now();
    std::vector<DecodeResult> decoded(samples.size());
    const auto batch = static_cast<std::size_t>(options_.batch);
    for (std::size_t first = 0; first < runnable.size(); first += batch) {
      const std::size_t end = std::min(runnable.size(), first + batch);
      decode_some(samples, std::span(runnable).subspan(first, end - first), decoded);
      if (options_.progress) options_.progress(static_cast<int64_t>(end), static_cast<int64_t>(runnable.size()));
    }
    result_.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    for (std::size_t i = 0; i < samples.size(); ++i) judge(i, samples[i], decoded[i]);
    return std::move(result_);
  }

 private:
  // Tokens of a gold answer and EOS.
  int64_t gold_tokens(const Row& row) const {
    if (!row.is_ids)
      return text_.tokenizer ? static_cast<int64_t>(
                                   text_.tokenizer->encode(config_.data.answer_prefix + row.answer + config_.data.answer_suffix).size()) +
                                   1
                             : 0;
    const auto answer = static_cast<int64_t>(row.answer_ids.size()) - row.prompt.value_or(0);
    return answer + (text_.eos && row.answer_ids.back() == *text_.eos ? 0 : 1);
  }

  int64_t longest_gold() const {
    int64_t longest = 0;
    for (const Row& row : file_.rows) longest = std::max(longest, gold_tokens(row));
    return longest;
  }

  // Of every row: none is dropped here.
  std::vector<Sample> all_samples() const {
    SampleOptions o = sample_options(config_, text_.eos.value_or(-1), text_.shape.vocab);
    o.length = nullptr, o.answers = Answers::all;
    o.fraction = 1;
    const Recipe trained = recipe_of(config_);
    o.needs_prompt = o.needs_prompt && trained.teacher && trained.student;
    int64_t dropped = 0;
    return make_samples({file_}, text_.tokenizer ? &*text_.tokenizer : nullptr, o, &dropped);
  }

  void decode_some(const std::vector<Sample>& samples, std::span<const std::size_t> which, std::vector<DecodeResult>& to) {
    std::vector<Sample> questions;
    for (std::size_t i : which) questions.push_back(samples[i]);
    DecodeOptions o;
    o.max_new_tokens = result_.max_new_tokens;
    o.eos = text_.eos.value_or(-1);
    o.batch = options_.batch;
    o.method = options_.method;
    o.stage = options_.stage;
    std::vector<DecodeResult> some = decode(model_, arena_, questions, o);
    for (std::size_t i = 0; i < which.size(); ++i) to[which[i]] = std::move(some[i]);
  }

  void judge(std::size_t i, const Sample& sample, const DecodeResult& decoded) {
    EvalRecord& r = result_.records[i];
    const Row& row = file_.rows[i];
    r.passes = decoded.passes, r.passes_merged = decoded.passes_merged, r.hit_limit = decoded.hit_limit;
    r.gold_over = gold_tokens(row) > result_.max_new_tokens;
    r.correct.assign(result_.scorers.size(), false);
    const bool lost = r.too_long || (r.hit_limit && !recipe_.forced);
    if (row.is_ids) return judge_ids(r, sample, decoded.ids, lost);
    r.question = row.question, r.gold = row.answer;
    r.output = text_.tokenizer->decode(decoded.ids, true);
    if (lost) return;
    const std::optional<std::string> answer = !recipe_.forced ? answer_of_chain(r.output, stripped(config_.data.answer_prompt)) : r.output;
    for (std::size_t s = 0; s < result_.scorers.size(); ++s) r.correct[s] = holds(result_.scorers[s], r.output, answer, r.gold);
  }

  void judge_ids(EvalRecord& r, const Sample& sample, const std::vector<int32_t>& output, bool lost) {
    const IdsAnswer a = ids_answer(sample, output, recipe_, text_.eos);
    r.question = joined(sample.question), r.gold = joined(a.gold), r.output = joined(output);
    if (lost) return;
    for (std::size_t s = 0; s < result_.scorers.size(); ++s) {
      if (result_.scorers[s] == Scorer::codi)
        r.correct[s] = codi_match(text_.tokenizer->decode(output, true), text_.tokenizer->decode(a.gold, true));
      else r.correct[s] = a.found == a.gold;
    }
  }

  Model& model_;
  Arena& arena_;
  const TextModel& text_;
  RowFile file_;
  const EvalOptions& options_;
  const RunConfig config_;
  const Recipe recipe_;
  EvalResult result_;
};

template <class F>
int64_t count_of(const EvalResult& r, F f) {
  return std::count_if(r.records.begin(), r.records.end(), f);
}

template <class F>
double mean_of(const EvalResult& r, F f) {
  double sum = 0;
  for (const EvalRecord& record : r.records) sum += static_cast<double>(f(record));
  const int64_t run = r.count() - r.too_long();
  return run > 0 ? sum / static_cast<double>(run) : 0;
}

}  // namespace

int64_t EvalResult::correct(std::size_t s) const {
  return count_of(*this, [s](const EvalRecord& r) { return static_cast<bool>(r.correct[s]); });
}
double EvalResult::accuracy(std::size_t s) const {
  return count() > 0 ? static_cast<double>(correct(s)) / static_cast<double>(count()) : 0;
}
double EvalResult::passes() const {
  return mean_of(*this, [](const EvalRecord& r) { return r.passes; });
}
double EvalResult::passes_merged() const {
  return mean_of(*this, [](const EvalRecord& r) { return r.passes_merged; });
}
int64_t EvalResult::limit_hits() const {
  return count_of(*this, [](const EvalRecord& r) { return r.hit_limit; });
}
int64_t EvalResult::too_long() const {
  return count_of(*this, [](const EvalRecord& r) { return r.too_long; });
}

int64_t EvalResult::golds_over() const {
  return count_of(*this, [](const EvalRecord& r) { return r.gold_over; });
}

int64_t default_new_tokens(const RunConfig& config, const Recipe& decoding, int64_t longest_gold) {
  if (config.decode.max_new_tokens > 0) return config.decode.max_new_tokens;
  if (!decoding.forced) return 256;
  return longest_gold == 0 ? 32 : std::clamp<int64_t>(longest_gold, 10, kLongestPrompt);
}

EvalResult evaluate(Model& model, Arena& arena, const TextModel& text, const RowFile& file, const EvalOptions& options) {
  return Evaluation(model, arena, text, file, options).run();
}

Json to_json(const EvalResult& result) {
  Json accuracy = Json::object(), correct = Json::object(), records = Json::array();
  for (std::size_t s = 0; s < result.scorers.size(); ++s) {
    accuracy[name_of(result.scorers[s])] = result.accuracy(s);
    correct[name_of(result.scorers[s])] = result.correct(s);
  }
  for (const EvalRecord& r : result.records) {
    Json verdicts = Json::object();
    for (std::size_t s = 0; s < result.scorers.size(); ++s) verdicts[name_of(result.scorers[s])] = static_cast<bool>(r.correct[s]);
    records.push_back({{"question", r.question},
                       {"gold", r.gold},
                       {"output", r.output},
                       {"correct", std::move(verdicts)},
                       {"passes", r.passes},
                       {"passes_merged", r.passes_merged},
                       {"hit_limit", r.hit_limit},
                       {"too_long", r.too_long}});
  }
  return {{"method", name_of(result.method)},
          {"prompt", name_of(result.prompt)},
          {"format", name_of(result.format)},
          {"max_new_tokens", result.max_new_tokens},
          {"questions", result.count()},
          {"accuracy", std::move(accuracy)},
          {"correct", std::move(correct)},
          {"passes", result.passes()},
          {"passes_merged", result.passes_merged()},
          {"limit_hits", result.limit_hits()},
          {"too_long", result.too_long()},
          {"golds_over_limit", result.golds_over()},
          {"records", std::move(records)}};
}

}  // namespace kava
