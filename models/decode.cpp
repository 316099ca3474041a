#include "models/decode.h"

#include <algorithm>

#include "engine/device/host.h"
#include "engine/device/indices.h"
#include "models/latent.h"
#include "models/transformer.h"

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
  const int64_t rows = first + new_tokens + int64_t{recipe.iterations} * recipe.latents;
  return (rows * kept + first * working) * size_of(model.storage);
}

// Some samples that are decoded together.
class Batch {
 public:
  Batch(Model& model, Arena& arena, const RunConfig& config, const Recipe& recipe, std::span<const Sample> questions,
        const DecodeOptions& options)
      : model_(model),
        ops_(model.ops),
        arena_(arena),
        recipe_(recipe),
        options_(options),
        transformer_(model, arena, Keep::nothing, 0, false) {
    std::vector<Sample> samples;
    for (const Sample& s : questions) samples.push_back(given(s, recipe));
    layout_ = make_layout(config, recipe, samples, 0, options.keep_latents);
    results_.resize(samples.size());
  }

  std::vector<DecodeResult> run() {
    allocate();
    run_given();
    if (options_.keep_latents && layout_.latents > 0) keep_latents();
    while (!active_.empty()) run_token();
    return std::move(results_);
  }

 private:
  // A sample that still decodes.
  struct Active {
    std::size_t sample;
    int32_t next, position;     // the token to run, and where it stands
    int32_t ends;               // EOS to come
    std::vector<int32_t> keys;  // rows of its K and V
  };

  void allocate() {
    int32_t last = 0;
    int64_t most = layout_.samples;
    for (const Pass& p : layout_.passes) {
      most = std::max(most, p.rows());
      for (int32_t position : p.positions) last = std::max(last, position);
    }
    model_.ensure_positions(last + 1 + options_.max_new_tokens);
    // The last token allowed is not run any more.
    transformer_.allocate(layout_.rows + layout_.samples * (options_.max_new_tokens - 1), layout_.live_rows + layout_.samples, most);
    next_row_ = layout_.rows;
  }

  // All passes of the layout; then every sample's first token.
  void run_given() {
    for (const Pass& p : layout_.passes) {
      ArenaScope scope(arena_);
      const DevicePass d = upload_pass(ops_, arena_, p);
      FeedState feeds = upload_feeds(ops_, arena_, layout_, p);
      feed_latents(model_, arena_, transformer_, d, feeds);
      check_indices(p.ids, kLatentId, model_.shape.vocab);
      if (d.ids.cols > 0) ops_.embed_fwd(transformer_.inputs(d).row_range(d.fed, d.rows()), model_.embedding, model_.new_tokens, d.ids);
      transformer_.forward(d);
    }
    const Pass& last = layout_.passes.back();
    const SegmentList& segments = last.segments;
    std::vector<int32_t> live;
    for (std::size_t b = 0; b < results_.size(); ++b) {
      // The sample's last segment ends in its last row and holds all the rows that it attends.
      const auto s = static_cast<std::size_t>(segments.group_offsets[b + 1] - 1);
      const auto row = static_cast<std::size_t>(segments.query_begin[s] + segments.query_count[s] - 1);
      live.push_back(layout_.live_of[static_cast<std::size_t>(last.begin) + row]);
      active_.push_back({b,
                         0,
                         last.positions[row],
                         recipe_.ends,
                         {segments.keys.begin() + segments.key_offsets[s], segments.keys.begin() + segments.key_offsets[s + 1]}});
      const int64_t with_latents = recipe_.markers ? layout_.iterations + 1 : 0;
      results_[b].passes_merged = std::max<int64_t>(with_latents, 1);
      results_[b].passes = with_latents + 1;
    }
    take(best(gather(live)));
  }

  Tensor gather(std::span<const int32_t> live) {
    const Tensor h = arena_.alloc(model_.storage, static_cast<int64_t>(live.size()), model_.shape.hidden);
    ops_.gather_rows(h, transformer_.all_hidden(), upload_indices(ops_, arena_, live));
    return h;
  }

  std::vector<int32_t> best(const Tensor& hidden) {
    ArenaScope scope(arena_);
    const Tensor best = arena_.alloc(DType::i32, 1, hidden.rows);
    ops_.head_argmax(arena_, best, hidden, model_.head);
    std::vector<int32_t> ids(static_cast<std::size_t>(hidden.rows));
    ops_.download(ids.data(), best);
    return ids;
  }

