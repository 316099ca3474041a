#include "models/layout.h"

#include <algorithm>
#include <numeric>

namespace kava {

void SegmentList::add(std::span<const int32_t> before, int32_t own_begin, int32_t own_count, int32_t first_query, int32_t queries) {
  keys.insert(keys.end(), before.begin(), before.end());
  for (int32_t i = 0; i < own_count; ++i) keys.push_back(own_begin + i);
  most_keys = std::max(most_keys, static_cast<int64_t>(keys.size()) - key_offsets.back());
  fewest_queries = count() == 0 ? queries : std::min<int64_t>(fewest_queries, queries);
  most_queries = std::max<int64_t>(most_queries, queries);
  key_offsets.push_back(static_cast<int32_t>(keys.size()));
  query_begin.push_back(first_query);
  query_count.push_back(queries);
}

namespace {

std::vector<int32_t> range(int32_t begin, int32_t count) {
  std::vector<int32_t> r(static_cast<std::size_t>(count));
  std::iota(r.begin(), r.end(), begin);
  return r;
}

void append(std::vector<int32_t>& to, std::span<const int32_t> from) { to.insert(to.end(), from.begin(), from.end()); }

int32_t size(const std::vector<int32_t>& v) { return static_cast<int32_t>(v.size()); }

// A segment before rows have live numbers: own rows begin..+count of the step, the last `live` of them live.
struct Draft {
  std::vector<int32_t> before;
  int32_t begin, count, live;
};

// Builds the passes one after the other; rows get their numbers in the order of the calls.
class Builder {
 public:
  Builder(const RunConfig& config, const Recipe& recipe, std::span<const Sample> samples, int64_t first_index, bool latents_live)
      : config_(config), recipe_(recipe), samples_(samples), latents_live_(latents_live) {
    B_ = static_cast<int32_t>(samples.size());
    for (int32_t b = 0; b < B_; ++b) {
      Cut cut = cut_of(recipe, samples[static_cast<std::size_t>(b)], first_index + b);
      out_.iterations = std::max<int64_t>(out_.iterations, cut.iterations);
      cut.iterations = iterations_run(config, cut);
      cuts_.push_back(cut);
      M_ = std::max(M_, cut.latents), T_ = std::max(T_, cut.iterations);
      out_.sample_index.push_back(static_cast<int32_t>(first_index) + b);
    }
    out_.samples = B_, out_.latents = M_;
    if (recipe.markers) out_.codi_student_rows.assign(static_cast<std::size_t>(B_), -1);
    rows_in_sample_.assign(static_cast<std::size_t>(B_), 0);
    prefix_.resize(static_cast<std::size_t>(B_));
    drafts_.resize(static_cast<std::size_t>(B_));
    slot_.assign(static_cast<std::size_t>(T_ + 1), std::vector<int32_t>(static_cast<std::size_t>(B_ * M_), -1));
    newest_ = slot_[0];
  }

  Layout build() {
    first_pass();
    for (int32_t t = 1; t <= T_; ++t) latent_pass(t);
    resolve();
    collect_latents();
    return std::move(out_);
  }

 private:
  const Cut& cut(int32_t b) const { return cuts_[static_cast<std::size_t>(b)]; }

  // Latents lo..hi of a sample are computed in pass t (docs/method.md section 3.1).
  std::pair<int32_t, int32_t> computed(int32_t t, int32_t b) const {
    const Cut& c = cut(b);
    if (!config_.step.prune_latents) return {0, c.latents - 1};
    return {std::max(0, t - 1), c.latents - 1 - (c.iterations - t)};
  }

  int32_t& slot(int32_t t, int32_t b, int32_t i) { return slot_[static_cast<std::size_t>(t)][static_cast<std::size_t>(b * M_ + i)]; }

  int32_t& newest(int32_t b, int32_t i) { return newest_[static_cast<std::size_t>(b * M_ + i)]; }

  void begin_pass() {
    pass_ = Pass{};
    pass_.begin = out_.rows;
    for (auto& d : drafts_) d.clear();
  }

  int32_t add_row(int32_t b, int32_t position) {
    pass_.positions.push_back(position);
    pass_.row_keys.push_back(out_.sample_index[static_cast<std::size_t>(b)]);
    pass_.row_keys.push_back(rows_in_sample_[static_cast<std::size_t>(b)]++);
    return static_cast<int32_t>(out_.rows++);
  }
  int32_t add_token(int32_t b, int32_t id, int32_t position) {
    pass_.ids.push_back(id);
    return add_row(b, position);
  }
  int32_t add_tokens(int32_t b, std::span<const int32_t> ids, int32_t position) {
    int32_t first = static_cast<int32_t>(out_.rows);
    for (int32_t id : ids) add_token(b, id, position++);
    return first;
  }

  std::vector<Draft>& drafts(int32_t b) { return drafts_[static_cast<std::size_t>(b)]; }

