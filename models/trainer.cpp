#include "models/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>
#include <numbers>
#include <numeric>
#include <tuple>

#include "engine/clock.h"
#include "engine/device/cuda_module.h"
#include "engine/device/host.h"
#include "engine/error.h"
#include "engine/files/digest.h"
#include "engine/files/json.h"
#include "engine/memory.h"
#include "models/flops.h"

namespace kava {

namespace {

constexpr int64_t kLeastBucket = int64_t{4} << 20;  // bytes that are worth a call of the ranks' devices, where there are four of them

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

nlohmann::ordered_json metrics_line(const StepReport& r, const Speed& speed, double matrix_rate, double seconds, int64_t memory,
                                    int64_t device_memory) {
  nlohmann::ordered_json line = {{"step", r.step}, {"epoch", r.epoch}, {"samples", r.samples}};
  line.update(step_metrics(r, speed));
  line["mfu"] = matrix_rate > 0 ? speed.flops_per_s / matrix_rate : 0.0;
  line["seconds"] = seconds;
  line["memory_bytes"] = memory;
  if (device_memory > 0) line["device_bytes"] = device_memory;
  if (r.latent_norm_ratio) line["latent_norm_ratio"] = *r.latent_norm_ratio;
  for (const auto& [name, norm] : r.term_grads) line[name] = norm;
  if (r.stage) line["stage"] = *r.stage, line["latents"] = r.latents, line["left"] = r.left;
  return line;
}

// Of a flat buffer, a piece at a time: a whole copy beside it would be in no plan.
std::string digest_of(Ops& ops, const Tensor& flat) {
  KAVA_CHECK(flat.rows == 1, "a flat buffer of {} rows", flat.rows);
  std::vector<char> piece(std::size_t{1} << 20);
  const int64_t each = std::ssize(piece) / size_of(flat.dtype);
  Digest digest;
  for (int64_t at = 0; at < flat.cols; at += each) {
    const Tensor part = flat.col_range(at, std::min(flat.cols, at + each));
    ops.download(piece.data(), part);
    digest.add(piece.data(), static_cast<std::size_t>(part.cols * size_of(flat.dtype)));
  }
  return digest.hex();
}

}  // namespace

nlohmann::ordered_json step_metrics(const StepReport& r, const Speed& speed) {
  return {{"loss", r.loss},
          {"student_ce", r.losses.student_ce},
          {"teacher_ce", r.losses.teacher_ce},
          {"kv", r.losses.kv},
          {"codi", r.losses.codi},
          {"grad_norm", r.grad_norm},
          {"lr", r.lr},
          {"samples_per_s", speed.samples_per_s},
          {"tokens_per_s", speed.tokens_per_s}};
}

double learning_rate(const RunConfig::Train& train, int64_t step, int64_t total) {
  const double N = static_cast<double>(total), k = static_cast<double>(step);
  const double W = std::ceil(train.warmup * N);
  if (k < W) return train.lr * k / W;
  if (train.schedule == Schedule::cosine) return train.lr * (1 + std::cos(std::numbers::pi * (k - W) / (N - W))) / 2;
  if (train.schedule == Schedule::linear) return train.lr * (N - k) / (N - W);
  return train.lr;
}

int64_t total_steps(const RunConfig::Train& train, int64_t samples) {
  return train.max_steps > 0 ? train.max_steps : train.epochs * ceil_div(samples, train.batch);
}

Tensor step_scalars(Arena& arena, int64_t forwards) { return arena.alloc(DType::f64, 1, forwards * kStepSums + 1); }

Trainer::Trainer(Model& model, std::span<const Sample> samples, TrainingState state, Comm* comm)
    : model_(model),
      comm_(comm ? *comm : self_),
      arena_(model.ops),
      options_(model.config.train),
      samples_(samples),
      state_(std::move(state)),
      steps_per_epoch_(ceil_div(std::max<int64_t>(1, std::ssize(samples)), options_.batch)),
      curriculum_(model.config, steps_per_epoch_) {
  KAVA_CHECK(!samples.empty(), "nothing to train on");
  const int64_t n = static_cast<int64_t>(samples.size());
  const auto length = [&] { return std::tuple(state_.total_steps, state_.max_steps, state_.epochs, state_.micro_batch); };
  const bool begun = state_.total_steps > 0;
  const auto before = length();
  state_.total_steps = total_steps(options_, n);
  state_.max_steps = options_.max_steps, state_.epochs = options_.epochs;
  state_.micro_batch = options_.micro_batch > 0 ? options_.micro_batch : options_.batch;
  state_.device = model.ops.name();
  if (recipe_of(model.config).has_stages()) state_.last_stage = curriculum_.stage(state_.total_steps - 1);
  saved_ = begun && length() == before, extended_ = begun && !saved_;
  // What was the best of a shorter run may be of a stage that is no longer the last.
  if (begun && state_.total_steps != std::get<0>(before) && state_.best) {
    const int64_t step = state_.best->step, every = options_.valid_every > 0 ? options_.valid_every : steps_per_epoch_;
    if (!counts((step - 1) / every * every, step)) state_.best.reset();
  }
  model_.parameters.set_updates(state_.moment_updates);
  // Once for all samples, so that no later step makes longer tables.
  int64_t positions = 0;
  for (const Sample& s : samples_) positions = std::max(positions, needed_positions(model.config, s));
  model_.ensure_positions(positions);
  const int64_t forwards = ceil_div(options_.batch, state_.micro_batch);
  embedding_rms_ = embedding_rms();
  scalars_ = step_scalars(arena_, forwards);
  const int64_t gradient = model_.parameters.count() * size_of(model_.parameters.grad().dtype);
  buckets_ = gradient_buckets(model_, comm_.alone() ? gradient : std::min(kLeastBucket, gradient / 4));
  if (!comm_.link() && (forwards > 1 || !comm_.alone())) total_ = model_.parameters.like_grad();
}

std::span<const Sample> Trainer::batch_of(int64_t step) {
  const int64_t epoch = step / steps_per_epoch_, n = static_cast<int64_t>(samples_.size());
  if (epoch != order_epoch_) order_ = epoch_order(n, model_.config.seed, epoch), order_epoch_ = epoch;
  const int64_t first = step % steps_per_epoch_ * options_.batch;
  batch_.clear();
  for (int64_t i = first; i < std::min(n, first + options_.batch); ++i)
    batch_.push_back(samples_[static_cast<std::size_t>(order_[static_cast<std::size_t>(i)])]);
  return batch_;
}

// Whether the batch of a step had anything left of its traces.
bool Trainer::left_in(int64_t step) {
  const Recipe recipe = curriculum_.recipe(step);
  int64_t index = 0;
  return std::ranges::any_of(batch_of(step), [&](const Sample& s) { return cut_of(recipe, s, index++).rest() > 0; });
}

// Forward i of a batch; returns the fewest operations that it takes.
double Trainer::forward(std::span<const Sample> batch, const Recipe& recipe, std::span<const BatchTotals> forwards, int64_t i,
                        std::function<void(int64_t)> layer_done) {
  const int64_t first = i * state_.micro_batch, size = std::min(state_.micro_batch, std::ssize(batch) - first);
  double flops = 0;
  StepOptions options;
  options.recipe = recipe;
  options.first_index = first;
  options.step = static_cast<uint32_t>(state_.step);
  options.flops = &flops, options.only = only_;
  options.layer_done = std::move(layer_done);
  add_step(model_, arena_, batch.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(size)),
           forwards[static_cast<std::size_t>(i)], options, scalars_.col_range(i * kStepSums, (i + 1) * kStepSums));
  return flops;
}