  // The next token of every active sample. Who is done leaves.
  void take(const std::vector<int32_t>& ids) {
    for (std::size_t i = 0; i < active_.size(); ++i) {
      Active& a = active_[i];
      DecodeResult& r = results_[a.sample];
      const bool ended = ids[i] == options_.eos && --a.ends == 0;
      if (!ended) r.ids.push_back(ids[i]);
      r.hit_limit = !ended && static_cast<int64_t>(r.ids.size()) == options_.max_new_tokens;
      a.next = ended || r.hit_limit ? -1 : ids[i];
      ++a.position;
    }
    std::erase_if(active_, [](const Active& a) { return a.next < 0; });
  }

  void run_token() {
    ArenaScope scope(arena_);
    const int64_t n = static_cast<int64_t>(active_.size());
    Pass p;
    p.begin = next_row_, p.end = next_row_ + n;
    p.live_begin = layout_.live_rows, p.live_end = layout_.live_rows + n;
    for (std::size_t i = 0; i < active_.size(); ++i) {
      Active& a = active_[i];
      const auto index = static_cast<int32_t>(i), row = static_cast<int32_t>(next_row_) + index;
      p.ids.push_back(a.next);
      p.positions.push_back(a.position);
      p.row_keys.insert(p.row_keys.end(), {0, 0});  // decoding drops nothing
      p.live.push_back(index);
      p.segments.add(a.keys, row, 1, index, 1);
      p.segments.end_group();
      a.keys.push_back(row);
      ++results_[a.sample].passes, ++results_[a.sample].passes_merged;
    }
    p.live_segments = p.segments;
    next_row_ += n;
    DevicePass d = upload_pass(ops_, arena_, p);
    d.reads = Reads::streamed;  // a row a sample, however many samples there are
    ops_.embed_fwd(transformer_.inputs(d), model_.embedding, model_.new_tokens, d.ids);
    transformer_.forward(d);
    take(best(transformer_.hidden(d)));
  }

  std::vector<float> host(const Tensor& x) {
    const std::vector<double> values = to_host(ops_, x);
    return {values.begin(), values.end()};
  }

  void keep_latents() {
    ArenaScope scope(arena_);
    const auto M = static_cast<std::size_t>(layout_.latents);
    const Tensor& v = transformer_.layers()[0].v;
    for (std::size_t b = 0; b < results_.size(); ++b) {
      ArenaScope inner(arena_);
      const std::span<const int32_t> rows(layout_.latent_rows.data() + b * M, M);
      std::vector<int32_t> live;
      for (int32_t row : rows) live.push_back(layout_.live_of[static_cast<std::size_t>(row)]);
      const Tensor values = arena_.alloc(model_.storage, layout_.latents, v.cols), hidden = gather(live);
      ops_.gather_rows(values, v, upload_indices(ops_, arena_, rows));
      results_[b].latents = {host(values), host(hidden), best(hidden)};
    }
  }

  Model& model_;
  Ops& ops_;
  Arena& arena_;
  const Recipe& recipe_;
  const DecodeOptions& options_;
  Layout layout_;
  Transformer transformer_;
  std::vector<DecodeResult> results_;
  std::vector<Active> active_;
  int64_t next_row_ = 0;
};

}  // namespace

RunConfig decoding_config(const RunConfig& run, std::optional<Method> method) {
  RunConfig config = run;
  if (!method || *method == run.method) return config;
  config.method = *method;
  if (*method == Method::codi || *method == Method::codi_exact) config.latent.iterations = config.latent.count;
  return config;
}

int64_t prompt_length(const Recipe& decoding, const Sample& s) { return lengths_of(decoding, given(s, decoding), 0).student; }

std::vector<DecodeResult> decode(Model& model, Arena& arena, std::span<const Sample> questions, const DecodeOptions& options) {
  const RunConfig config = decoding_config(model.config, options.method);
  const Recipe recipe = options.stage ? decoding_recipe(config, *options.stage) : decoding_recipe(config);
  std::vector<DecodeResult> results;
  for (std::size_t first = 0; first < questions.size();) {
    std::size_t end = first;
    for (int64_t bytes = 0; end < questions.size() && static_cast<int64_t>(end - first) < options.batch; ++end) {
      KAVA_CHECK(prompt_length(recipe, questions[end]) <= kLongestPrompt, "a question of {} tokens", questions[end].question.size());
      bytes += sample_bytes(model, recipe, questions[end], options.max_new_tokens);
      if (bytes > kBatchBytes && end > first) break;
    }
    ArenaScope scope(arena);
    std::vector<DecodeResult> some = Batch(model, arena, config, recipe, questions.subspan(first, end - first), options).run();
    std::move(some.begin(), some.end(), std::back_inserter(results));
    first = end;
  }
  return results;
}

}  // namespace kava
