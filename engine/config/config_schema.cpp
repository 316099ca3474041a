#include "engine/config/config_schema.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <limits>

#include "engine/config/architecture.h"

namespace kava::schema {

namespace {

template <class E>
Choice choice(E& value) {
  return {&names_of(E{}), [&value] { return static_cast<std::size_t>(value); }, [&value](std::size_t i) { value = static_cast<E>(i); }};
}

constexpr int64_t kManySteps = 1'000'000'000;
constexpr int64_t kMostStages = 1'000'000;
constexpr Interval kFraction{0, 1};
constexpr Interval kWeight{0, 1e6};
constexpr Interval kPositive{0, 1e30, true};

template <class... Cases>
struct Visit : Cases... {
  using Cases::operator()...;
};
template <class... Cases>
Visit(Cases...) -> Visit<Cases...>;

}  // namespace

std::vector<Key> keys_of(RunConfig& c) {
  constexpr OnResume kContent = OnResume::content, kExtend = OnResume::extend, kFree = OnResume::free;
  return {
      {"method", choice(c.method)},
      {"seed", Whole{&c.seed, 0, std::numeric_limits<int64_t>::max()}},

      {"model.path", Text{&c.model.path, true}, kContent},
      {"model.init", choice(c.model.init)},
      {"model.adapter", Text{&c.model.adapter, true}, kContent},
      {"model.dtype", choice(c.model.dtype)},
      {"model.dropout", choice(c.model.dropout)},

      {"data.train", Files{&c.data.train}, kContent},
      {"data.valid", Text{&c.data.valid, true}, kContent},
      {"data.drop_last_step", Flag{&c.data.drop_last_step}},
      {"data.step_separator", Text{&c.data.step_separator}},
      {"data.answer_prompt", Text{&c.data.answer_prompt}},
      {"data.question_prefix", Text{&c.data.question_prefix}},
      {"data.question_suffix", Text{&c.data.question_suffix}},
      {"data.trace_prefix", Text{&c.data.trace_prefix}},
      {"data.trace_suffix", Text{&c.data.trace_suffix}},
      {"data.step_suffix", Text{&c.data.step_suffix}},
      {"data.answer_prefix", Text{&c.data.answer_prefix}},
      {"data.answer_suffix", Text{&c.data.answer_suffix}},
      {"data.answer_commas", choice(c.data.answer_commas)},
      {"data.separator", choice(c.data.separator)},
      {"data.answers", choice(c.data.answers)},
      {"data.max_tokens", Whole{&c.data.max_tokens, 1, 1'048'576}},
      {"data.fraction", Real{&c.data.fraction, {0, 1, true}}},

      {"train.trainable", choice(c.train.trainable)},
      {"train.epochs", Whole{&c.train.epochs, 1, 1'000'000}, kExtend},
      {"train.max_steps", Whole{&c.train.max_steps, 0, kManySteps}, kExtend},
      {"train.batch", Whole{&c.train.batch, 1, 1'048'576}},
      {"train.micro_batch", Whole{&c.train.micro_batch, 0, 1'048'576}, kExtend},
      {"train.optimizer", choice(c.train.optimizer)},
      {"train.lr", Real{&c.train.lr, {0, 1e30}}},
      {"train.betas", Pair{&c.train.betas, {0, 1, false, true}}},
      {"train.eps", Real{&c.train.eps, {1e-30, 1}}},
      {"train.weight_decay", Real{&c.train.weight_decay, kWeight}},
      {"train.clip", Real{&c.train.clip, kPositive}},
      {"train.schedule", choice(c.train.schedule)},
      {"train.warmup", Real{&c.train.warmup, kFraction}},
      {"train.log_every", Whole{&c.train.log_every, 1, kManySteps}, kFree},
      {"train.valid_every", Whole{&c.train.valid_every, 0, kManySteps}, kFree},
      {"train.checkpoint_every", Whole{&c.train.checkpoint_every, 0, kManySteps}, kFree},
      {"train.keep_checkpoints", Whole{&c.train.keep_checkpoints, 1, 1'000'000}, kFree},
      {"train.recompute", choice(c.train.recompute), kFree},
      {"train.max_hours", Real{&c.train.max_hours, {0, 1e6}}, kFree},
      {"train.log_grads_every", Whole{&c.train.log_grads_every, 0, kManySteps}, kFree},

      {"valid.floor", Real{&c.valid.floor, kFraction}, kFree},

      {"lora.rank", Whole{&c.lora.rank, 1, 65'536}},
      {"lora.alpha", Real{&c.lora.alpha, kWeight}},
      {"lora.dropout", Real{&c.lora.dropout, {0, 1, false, true}}},
      {"lora.targets", Targets{&c.lora.targets}},

      {"latent.count", Whole{&c.latent.count, 1, 4096}},
      {"latent.iterations", Whole{&c.latent.iterations, 0, 4096}},
      {"latent.projection", Flag{&c.latent.projection}},
      {"latent.projection_init", choice(c.latent.projection_init)},
      {"latent.update", choice(c.latent.update)},
      {"latent.token_init", Text{&c.latent.token_init}},
      {"latent.tokens", choice(c.latent.tokens)},

      {"rkv.policy", choice(c.rkv.policy)},
      {"rkv.lambda", Real{&c.rkv.lambda, kFraction}},
      {"rkv.group", choice(c.rkv.group)},
      {"rkv.queries", choice(c.rkv.queries)},
      {"rkv.order", choice(c.rkv.order)},
      {"rkv.short", choice(c.rkv.short_)},

      {"kv.weight", Real{&c.kv.weight, kWeight}},
      {"kv.reduction", choice(c.kv.reduction)},
      {"kv.loss", choice(c.kv.loss)},
      {"kv.std", choice(c.kv.std)},
      {"kv.keys", choice(c.kv.keys)},
      {"kv.projection", Flag{&c.kv.projection}},

      {"codi.weight", Real{&c.codi.weight, kWeight}},
      {"codi.loss", choice(c.codi.loss)},
      {"codi.std", choice(c.codi.std)},
      {"codi.states", choice(c.codi.states)},
      {"codi.token", choice(c.codi.token)},
      {"codi.mse_std", Whole{&c.codi.mse_std, 1, 2}},
      {"codi.target", choice(c.codi.target)},

      {"loss.student", Real{&c.loss.student, kWeight}},
      {"loss.teacher", Real{&c.loss.teacher, kWeight}},
      {"loss.mean", choice(c.loss.mean)},

      {"stages.fixed", Whole{&c.stages.fixed, -1, kMostStages}},
      {"stages.first", Whole{&c.stages.first, 0, kMostStages}},
      {"stages.last", Whole{&c.stages.last, -1, kMostStages}},
      {"stages.hold", Whole{&c.stages.hold, 0, kMostStages}},
      {"stages.epochs", Whole{&c.stages.epochs, 1, kMostStages}},
      {"stages.steps", Whole{&c.stages.steps, 0, kMostStages}},
      {"stages.mix", Real{&c.stages.mix, kFraction}},
      {"stages.reset_optimizer", choice(c.stages.reset_optimizer)},
      {"stages.best", choice(c.stages.best)},

      {"coconut.thoughts", Whole{&c.coconut.thoughts, 0, 64}},
      {"coconut.max_stage", Whole{&c.coconut.max_stage, 0, 1024}},
      {"coconut.pad_to_max", Flag{&c.coconut.pad_to_max}},
      {"coconut.markers", Flag{&c.coconut.markers}},
      {"coconut.feedback", choice(c.coconut.feedback)},

      {"icot.remove_per_epoch", Real{&c.icot.remove_per_epoch, {0, 1e6, true}}},
      {"icot.remove_all_from", Whole{&c.icot.remove_all_from, 0, kMostStages}},
      {"icot.smoothing", Real{&c.icot.smoothing, kWeight}},
      {"icot.side", choice(c.icot.side)},
      {"icot.keep_positions", Flag{&c.icot.keep_positions}},

      {"decode.prompt", choice(c.decode.prompt)},
      {"decode.max_new_tokens", Whole{&c.decode.max_new_tokens, 0, 65'536}},

      {"step.prefix_sharing", Flag{&c.step.prefix_sharing}},
      {"step.prune_latents", Flag{&c.step.prune_latents}},
  };
}

const std::vector<std::string>& lora_linears() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all;
    for (const Architecture& a : architectures())
      for (const std::string& name : a.target_names())
        if (std::ranges::find(all, name) == all.end()) all.push_back(name);
    return all;
  }();
  return names;
}

std::string real_text(double value) {
  std::string text = fmt::format("{}", value);
  if (text.find_first_of(".e") == std::string::npos) text += ".0";
  return text;
}

std::string toml_string(std::string_view text) {
  std::string out = "\"";
  for (char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') out += '\\', out += c;
    else if (c == '\n') out += "\\n";
    else if (c == '\t') out += "\\t";
    else if (byte < 0x20 || byte == 0x7F) out += fmt::format("\\u{:04X}", byte);
    else out += c;
  }
  return out + '"';
}

std::string Interval::text() const {
  std::string out = fmt::format("{:g} to {:g}", least, most);
  if (without_least) out += fmt::format(", without {:g}", least);
  if (without_most) out += fmt::format(", without {:g}", most);
  return out;
}

std::string value_text(const Key& key) {
  auto list = [](const auto& values, auto text) {
    std::vector<std::string> parts;
    for (const auto& v : values) parts.push_back(text(v));
    return fmt::format("[{}]", fmt::join(parts, ", "));
  };
  return std::visit(Visit{
                        [](const Whole& f) { return fmt::format("{}", *f.value); },
                        [](const Real& f) { return real_text(*f.value); },
                        [&](const Pair& f) { return list(*f.value, real_text); },
                        [](const Flag& f) { return std::string(*f.value ? "true" : "false"); },
                        [](const Text& f) { return toml_string(*f.value); },
                        [](const Choice& f) { return toml_string(f.words->at(f.get())); },
                        [&](const Files& f) {
                          return list(*f.value, [](const DataFile& file) {
                            return file.format ? fmt::format("{{ path = {}, format = {} }}", toml_string(file.path),
                                                             toml_string(name_of(*file.format)))
                                               : toml_string(file.path);
                          });
                        },
                        [&](const Targets& f) { return list(*f.value, [](const std::string& s) { return toml_string(s); }); },
                    },
                    key.field);
}

std::string range_text(const Key& key) {
  return std::visit(
      Visit{
          [](const Whole& f) { return fmt::format("{} to {}", f.least, f.most); },
          [](const Real& f) { return f.range.text(); },
          [](const Pair& f) { return "two numbers, each " + f.range.text(); },
          [](const Flag&) { return std::string("true | false"); },
          [](const Text& f) { return std::string(f.is_path ? "a path" : "any text"); },
          [](const Choice& f) { return fmt::format("{}", fmt::join(*f.words, " | ")); },
          [](const Files&) { return fmt::format("paths, or {{path, format}} with format {}", fmt::join(names_of(DataFormat{}), " | ")); },
          [](const Targets&) { return fmt::format("some of {}", fmt::join(lora_linears(), ", ")); },
      },
      key.field);
}

}  // namespace kava::schema