// Each running term's gradient by itself, in logged steps alone, so that a checkpoint need not hold any for a later line. The step's own is
// made afterwards, from the same numbers as without this.
std::map<std::string, double> Trainer::term_gradients(std::span<const Sample> batch, const Recipe& recipe,
                                                      std::span<const BatchTotals> forwards) {
  std::map<std::string, double> norms;
  const int64_t every = options_.log_grads_every, step = state_.step + 1,
                line_before = state_.step / options_.log_every * options_.log_every;
  if (every == 0 || !is_logged(step) || step / every == line_before / every) return norms;
  const RunConfig& c = model_.config;
  const std::tuple<StepSum, const char*, bool> terms[] = {{kStudentCe, "grad_student_ce", recipe.student && c.loss.student > 0},
                                                          {kTeacherCe, "grad_teacher_ce", recipe.teacher && c.loss.teacher > 0},
                                                          {kKv, "grad_kv", c.kv.weight > 0},
                                                          {kCodi, "grad_codi", c.codi.weight > 0}};
  for (const auto& [term, name, runs] : terms) {
    if (!runs) continue;
    only_ = term;
    gradients(batch, recipe, forwards);
    ArenaScope scope(arena_);
    const Tensor square = arena_.alloc(DType::f64, 1, 1);
    model_.ops.sum_squares(arena_, square, model_.parameters.grad());
    norms[name] = std::sqrt(to_host(model_.ops, square)[0]);
  }
  only_.reset();
  return norms;
}

