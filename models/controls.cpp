#include "models/controls.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <numeric>

#include "engine/device/host.h"
#include "engine/device/indices.h"
#include "models/decode_batch.h"
#include "models/decode_ranks.h"

namespace kava {

namespace {

constexpr std::array kFirstControls{Control::zero, Control::shuffle, Control::boundaries};
constexpr Control kLastControl = Control::mean;
static_assert(1 + kFirstControls.size() == kFirstAnswers);

// Keys (turned back) and values of all slots, summed over questions, by layer: [M, K*D].
struct LatentMeans {
  std::vector<std::vector<double>> k, v;
  int64_t questions = 0;
};

// Questions are summed in so many blocks, one after the other, and then the blocks, whichever rank a block belongs to.
constexpr std::size_t kBlocks = 64;
std::size_t block_begin(std::size_t block, std::size_t questions) { return questions * block / kBlocks; }
std::size_t block_of(std::size_t question, std::size_t questions) { return ((question + 1) * kBlocks - 1) / questions; }

// [eot, prompt, A, EOS] of a question; nothing of a trace. Of a gold answer that ends behind the model's last position only what decoding
// is given stays.
Sample without_trace(const Sample& s, const Recipe& recipe, int64_t positions) {
  Sample q = s;
  q.trace.clear(), q.steps.clear();
  if (positions > 0 && std::ssize(q.question) + 2 + recipe.latents + std::ssize(q.answer) > positions) {
    if (!recipe.forced) q.prompt = 0;
    q.answer.resize(static_cast<std::size_t>(q.prompt)), q.blank = 0;
  }
  return q;
}

Sample question_alone(const Sample& s) {
  Sample q;
  q.question = s.question;
  return q;
}

// Some questions under some controls.
class ControlBatch {
 public:
  // run: the recipe of the passes before the answers, whose latents the decoding's or none. given: the questions, and behind them the one
  // that follows, where `shuffle` asks for its latents.
  ControlBatch(Model& model, Arena& arena, const Decoding& decoding, const Recipe& run, std::span<const Sample> given,
               std::span<const Sample> questions, std::vector<Control> controls, const DecodeOptions& options)
      : model_(model),
        ops_(model.ops),
        arena_(arena),
        recipe_(decoding.recipe),
        given_(given),
        questions_(questions),
        controls_(std::move(controls)),
        M_(recipe_.latents),
        batch_(model, arena, make_layout(decoding.config, run, given, 0), options, recipe_.ends) {
    DecodeBatch::Extra extra;
    const auto variants = static_cast<int64_t>(controls_.size());
    for (const Sample& s : questions_) {
      extra.pass_rows += variants * (1 + count(s.answer));
      extra.last_position = std::max(extra.last_position, static_cast<int32_t>(count(s.question) + 1 + M_ + count(s.answer)));
    }
    extra.live_rows = extra.pass_rows;
    extra.rows = extra.pass_rows + variants * slots();
    batch_.allocate((variants + 1) * static_cast<int64_t>(questions_.size()), extra);
    batch_.run_layout();
    replaced_.resize(controls_.size());
  }

  // Adds the latents of the questions, in their order, each to the sum that is its own.
  void add_to(std::span<LatentMeans* const> sums) {
    const auto size = static_cast<std::size_t>(M_ * width());
    for (LatentMeans* sum : sums)
      sum->k.resize(layers(), std::vector<double>(size)), sum->v.resize(layers(), std::vector<double>(size)), ++sum->questions;
    for (std::size_t l = 0; l < layers(); ++l) {
      ArenaScope scope(arena_);
      const auto [k, v] = latents_of(l, 0);
      const std::vector<double> keys = to_host(ops_, k), values = to_host(ops_, v);
      for (std::size_t i = 0; i < keys.size(); ++i) sums[i / size]->k[l][i % size] += keys[i], sums[i / size]->v[l][i % size] += values[i];
    }
  }

