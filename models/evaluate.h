// Evaluation on one data file: every question decoded, every answer judged by each scorer that applies (docs/method.md section 8).
#pragma once
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/device/comm.h"
#include "engine/files/json.h"
#include "models/controls.h"
#include "models/decode.h"
#include "models/statistics.h"
#include "models/text.h"

namespace kava {

/// strict, raw and codi apply to every row of text, gsm8k to written chains, gsm_hard (relative 1e-6) to GSM-Hard. Rows of ids are judged
/// by equal ids (strict, raw), and by codi where a tokenizer can decode them.
KAVA_CHOICE(Scorer, strict, raw, codi, gsm8k, gsm_hard)

/// Those that apply; tokenizer: whether the model folder has one, which only rows of ids can do without.
std::vector<Scorer> scorers_for(Method method, DataFormat format, bool tokenizer);

struct EvalOptions : DecodeChoice {
  int64_t limit = 0;  // the first rows of the file; 0: all
  int64_t batch = kDecodeBatch;
  int64_t max_new_tokens = 0;  // 0: default_new_tokens of the whole file's longest gold answer
  Sampling sampling;           // a question's draws are keyed by its row
  bool controls = false;       // of the latents too; greedy, with one answer
  bool measure_single = false;
  Comm* comm = nullptr;  // ranks that share the questions of a batch, and all get the whole result; absent: this process is alone
  /// On every rank before the first batch and after each; where this process is alone, ten times a second within one too. correct: by the
  /// first scorer, -1 where it is not known yet.
  std::function<void(int64_t done, int64_t total, int64_t correct)> progress;
  // Answers from before, by row, the same on all ranks; and told of this rank's new ones as they come. With controls: as ControlWork has
  // them.
  std::map<std::size_t, std::vector<DecodeResult>> known;
  std::function<void(std::size_t row, std::span<const DecodeResult> answers)> answered;
};

struct EvalAnswer {
  std::string output;  // of ids rows the ids, separated by spaces; and the text of these, where a tokenizer can tell it
  std::string text;
  std::vector<bool> correct;  // by EvalResult::scorers
  int64_t passes = 0, passes_merged = 0, tokens = 0;
  bool hit_limit = false;           // this makes it wrong
  std::optional<std::string> vote;  // what a majority is counted by: the answer without commas and white space around it
};

/// A question, and the answer that counts: with several the first of those that most agree with.
struct EvalRecord : EvalAnswer {
  std::string question, gold;       // ids rows: the ids, separated by spaces
  std::vector<EvalAnswer> samples;  // where there are several: all of them
  bool too_long = false;            // over longest_prompt: not run, wrong
  bool gold_over = false;           // the gold answer and EOS, and a prompt that is not given, need more than max_new_tokens
};

/// All questions once more under a control of the latents.
struct ControlResult {
  Control control = Control::zero;
  std::vector<EvalAnswer> answers;  // by question
  double answer_ce = 0;             // of the gold answers' tokens, EOS included, under teacher forcing: mean over all of them
};

struct EvalResult {
  Method method = Method::kava;
  DecodePrompt prompt = DecodePrompt::forced;
  DataFormat format = DataFormat::icot_text;
  int64_t max_new_tokens = 0, longest_prompt = 0;
  std::vector<Scorer> scorers;
  std::vector<EvalRecord> records;
  int64_t samples = 1;
  double temperature = 0;
  std::vector<ControlResult> controls;
  double answer_ce = 0;      // the intact model's, beside controls; and
  int64_t golds_beyond = 0;  // the gold answers that are not in it, as they end behind the model's last position
  double seconds = 0;
  int64_t timed = 0;                 // questions that were answered in that time
  std::optional<double> ms_batch_1;  // of one question alone, where measured: mean over the first few

  int64_t count() const { return static_cast<int64_t>(records.size()); }
  int64_t correct(std::size_t scorer) const;
  double accuracy(std::size_t scorer) const;  // a share of all questions
  double passes() const;                      // mean over the answers to questions that were run, as the two below
  double passes_merged() const;
  double tokens() const;
  double ms_per_question() const;  // at the batch asked for
  /// The share of a scorer in answers taken one by one, and of questions that any of their answers gets right.
  std::vector<double> pass_at_1(std::size_t scorer) const, pass_at_all(std::size_t scorer) const;  // by question
  std::vector<double> verdicts(std::size_t scorer) const;                                          // by question, 0 or 1
  int64_t limit_hits() const;
  int64_t too_long() const;
  int64_t without_prompt() const;  // that end without the prompt behind which an answer stands, where it is not given
  int64_t golds_over() const;
};

/// The most new tokens when none are asked for: decode.max_new_tokens; else 256 where the model writes the prompt itself, else what the
/// longest gold answer and EOS need, from 10 to kLongestPrompt; 32 where there is no gold answer (0).
int64_t default_new_tokens(const RunConfig& config, const Recipe& decoding, int64_t longest_gold);

/// Error(code data, FILE:LINE) for a row that cannot be decoded: an id outside the vocabulary, no token in the question, no "prompt" where
/// the method needs it; Error(code data, FILE) for rows of text without a tokenizer.
EvalResult evaluate(Model& model, Arena& arena, const TextModel& text, const RowFile& file, const EvalOptions& options);

/// Everything but times, which a caller adds: the same for any batch and number of threads. Bootstrap intervals beside every accuracy.
Json to_json(const EvalResult& result);

/// What `--sweep-latents` and `--sweep-passes` tried.
struct SweepPoint {
  int64_t latents = 0, iterations = 0;
  EvalResult result;
};
/// By point: `latents`, `iterations`, what it costs, and accuracy by the strict scorer against the intact model's.
Json sweep_json(const EvalResult& intact, const std::vector<SweepPoint>& points);

}  // namespace kava
