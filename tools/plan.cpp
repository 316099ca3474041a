#include "tools/plan.h"

#include <fmt/format.h>

#include <algorithm>

#include "models/curriculum.h"
#include "models/model.h"
#include "models/trainer.h"

namespace kava {

namespace {

constexpr int64_t kMostListed = 8;

struct Count {
  int64_t total = 0, trainable = 0;
};

// The group of a tensor, by its name in a model folder or an adapter.
std::string group_of(const Architecture& a, const std::string& name) {
  if (name.find(".lora_") != std::string::npos) return "lora";
  const std::pair<const char*, const char*> own[] = {
      {"new_tokens", "new tokens"}, {"latent_projection", "latent projection"}, {"kv_projection", "kv projection"}};
  for (const auto& [part, group] : own)
    if (name.starts_with(part)) return group;
  if (name == kHeadName) return "head";
  if (name == a.prefix + a.embedding + ".weight") return "embedding";
  if (!a.rotary() && name == a.prefix + a.positions + ".weight") return "positions";
  for (std::size_t g = 0; g < kMapGroups; ++g)
    for (const LinearSpec& map : a.maps[g])
      if (name.find("." + map.path + ".") != std::string::npos) return g <= kAttentionOut ? "attention" : "mlp";
  return "norms";
}

// The stages of a run with the steps before which each ends.
std::string stage_line(const RunConfig& config, int64_t steps, int64_t steps_per_epoch) {
  if (!recipe_of(config).has_stages()) return "";
  const Curriculum curriculum(config, steps_per_epoch);
  std::string out = "\nstages     ";
  int64_t listed = 0;
  for (int64_t step = 1; step <= steps; ++step) {
    const int64_t stage = curriculum.stage(step - 1);
    if (step < steps && curriculum.stage(step) == stage) continue;
    if (++listed <= kMostListed || step == steps) out += fmt::format(" {} to step {}{}", stage, step, step < steps ? "," : "");
    else if (listed == kMostListed + 1) out += " ...";
  }
  return out;
}

}  // namespace

std::string parameter_table(const RunConfig& config, const TextModel& text) {
  const ModelConfig& m = text.shape;
  std::vector<std::pair<std::string, Count>> groups;
  auto count = [&](const std::string& name, int64_t elements, bool total, bool trainable) {
    const std::string group = group_of(m.architecture(), name);
    auto it = std::ranges::find(groups, group, &std::pair<std::string, Count>::first);
    if (it == groups.end()) it = groups.insert(groups.end(), {group, {}});
    if (total) it->second.total += elements;
    if (trainable) it->second.trainable += elements;
  };
  const bool all = config.train.trainable == Trainable::all;
  for (const WeightSpec& w : weight_specs(m)) count(w.name, w.rows * w.cols, true, all);
  for (const TrainableSpec& t : trainable_specs(config, m))
    if (t.start != TrainableSpec::Start::base)
      count(t.name, t.rows * t.cols, true, t.name != "new_tokens.weight" || config.latent.tokens == NewTokens::trained);
  std::string out = fmt::format("model       {}: {}, {} layers, hidden {}, {}/{} heads of {}, mlp {}, vocabulary {}, {} head\n",
                                escaped(text.folder, 4096), m.family, m.layers, m.hidden, m.heads, m.kv_heads, m.head_dim, m.mlp, m.vocab,
                                m.tied ? "tied" : "untied");
  if (text.tokenizer) out += fmt::format("tokenizer   {} tokens\n", text.tokenizer->size());
  out += fmt::format("method      {}, {}, trainable = {}\n", name_of(config.method), name_of(config.model.dtype),
                     name_of(config.train.trainable));
  out += fmt::format("{:<20}{:>16}{:>16}\n", "parameters", "total", "trainable");
  Count sum;
  for (const auto& [group, c] : groups) {
    out += fmt::format("  {:<18}{:>16}{:>16}\n", group, c.total, c.trainable);
    sum.total += c.total, sum.trainable += c.trainable;
  }
  return out + fmt::format("  {:<18}{:>16}{:>16}\n", "all", sum.total, sum.trainable);
}

std::string run_summary(const RunConfig& config, std::span<const Sample> samples, int64_t dropped) {
  const int64_t n = static_cast<int64_t>(samples.size()), steps = total_steps(config.train, n);
  double question = 0, trace = 0, answer = 0;
  int64_t longest = 0;
  for (const Sample& s : samples) {
    question += static_cast<double>(s.question.size()), trace += static_cast<double>(s.trace.size());
    answer += static_cast<double>(s.answer.size());
    longest = std::max(longest, longest_sequence(config, s));
  }
  const double each = 1 / static_cast<double>(n);
  const int64_t per_epoch = (n + config.train.batch - 1) / config.train.batch;
  const int64_t micro = config.train.micro_batch > 0 ? config.train.micro_batch : config.train.batch;
  return fmt::format(
      "samples     {} ({} left out: over data.max_tokens = {}, or by data.answers)\n"
      "tokens      question {:.1f}, trace {:.1f}, answer {:.1f} on average; longest sequence {}\n"
      "steps       {} of {} samples, {} a forward; {:.2f} epochs{}",
      n, dropped, config.data.max_tokens, question * each, trace * each, answer * each, longest, steps, std::min(config.train.batch, n),
      std::min(micro, n), static_cast<double>(steps) / static_cast<double>(per_epoch), stage_line(config, steps, per_epoch));
}

}  // namespace kava