  // Every question's answers: the intact one first if asked for, then one for each control.
  std::vector<DecodeResult> run(const LatentMeans& means, bool intact, std::span<const int64_t> numbers) {
    for (std::size_t c = 0; c < controls_.size(); ++c) replace(c, means);
    const Pass tails = add_tails();
    batch_.run_pass(tails);
    std::vector<DecodeBatch::Start> starts;
    std::vector<int32_t> gold_rows, targets;
    int64_t row = tails.begin;
    for (std::size_t b = 0; b < questions_.size(); ++b) {
      const int64_t rows = 1 + count(questions_[b].answer);
      if (intact) {
        const auto eot = static_cast<std::size_t>(eot_of(b));
        begin(b, before(b), static_cast<int32_t>(eot), batch_.layout().live_of[eot], starts, gold_rows, targets);
      }
      for (std::size_t c = 0; c < controls_.size(); ++c, row += rows)
        begin(b, keys_of(b, c), static_cast<int32_t>(row), static_cast<int32_t>(tails.live_begin + row - tails.begin), starts, gold_rows,
              targets);
    }
    const std::vector<double> nll = gold_nll(gold_rows, targets);
    std::vector<DecodeResult> answers = batch_.run_tokens(starts, numbers);
    std::size_t at = 0;
    for (std::size_t i = 0; i < answers.size(); ++i) {
      const Sample& s = questions_[static_cast<std::size_t>(starts[i].question)];
      answers[i].gold_tokens = count(s.answer) - s.prompt;
      for (int64_t j = 0; j < answers[i].gold_tokens; ++j) answers[i].gold_nll += nll[at++];
    }
    return answers;
  }

 private:
  static int64_t count(const std::vector<int32_t>& ids) { return static_cast<int64_t>(ids.size()); }
  std::size_t layers() { return batch_.transformer().layers().size(); }
  int64_t width() { return batch_.transformer().layers()[0].k.cols; }
  int64_t slots() const { return static_cast<int64_t>(questions_.size()) * M_; }

  // Positions of the latents of the questions, or of those `offset` further on.
  std::vector<int32_t> positions(std::size_t offset) const {
    std::vector<int32_t> p;
    for (std::size_t b = 0; b < questions_.size(); ++b)
      for (int32_t i = 0; i < M_; ++i) p.push_back(static_cast<int32_t>(count(given_[b + offset].question)) + 1 + i);
    return p;
  }

  void turn(const Tensor& k, const std::vector<int32_t>& positions, bool back) {
    if (!model_.cosine) return;
    check_indices(positions, 0, model_.cosine.rows);
    ops_.rope_fwd(k, upload_indices(ops_, arena_, positions), model_.cosine, model_.sine, model_.shape.head_dim, back);
  }

  // Keys before RoPE, and values, in the sum type: [questions * M, K*D].
  std::pair<Tensor, Tensor> latents_of(std::size_t l, std::size_t offset) {
    const LayerKept& kept = batch_.transformer().layers()[l];
    const auto& all = batch_.layout().latent_rows;
    const std::span<const int32_t> rows(all.data() + offset * static_cast<std::size_t>(M_), static_cast<std::size_t>(slots()));
    check_indices(rows, 0, kept.k.rows);
    const DType sum = sum_type(model_.storage);
    const Tensor k = arena_.alloc(sum, slots(), width()), v = arena_.alloc(sum, slots(), width());
    const Tensor at = upload_indices(ops_, arena_, rows);
    ops_.gather_rows(k, kept.k, at), ops_.gather_rows(v, kept.v, at);
    turn(k, positions(offset), true);
    return {k, v};
  }

  std::pair<Tensor, Tensor> means_of(std::size_t l, const LatentMeans& means) {
    const DType sum = sum_type(model_.storage);
    const Tensor k = arena_.alloc(sum, slots(), width()), v = arena_.alloc(sum, slots(), width());
    for (const auto& [to, from] : {std::pair(k, &means.k[l]), std::pair(v, &means.v[l])}) {
      std::vector<double> all(static_cast<std::size_t>(slots() * width()));
      for (std::size_t i = 0; i < all.size(); ++i) all[i] = (*from)[i % from->size()] / static_cast<double>(means.questions);
      from_host(ops_, to, all);
    }
    return {k, v};
  }

