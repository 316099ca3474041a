#include "tools/inspect_probe.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "engine/cli.h"
#include "engine/files/files.h"
#include "engine/files/json.h"
#include "engine/files/paths.h"
#include "engine/files/safetensors.h"
#include "models/adapter.h"
#include "models/decode.h"
#include "models/evaluate.h"
#include "models/kava.h"
#include "models/latent_tokens.h"
#include "models/open_model.h"
#include "tools/device.h"

namespace kava {

namespace {

struct ProbeCommand {
  std::string model, data, out;
  int64_t limit = 16;
  DeviceOptions device;
};

// Latents in words over the passes, [passes, B, M].
struct Words {
  std::vector<int64_t> passes;
  std::vector<int32_t> top, nearest;
  std::vector<float> distance;
};

// Cosines between the latents of pass T and the kept tokens of the teacher, [L, K/V heads, M, M], means over samples, and over how many.
struct Similarity {
  std::vector<float> k, v;
  std::vector<int32_t> samples;
};

class Probe {
 public:
  Probe(Ops& ops, OpenedModel& opened, const std::vector<Sample>& samples)
      : ops_(ops), opened_(opened), config_(opened.config), samples_(samples), recipe_(decoding_recipe(config_)) {}

  bool has_latents() const { return recipe_.latents > 0; }
  int64_t latents() const { return recipe_.latents; }

  /// The answers, and where there are latents their words in each of the passes that a smaller T stops after.
  std::vector<std::string> run(Words& words) {
    std::vector<std::string> outputs;
    const bool sequential = config_.method == Method::coconut;
    const int64_t last = has_latents() ? std::min<int64_t>(recipe_.iterations, recipe_.latents) : 0;
    for (int64_t pass = sequential ? last : 0; pass <= last; ++pass) {
      // A model of its own for each, since its configuration is part of it.
      if (!sequential && has_latents()) opened_.config.latent.iterations = pass;
      const std::unique_ptr<Model> model = load_model(ops_, opened_);
      Arena arena(ops_);
      const std::vector<DecodeResult> results = decode_all(*model, arena, pass == last);
      if (has_latents()) words.passes.push_back(pass);
      for (const DecodeResult& r : results) {
        if (pass == last) outputs.push_back(text_of(r.ids));
        if (has_latents()) add_words(*model, arena, r.latents, words);
      }
    }
    opened_.config = config_;
    return outputs;
  }

  /// The dump of one step without an update: what was kept, and both sides' keys and values. Empty where there is no teacher with latents.
  Dump distilled() {
    RunConfig config = config_;
    const Recipe recipe = recipe_of(config, last_stage(config));
    if (!recipe.teacher || recipe.latents == 0) return {};
    config.kv.weight = std::max(config.kv.weight, 1.0);  // methods without L_KV are looked at in the same way
    Model model(ops_, config, opened_.text.shape, opened_.adapter.empty() ? Values::start : Values::loaded, ModelUse::inference);
    if (!opened_.adapter.empty()) load_adapter(model, opened_.adapter.string());
    Arena arena(ops_);
    Dump dump;
    StepOptions options;
    options.recipe = recipe, options.dropout = false, options.backward = false, options.dump = &dump;
    run_step(model, arena, samples_, batch_totals(config, recipe, samples_), options);
    return dump;
  }

 private:
  std::vector<DecodeResult> decode_all(Model& model, Arena& arena, bool whole) const {
    DecodeOptions options;
    options.eos = *opened_.text.eos;
    options.keep_latents = has_latents();
    options.max_new_tokens = whole ? default_new_tokens(config_, recipe_, 0) : 1;
    return decode(model, arena, samples_, options);
  }

  std::string text_of(const std::vector<int32_t>& ids) const {
    if (opened_.text.tokenizer) return std::string(stripped(opened_.text.tokenizer->decode(ids, true)));
    std::string out;
    for (int32_t id : ids) out += (out.empty() ? "" : " ") + std::to_string(id);
    return out;
  }

  void add_words(Model& model, Arena& arena, const LatentStates& latents, Words& words) const {
    const int64_t tokens = opened_.text.tokenizer ? opened_.text.tokenizer->size() : opened_.text.shape.vocab;
    for (const NearestToken& n : nearest_tokens(model, arena, latents.values, tokens, latents.positions))
      words.nearest.push_back(n.id), words.distance.push_back(static_cast<float>(n.distance));
    words.top.insert(words.top.end(), latents.top.begin(), latents.top.end());
  }

