#include "models/train_samples.h"

#include <algorithm>
#include <filesystem>
#include <sstream>

#include "engine/cli.h"
#include "engine/data/row_forms.h"
#include "engine/error.h"
#include "engine/files/files.h"
#include "models/contents.h"
#include "models/recipe.h"
#include "models/token_cache.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

constexpr std::uintmax_t kWorthKeeping = std::uintmax_t{4} << 20;  // bytes of data.train

SampleOptions options_of(const TextModel& text, const RunConfig& config) {
  SampleOptions o = sample_options(config, text.eos.value_or(-1), text.shape.vocab);
  o.fraction = 1;
  return o;
}

// The keys of [data] that decide about tokens, and what else does.
std::string key_of(const TextModel& text, const RunConfig& config, const SampleOptions& options) {
  std::string key = release_text("kava") + "\n";
  std::istringstream lines(to_toml(config));
  bool inside = false;
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with('[')) inside = line == "[data]";
    else if (inside && !line.starts_with("train ") && !line.starts_with("valid ") && !line.starts_with("max_tokens ")) key += line + "\n";
  }
  if (config.data.fraction < 1) key += fmt::format("seed {}\n", config.seed);
  key += fmt::format("{} {} {} {}\n", options.needs_prompt, options.before_answer, options.eos, options.vocab_size);
  for (const auto& [name, digest] : model_digests(text.folder, text.shape, Init::random))
    if (name != "config.json") key += name + " " + digest + "\n";
  for (const DataFile& file : config.data.train)
    key += fmt::format("{} {}\n", file.format ? name_of(*file.format) : "any", sha256_file(file.path));
  return sha256(key);
}

// Rows of text need a tokenizer; told before a row is looked at.
void require_tokenizer_for(const TextModel& text, const RowFile& part) {
  if (text.tokenizer) return;
  require_tokenizer(text, {RowFile{part.path, part.format, {part.rows[0]}, "", part.keys}});
}

int64_t count_rows(const RunConfig& config) {
  int64_t rows = 0;
  for (const DataFile& file : config.data.train) rows += read_parts(file.path, file.format, [](RowFile&) {}).rows;
  return rows;
}

// Of all lengths.
TrainSamples tokenised(const TextModel& text, const RunConfig& config, const SampleOptions& options) {
  TrainSamples all;
  std::vector<int64_t> chosen;
  if (config.data.fraction < 1) chosen = chosen_rows(count_rows(config), config.data.fraction, config.seed);
  auto next = chosen.begin();
  int64_t first = 0;  // row of the next part
  for (const DataFile& file : config.data.train)
    all.files.push_back(read_parts(file.path, file.format, [&](RowFile& part) {
      require_tokenizer_for(text, part);
      const int64_t end = first + std::ssize(part.rows);
      std::vector<int64_t> rows;  // of those that are taken
      if (config.data.fraction < 1) {
        std::vector<Row> some;
        for (; next != chosen.end() && *next < end; ++next)
          rows.push_back(*next), some.push_back(std::move(part.rows[static_cast<std::size_t>(*next - first)]));
        part.rows = std::move(some);
      }
      LeftOut left_out;
      if (!part.rows.empty())
        for (Sample& sample : make_samples({part}, text.tokenizer ? &*text.tokenizer : nullptr, options, &left_out)) {
          sample.row = rows.empty() ? first + sample.row : rows[static_cast<std::size_t>(sample.row)];
          for (std::vector<int32_t>* ids : {&sample.question, &sample.trace, &sample.answer, &sample.steps}) ids->shrink_to_fit();
          all.samples.push_back(std::move(sample));
        }
      all.left_out.by_answer += left_out.by_answer;
      first = end;
    }));
  return all;
}

}  // namespace

TrainSamples read_train_samples(const TextModel& text, const RunConfig& config) {
  const SampleOptions options = options_of(text, config);
  std::uintmax_t bytes = 0;
  for (const DataFile& file : config.data.train) {
    std::error_code failed;
    const std::uintmax_t size = fs::file_size(file.path, failed);
    if (!failed && size > kLargestDataFile) (void)read_file(file.path, kLargestDataFile);  // refuses it unread
    bytes += failed ? 0 : size;
  }
  TrainSamples all;
  if (bytes < kWorthKeeping) {
    all = tokenised(text, config, options);
  } else {
    const TokenCache cache(key_of(text, config, options));
    if (std::optional<TrainSamples> kept = cache.read(config.data.train, options.vocab_size)) {
      all = *std::move(kept);
    } else {
      all = tokenised(text, config, options);
      cache.write(all);
    }
  }
  leave_out_long(all.samples, config, text.shape, all.left_out);
  return all;
}

}  // namespace kava