  // Numbers the live rows and turns the drafts into segments. The fed latents' segments have to stand first in each sample's group.
  void end_pass() {
    pass_.end = out_.rows;
    out_.live_of.resize(static_cast<std::size_t>(out_.rows), -1);
    for (const auto& of_sample : drafts_)
      for (const Draft& d : of_sample)
        for (int32_t r = d.begin + d.count - d.live; r < d.begin + d.count; ++r) out_.live_of[static_cast<std::size_t>(r)] = 0;
    pass_.live_begin = out_.live_rows;
    for (int64_t r = pass_.begin; r < pass_.end; ++r)
      if (int32_t& live = out_.live_of[static_cast<std::size_t>(r)]; live == 0) {
        live = static_cast<int32_t>(out_.live_rows++);
        pass_.live.push_back(static_cast<int32_t>(r - pass_.begin));
      }
    pass_.live_end = out_.live_rows;
    for (const auto& of_sample : drafts_) {
      for (const Draft& d : of_sample) {
        if (d.count == 0) continue;
        pass_.segments.add(d.before, d.begin, d.count, static_cast<int32_t>(d.begin - pass_.begin), d.count);
        if (d.live == 0) continue;
        const int32_t first = out_.live_of[static_cast<std::size_t>(d.begin + d.count - d.live)];
        pass_.live_segments.add(d.before, d.begin, d.count, static_cast<int32_t>(first - pass_.live_begin), d.live);
      }
      pass_.segments.end_group();
      pass_.live_segments.end_group();
    }
    out_.passes.push_back(std::move(pass_));
  }

  // Rows of a sample that predict `targets`, from row `first` on; filled in once live rows have numbers.
  struct Predicts {
    int32_t sample;
    bool student;
    int32_t before, first, count;  // the first prediction is made by row `before`, the others by first..first+count-2
    std::vector<int32_t> targets;
  };

  void first_pass() {
    begin_pass();
    for (int32_t b = 0; b < B_; ++b) {
      const Sample& s = samples_[static_cast<std::size_t>(b)];
      const int32_t n_q = size(s.question), n_c = size(s.trace), n_a = size(s.answer);
      if (!recipe_.markers) {
        plain_sequence(b);
        continue;
      }
      const auto [lo, hi] = computed(0, b);
      const int32_t q = add_tokens(b, s.question, 0);
      add_token(b, kBotId, n_q);
      for (int32_t i = lo; i <= hi; ++i) newest(b, i) = slot(0, b, i) = add_token(b, kLatentId, n_q + 1 + i);
      const int32_t latents = std::max(0, hi + 1);
      prefix_[static_cast<std::size_t>(b)] = range(q, n_q + 1);
      const bool sharing = config_.step.prefix_sharing && recipe_.teacher;
      // bot and the latents feed pass 1; with T = 0 nobody reads them. The last row of Q predicts the teacher's first token.
      const int32_t fed_from = cut(b).iterations > 0 ? 1 + latents : latents_live_ ? latents : 0;
      drafts(b).push_back({{}, q, n_q + 1 + latents, sharing ? 2 + latents : fed_from});
      if (!recipe_.teacher) continue;
      int32_t last_q = q + n_q - 1, tail;
      if (sharing) {
        tail = add_tokens(b, s.trace, n_q);
        add_tokens(b, s.answer, n_q + n_c);
        drafts(b).push_back({range(q, n_q), tail, n_c + n_a, n_c + n_a});
      } else {
        const int32_t own = add_tokens(b, s.question, 0);
        tail = add_tokens(b, s.trace, n_q);
        add_tokens(b, s.answer, n_q + n_c);
        drafts(b).push_back({{}, own, n_q + n_c + n_a, 1 + n_c + n_a});
        last_q = own + n_q - 1;
      }
      teacher_rows(b, last_q, tail);
    }
    student_tails(0);
    end_pass();
  }

  // The one sequence of a recipe without markers: Q and its tail.
  void plain_sequence(int32_t b) {
    const Sample& s = samples_[static_cast<std::size_t>(b)];
    std::vector<int32_t> tail = recipe_.student ? student_tail(s, cut(b)) : teacher_tail(s);
    const int32_t n_q = size(s.question), n = size(tail), q = static_cast<int32_t>(out_.rows);
    for (int32_t i = 0; i < n_q + n; ++i)
      add_token(b, i < n_q ? s.question[static_cast<std::size_t>(i)] : tail[static_cast<std::size_t>(i - n_q)],
                i + (i >= cut(b).gap ? cut(b).shift : 0));
    drafts(b).push_back({{}, q, n_q + n, 1 + n});
    if (!recipe_.student) out_.codi_teacher_rows.push_back(q + n_q + size(s.trace) + s.prompt + s.blank - 1);
    predicts_.push_back({b, recipe_.student, q + n_q - 1, q + n_q, n, std::move(tail)});
  }

  // tail: first row of [C, prompt, A, EOS].
  void teacher_rows(int32_t b, int32_t last_q, int32_t tail) {
    const Sample& s = samples_[static_cast<std::size_t>(b)];
    const int32_t n_c = size(s.trace), n_a = size(s.answer);
    predicts_.push_back({b, false, last_q, tail, n_c + n_a, teacher_tail(s)});
    append(out_.trace_rows, range(tail, n_c));
    out_.trace_offsets.push_back(size(out_.trace_rows));
    const int32_t skip = config_.rkv.queries == Queries::answer ? s.prompt : 0;
    append(out_.query_rows, range(tail + n_c + skip, n_a - skip));
    out_.query_offsets.push_back(size(out_.query_rows));
    // The last token before the answer: the blank after the prompt, the prompt's, else the trace's, else the question's.
    const int32_t before = n_c + s.prompt + s.blank;
    out_.codi_teacher_rows.push_back(before > 0 ? tail + before - 1 : last_q);
  }