  Ops& ops_;
  OpenedModel& opened_;
  const RunConfig config_;
  const std::vector<Sample>& samples_;
  const Recipe recipe_;
};

double cosine(const double* a, const double* b, int64_t n) {
  double ab = 0, aa = 0, bb = 0;
  for (int64_t i = 0; i < n; ++i) ab += a[i] * b[i], aa += a[i] * a[i], bb += b[i] * b[i];
  return aa > 0 && bb > 0 ? ab / std::sqrt(aa * bb) : 0;
}

// [L, H, M, M]: latent against kept token, over the samples whose slot is taken.
std::vector<float> mean_cosines(const DumpTensor& latent, const DumpTensor& target, const DumpTensor& kept, std::vector<int32_t>& samples) {
  const int64_t L = latent.shape[0], B = latent.shape[1], H = latent.shape[2], M = latent.shape[3], D = latent.shape[4];
  std::vector<float> out(static_cast<std::size_t>(L * H * M * M));
  samples.assign(static_cast<std::size_t>(L * H * M), 0);
  for (int64_t l = 0; l < L; ++l)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t slot = 0; slot < M; ++slot) {
        int32_t& n = samples[static_cast<std::size_t>((l * H + h) * M + slot)];
        std::vector<double> sums(static_cast<std::size_t>(M));
        for (int64_t b = 0; b < B; ++b) {
          if (kept.indices[static_cast<std::size_t>(((b * L + l) * H + h) * M + slot)] < 0) continue;
          ++n;
          const int64_t rows = ((l * B + b) * H + h) * M;
          for (int64_t i = 0; i < M; ++i)
            sums[static_cast<std::size_t>(i)] += cosine(latent.values.data() + (rows + i) * D, target.values.data() + (rows + slot) * D, D);
        }
        for (int64_t i = 0; i < M; ++i)
          out[static_cast<std::size_t>(((l * H + h) * M + i) * M + slot)] =
              n > 0 ? static_cast<float>(sums[static_cast<std::size_t>(i)] / n) : 0.0F;
      }
  return out;
}

// Texts by id of every token that the file names, so that a report needs no tokenizer.
Json token_texts(const OpenedModel& opened, std::initializer_list<const std::vector<int32_t>*> ids) {
  Json texts = Json::object();
  for (const auto* list : ids)
    for (int32_t id : *list)
      texts[std::to_string(id)] = opened.text.tokenizer ? escaped(opened.text.tokenizer->token(id), 40) : std::to_string(id);
  return texts;
}

std::string ids_text(const std::vector<int32_t>& ids) {
  std::string out;
  for (int32_t id : ids) out += (out.empty() ? "" : " ") + std::to_string(id);
  return out;
}

int probe(const ProbeCommand& command) {
  const std::unique_ptr<Ops> ops = make_ops(command.device);
  OpenedModel opened = open_model(command.model);
  require_no_input("--out", command.out, {opened.run_dir.string(), command.data, opened.config.model.path, opened.config.model.adapter});
  require_writable("--out", command.out);
  if (!opened.text.eos) throw Error(Exit::data, shown_path(opened.text.folder), "names no end of sequence", "add eos_token_id");
  RowFile file = read_rows(command.data);
  if (static_cast<int64_t>(file.rows.size()) > command.limit) file.rows.resize(static_cast<std::size_t>(command.limit));
  LeftOut left_out;
  RunConfig config = opened.config;
  config.data.fraction = 1;
  std::vector<Sample> samples = read_samples(opened.text, config, {file}, &left_out);
  const Recipe recipe = decoding_recipe(config);
  const int64_t longest = longest_prompt(opened.text.shape);
  const auto long_questions = std::erase_if(samples, [&](const Sample& s) { return prompt_length(recipe, s) > longest; });
  if (left_out.all() > 0) print_note("rows " + text_of(left_out, config, opened.text.shape));
  if (long_questions > 0) print_note(fmt::format("rows left out: {} over {} tokens of a question", long_questions, longest));
  if (samples.empty()) throw Error(Exit::data, shown_path(command.data), "no row is left", "raise --limit");

  Json questions = Json::array();
  std::vector<int32_t> trace, offsets = {0};
  for (const Sample& s : samples) {
    const Row& row = file.rows[static_cast<std::size_t>(s.row)];
    questions.push_back({{"question", row.is_ids ? ids_text(row.question_ids) : row.question},
                         {"gold", row.is_ids ? ids_text(row.answer_ids) : row.answer}});
    trace.insert(trace.end(), s.trace.begin(), s.trace.end());
    offsets.push_back(static_cast<int32_t>(trace.size()));
  }
  Probe probed(*ops, opened, samples);
  Words words;
  const std::vector<std::string> outputs = probed.run(words);
  for (std::size_t i = 0; i < outputs.size(); ++i) questions[i]["output"] = outputs[i];
  const Dump dump = probed.distilled();
  const auto B = static_cast<int64_t>(samples.size()), M = probed.latents(), T = static_cast<int64_t>(words.passes.size());
  std::vector<TensorOut> tensors = {{"trace.ids", "I32", {static_cast<int64_t>(trace.size())}, trace.data()},
                                    {"trace.offsets", "I32", {B + 1}, offsets.data()}};
  if (probed.has_latents()) {
    tensors.push_back({"latent.top", "I32", {T, B, M}, words.top.data()});
    tensors.push_back({"latent.nearest", "I32", {T, B, M}, words.nearest.data()});
    tensors.push_back({"latent.distance", "F32", {T, B, M}, words.distance.data()});
  }
  Similarity similarity;
  if (!dump.empty()) {
    const DumpTensor& kept = dump.at("rkv.kept");
    similarity.k = mean_cosines(dump.at("latent.k"), dump.at("target.k"), kept, similarity.samples);
    similarity.v = mean_cosines(dump.at("latent.v"), dump.at("target.v"), kept, similarity.samples);
    const int64_t L = kept.shape[1], H = kept.shape[2];
    tensors.push_back({"similarity.k", "F32", {L, H, M, M}, similarity.k.data()});
    tensors.push_back({"similarity.v", "F32", {L, H, M, M}, similarity.v.data()});
    tensors.push_back({"similarity.samples", "I32", {L, H, M}, similarity.samples.data()});
    tensors.push_back({"rkv.kept", "I32", kept.shape, kept.indices.data()});
  }
  // Of config.toml: what was opened may end in an earlier stage. A plain model is no run's.
  const std::string run = opened.plain() ? "" : config_hash(load_run_config(opened.run_dir.string()));
  const Json about = {{"format", 1},
                      {"config_hash", run},
                      {"method", name_of(opened.config.method)},
                      {"weights", opened.weights},
                      {"data", sha256_file(command.data)},
                      {"passes", words.passes},
                      {"questions", std::move(questions)},
                      {"tokens", token_texts(opened, {&words.top, &words.nearest, &trace})}};
  fmt::print("{}: {} questions, {} latents, {} passes{}\n", shown_path(command.out), B, M, T,
             dump.empty() ? ", no teacher to hold them against" : "");
  require_printed();
  write_safetensors(command.out, tensors, {{"kava.probe", about.dump(-1, ' ', true, Json::error_handler_t::replace)}});
  return 0;
}

}  // namespace

void add_probe_command(CLI::App& app, std::function<int()>& chosen) {
  auto command = std::make_shared<ProbeCommand>();
  CLI::App* sub = app.add_subcommand("probe", "Write what a report shows of a model: latents in words, similarities, kept tokens");
  sub->footer(
      "Example (after tools/quickstart.sh):\n  kava_inspect probe runs/quickstart/kava --data runs/quickstart/data/test.txt --out "
      "runs/probe.safetensors");
  sub->add_option("RUN", command->model, "A run directory, or a checkpoint in it")->required();
  sub->add_option("--data", command->data, "A data file, with traces")->required();
  sub->add_option("--limit", command->limit, "Only the first N rows")->check(CLI::Range(int64_t{1}, int64_t{4096}))->capture_default_str();
  sub->add_option("--out", command->out, "The safetensors file to write")->required();
  add_device_options(*sub, command->device);
  sub->callback([command, &chosen] { chosen = [command] { return probe(*command); }; });
}

}  // namespace kava
