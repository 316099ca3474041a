#include "models/decode_batch.h"

#include <algorithm>
#include <cmath>

#include "engine/device/host.h"
#include "engine/device/indices.h"
#include "engine/error.h"
#include "models/latent.h"

namespace kava {

namespace {

constexpr int64_t kLogitsBytes = int64_t{32} << 20;  // at a time, on the device

// Keys of Ops::pass. Those of a training step are not negative.
int64_t key_of(Reads reads) { return -1 - static_cast<int64_t>(reads); }
int64_t key_of_layout(std::size_t pass) { return -100 - static_cast<int64_t>(pass); }

[[noreturn]] void refuse_logits() {
  throw Error(Exit::numeric, "logits", "are not finite", "check the model's weights, or decode in another --dtype");
}
// Of logits, or of the hidden states that they are made of.
void require_finite(std::span<const double> values) {
  if (!std::ranges::all_of(values, [](double x) { return std::isfinite(x); })) refuse_logits();
}

}  // namespace

DecodeBatch::DecodeBatch(Model& model, Arena& arena, Layout layout, const DecodeOptions& options, int32_t ends)
    : model_(model),
      ops_(model.ops),
      arena_(arena),
      options_(options),
      ends_(ends),
      layout_(std::move(layout)),
      transformer_(model, arena, Keep::nothing, 0, false) {}

void DecodeBatch::allocate(int64_t answers, const Extra& extra) {
  int32_t last = extra.last_position;
  int64_t most = std::max(answers, extra.pass_rows);
  for (const Pass& p : layout_.passes) {
    most = std::max(most, p.rows());
    for (int32_t position : p.positions) last = std::max(last, position);
  }
  // No token is run beyond the last position.
  const int64_t wanted = last + 1 + options_.max_new_tokens, positions = model_.shape.position_limit();
  model_.ensure_positions(positions > 0 ? std::min(wanted, positions) : wanted);
  // The last token allowed is not run any more.
  transformer_.allocate(layout_.rows + extra.rows + answers * (options_.max_new_tokens - 1), layout_.live_rows + extra.live_rows + answers,
                        most);
  next_row_ = layout_.rows, token_live_ = layout_.live_rows + extra.live_rows;
}

void DecodeBatch::run_layout() {
  for (std::size_t i = 0; i < layout_.passes.size(); ++i) {
    ArenaScope scope(arena_);
    check_pass(model_, layout_.passes[i]);
    DevicePass d;
    FeedState feeds;
    IndexBlock block;
    add_pass(block, d, layout_.passes[i]);
    add_feeds(block, feeds, layout_, layout_.passes[i]);
    block.send(ops_, arena_);
    ops_.pass(arena_, key_of_layout(i), [&] {
      feed_latents(model_, arena_, transformer_, d, feeds);
      if (d.ids.cols > 0) ops_.embed_fwd(transformer_.inputs(d).row_range(d.fed, d.rows()), model_.embedding, model_.new_tokens, d.ids);
      transformer_.forward(d);
    });
  }
}

void DecodeBatch::run_pass(const Pass& p, Reads reads) {
  ArenaScope scope(arena_);
  check_pass(model_, p);
  DevicePass d = upload_pass(ops_, arena_, p);
  d.reads = reads;
  ops_.pass(arena_, key_of(reads), [&] {
    ops_.embed_fwd(transformer_.inputs(d), model_.embedding, model_.new_tokens, d.ids);
    transformer_.forward(d);
  });
}

DecodeBatch::Start DecodeBatch::given_start(std::size_t b) const {
  const Pass& last = layout_.passes.back();
  const SegmentList& segments = last.segments;
  // The sample's last segment ends in its last row and holds all the rows that it attends.
  const auto s = static_cast<std::size_t>(segments.group_offsets[b + 1] - 1);
  const auto row = static_cast<std::size_t>(segments.query_begin[s] + segments.query_count[s] - 1);
  const auto keys = segments.keys.begin();
  return {static_cast<int64_t>(b),
          {keys + segments.key_offsets[s], keys + segments.key_offsets[s + 1]},
          last.positions[row],
          layout_.live_of[static_cast<std::size_t>(last.begin) + row],
          1,
          1};
}

Tensor DecodeBatch::gather_live(std::span<const int32_t> live) {
  check_indices(live, 0, transformer_.all_hidden().rows);
  const Tensor h = arena_.alloc(model_.storage, static_cast<int64_t>(live.size()), model_.shape.hidden);
  ops_.gather_rows(h, transformer_.all_hidden(), upload_indices(ops_, arena_, live));
  return h;
}

void DecodeBatch::each_logits(const Tensor& hidden, const std::function<void(int64_t, std::span<const double>)>& f) {
  const DType sum = sum_type(model_.storage);
  const int64_t V = model_.head.rows, piece = std::max<int64_t>(1, kLogitsBytes / (V * size_of(sum)));
  for (int64_t first = 0; first < hidden.rows; first += piece) {
    ArenaScope scope(arena_);
    const Tensor h = hidden.row_range(first, std::min(hidden.rows, first + piece));
    const Tensor logits = arena_.alloc(sum, h.rows, V), losses = arena_.alloc(DType::f64, 1, 2);
    const std::vector<int32_t> zeros(static_cast<std::size_t>(h.rows), 0);
    const Tensor targets = upload_indices(ops_, arena_, zeros);
    ops_.fill(losses, 0);
    ops_.head_cross_entropy(arena_, losses, {}, {}, {}, logits, h, model_.head, targets, targets, {}, {0, 0});
    const std::vector<double> values = to_host(ops_, logits);
    require_finite(values);
    ops_.on_host(h.rows,
                 [&](int64_t r) { f(first + r, std::span(values).subspan(static_cast<std::size_t>(r * V), static_cast<std::size_t>(V))); });
  }
}

// The next token of every active answer; row_of: whose hidden state it follows.
std::vector<int32_t> DecodeBatch::choose(const Tensor& hidden, const std::vector<std::size_t>& row_of) {
  ArenaScope scope(arena_);
  require_finite(to_host(ops_, hidden));
  std::vector<int32_t> chosen(active_.size());
  if (options_.sampling.greedy()) {
    const Tensor best = arena_.alloc(DType::i32, 1, hidden.rows);
    ops_.head_argmax(arena_, best, hidden, model_.head);
    std::vector<int32_t> ids(static_cast<std::size_t>(hidden.rows));
    ops_.download(ids.data(), best);
    for (std::size_t i = 0; i < active_.size(); ++i) chosen[i] = ids[row_of[i]];
    return chosen;
  }
  // A row for each answer: those of a question have one hidden state before their first token.
  std::vector<int32_t> rows, numbers;
  for (std::size_t i = 0; i < active_.size(); ++i) {
    const Active& a = active_[i];
    const uint64_t bits = draw_number(options_.sampling.seed, {a.question, a.sample, static_cast<int64_t>(results_[a.result].tokens)});
    rows.push_back(static_cast<int32_t>(row_of[i]));
    numbers.push_back(static_cast<int32_t>(bits)), numbers.push_back(static_cast<int32_t>(bits >> 32));
  }
  check_indices(rows, 0, hidden.rows);
  const auto n = static_cast<int64_t>(rows.size());
  const Tensor h = arena_.alloc(model_.storage, n, hidden.cols), drawn = arena_.alloc(DType::i32, 1, n);
  ops_.gather_rows(h, hidden, upload_indices(ops_, arena_, rows));
  ops_.head_draw(arena_, drawn, h, model_.head, upload_indices(ops_, arena_, numbers), options_.sampling.temperature,
                 options_.sampling.top_p);
  ops_.download(chosen.data(), drawn);
  if (std::ranges::find(chosen, -1) != chosen.end()) refuse_logits();
  return chosen;
}

std::vector<DecodeResult> DecodeBatch::run_tokens(const std::vector<Start>& starts, std::span<const int64_t> numbers) {
  // Equal answers need to be decoded once only.
  const int64_t samples = options_.sampling.samples, drawn = options_.sampling.greedy() ? 1 : samples;
  results_.assign(starts.size() * static_cast<std::size_t>(drawn), {});
  open_.assign(starts.size(), drawn);
  std::vector<int32_t> live;
  std::vector<std::size_t> row_of;
  for (std::size_t i = 0; i < starts.size(); ++i) {
    const Start& s = starts[i];
    live.push_back(s.live);
    for (int64_t k = 0; k < drawn; ++k) {
      const std::size_t result = i * static_cast<std::size_t>(drawn) + static_cast<std::size_t>(k);
      results_[result].passes = s.passes, results_[result].passes_merged = s.passes_merged;
      active_.push_back({result, i, numbers[static_cast<std::size_t>(s.question)], k, 0, s.position, ends_, s.keys});
      row_of.push_back(i);
    }
  }
  {
    ArenaScope scope(arena_);
    take(choose(gather_live(live), row_of));
  }
  while (!active_.empty()) run_token();
  if (drawn == samples) return std::move(results_);
  std::vector<DecodeResult> all;
  for (const DecodeResult& r : results_) all.insert(all.end(), static_cast<std::size_t>(samples), r);
  return all;
}

// Who is done leaves.
void DecodeBatch::take(const std::vector<int32_t>& ids) {
  for (std::size_t i = 0; i < active_.size(); ++i) {
    Active& a = active_[i];
    DecodeResult& r = results_[a.result];
    // A dry backend gives no token: what is planned for is the limit.
    const bool ended = !ops_.dry() && ids[i] == options_.eos && --a.ends == 0;
    if (!ended) r.ids.push_back(ids[i]);
    ++r.tokens;
    const int64_t positions = model_.shape.position_limit();
    const bool last_position = positions > 0 && a.position + 1 >= positions;
    r.hit_limit = !ended && (last_position || static_cast<int64_t>(r.ids.size()) == options_.max_new_tokens);
    a.next = ended || r.hit_limit ? -1 : ids[i];
    ++a.position;
    if (options_.on_token && !ended) options_.on_token(a.result, ids[i]);
    if (a.next < 0 && --open_[a.start] == 0 && options_.on_answers) tell_done(a);
  }
  std::erase_if(active_, [](const Active& a) { return a.next < 0; });
}

void DecodeBatch::tell_done(const Active& done) {
  const std::size_t each = results_.size() / open_.size(), samples = static_cast<std::size_t>(options_.sampling.samples);
  const auto first = results_.begin() + static_cast<std::ptrdiff_t>(done.start * each);
  std::vector<DecodeResult> answers(first, first + static_cast<std::ptrdiff_t>(each));
  answers.resize(samples, answers[0]);
  options_.on_answers(done.question, answers);
}

void DecodeBatch::run_token() {
  ArenaScope scope(arena_);
  const int64_t n = static_cast<int64_t>(active_.size());
  Pass p;
  p.begin = take_rows(n), p.end = next_row_;
  p.live_begin = token_live_, p.live_end = token_live_ + n;
  std::vector<std::size_t> row_of;
  for (std::size_t i = 0; i < active_.size(); ++i) {
    Active& a = active_[i];
    const auto index = static_cast<int32_t>(i), row = static_cast<int32_t>(p.begin) + index;
    p.ids.push_back(a.next);
    p.positions.push_back(a.position);
    p.row_keys.insert(p.row_keys.end(), {0, 0});  // decoding drops nothing
    p.live.push_back(index);
    p.segments.add(a.keys, row, 1, index, 1);
    if (i + 1 == active_.size() || active_[i + 1].question != a.question) p.segments.end_group();
    a.keys.push_back(row);
    row_of.push_back(i);
    ++results_[a.result].passes, ++results_[a.result].passes_merged;
  }
  p.live_segments = p.segments;
  // A row an answer, however many there are.
  run_pass(p, Reads::streamed);
  take(choose(transformer_.all_hidden().row_range(token_live_, token_live_ + n), row_of));
}

}  // namespace kava