// The samples of a step's batch that by themselves have a loss or gradient that is not finite: each in a step of its own, of which nothing
// is kept. Every rank looks at its part of them.
std::vector<const Sample*> Trainer::not_finite(int64_t step) {
  std::vector<const Sample*> found;
  const std::span<const Sample> batch = batch_of(step);
  const Recipe recipe = curriculum_.recipe(step);
  const auto ranks = static_cast<std::size_t>(comm_.size());
  std::vector<char> mine(batch.size()), all(batch.size() * ranks);
  for (auto i = static_cast<std::size_t>(comm_.rank()); i < batch.size(); i += ranks) {
    ArenaScope scope(arena_);
    const auto one = batch.subspan(i, 1);
    const BatchTotals totals = batch_totals(model_.config, recipe, one, 1);
    const Tensor sums = arena_.alloc(DType::f64, 1, kStepSums), square = arena_.alloc(DType::f64, 1, 1);
    StepOptions options;
    options.recipe = recipe;
    options.first_index = static_cast<int64_t>(i);
    options.step = static_cast<uint32_t>(step);
    model_.ops.fill(sums, 0);
    model_.parameters.zero_grad();
    add_step(model_, arena_, one, totals_of_forwards(model_.config, recipe, totals, one, 1)[0], options, sums);
    model_.ops.sum_squares(arena_, square, model_.parameters.grad());
    std::vector<double> values = to_host(model_.ops, sums);
    values.push_back(to_host(model_.ops, square)[0]);
    mine[i] = !std::ranges::all_of(values, [](double x) { return std::isfinite(x); });
  }
  if (comm_.alone()) all = mine;
  else comm_.gather(all.data(), mine.data(), std::ssize(mine), "looking for samples that are not finite");
  for (std::size_t i = 0; i < batch.size(); ++i)
    if (all[i % ranks * batch.size() + i]) found.push_back(&batch[i]);
  return found;
}

// Some rows at a time: a table that lies apart in its buffer, or is as large as the model, is no matter.
double Trainer::embedding_rms() {
  constexpr int64_t kRows = 4096;
  const Tensor& table = model_.embedding;
  ArenaScope scope(arena_);
  const Tensor squares = arena_.alloc(DType::f64, 1, ceil_div(table.rows, kRows));
  for (int64_t i = 0; i < squares.cols; ++i)
    model_.ops.sum_squares(arena_, squares.col_range(i, i + 1), table.row_range(i * kRows, std::min(table.rows, (i + 1) * kRows)));
  const std::vector<double> sums = to_host(model_.ops, squares);
  return std::sqrt(std::accumulate(sums.begin(), sums.end(), 0.0) / static_cast<double>(table.count()));
}