  // Writes what stands in place of the questions' latents.
  void replace(std::size_t c, const LatentMeans& means) {
    const Control control = controls_[c];
    if (control == Control::boundaries) return;
    const int64_t n = slots(), first = batch_.take_rows(n);
    replaced_[c].resize(static_cast<std::size_t>(n));
    std::iota(replaced_[c].begin(), replaced_[c].end(), static_cast<int32_t>(first));
    for (std::size_t l = 0; l < layers(); ++l) {
      ArenaScope scope(arena_);
      const LayerKept& kept = batch_.transformer().layers()[l];
      const Tensor to_k = kept.k.row_range(first, first + n), to_v = kept.v.row_range(first, first + n);
      if (control == Control::zero) {
        ops_.fill(to_k, 0), ops_.fill(to_v, 0);
        continue;
      }
      const auto [k, v] = control == Control::shuffle ? latents_of(l, 1) : means_of(l, means);
      turn(k, positions(0), false);
      ops_.copy(to_k, k), ops_.copy(to_v, v);
    }
  }

  // Rows that a question's eot attends: Q, bot and, where they were run, the latents.
  std::vector<int32_t> before(std::size_t b) const {
    const SegmentList& segments = batch_.layout().passes.back().segments;
    const auto s = static_cast<std::size_t>(segments.group_offsets[b + 1] - 1);
    const auto keys = segments.keys.begin();
    return {keys + segments.key_offsets[s], keys + segments.key_offsets[s + 1] - segments.query_count[s]};
  }

  std::vector<int32_t> keys_of(std::size_t b, std::size_t c) const {
    std::vector<int32_t> keys = before(b);
    keys.resize(questions_[b].question.size() + 1);
    if (!replaced_[c].empty())
      for (int32_t i = 0; i < M_; ++i) keys.push_back(replaced_[c][b * static_cast<std::size_t>(M_) + static_cast<std::size_t>(i)]);
    return keys;
  }

  int32_t eot_of(std::size_t b) const { return batch_.layout().codi_student_rows[b] - given_[b].prompt - given_[b].blank; }

  // [eot, answer] of every question under every control.
  Pass add_tails() {
    Pass p;
    p.live_begin = batch_.layout().live_rows;
    int64_t rows = 0;
    for (const Sample& s : questions_) rows += static_cast<int64_t>(controls_.size()) * (1 + count(s.answer));
    p.begin = batch_.take_rows(rows), p.end = p.begin + rows, p.live_end = p.live_begin + rows;
    for (std::size_t b = 0; b < questions_.size(); ++b) {
      const Sample& s = questions_[b];
      for (std::size_t c = 0; c < controls_.size(); ++c) {
        const auto first = static_cast<int32_t>(p.ids.size()), n = static_cast<int32_t>(1 + count(s.answer));
        p.ids.push_back(kEotId);
        p.ids.insert(p.ids.end(), s.answer.begin(), s.answer.end());
        for (int32_t j = 0; j < n; ++j) {
          p.positions.push_back(static_cast<int32_t>(count(s.question)) + 1 + M_ + j);
          p.row_keys.insert(p.row_keys.end(), {0, 0});
          p.live.push_back(first + j);
        }
        p.segments.add(keys_of(b, c), static_cast<int32_t>(p.begin) + first, n, first, n);
      }
      p.segments.end_group();
    }
    p.live_segments = p.segments;
    return p;
  }

  // An answer that begins behind eot and what is given of it; and the rows that predict the gold one.
  void begin(std::size_t b, std::vector<int32_t> keys, int32_t eot, int32_t eot_live, std::vector<DecodeBatch::Start>& starts,
             std::vector<int32_t>& gold_rows, std::vector<int32_t>& targets) const {
    const Sample& s = questions_[b];
    for (int32_t j = s.prompt; j < static_cast<int32_t>(count(s.answer)); ++j)
      gold_rows.push_back(eot_live + j), targets.push_back(s.answer[static_cast<std::size_t>(j)]);
    const int32_t given = recipe_.forced ? s.prompt : 0;
    for (int32_t j = 0; j <= given; ++j) keys.push_back(eot + j);
    const int64_t iterations = iterations_run(model_.config, cut_of(recipe_, s, 0));
    starts.push_back({static_cast<int64_t>(b), std::move(keys), static_cast<int32_t>(count(s.question)) + 1 + M_ + given, eot_live + given,
                      iterations + 2, iterations + 1});
  }

