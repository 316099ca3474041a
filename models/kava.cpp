#include "models/kava.h"

#include <algorithm>
#include <array>

#include "engine/device/indices.h"
#include "models/flops.h"
#include "models/step.h"

namespace kava {

namespace {

RunConfig with_terms(RunConfig config, const std::optional<StepSum>& only) {
  if (!only) return config;
  if (*only != kStudentCe) config.loss.student = 0;
  if (*only != kTeacherCe) config.loss.teacher = 0;
  if (*only != kKv) config.kv.weight = 0;
  if (*only != kCodi) config.codi.weight = 0;
  return config;
}

enum class PassKind : int64_t { forward, forward_alone, backward };
int64_t key_of(std::size_t pass, PassKind kind) { return 3 * static_cast<int64_t>(pass) + static_cast<int64_t>(kind); }

}  // namespace

Step::Step(Model& model, Arena& arena, std::span<const Sample> samples, const BatchTotals& totals, const StepOptions& options)
    : model_(model),
      ops_(model.ops),
      arena_(arena),
      config_(with_terms(model.config, options.only)),
      totals_(totals),
      options_(options),
      samples_(samples),
      recipe_(options.recipe.value_or(recipe_of(model.config))),
      layout_(make_layout(model.config, recipe_, samples, options.first_index)),
      transformer_(model, arena, options.backward ? keep_of(model.config.train.recompute) : Keep::nothing, options.step, options.dropout) {
  B_ = layout_.samples, M_ = layout_.latents;
  KD_ = model.shape.kv_heads * model.shape.head_dim;
  type_ = model.storage, sum_ = sum_type(type_);
  const bool by_slots = config_.rkv.short_ == Short::zero;
  for (const Sample& s : samples)
    valid_.push_back(static_cast<int32_t>(by_slots ? M_ : std::min<int64_t>(M_, static_cast<int64_t>(s.trace.size()))));
  for (const Sample& s : samples) {
    const Lengths n = lengths_of(recipe_, s, options.first_index + static_cast<int64_t>(judged_.size()));
    judged_.push_back(recipe_.student ? n.student_tail : static_cast<int64_t>(s.answer.size()));
    before_judged_.push_back(recipe_.student ? 0 : n.teacher_tail - judged_.back());
  }
  int32_t last = 0;
  for (const Pass& p : layout_.passes)
    for (int32_t position : p.positions) last = std::max(last, position);
  model.ensure_positions(last + 1);
}

void Step::run(const Tensor& sums) {
  plan();
  if (options_.count_forced) correct_ = arena_.alloc(DType::i32, 1, B_);
  forward();
  if (options_.backward) transformer_.allocate_gradients(layout_.rows, layout_.live_rows);
  cross_entropy(sums.col_range(kStudentCe, kTeacherCe + 1));
  if (config_.kv.weight > 0) kv_loss(sums.col_range(kKv, kKv + 1));
  if (config_.codi.weight > 0) codi_loss(sums.col_range(kCodi, kCodi + 1));
  if (options_.backward) measure_latents(sums);
  if (options_.dump && totals_.latents > 0) dump_latents();
  if (options_.flops)
    *options_.flops += has_fewest_rows(config_) ? minimum_flops(config_, model_.shape, layout_)
                                                : minimum_flops(config_, recipe_, model_.shape, samples_, options_.first_index);
  if (options_.backward) backward();
}

void Step::measure_latents(const Tensor& sums) {
  const DevicePass& last = passes_.back();
  if (last.fed == 0) return;
  const Tensor fed = transformer_.inputs(last).row_range(0, last.fed);
  ops_.sum_squares(arena_, sums.col_range(kLatentSquares, kLatentSquares + 1), fed);
  ops_.fill(sums.col_range(kLatentNumbers, kLatentNumbers + 1), static_cast<double>(fed.count()));
}

int64_t Step::forced_correct() const {
  std::vector<int32_t> correct(static_cast<std::size_t>(B_));
  ops_.download(correct.data(), correct_);
  return std::ranges::count(correct, 1);
}

void Step::plan() {
  IndexBlock block;
  passes_.resize(layout_.passes.size()), feeds_.resize(layout_.passes.size());
  for (std::size_t i = 0; i < passes_.size(); ++i) {
    check_pass(model_, layout_.passes[i]);
    add_pass(block, passes_[i], layout_.passes[i]);
    add_feeds(block, feeds_[i], layout_, layout_.passes[i]);
  }
  plan_head(block);
  if (config_.kv.weight > 0) plan_kv(block);
  if (config_.codi.weight > 0) plan_codi(block);
  block.send(ops_, arena_);
}

void Step::forward() {
  int64_t most = 0;
  for (const Pass& p : layout_.passes) most = std::max(most, p.rows());
  transformer_.allocate(layout_.rows, layout_.live_rows, most);
  std::vector<PassReads> reads(passes_.size());
  if (config_.kv.weight > 0) reads.front().queries = kv_.queries, reads.front().queries_live = kv_.queries_live;
  if (config_.codi.weight > 0) read_states(reads);
  for (std::size_t i = 0; i < passes_.size(); ++i) {
    ops_.pass(arena_, key_of(i, options_.backward ? PassKind::forward : PassKind::forward_alone), [&] {
      const DevicePass& d = passes_[i];
      feed_latents(model_, arena_, transformer_, d, feeds_[i]);
      if (d.ids.cols > 0) ops_.embed_fwd(transformer_.inputs(d).row_range(d.fed, d.rows()), model_.embedding, model_.new_tokens, d.ids);
      transformer_.forward(d, reads[i]);
    });
  }
}

std::vector<int32_t> Step::live_of(std::span<const int32_t> rows) const {
  std::vector<int32_t> live;
  for (int32_t r : rows) live.push_back(layout_.live_of[static_cast<std::size_t>(r)]);
  check_distinct(live, layout_.live_rows);
  return live;
}

std::vector<int32_t> Step::positions_of(std::span<const int32_t> rows) const {
  std::vector<int32_t> all;
  for (const Pass& p : layout_.passes) all.insert(all.end(), p.positions.begin(), p.positions.end());
  std::vector<int32_t> out;
  for (int32_t r : rows) out.push_back(all[static_cast<std::size_t>(r)]);
  return out;
}

void Step::plan_head(IndexBlock& block) {
  std::vector<int32_t> live, targets, classes, owners;
  for (int32_t teacher : {0, 1}) {
    if (teacher ? !recipe_.teacher : !recipe_.student) continue;
    const Supervised& rows = teacher ? layout_.teacher : layout_.student;
    live.insert(live.end(), rows.live_rows.begin(), rows.live_rows.end());
    targets.insert(targets.end(), rows.targets.begin(), rows.targets.end());
    classes.insert(classes.end(), rows.targets.size(), teacher);
    if (teacher) head_.teacher_rows = std::ssize(rows.targets);
    // A sample is judged by the student's predictions, or by the teacher's where it is alone.
    const bool judged = teacher == 0 || !recipe_.student;
    for (std::size_t b = 0; b < judged_.size() && judged; ++b) {
      owners.insert(owners.end(), static_cast<std::size_t>(before_judged_[b]), -1);
      owners.insert(owners.end(), static_cast<std::size_t>(judged_[b]), static_cast<int32_t>(b));
    }
    owners.resize(targets.size(), -1);
  }
  check_distinct(live, layout_.live_rows);
  check_indices(targets, 0, model_.shape.vocab);
  block.add(head_.live, live);
  block.add(head_.targets, targets);
  block.add(head_.classes, classes);
  block.add(head_.owners, owners);
}

// Weighted means over all supervised tokens of the optimiser batch.
void Step::cross_entropy(const Tensor& sums) {
  ArenaScope scope(arena_);
  const int64_t n = head_.live.cols, C = model_.shape.hidden, V = model_.shape.vocab;
  const Tensor h = arena_.alloc(type_, n, C);
  ops_.gather_rows(h, transformer_.all_hidden(), head_.live);
  const std::array weights{config_.loss.student / static_cast<double>(std::max<int64_t>(totals_.student_tokens, 1)),
                           config_.loss.teacher / static_cast<double>(std::max<int64_t>(totals_.teacher_tokens, 1))};
  const bool backward = options_.backward && (config_.loss.student > 0 || config_.loss.teacher > 0);
  const Tensor dh = backward ? arena_.alloc(sum_, n, C) : Tensor{};
  const Tensor logits = options_.dump ? arena_.alloc(sum_, n, V) : Tensor{};
  ops_.head_cross_entropy(arena_, sums, dh, backward ? model_.dhead : Tensor{}, correct_, logits, h, model_.head, head_.targets,
                          head_.classes, head_.owners, weights);
  if (backward) ops_.scatter_add_rows(transformer_.dhidden(), dh, head_.live);
  if (!options_.dump) return;
  const int64_t teacher = head_.teacher_rows;
  if (n > teacher) dump("logits.student", {n - teacher, V}, host(logits.row_range(0, n - teacher)), 0);
  if (teacher > 0) dump("logits.teacher", {teacher, V}, host(logits.row_range(n - teacher, n)), 0);
}

void Step::backward() {
  for (std::size_t i = passes_.size(); i-- > 1;) ops_.pass(arena_, key_of(i, PassKind::backward), [&] { backward(i, {}); });
  // What is told of layers exchanges their gradients, beside what goes on.
  if (options_.layer_done) backward(0, options_.layer_done);
  else ops_.pass(arena_, key_of(0, PassKind::backward), [&] { backward(0, {}); });
}

void Step::backward(std::size_t i, const std::function<void(int64_t)>& layer_done) {
  const DevicePass& p = passes_[i];
  const bool last = i + 1 == passes_.size();  // the student's answer, and so the taps, lie in the last pass
  transformer_.backward(p, last ? std::span<const Tap>(taps_) : std::span<const Tap>(), layer_done);
  feed_latents_backward(model_, arena_, transformer_, p, feeds_[i]);
  if (p.ids.cols > 0 && (model_.dembedding || model_.dnew_tokens))
    ops_.embed_bwd(model_.dembedding, model_.dnew_tokens, transformer_.dinput().row_range(p.begin + p.fed, p.end), p.ids);
}

void add_step(Model& model, Arena& arena, std::span<const Sample> samples, const BatchTotals& totals, const StepOptions& options,
              const Tensor& sums) {
  ArenaScope scope(arena);
  Step(model, arena, samples, totals, options).run(sums);
}

StepLosses run_step(Model& model, Arena& arena, std::span<const Sample> samples, const BatchTotals& totals, const StepOptions& options) {
  ArenaScope scope(arena);
  const Tensor sums = arena.alloc(DType::f64, 1, kStepSums);
  model.ops.fill(sums, 0);
  Step step(model, arena, samples, totals, options);
  step.run(sums);
  StepLosses losses = losses_of(to_host(model.ops, sums), totals);
  if (options.count_forced) losses.forced_correct = step.forced_correct();
  return losses;
}

}  // namespace kava
