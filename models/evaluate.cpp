#include "models/evaluate.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <chrono>
#include <span>

#include "engine/clock.h"
#include "models/decode_ranks.h"
#include "models/score.h"

namespace kava {

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

namespace {

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

// What a row of ids should have given, without EOS, and what of the output stands for it: the part after its last prompt; where the row has
// no prompt that would mark the answer's start, all of it, with what the model writes before: a chain, or what a stage has left of one.
struct IdsAnswer {
  std::vector<int32_t> gold;
  std::optional<std::vector<int32_t>> found;
};

IdsAnswer ids_answer(const Sample& s, const std::vector<int32_t>& output, Method method, const Recipe& recipe, std::optional<int32_t> eos) {
  IdsAnswer a;
  a.gold.assign(s.answer.begin() + s.prompt, s.answer.end());
  if (eos && !a.gold.empty() && a.gold.back() == *eos) a.gold.pop_back();
  if (recipe.forced) {
    a.found = output;
  } else if (s.prompt == 0) {
    const Cut cut = cut_of(recipe, s, 0);
    const auto begin = s.trace.begin();
    if (method == Method::full_cot) a.gold.insert(a.gold.begin(), begin, s.trace.end());
    else a.gold.insert(a.gold.begin(), begin + cut.begin, begin + cut.end);
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
        decoding_(decoding_of(model.config, options)),
        config_(decoding_.config),
        recipe_(decoding_.recipe),
        parts_(sample_options(config_, text.eos.value_or(-1), text.shape.vocab)) {
    result_.max_new_tokens = options.max_new_tokens > 0 ? options.max_new_tokens : default_new_tokens(config_, recipe_, longest_gold());
    if (options.limit > 0 && options.limit < static_cast<int64_t>(file_.rows.size()))
      file_.rows.resize(static_cast<std::size_t>(options.limit));
    if (text_.tokenizer && !recipe_.forced) prompt_tokens_ = std::ssize(prompt_ids(*text_.tokenizer, parts_));
    result_.method = config_.method;
    result_.longest_prompt = longest_prompt(text_.shape);
    result_.prompt = recipe_.forced ? DecodePrompt::forced : DecodePrompt::free;
    result_.format = file.format;
    result_.samples = options.sampling.samples, result_.temperature = options.sampling.temperature;
    result_.scorers = scorers_for(config_.method, file.format, text.tokenizer.has_value());
  }

  EvalResult run() {
    const std::vector<Sample> samples = all_samples();
    result_.records.resize(samples.size());
    std::vector<std::size_t> runnable;
    for (std::size_t i = 0; i < samples.size(); ++i) {
      if (prompt_length(recipe_, samples[i]) <= result_.longest_prompt) runnable.push_back(i);
      else result_.records[i].too_long = true, judge(i, samples[i], {});
    }
    const auto start = std::chrono::steady_clock::now();
    if (options_.controls) run_controls(samples, runnable);
    else run_batches(samples, runnable);
    result_.seconds = seconds_since(start);
    if (options_.measure_single && !runnable.empty()) measure_single(samples, runnable);
    return std::move(result_);
  }

 private:
  // Tokens of a gold answer and EOS, as a sample has them.
  int64_t gold_tokens(const Row& row) const {
    if (!row.is_ids) {
      if (!text_.tokenizer) return 0;
      return std::ssize(answer_ids(*text_.tokenizer, parts_, row.answer)) + 1;
    }
    const auto answer = static_cast<int64_t>(row.answer_ids.size()) - row.prompt.value_or(0);
    return answer + (text_.eos && row.answer_ids.back() == *text_.eos ? 0 : 1);
  }

  // Of a prompt that the model writes itself.
  int64_t free_prompt_tokens(const Row& row) const {
    if (recipe_.forced) return 0;
    return row.is_ids ? row.prompt.value_or(0) : prompt_tokens_;
  }

  int64_t longest_gold() const {
    int64_t longest = 0;
    for (const Row& row : file_.rows) longest = std::max(longest, gold_tokens(row));
    return longest;
  }

  // Of every row: none is dropped here.
  std::vector<Sample> all_samples() const {
    require_tokenizer(text_, {file_});
    SampleOptions o = parts_;
    o.chat_before = text_.chat.before, o.chat_after = text_.chat.after;
    o.answers = Answers::all;
    o.fraction = 1;
    const Recipe trained = recipe_of(config_);
    o.needs_prompt = o.needs_prompt && trained.teacher && trained.student;
    LeftOut none;
    return make_samples({file_}, text_.tokenizer ? &*text_.tokenizer : nullptr, o, &none);
  }

  void run_batches(const std::vector<Sample>& samples, std::span<const std::size_t> runnable) {
    std::vector<std::size_t> open;
    int64_t correct = 0;
    for (std::size_t row : runnable) {
      const auto known = options_.known.find(row);
      if (known == options_.known.end()) open.push_back(row);
      else judge(row, samples[row], known->second), correct += result_.records[row].correct[0] ? 1 : 0;
    }
    // A batch on each rank.
    const auto batch = static_cast<std::size_t>(options_.batch * (options_.comm ? options_.comm->size() : 1));
    const std::size_t before = runnable.size() - open.size();
    const auto tell = [&](std::size_t first) {
      if (options_.progress) options_.progress(static_cast<int64_t>(before + first), static_cast<int64_t>(runnable.size()), correct);
    };
    tell(0);
    result_.timed = std::ssize(open);
    for (std::size_t first = 0; first < open.size(); first += batch) {
      const std::size_t end = std::min(open.size(), first + batch);
      const auto which = std::span(open).subspan(first, end - first);
      auto [questions, options] = decoding(samples, which);
      options.on_token = now_and_then([&, first] { tell(first); });
      if (options_.answered)
        options.on_answers = [&](int64_t row, std::span<const DecodeResult> answers) {
          options_.answered(static_cast<std::size_t>(row), answers);
        };
      const std::vector<DecodeResult> decoded =
          options_.comm ? decode_on_ranks(*options_.comm, model_, arena_, questions, options) : decode(model_, arena_, questions, options);
      const std::size_t each = decoded.size() / which.size();
      for (std::size_t i = 0; i < which.size(); ++i) judge(which[i], samples[which[i]], std::span(decoded).subspan(i * each, each));
      for (const std::size_t i : which) correct += result_.records[i].correct[0] ? 1 : 0;
      tell(end);
    }
  }

  // Calls `tell` ten times a second while tokens come, where no other rank is waited for.
  std::function<void(std::size_t, int32_t)> now_and_then(std::function<void()> tell) const {
    if (!options_.progress || (options_.comm && !options_.comm->alone())) return {};
    return [tell = std::move(tell), last = std::chrono::steady_clock::now()](std::size_t, int32_t) mutable {
      if (seconds_since(last) < 0.1) return;
      last = std::chrono::steady_clock::now();
      tell();
    };
  }

  void run_controls(const std::vector<Sample>& samples, std::span<const std::size_t> runnable) {
    EvalAnswer wrong;
    wrong.correct.assign(result_.scorers.size(), false);
    for (std::size_t c = 0; c < kControls; ++c)
      result_.controls.push_back({static_cast<Control>(c), std::vector<EvalAnswer>(samples.size(), wrong), 0});
    ControlWork work;
    work.comm = options_.comm;
    for (std::size_t i = 0; i < runnable.size(); ++i)
      if (const auto known = options_.known.find(runnable[i]); known != options_.known.end()) work.known[i] = known->second;
    result_.timed = std::ssize(runnable) - std::ssize(work.known);
    if (options_.answered)
      work.answered = [&](std::size_t i, std::span<const DecodeResult> answers) { options_.answered(runnable[i], answers); };
    auto [questions, options] = decoding(samples, runnable);
    int64_t through = 0;
    const auto tell = [&] {
      if (options_.progress) options_.progress(through, static_cast<int64_t>(runnable.size()), -1);
    };
    tell();
    options.on_token = now_and_then(tell);
    work.progress = [&](double done) { through = static_cast<int64_t>(done), tell(); };
    const std::vector<ControlledQuestion> all = decode_controls(model_, arena_, questions, options, work);
    int64_t tokens = 0;
    for (std::size_t i = 0; i < runnable.size(); ++i) {
      const std::size_t row = runnable[i];
      judge(row, samples[row], std::span(&all[i].intact, 1));
      result_.answer_ce += all[i].intact.gold_nll, tokens += all[i].intact.gold_tokens;
      if (all[i].intact.gold_tokens == 0) ++result_.golds_beyond;
      for (ControlResult& c : result_.controls) {
        const DecodeResult& answer = all[i].controls[static_cast<std::size_t>(c.control)];
        c.answers[row] = judge_answer(file_.rows[row], samples[row], answer);
        c.answer_ce += answer.gold_nll;
      }
    }
    const double count = static_cast<double>(std::max<int64_t>(tokens, 1));
    result_.answer_ce /= count;
    for (ControlResult& c : result_.controls) c.answer_ce /= count;
  }

  std::pair<std::vector<Sample>, DecodeOptions> decoding(const std::vector<Sample>& samples, std::span<const std::size_t> which) const {
    std::vector<Sample> questions;
    DecodeOptions o;
    static_cast<DecodeChoice&>(o) = options_;
    for (std::size_t i : which) questions.push_back(samples[i]), o.numbers.push_back(static_cast<int64_t>(i));
    o.max_new_tokens = result_.max_new_tokens;
    o.eos = text_.eos.value_or(-1);
    o.batch = options_.batch;
    o.sampling = options_.sampling;
    return {std::move(questions), std::move(o)};
  }

  // Each of the first questions alone, until they have taken a tenth of the whole evaluation's time.
  void measure_single(const std::vector<Sample>& samples, std::span<const std::size_t> runnable) {
    constexpr std::size_t kMost = 8;
    const auto start = std::chrono::steady_clock::now();
    std::size_t n = 0;
    while (n < std::min(runnable.size(), kMost) && (n == 0 || seconds_since(start) < result_.seconds / 10)) {
      const auto [questions, options] = decoding(samples, runnable.subspan(n++, 1));
      decode(model_, arena_, questions, options);
    }
    result_.ms_batch_1 = 1000 * seconds_since(start) / static_cast<double>(n);
  }

  void judge(std::size_t i, const Sample& sample, std::span<const DecodeResult> decoded) {
    EvalRecord& r = result_.records[i];
    const Row& row = file_.rows[i];
    r.gold_over = free_prompt_tokens(row) + gold_tokens(row) > result_.max_new_tokens;
    r.question = row.is_ids ? joined(sample.question) : row.question;
    r.gold = row.is_ids ? joined(ids_answer(sample, {}, config_.method, recipe_, text_.eos).gold) : row.answer;
    r.correct.assign(result_.scorers.size(), false);
    std::vector<EvalAnswer> answers;
    for (const DecodeResult& d : decoded) answers.push_back(judge_answer(row, sample, d));
    if (!answers.empty()) static_cast<EvalAnswer&>(r) = answers[winner(answers)];
    if (result_.samples > 1) r.samples = std::move(answers);
  }

  // The first of the answers that has the most equal ones; the first of all where none counts.
  static std::size_t winner(const std::vector<EvalAnswer>& answers) {
    std::size_t best = 0;
    int64_t most = 0;
    for (std::size_t i = 0; i < answers.size(); ++i) {
      if (!answers[i].vote) continue;
      const int64_t votes = std::ranges::count(answers, answers[i].vote, &EvalAnswer::vote);
      if (votes > most) most = votes, best = i;
    }
    return best;
  }

  EvalAnswer counted(const DecodeResult& decoded) const {
    EvalAnswer a;
    a.passes = decoded.passes, a.passes_merged = decoded.passes_merged, a.tokens = decoded.tokens, a.hit_limit = decoded.hit_limit;
    a.correct.assign(result_.scorers.size(), false);
    return a;
  }

  EvalAnswer judge_answer(const Row& row, const Sample& sample, const DecodeResult& decoded) const {
    return row.is_ids ? judge_ids(sample, decoded) : judge_text(row, decoded);
  }

  EvalAnswer judge_text(const Row& row, const DecodeResult& decoded) const {
    EvalAnswer a = counted(decoded);
    a.output = text_.tokenizer->decode(decoded.ids, true);
    if (a.hit_limit) return a;
    const std::optional<std::string> answer = !recipe_.forced ? answer_of_chain(a.output, stripped(config_.data.answer_prompt)) : a.output;
    if (answer) a.vote = strict_form(*answer);
    for (std::size_t s = 0; s < result_.scorers.size(); ++s) a.correct[s] = holds(result_.scorers[s], a.output, answer, row.answer);
    return a;
  }

  EvalAnswer judge_ids(const Sample& sample, const DecodeResult& decoded) const {
    EvalAnswer a = counted(decoded);
    const IdsAnswer ids = ids_answer(sample, decoded.ids, config_.method, recipe_, text_.eos);
    a.output = joined(decoded.ids);
    if (a.hit_limit) return a;
    if (!text_.tokenizer) {
      if (ids.found) a.vote = joined(*ids.found);
      a.correct.assign(result_.scorers.size(), ids.found == ids.gold);
      return a;
    }
    const std::string gold = text_.tokenizer->decode(ids.gold, true);
    std::optional<std::string> answer;
    if (ids.found) answer = text_.tokenizer->decode(*ids.found, true), a.vote = strict_form(*answer);
    a.text = text_.tokenizer->decode(decoded.ids, true);
    for (std::size_t s = 0; s < result_.scorers.size(); ++s) a.correct[s] = holds(result_.scorers[s], a.text, answer, gold);
    return a;
  }

  Model& model_;
  Arena& arena_;
  const TextModel& text_;
  RowFile file_;
  const EvalOptions& options_;
  const Decoding decoding_;
  const RunConfig& config_;
  const Recipe& recipe_;
  const SampleOptions parts_;  // by which a row's parts become ids
  int64_t prompt_tokens_ = 0;
  EvalResult result_;
};

}  // namespace

int64_t default_new_tokens(const RunConfig& config, const Recipe& decoding, int64_t longest_gold) {
  if (config.decode.max_new_tokens > 0) return config.decode.max_new_tokens;
  if (!decoding.forced) return 256;
  return longest_gold == 0 ? 32 : std::clamp<int64_t>(longest_gold, 10, kLongestPrompt);
}

EvalResult evaluate(Model& model, Arena& arena, const TextModel& text, const RowFile& file, const EvalOptions& options) {
  return Evaluation(model, arena, text, file, options).run();
}

}  // namespace kava
