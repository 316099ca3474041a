#include "models/decode.h"

#include <algorithm>
#include <numeric>

#include "engine/device/host.h"
#include "engine/device/indices.h"
#include "models/decode_batch.h"

namespace kava {

namespace {

constexpr int64_t kBatchBytes = int64_t{2} << 30;

// What the layout is made of: the question, and the prompt where it is given.
Sample given(const Sample& s, const Recipe& recipe) {
  Sample g;
  g.question = s.question;
  if (!recipe.forced) return g;
  g.prompt = s.prompt;
  g.answer.assign(s.answer.begin(), s.answer.begin() + s.prompt);
  return g;
}

// Room for one sample: K, V and inputs of all its rows, and what lies within a layer, for its first pass.
int64_t sample_bytes(const Model& model, const Recipe& recipe, const Sample& s, int64_t new_tokens) {
  const ModelConfig& m = model.shape;
  const LayerWeights& w = model.layers[0];
  const int64_t kept = 2 * m.layers * m.kv_heads * m.head_dim + m.hidden, q = m.heads * m.head_dim;
  const int64_t working = 2 * w.qkv.map.joined.cols + w.qkv.map.outs() + q + w.o.map.joined.cols + w.gate_up.map.joined.cols + 2 * m.mlp +
                          w.down.map.joined.cols + 6 * m.hidden;
  const int64_t first = prompt_length(recipe, s);
  const Cut cut = cut_of(recipe, s, 0);
  const int64_t rows = first + new_tokens + int64_t{iterations_run(model.config, cut)} * cut.latents;
  return (rows * kept + first * working) * size_of(model.storage);
}

}  // namespace

std::size_t together(const Model& model, const Recipe& recipe, std::span<const Sample> questions, int64_t most, int64_t new_rows) {
  std::size_t count = 0;
  for (int64_t bytes = 0; count < questions.size() && static_cast<int64_t>(count) < most; ++count) {
    const Sample& s = questions[count];
    KAVA_CHECK(prompt_length(recipe, s) <= longest_prompt(model.shape), "a question of {} tokens", s.question.size());
    bytes += sample_bytes(model, recipe, s, new_rows);
    if (bytes > kBatchBytes && count > 0) break;
  }
  return count;
}

namespace {

std::vector<float> host(Ops& ops, const Tensor& x) {
  const std::vector<double> values = to_host(ops, x);
  return {values.begin(), values.end()};
}

int32_t position_of(const Layout& layout, int32_t row) {
  for (const Pass& p : layout.passes)
    if (row < p.end) return p.positions[static_cast<std::size_t>(row - p.begin)];
  KAVA_CHECK(false, "row {} of {}", row, layout.rows);
}

LatentStates latents_of(Model& model, Arena& arena, DecodeBatch& batch, std::size_t sample) {
  ArenaScope scope(arena);
  Ops& ops = model.ops;
  const Layout& layout = batch.layout();
  const auto M = static_cast<std::size_t>(layout.latents);
  const Tensor& v = batch.transformer().layers()[0].v;
  const std::span<const int32_t> rows(layout.latent_rows.data() + sample * M, M);
  std::vector<int32_t> live, top(M);
  for (int32_t row : rows) live.push_back(layout.live_of[static_cast<std::size_t>(row)]);
  check_indices(rows, 0, v.rows);
  const Tensor values = arena.alloc(model.storage, layout.latents, v.cols), hidden = batch.gather_live(live);
  const Tensor best = arena.alloc(DType::i32, 1, layout.latents);
  ops.gather_rows(values, v, upload_indices(ops, arena, rows));
  ops.head_argmax(arena, best, hidden, model.head);
  ops.download(top.data(), best);
  std::vector<int32_t> positions;
  for (int32_t row : rows) positions.push_back(position_of(layout, row));
  return {host(ops, values), host(ops, hidden), std::move(top), std::move(positions)};
}

std::vector<DecodeResult> decode_batch(Model& model, Arena& arena, const RunConfig& config, const Recipe& recipe,
                                       std::span<const Sample> questions, const DecodeOptions& options, std::span<const int64_t> numbers) {
  ArenaScope scope(arena);
  std::vector<Sample> samples;
  for (const Sample& s : questions) samples.push_back(given(s, recipe));
  DecodeBatch batch(model, arena, make_layout(config, recipe, samples, 0, options.keep_latents), options, recipe.ends);
  const auto answers = static_cast<int64_t>(samples.size()) * options.sampling.samples;
  batch.allocate(answers, {});
  batch.run_layout();
  const int64_t with_latents = recipe.markers ? std::ssize(batch.layout().passes) : 0;
  std::vector<DecodeBatch::Start> starts;
  for (std::size_t b = 0; b < samples.size(); ++b) {
    starts.push_back(batch.given_start(b));
    starts.back().passes = with_latents + 1, starts.back().passes_merged = std::max<int64_t>(with_latents, 1);
  }
  std::vector<LatentStates> latents(samples.size());
  if (options.keep_latents && batch.layout().latents > 0)
    for (std::size_t b = 0; b < samples.size(); ++b) latents[b] = latents_of(model, arena, batch, b);
  std::vector<DecodeResult> results = batch.run_tokens(starts, numbers);
  const std::size_t each = results.size() / samples.size();
  for (std::size_t i = 0; i < results.size(); ++i) results[i].latents = latents[i / each];
  return results;
}

}  // namespace

Decoding decoding_of(const RunConfig& run, const DecodeChoice& choice) {
  RunConfig config = run;
  config.method = choice.method.value_or(run.method);
  if (choice.latents) config.latent.count = *choice.latents;
  const bool codi = config.method == Method::codi || config.method == Method::codi_exact;
  if (codi && (config.method != run.method || choice.latents)) config.latent.iterations = config.latent.count;
  if (choice.iterations) config.latent.iterations = *choice.iterations;
  const Recipe recipe = choice.stage ? decoding_recipe(config, *choice.stage) : decoding_recipe(config);
  return {std::move(config), recipe};
}

int64_t longest_prompt(const ModelConfig& shape) {
  const int64_t positions = shape.position_limit();
  return positions > 0 ? std::min(positions, kLongestPrompt) : kLongestPrompt;
}

int64_t prompt_length(const Recipe& decoding, const Sample& s) { return lengths_of(decoding, given(s, decoding), 0).student; }

std::vector<DecodeResult> decode(Model& model, Arena& arena, std::span<const Sample> questions, const DecodeOptions& options) {
  const auto [config, recipe] = decoding_of(model.config, options);
  std::vector<int64_t> numbers = options.numbers;
  if (numbers.empty()) numbers.resize(questions.size()), std::iota(numbers.begin(), numbers.end(), 0);
  KAVA_CHECK(numbers.size() == questions.size(), "{} numbers of {} questions", numbers.size(), questions.size());
  std::vector<DecodeResult> results;
  for (std::size_t first = 0; first < questions.size();) {
    const std::size_t count =
        together(model, recipe, questions.subspan(first), options.batch, options.max_new_tokens * options.sampling.samples);
    std::vector<DecodeResult> some =
        decode_batch(model, arena, config, recipe, questions.subspan(first, count), options, std::span(numbers).subspan(first, count));
    std::move(some.begin(), some.end(), std::back_inserter(results));
    first += count;
  }
  return results;
}

}  // namespace kava