bool Trainer::is_logged(int64_t step) const { return step % options_.log_every == 0 || step >= state_.total_steps; }

bool Trainer::resets_moments() {
  return curriculum_.resets(state_.step, [&] { return left_in(state_.step - 1); });
}

// The next step but for what its scalars say.
Trainer::Begun Trainer::begin_step() {
  if (resets_moments()) model_.parameters.reset_moments(), state_.moment_updates = 0;
  const std::span<const Sample> batch = batch_of(state_.step);
  const Recipe recipe = curriculum_.recipe(state_.step);
  const BatchTotals totals = batch_totals(model_.config, recipe, batch, state_.micro_batch);
  Begun begun{{}, totals_of_forwards(model_.config, recipe, totals, batch, state_.micro_batch)};
  StepReport& r = begun.report;
  r.epoch = state_.step / steps_per_epoch_;
  if (recipe.has_stages()) r.stage = curriculum_.stage(state_.step);
  r.latents = totals.latents, r.left = static_cast<double>(totals.rest) / static_cast<double>(batch.size());
  // Embeddings that are trained have another size in each step.
  if (options_.trainable == Trainable::all && is_logged(state_.step + 1)) embedding_rms_ = embedding_rms();
  r.term_grads = term_gradients(batch, recipe, begun.forwards);
  r.flops = gradients(batch, recipe, begun.forwards);
  if (options_.trainable != Trainable::all || is_logged(state_.step + 1)) r.embedding_rms = embedding_rms_;
  r.lr = learning_rate(options_, state_.step, state_.total_steps);
  AdamwOptions o;
  o.lr = r.lr, o.beta1 = options_.betas[0], o.beta2 = options_.betas[1], o.eps = options_.eps;
  o.weight_decay = options_.weight_decay, o.clip = options_.clip;
  model_.parameters.update(arena_, o, scalars_.col_range(scalars_.cols - 1, scalars_.cols), scalars_.col_range(0, scalars_.cols - 1));
  state_.samples += static_cast<int64_t>(batch.size());
  r.step = ++state_.step;
  saved_ = false;
  state_.epoch = state_.step / steps_per_epoch_, state_.cursor = state_.step % steps_per_epoch_ * options_.batch;
  r.samples = state_.samples;
  r.batch_samples = static_cast<int64_t>(batch.size());
  r.batch_tokens = token_count(recipe, batch);
  return begun;
}

void Trainer::ask_for(Begun begun) {
  begun_ = std::move(begun);
  model_.ops.begin_download(scalars_);
}

StepReport Trainer::end_step() {
  std::vector<double> scalars(static_cast<std::size_t>(scalars_.cols));
  model_.ops.end_download(scalars.data());
  StepReport r = std::move(begun_->report);
  for (std::size_t i = 0; i < begun_->forwards.size(); ++i)
    r.losses += losses_of(std::span(scalars).subspan(i * kStepSums, kStepSums), begun_->forwards[i]);
  double squares = 0, numbers = 0;
  for (std::size_t i = 0; i < begun_->forwards.size(); ++i)
    squares += scalars[i * kStepSums + kLatentSquares], numbers += scalars[i * kStepSums + kLatentNumbers];
  if (numbers > 0 && r.embedding_rms > 0) r.latent_norm_ratio = std::sqrt(squares / numbers) / r.embedding_rms;
  begun_.reset();
  r.loss = r.losses.total(model_.config);
  r.grad_norm = std::sqrt(scalars.back());
  r.updated = std::isfinite(r.grad_norm);
  if (r.updated) ++state_.updates, ++state_.moment_updates;
  state_.skipped_in_row = r.updated ? 0 : state_.skipped_in_row + 1;
  if (!r.updated) r.not_finite = not_finite(r.step - 1);
  return r;
}

StepReport Trainer::step() {
  ask_for(begin_step());
  return end_step();
}

bool Trainer::due(int64_t every) const {
  return state_.finished() || (state_.step > 0 && state_.step % (every > 0 ? every : steps_per_epoch_) == 0);
}

