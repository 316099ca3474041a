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
  const SampleOptions options = sample_options(config, text.eos.value_or(-1), text.shape.vocab);
  std::vector<Sample> samples = make_samples(files, text.tokenizer ? &*text.tokenizer : nullptr, options, left_out);
  leave_out_long(samples, config, text.shape, *left_out);
  return samples;
}

void leave_out_long(std::vector<Sample>& samples, const RunConfig& config, const ModelConfig& shape, LeftOut& left_out) {
  const int64_t positions = shape.position_limit();
  std::erase_if(samples, [&](const Sample& s) {
    const bool beyond = positions > 0 && needed_positions(config, s) > positions,
               too_long = !beyond && longest_sequence(config, s) > config.data.max_tokens;
    left_out.by_positions += beyond, left_out.too_long += too_long;
    return beyond || too_long;
  });
}

void require_samples(const RunConfig& config, const ModelConfig& shape, const std::string& path, std::span<const Sample> samples,
                     const LeftOut& left_out) {
  if (!samples.empty()) return;
  std::vector<std::string> why, remedies;
  const auto add = [&](int64_t count, std::string_view before, const std::string& after, const char* remedy) {
    if (count == 0) return;
    why.push_back(fmt::format("{}{}{} {}", before, count == left_out.all() ? "all " : "", count, after)), remedies.emplace_back(remedy);
  };
  add(left_out.too_long, "", fmt::format("are longer than data.max_tokens = {}", config.data.max_tokens), "raise data.max_tokens");
  add(left_out.by_positions, "", fmt::format("need more than n_positions = {}", shape.position_limit()),
      "give shorter rows or fewer latents");
  add(left_out.by_answer, "the answers of ", "do not begin with a digit", "set data.answers = \"all\"");
  throw Error(Exit::data, shown_path(path), fmt::format("no row is left: {}", fmt::join(why, ", ")),
              fmt::format("{}", fmt::join(remedies, ", ")));
}

std::string text_of(const LeftOut& left_out, const RunConfig& config, const ModelConfig& shape) {
  if (left_out.all() == 0) return "none left out";
  std::vector<std::string> parts;
  if (left_out.too_long > 0) parts.push_back(fmt::format("{} over data.max_tokens = {}", left_out.too_long, config.data.max_tokens));
  if (left_out.by_positions > 0) parts.push_back(fmt::format("{} over n_positions = {}", left_out.by_positions, shape.position_limit()));
  if (left_out.by_answer > 0) parts.push_back(fmt::format("{} by data.answers = \"digit\"", left_out.by_answer));
  return fmt::format("left out: {}", fmt::join(parts, ", "));
}

std::vector<RowFile> read_train_files(const RunConfig& config) {
  std::vector<RowFile> files;
  for (const DataFile& f : config.data.train) files.push_back(read_rows(f.path, f.format));
  return files;
}

}  // namespace kava