  // [eot, rest, prompt, A, EOS] of the samples whose last pass is t.
  void student_tails(int32_t t) {
    for (int32_t b = 0; b < B_ && recipe_.markers; ++b) {
      if (cut(b).iterations != t) continue;
      const Sample& s = samples_[static_cast<std::size_t>(b)];
      std::vector<int32_t> tail = student_tail(s, cut(b));
      const int32_t latents = cut(b).latents, first = size(s.question) + 1 + latents, n = size(tail);
      std::vector<int32_t> before = prefix_[static_cast<std::size_t>(b)];
      for (int32_t i = 0; i < latents; ++i) before.push_back(newest(b, i));
      const int32_t eot = add_token(b, kEotId, first);
      add_tokens(b, tail, first + 1);
      drafts(b).push_back({std::move(before), eot, 1 + n, 1 + n});
      predicts_.push_back({b, true, eot, eot + 1, n, std::move(tail)});
      out_.codi_student_rows[static_cast<std::size_t>(b)] = eot + cut(b).rest() + s.prompt + s.blank;
    }
  }

  void latent_pass(int32_t t) {
    begin_pass();
    for (int32_t b = 0; b < B_; ++b) {
      const auto [lo, hi] = computed(t, b);
      if (t > cut(b).iterations || hi < lo) continue;
      const int32_t n_q = size(samples_[static_cast<std::size_t>(b)].question);
      std::vector<int32_t> before = prefix_[static_cast<std::size_t>(b)];
      for (int32_t i = 0; i < lo; ++i) before.push_back(newest(b, i));
      const int32_t bot = before[static_cast<std::size_t>(n_q)], first = static_cast<int32_t>(out_.rows);
      for (int32_t i = lo; i <= hi; ++i) {
        Feed feed;
        if (i > 0) feed.hidden_row = slot(t - 1, b, i - 1);
        else if (int32_t previous = t > 1 ? slot(t - 1, b, 0) : -1; previous >= 0) feed.copy_row = previous;
        else feed.hidden_row = bot;
        pass_.feeds.push_back(feed);
        newest(b, i) = slot(t, b, i) = add_row(b, n_q + 1 + i);
      }
      drafts(b).push_back({std::move(before), first, hi - lo + 1, t < cut(b).iterations || latents_live_ ? hi - lo + 1 : 0});
    }
    student_tails(t);
    if (static_cast<int64_t>(out_.rows) > pass_.begin) end_pass();
  }

  // In the order of the samples, whichever pass their tails are in.
  void resolve() {
    std::ranges::stable_sort(predicts_, {}, &Predicts::sample);
    for (const Predicts& p : predicts_) {
      Supervised& to = p.student ? out_.student : out_.teacher;
      for (int32_t i = 0; i < p.count; ++i)
        to.live_rows.push_back(out_.live_of[static_cast<std::size_t>(i == 0 ? p.before : p.first + i - 1)]);
      append(to.targets, p.targets);
    }
  }

  void collect_latents() {
    for (int32_t b = 0; b < B_; ++b)
      for (int32_t i = 0; i < M_; ++i) out_.latent_rows.push_back(newest(b, i));
    for (int32_t t = 0; t <= out_.iterations; ++t)
      for (int32_t b = 0; b < B_; ++b)
        for (int32_t i = 0; i < M_; ++i) out_.latent_input_rows.push_back(t <= T_ ? slot(t, b, i) : -1);
  }

  const RunConfig& config_;
  const Recipe& recipe_;
  std::span<const Sample> samples_;
  bool latents_live_;
  int32_t B_ = 0, M_ = 0, T_ = 0;
  std::vector<Cut> cuts_;
  Layout out_;
  Pass pass_;
  std::vector<Predicts> predicts_;
  std::vector<int32_t> rows_in_sample_;
  std::vector<std::vector<int32_t>> prefix_;  // rows of Q and bot
  std::vector<std::vector<Draft>> drafts_;
  std::vector<std::vector<int32_t>> slot_;  // [T+1][B*M]: row of latent i in pass t, -1 where it is not computed
  std::vector<int32_t> newest_;             // [B*M]: its newest row: where pruning reuses a final one it lies in an earlier pass
};

}  // namespace

int32_t iterations_run(const RunConfig& config, const Cut& cut) {
  if (cut.latents == 0) return 0;
  return config.step.prune_latents ? std::min(cut.iterations, cut.latents) : cut.iterations;
}

Layout make_layout(const RunConfig& config, const Recipe& recipe, std::span<const Sample> samples, int64_t first_index, bool latents_live) {
  return Builder(config, recipe, samples, first_index, latents_live).build();
}

}  // namespace kava