// Whether a validation after so many steps, with those from `first` on since the one before, may be the best: a model of an early stage
// would be tested with what it has not learnt yet.
bool Trainer::counts(int64_t first, int64_t steps) {
  const RunConfig& c = model_.config;
  const Recipe recipe = recipe_of(c);
  if (!recipe.has_stages() || c.stages.best == BestOf::any || c.stages.fixed >= 0) return true;
  if (recipe.rest == Recipe::Rest::steps) return curriculum_.stage(std::max<int64_t>(0, steps - 1)) == state_.last_stage;
  for (int64_t step = std::max<int64_t>(0, first); step < steps; ++step)
    if (left_in(step)) return false;
  return true;
}

void Trainer::validate(RunFolder* folder, const TrainingHooks& hooks) {
  const int64_t stage = curriculum_.stage(std::max<int64_t>(0, state_.step - 1));
  std::optional<Validation> v;
  try {
    v = hooks.validate(arena_, stage);
  } catch (const Error& e) {
    if (e.code() != Exit::numeric) throw;
    throw Error(Exit::numeric, fmt::format("step {}", state_.step), "the logits of the validation are not finite", "lower train.lr");
  }
  if (!v) return;
  nlohmann::ordered_json object = {{"step", state_.step}};
  for (const auto& [name, value] : v->values) object[name] = value;
  if (folder) folder->append(nlohmann::ordered_json({{"valid", object}}).dump());
  // Where no validation counted, the last checkpoint is the best.
  const bool may_be_best = counts(state_.validated_step, state_.step) || (state_.finished() && !state_.best);
  state_.validated_step = state_.step;
  saved_ = false;
  if (may_be_best && (!state_.best || state_.best->beaten_by(v->score, v->loss))) state_.best = Best{state_.step, v->score, v->loss};
  if (hooks.on_validation) hooks.on_validation(state_.step, *v);
}

// A checkpoint is written by one rank for all.
void Trainer::require_same_values() {
  if (comm_.alone()) return;
  const ParameterStore& p = model_.parameters;
  std::string digests;
  for (const Tensor& flat : {p.value(), p.m(), p.v()}) digests += digest_of(model_.ops, flat);
  const std::vector<std::string> all = comm_.gather(digests, "comparing weights");
  for (std::size_t r = 1; r < all.size(); ++r)
    if (all[r] != all[0])
      throw Error(Exit::comm, fmt::format("step {}", state_.step), fmt::format("rank {} holds other weights than rank 0", r),
                  "check its machine; checkpoints of steps before are whole");
}

void Trainer::save(RunFolder* folder, const TrainingHooks& hooks) {
  if (saved_) return;
  KAVA_CHECK(!begun_, "a checkpoint in the middle of a step");
  if (const std::string name = model_.parameters.find_not_finite(arena_); !name.empty())
    throw Error(Exit::numeric, fmt::format("step {}", state_.step), fmt::format("{} holds a value that is not finite", name),
                "lower train.lr; checkpoints of steps before are whole");
  require_same_values();
  if (folder) folder->save(model_, state_);
  saved_ = true;
  if (hooks.note) hooks.note(fmt::format("checkpoint of step {} written", state_.step));
}

void Trainer::log(RunFolder* folder, const TrainingHooks& hooks, const StepReport& report, double seconds) {
  state_.seconds += seconds;
  logged_seconds_ += seconds, logged_flops_ += report.flops;
  logged_samples_ += report.batch_samples, logged_tokens_ += report.batch_tokens;
  const double each = 1 / std::max(logged_seconds_, 1e-9);
  const Speed speed{static_cast<double>(logged_samples_) * each, static_cast<double>(logged_tokens_) * each, logged_flops_ * each};
  if (is_logged(report.step)) {
    const int64_t memory = model_.ops.name() == "cpu" ? peak_resident_memory() : model_.ops.held_bytes();
    // The rate is a process's, the work that of all ranks.
    const double ranks = comm_.size(), rate = hooks.matrix_rate ? ranks * hooks.matrix_rate(speed.flops_per_s / ranks) : 0;
    if (folder) folder->append(metrics_line(report, speed, rate, state_.seconds, memory, taken_memory(model_.ops)).dump());
    logged_seconds_ = logged_flops_ = 0, logged_samples_ = logged_tokens_ = 0;
  }
  if (hooks.on_step) hooks.on_step(report, speed);
}

