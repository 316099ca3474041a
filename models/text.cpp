#include "models/text.h"

#include <algorithm>
#include <filesystem>

#include "engine/error.h"
#include "engine/files/files.h"
#include "models/recipe.h"

namespace kava {

TextModel open_text_model(const std::string& folder) {
  TextModel t{folder, ModelConfig::load(folder), std::nullopt, std::nullopt, ""};
  const std::filesystem::path file = std::filesystem::path(folder) / "tokenizer.json";
  if (is_there(file)) {
    t.tokenizer = Tokenizer::load(folder);
    t.tokenizer->require_ids_below(t.shape.vocab, folder);
    t.note = t.tokenizer->note();
    if (const std::optional<std::string> name = t.tokenizer->eos_token()) {
      t.eos = t.tokenizer->id_of(*name);
      if (!t.eos)
        throw Error(Exit::data, file.string(), "does not hold the eos_token \"" + escaped(*name) + "\"", "correct tokenizer_config.json");
    }
  }
  if (!t.eos && t.shape.eos_is_list)
    throw Error(Exit::data, t.shape.source, "eos_token_id is a list and no tokenizer file names the eos_token",
                "name it in tokenizer_config.json");
  if (!t.eos && !t.shape.eos_ids.empty()) {
    if (t.shape.eos_ids[0] >= t.shape.vocab)
      throw Error(Exit::data, t.shape.source, fmt::format("eos_token_id = {} is no token of {}", t.shape.eos_ids[0], t.shape.vocab),
                  "correct it, or name the eos_token in tokenizer_config.json");
    t.eos = static_cast<int32_t>(t.shape.eos_ids[0]);
  }
  if (t.tokenizer && !t.eos)
    throw Error(Exit::data, folder, "names no end of sequence", "give eos_token in tokenizer_config.json or eos_token_id in config.json");
  return t;
}

SampleOptions sample_options(const RunConfig& config, int32_t eos, int64_t vocab_size) {
  SampleOptions options;
  static_cast<RunConfig::Data&>(options) = config.data;
  options.length = [config](const Sample& sample) { return longest_sequence(config, sample); };
  options.needs_prompt = config.codi.weight > 0 || (config.kv.weight > 0 && config.rkv.queries == Queries::answer);
  options.before_answer = config.codi.token == CodiToken::before_answer;
  options.seed = config.seed;
  options.eos = eos;
  options.vocab_size = vocab_size;
  return options;
}

void require_tokenizer(const TextModel& text, const std::vector<RowFile>& files) {
  if (text.tokenizer || !is_there(std::filesystem::path(text.folder) / "vocab.json")) return;
  for (const RowFile& file : files)
    if (!std::ranges::all_of(file.rows, [](const Row& row) { return row.is_ids; }))
      Tokenizer::refuse_missing(text.folder, "no text can be read", "");
}

std::vector<Sample> read_samples(const TextModel& text, const RunConfig& config, const std::vector<RowFile>& files, LeftOut* left_out) {
  require_tokenizer(text, files);
  SampleOptions options = sample_options(config, text.eos.value_or(-1), text.shape.vocab);
  if (const int64_t positions = text.shape.position_limit())
    options.length = [config, positions](const Sample& sample) {
      // What passes the last position counts as over-long.
      const int64_t tokens = longest_sequence(config, sample);
      return needed_positions(config, sample) > positions ? std::max(tokens, config.data.max_tokens + 1) : tokens;
    };
  return make_samples(files, text.tokenizer ? &*text.tokenizer : nullptr, options, left_out);
}

std::string length_limit(const RunConfig& config, const ModelConfig& shape) {
  const int64_t positions = shape.position_limit();
  const std::string tokens = fmt::format("data.max_tokens = {}", config.data.max_tokens);
  return positions > 0 && positions < config.data.max_tokens ? fmt::format("{} or n_positions = {}", tokens, positions) : tokens;
}

void require_samples(const RunConfig& config, const ModelConfig& shape, const std::string& path, std::span<const Sample> samples,
                     const LeftOut& left_out) {
  if (!samples.empty()) return;
  const auto [too_long, by_answer] = left_out;
  const int64_t positions = shape.position_limit();
  // What is longer than data.max_tokens is then longer than the positions too.
  const bool by_positions = positions > 0 && positions < config.data.max_tokens;
  const std::string both = too_long > 0 && by_answer > 0 ? ", " : "", all = both.empty() ? "all " : "";
  throw Error(
      Exit::data, shown_path(path),
      "no row is left: " + (too_long > 0 ? fmt::format("{}{} are longer than {}", all, too_long, length_limit(config, shape)) : "") + both +
          (by_answer > 0 ? fmt::format("the answers of {}{} do not begin with a digit", all, by_answer) : ""),
      std::string(too_long == 0  ? ""
                  : by_positions ? "give shorter rows or fewer latents"
                                 : "raise data.max_tokens") +
          both + (by_answer > 0 ? "set data.answers = \"all\"" : ""));
}

std::string text_of(const LeftOut& left_out, const std::string& limit) {
  if (left_out.all() == 0) return "none left out";
  std::string text = "left out: ";
  if (left_out.too_long > 0) text += fmt::format("{} over {}", left_out.too_long, limit);
  if (left_out.by_answer > 0)
    text += fmt::format("{}{} by data.answers = \"digit\"", left_out.too_long > 0 ? ", " : "", left_out.by_answer);
  return text;
}

std::vector<RowFile> read_train_files(const RunConfig& config) {
  std::vector<RowFile> files;
  for (const DataFile& f : config.data.train) files.push_back(read_rows(f.path, f.format));
  return files;
}

}  // namespace kava