  std::vector<double> gold_nll(const std::vector<int32_t>& rows, const std::vector<int32_t>& targets) {
    ArenaScope scope(arena_);
    std::vector<double> nll(rows.size());
    if (rows.empty()) return nll;
    batch_.each_logits(batch_.gather_live(rows), [&](int64_t r, std::span<const double> logits) {
      const auto i = static_cast<std::size_t>(r);
      nll[i] = negative_log_likelihood(logits, targets[i]);
    });
    return nll;
  }

  Model& model_;
  Ops& ops_;
  Arena& arena_;
  const Recipe& recipe_;
  std::span<const Sample> given_, questions_;
  std::vector<Control> controls_;
  int32_t M_;
  DecodeBatch batch_;
  std::vector<std::vector<int32_t>> replaced_;  // by control: the rows in place of the latents, none where they are left out
};

// The same without the latents' passes: what stands in their place comes from elsewhere.
Recipe without_latents(Recipe recipe) {
  recipe.latents = recipe.iterations = recipe.thoughts = 0;
  return recipe;
}

// All questions under all controls.
class ControlRun {
 public:
  ControlRun(Model& model, Arena& arena, std::span<const Sample> samples, const DecodeOptions& options, const ControlWork& work)
      : model_(model),
        arena_(arena),
        options_(options),
        work_(work),
        decoding_(decoding_of(model.config, options)),
        answers_(samples.size()),
        blocks_(kBlocks) {
    const Recipe& recipe = decoding_.recipe;
    KAVA_CHECK(recipe.latents > 0 && options.sampling.greedy() && options.sampling.samples == 1, "controls of {} latents", recipe.latents);
    std::size_t longest = 0;
    for (const Sample& s : samples) {
      questions_.push_back(without_trace(s, recipe, model.shape.position_limit()));
      longest = std::max(longest, questions_.back().answer.size());
    }
    answer_rows_ = static_cast<int64_t>(kAllAnswers) * (static_cast<int64_t>(longest) + options.max_new_tokens) + 2 * recipe.latents;
    for (const auto& [question, known] : work.known) answers_.at(question) = known;
    const auto ranks = static_cast<std::size_t>(comm_.size()), rank = static_cast<std::size_t>(comm_.rank());
    begin_ = block_begin(kBlocks * rank / ranks, samples.size()), end_ = block_begin(kBlocks * (rank + 1) / ranks, samples.size());
  }

  // The first answers of every question and the means of all latents; then, with those, the last. Ranks go round by round, a batch each.
  void part(bool first_part) {
    for (std::size_t first = begin_, left = 1; left > 0;) {
      if (first < end_) first += round(first, first_part);
      left = 0;
      std::vector<std::size_t> of(static_cast<std::size_t>(comm_.size()));
      const std::size_t mine = end_ - first;
      comm_.gather(of.data(), &mine, sizeof mine, "counting questions");
      for (std::size_t n : of) left += n;
      const auto all = static_cast<double>(questions_.size()), through = all - static_cast<double>(left);
      if (work_.progress) work_.progress(first_part ? 0.7 * through : 0.7 * all + 0.3 * through);
    }
    if (first_part) add_blocks();
  }

  std::vector<ControlledQuestion> result() {
    std::vector<DecodeResult> mine;
    for (std::size_t i = begin_; i < end_; ++i) std::ranges::move(answers_[i], std::back_inserter(mine));
    std::vector<DecodeResult> all = gather_results(comm_, mine);
    std::vector<ControlledQuestion> out(questions_.size());
    for (std::size_t i = 0; i < out.size(); ++i) {
      const auto of = std::span(all).subspan(i * kAllAnswers, kAllAnswers);
      out[i].intact = std::move(of[0]);
      for (std::size_t c = 0; c < kFirstControls.size(); ++c)
        out[i].controls[static_cast<std::size_t>(kFirstControls[c])] = std::move(of[1 + c]);
      out[i].controls[static_cast<std::size_t>(kLastControl)] = std::move(of[kFirstAnswers]);
    }
    return out;
  }