Trainer::Asked Trainer::asked(const TrainingHooks& hooks) {
  Asked mine{hooks.stop && hooks.stop(), hooks.checkpoint && hooks.checkpoint()};
  if (comm_.alone()) return mine;
  std::vector<Asked> all(static_cast<std::size_t>(comm_.size()));
  comm_.gather(all.data(), &mine, sizeof mine, "agreeing on the next step");
  for (const Asked& a : all) mine.stop = mine.stop || a.stop, mine.checkpoint = mine.checkpoint || a.checkpoint;
  return mine;
}

// Takes what the last step's scalars say, where that was not done.
void Trainer::settle(RunFolder* folder, const TrainingHooks& hooks) {
  if (!begun_) return;
  const StepReport report = end_step();
  const double seconds = seconds_since(counted_);
  counted_ = std::chrono::steady_clock::now();
  if (state_.skipped_in_row > 0 && hooks.note)
    hooks.note(fmt::format("step {}: the loss or the gradient is not finite; no update made", report.step));
  log(folder, hooks, report, seconds);
  if (state_.skipped_in_row >= kMostSkipped)
    throw Error(Exit::numeric, fmt::format("step {}", report.step),
                fmt::format("the loss or the gradient was not finite in {} steps in a row", kMostSkipped),
                "lower train.lr; checkpoints of steps before are whole");
}

// Where the next step fails before it is queued, the one before it is told all the same, and an end that it makes came first.
Trainer::Begun Trainer::begin_next(RunFolder* folder, const TrainingHooks& hooks) {
  try {
    return begin_step();
  } catch (...) {
    const std::exception_ptr failure = std::current_exception();
    try {
      settle(folder, hooks);
    } catch (const Error& e) {
      if (e.code() != Exit::comm) throw;  // the others are elsewhere, since this rank failed
    } catch (...) {                       // the device failed, which is what is told
    }
    std::rethrow_exception(failure);
  }
}

bool Trainer::run(RunFolder* folder, const TrainingHooks& hooks) {
  if (extended_) save(folder, hooks);  // a kill before the next checkpoint must not take the extension back
  for (;;) {
    comm_.set_place(fmt::format("step {}", state_.step));
    Asked now = asked(hooks);
    if (now.stop || now.checkpoint || due(options_.valid_every) || due(options_.checkpoint_every) || resets_moments())
      settle(folder, hooks);
    if (hooks.validate && due(options_.valid_every) && state_.validated_step != state_.step && !now.stop) {
      validate(folder, hooks);
      const Asked meanwhile = asked(hooks);
      now = {meanwhile.stop, now.checkpoint || meanwhile.checkpoint};
    }
    if (state_.finished() && state_.updates == 0)
      throw Error(Exit::numeric, fmt::format("step {}", state_.step), "no step made an update: there was no finite loss and gradient",
                  "lower train.lr, or check the data and the model");
    const bool best_now = state_.best && state_.best->step == state_.step;
    if (now.stop || now.checkpoint || best_now || due(options_.checkpoint_every)) save(folder, hooks);
    if (state_.finished() && (!hooks.validate || state_.validated_step == state_.step)) return true;
    if (now.stop) return false;
    if (!begun_) counted_ = std::chrono::steady_clock::now();
    Begun next = begin_next(folder, hooks);
    settle(folder, hooks);
    ask_for(std::move(next));
    if (!model_.ops.queues()) settle(folder, hooks);
  }
}

}  // namespace kava
