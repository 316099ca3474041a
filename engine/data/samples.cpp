#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/data/data.h"
#include "engine/error.h"
#include "engine/text/tokenizer.h"
#include "kernels/philox.h"

namespace kava {

namespace {

void append(std::vector<int32_t>& ids, const std::vector<int32_t>& more) { ids.insert(ids.end(), more.begin(), more.end()); }

Sample ids_sample(const RowFile& file, const Row& row, const SampleOptions& options) {
  for (const auto* ids : {&row.question_ids, &row.trace_ids, &row.answer_ids})
    for (int32_t id : *ids)
      if (id >= options.vocab_size)
        throw Error(Exit::data, file.where(row), fmt::format("token id {} is outside the model's vocabulary of {}", id, options.vocab_size),
                    "use the data made for this model");
  if (options.needs_prompt && !row.prompt)
    throw Error(Exit::data, file.where(row), "the row has no \"prompt\", on which codi.weight and rkv.queries = \"answer\" depend",
                "give the number of leading answer ids that are the prompt");
  Sample sample;
  sample.question = row.question_ids, sample.trace = row.trace_ids, sample.answer = row.answer_ids;
  sample.steps = row.step_lengths;
  sample.prompt = static_cast<int32_t>(row.prompt.value_or(0));
  return sample;
}

void add_steps(Sample& sample, const Row& row, const Tokenizer& tokenizer, const SampleOptions& options) {
  const std::size_t steps = row.steps.size() - (options.drop_last_step && !row.steps.empty() ? 1 : 0);
  for (std::size_t i = 0; i < steps; ++i) {
    std::string text = (i == 0 ? options.trace_prefix : options.step_separator) + row.steps[i] + options.step_suffix;
    if (i + 1 == steps) text += options.trace_suffix;
    const std::vector<int32_t> ids = tokenizer.encode(text);
    append(sample.trace, ids);
    sample.steps.push_back(static_cast<int32_t>(ids.size()));
  }
}

Sample text_sample(const RowFile& file, const Row& row, const Tokenizer& tokenizer, const std::vector<int32_t>& prompt,
                   const SampleOptions& options) {
  Sample sample;
  sample.question = question_ids(tokenizer, options, row.question);
  // Its last row predicts what comes first; a vocabulary may lack single bytes.
  if (sample.question.empty())
    throw Error(Exit::data, file.where(row), "the question has no token of the model's vocabulary", "correct the row");
  add_steps(sample, row, tokenizer, options);
  sample.answer = prompt;
  sample.prompt = static_cast<int32_t>(prompt.size());
  const std::vector<int32_t> ids = answer_ids(tokenizer, options, row.answer);
  sample.blank = options.before_answer && !ids.empty() && stripped(tokenizer.decode({&ids[0], 1})).empty();
  append(sample.answer, ids);
  sample.answer.push_back(options.eos);
  return sample;
}

bool is_taken(const Row& row, const SampleOptions& options) {
  return row.is_ids || options.answers == Answers::all || (!row.answer.empty() && row.answer[0] >= '0' && row.answer[0] <= '9');
}

uint64_t random64(Purpose purpose, int64_t seed, uint64_t index, uint64_t epoch) {
  const auto words = philox(
      {static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), static_cast<uint32_t>(epoch), static_cast<uint32_t>(epoch >> 32)},
      philox_key(purpose, static_cast<uint64_t>(seed)));
  return uint64_t{words[1]} << 32 | words[0];
}

}  // namespace

std::vector<int32_t> question_ids(const Tokenizer& tokenizer, const SampleOptions& options, std::string_view question) {
  std::vector<int32_t> ids = options.chat_before;
  if (const auto bos = tokenizer.bos(); bos && ids.empty()) ids.push_back(*bos);
  append(ids, tokenizer.encode(options.question_prefix + std::string(question) + options.question_suffix));
  append(ids, options.chat_after);
  if (options.separator == Separator::eos) ids.push_back(options.eos);
  return ids;
}

std::vector<int32_t> prompt_ids(const Tokenizer& tokenizer, const SampleOptions& options) {
  std::vector<int32_t> ids;
  if (options.separator == Separator::eos) ids.push_back(options.eos);
  append(ids, tokenizer.encode(options.answer_prompt));
  return ids;
}

std::vector<int32_t> answer_ids(const Tokenizer& tokenizer, const SampleOptions& options, std::string answer) {
  if (options.answer_commas == Commas::remove) std::erase(answer, ',');
  return tokenizer.encode(options.answer_prefix + answer + options.answer_suffix);
}

std::vector<Sample> make_samples(const std::vector<RowFile>& files, const Tokenizer* tokenizer, const SampleOptions& options,
                                 LeftOut* left_out) {
  int64_t total = 0;
  for (const RowFile& file : files) total += static_cast<int64_t>(file.rows.size());
  const std::vector<int64_t> chosen = chosen_rows(total, options.fraction, options.seed);
  const std::vector<int32_t> prompt = tokenizer ? prompt_ids(*tokenizer, options) : std::vector<int32_t>{};

  std::vector<Sample> samples;
  samples.reserve(chosen.size());
  *left_out = {};
  int64_t first = 0;  // index of the file's first row
  auto next = chosen.begin();
  for (const RowFile& file : files) {
    const int64_t end = first + static_cast<int64_t>(file.rows.size());
    for (; next != chosen.end() && *next < end; ++next) {
      const Row& row = file.rows[static_cast<std::size_t>(*next - first)];
      if (!row.is_ids && !tokenizer)
        throw Error(Exit::data, shown_path(file.path), "rows of text need a tokenizer, and the model's folder has none",
                    "add tokenizer.json to it, or give rows of token ids");
      if (!is_taken(row, options)) {
        ++left_out->by_answer;
        continue;
      }
      Sample sample = row.is_ids ? ids_sample(file, row, options) : text_sample(file, row, *tokenizer, prompt, options);
      sample.row = *next, sample.line = row.line;
      samples.push_back(std::move(sample));
    }
    first = end;
  }
  return samples;
}

std::vector<int64_t> chosen_rows(int64_t n, double fraction, int64_t seed) {
  std::vector<int64_t> rows(static_cast<std::size_t>(n));
  std::iota(rows.begin(), rows.end(), 0);
  const int64_t count = std::clamp<int64_t>(std::llround(fraction * static_cast<double>(n)), std::min<int64_t>(n, 1), n);
  if (count == n) return rows;
  std::vector<std::pair<uint64_t, int64_t>> drawn;
  drawn.reserve(rows.size());
  for (int64_t row : rows) drawn.emplace_back(random64(Purpose::fraction, seed, static_cast<uint64_t>(row), 0), row);
  std::nth_element(drawn.begin(), drawn.begin() + count, drawn.end());
  rows.resize(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = drawn[i].second;
  std::sort(rows.begin(), rows.end());
  return rows;
}

std::vector<int64_t> epoch_order(int64_t n, int64_t seed, int64_t epoch) {
  std::vector<int64_t> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  for (uint64_t left = static_cast<uint64_t>(n); left > 1; --left) {
    // Uniform to within left / 2^64.
    const uint64_t pick = random64(Purpose::epoch_order, seed, left, static_cast<uint64_t>(epoch)) % left;
    std::swap(order[left - 1], order[pick]);
  }
  return order;
}

}  // namespace kava
