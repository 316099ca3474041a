// Data files: rows of question, reasoning steps and answer, and the token sequences made of them (docs/formats.md section 1,
// docs/method.md section 2).
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/config/config.h"

namespace kava {

class Tokenizer;

/// Without the ASCII white space at both ends.
std::string_view stripped(std::string_view s);

/// One row. Text ends are stripped, empty steps are gone.
struct Row {
  std::string question;
  std::vector<std::string> steps;
  std::string answer;
  bool has_trace = true;  // false: the form has no chain, and no key of the row names one
  bool is_ids = false;    // then the ids below and not the text above
  std::vector<int32_t> question_ids, trace_ids, answer_ids;
  std::vector<int32_t> step_lengths;  // of the steps that trace_ids is made of
  std::optional<int64_t> prompt;      // leading answer ids that are the prompt
  int64_t line = 0;                   // in its file, from 1
};

struct RowFile {
  std::string path;
  DataFormat format;
  std::vector<Row> rows;
  std::string sha256;  // of the file's bytes
  std::string keys;    // those of the first row, for errors; "text" for icot_text
  /// "FILE:LINE" of a row, for errors.
  std::string where(const Row& row) const;
};

/// Reads a whole file, a JSON list, one JSON object a line or text; without `format` the fields are recognised from the first row. The
/// first malformed row is Error(code data, FILE:LINE), a file without rows Error(code data, FILE).
RowFile read_rows(const std::string& path, std::optional<DataFormat> format = std::nullopt);

/// What a run needs of a file beside its rows.
struct FileFacts {
  std::string path;
  DataFormat format = DataFormat::icot_text;
  std::string sha256, keys;  // as of a RowFile
  int64_t rows = 0;
  bool chain = false;  // of any row
};

/// read_rows, some rows at a time: `take` is given files that hold the next rows, without the digest.
FileFacts read_parts(const std::string& path, std::optional<DataFormat> format, const std::function<void(RowFile& part)>& take);

/// A JSON number as an answer: whole without point or exponent, else the shortest decimal that reads back, without exponent.
std::string answer_text(double number);

/// Token ids of one row. answer = [separator] prompt, answer, EOS; its first `prompt` ids are the prompt with the separator (0 for an ids
/// row that does not say).
struct Sample {
  std::vector<int32_t> question, trace, answer;
  int32_t prompt = 0;
  int64_t row = 0;             // index over the rows of all files
  int64_t line = 0;            // of its file
  std::vector<int32_t> steps;  // lengths of the trace's steps
  int32_t blank = 0;           // 1: the token after the prompt is white space alone, where codi.token = "before_answer" distils
};

/// The keys of [data], and what else of a run decides how rows become samples.
struct SampleOptions : RunConfig::Data {
  bool needs_prompt = false;   // an ids row must say how long its prompt is
  bool before_answer = false;  // Sample::blank is wanted
  int64_t seed = 0;
  int32_t eos = 0;
  int64_t vocab_size = 0;                        // ids rows must lie below it
  std::vector<int32_t> chat_before, chat_after;  // around every question of text, in place of BOS
};

/// Ids of a question: BOS if the tokenizer adds one, or what begins a chat; the text between its affixes; what ends it in a chat; the
/// separator.
std::vector<int32_t> question_ids(const Tokenizer& tokenizer, const SampleOptions& options, std::string_view question);
/// Ids of the prompt, the separator before it.
std::vector<int32_t> prompt_ids(const Tokenizer& tokenizer, const SampleOptions& options);
/// Ids of an answer between its affixes, without commas where the options say so; no EOS.
std::vector<int32_t> answer_ids(const Tokenizer& tokenizer, const SampleOptions& options, std::string answer);

/// Rows that no sample is made of.
struct LeftOut {
  int64_t too_long = 0;      // their longest sequence is over data.max_tokens
  int64_t by_positions = 0;  // they need more positions than the model has
  int64_t by_answer = 0;     // data.answers does not take them
  int64_t all() const { return too_long + by_positions + by_answer; }
};

/// Tokenises the parts, each with its affixes, alone and concatenates them. Rows that data.answers does not take are left out and counted
/// in *left_out; data.fraction applies before. Order is that of the files. Error(code data, FILE:LINE) on an id outside the vocabulary, a
/// question without a token or a missing prompt; Error(code data, FILE) on text rows without a tokenizer.
std::vector<Sample> make_samples(const std::vector<RowFile>& files, const Tokenizer* tokenizer, const SampleOptions& options,
                                 LeftOut* left_out);

/// Which of n rows are chosen, ascending: the round(fraction n), at least one, with the smallest random numbers of the seed.
std::vector<int64_t> chosen_rows(int64_t n, double fraction, int64_t seed);

/// The order of n samples in an epoch: a permutation of 0..n-1 that depends on (n, seed, epoch) alone.
std::vector<int64_t> epoch_order(int64_t n, int64_t seed, int64_t epoch);

}  // namespace kava