 private:
  // How many of this rank's questions, from that on, are through now.
  std::size_t round(std::size_t first, bool first_part) {
    ArenaScope scope(arena_);
    const std::size_t due = first_part ? kFirstAnswers : kAllAnswers;
    std::size_t n = together(model_, decoding_.recipe, std::span(questions_).subspan(first, end_ - first), options_.batch, answer_rows_);
    // What is known is run for its latents alone.
    const bool known = answers_[first].size() >= due;
    for (std::size_t i = 1; i < n; ++i)
      if ((answers_[first + i].size() >= due) != known) n = i;
    if (first_part || !known) run(first, n, first_part, known);
    return n;
  }

  // The means, from the blocks of all ranks.
  void add_blocks() {
    const std::size_t layers = model_.layers.size();
    means_.k.resize(layers), means_.v.resize(layers);
    means_.questions = static_cast<int64_t>(questions_.size());
    for (std::size_t l = 0; l < layers; ++l)
      for (auto part : {&LatentMeans::k, &LatentMeans::v}) {
        std::string mine;
        for (const LatentMeans& block : blocks_)
          if (block.questions > 0)
            mine.append(reinterpret_cast<const char*>((block.*part)[l].data()), (block.*part)[l].size() * sizeof(double));
        std::vector<double>& sum = (means_.*part)[l];
        sum.resize(static_cast<std::size_t>(decoding_.recipe.latents * model_.shape.kv_heads * model_.shape.head_dim));
        for (const std::string& of : comm_.gather(mine, "adding latents"))
          for (std::size_t at = 0; at < of.size() / sizeof(double); ++at) {
            double x = 0;
            std::memcpy(&x, of.data() + at * sizeof x, sizeof x);
            sum[at % sum.size()] += x;
          }
      }
  }

  void run(std::size_t first, std::size_t n, bool first_part, bool known) {
    const bool latents_of_next = first_part && !known;
    std::vector<Sample> given;
    std::vector<int64_t> numbers;
    for (std::size_t i = first; i < first + n; ++i)
      given.push_back(latents_of_next ? questions_[i] : question_alone(questions_[i])), numbers.push_back(static_cast<int64_t>(i));
    if (latents_of_next) given.push_back(question_alone(questions_[(first + n) % questions_.size()]));
    std::vector<Control> controls;
    if (!known && first_part) controls.assign(kFirstControls.begin(), kFirstControls.end());
    if (!known && !first_part) controls = {kLastControl};
    ControlBatch batch(model_, arena_, decoding_, first_part ? decoding_.recipe : without_latents(decoding_.recipe), given,
                       std::span(questions_).subspan(first, n), std::move(controls), options_);
    if (first_part) {
      std::vector<LatentMeans*> sums;
      for (std::size_t i = first; i < first + n; ++i) sums.push_back(&blocks_[block_of(i, questions_.size())]);
      batch.add_to(sums);
    }
    if (known) return;
    const std::vector<DecodeResult> found = batch.run(means_, first_part, numbers);
    const std::size_t each = found.size() / n;
    for (std::size_t i = 0; i < n; ++i) {
      const auto of = std::span(found).subspan(i * each, each);
      answers_[first + i].insert(answers_[first + i].end(), of.begin(), of.end());
      if (work_.answered) work_.answered(first + i, of);
    }
  }

  Model& model_;
  Arena& arena_;
  const DecodeOptions& options_;
  const ControlWork& work_;
  Comm alone_;
  Comm& comm_ = work_.comm ? *work_.comm : alone_;
  const Decoding decoding_;
  std::vector<Sample> questions_;
  std::size_t begin_ = 0, end_ = 0;  // this rank's
  int64_t answer_rows_ = 0;
  std::vector<std::vector<DecodeResult>> answers_;  // in the order of ControlWork
  std::vector<LatentMeans> blocks_;
  LatentMeans means_;
};

}  // namespace

std::vector<ControlledQuestion> decode_controls(Model& model, Arena& arena, std::span<const Sample> samples, const DecodeOptions& options,
                                                const ControlWork& work) {
  ControlRun run(model, arena, samples, options, work);
  for (const bool first_part : {true, false}) run.part(first_part);
  return run.result();
}

}  // namespace kava
