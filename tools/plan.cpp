#include "tools/plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "engine/cli.h"
#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/files/json.h"
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

// Of all tensors, each once.
Count parameters_of(const RunConfig& config, const ModelConfig& m) {
  Count sum;
  const bool all = config.train.trainable == Trainable::all;
  for (const WeightSpec& w : weight_specs(m)) sum.total += w.rows * w.cols, sum.trainable += all ? w.rows * w.cols : 0;
  for (const TrainableSpec& t : trainable_specs(config, m)) {
    if (t.start == TrainableSpec::Start::base) continue;
    sum.total += t.rows * t.cols;
    if (t.name != "new_tokens.weight" || config.latent.tokens == NewTokens::trained) sum.trainable += t.rows * t.cols;
  }
  return sum;
}

nlohmann::ordered_json json_of(const MemoryUse& m) {
  return {{"weights", m.weights},         {"trainables", m.trainables}, {"activations", m.activations},
          {"temporaries", m.temporaries}, {"decoding", m.decoding},     {"total", m.total()}};
}

// The words after the numbers of the lines, by what a key ends in.
const char* unit_of(const std::string& key) {
  const std::pair<const char*, const char*> units[] = {{"parameters.", "values"},
                                                       {"memory.", "bytes"},
                                                       {"worst_batch.samples", "samples"},
                                                       {"worst_batch.rows", "rows"},
                                                       {"worst_batch.", "-"},
                                                       {"flops_per_step", "FLOP"},
                                                       {"steps", "steps"},
                                                       {"disk_bytes", "bytes"},
                                                       {"seconds", "s"},
                                                       {"largest_micro_batch", "samples"}};
  for (const auto& [part, unit] : units)
    if (key.starts_with(part)) return unit;
  return "-";
}

void print_lines(const nlohmann::ordered_json& json, const std::string& prefix) {
  for (const auto& [key, value] : json.items()) {
    if (value.is_object()) print_lines(value, prefix + key + ".");
    else fmt::print("{}  {} {}\n", prefix + key, value.dump(), unit_of(prefix + key));
  }
}

// A positive number with what follows it.
std::optional<std::pair<double, std::string>> number_of(const std::string& text) {
  double x = 0;
  const auto [stop, failed] = std::from_chars(text.data(), text.data() + text.size(), x);
  if (failed != std::errc() || !std::isfinite(x) || x <= 0) return std::nullopt;
  return std::pair(x, std::string(stop, text.data() + text.size()));
}

}  // namespace

std::optional<int64_t> memory_of(const PlanOptions& options) {
  if (!options.memory) return std::nullopt;
  const auto number = number_of(*options.memory);
  const std::string unit = number ? number->second : "";
  const double each = unit == "GB" ? 1e9 : unit == "GiB" ? 0x1p30 : 1;
  if (!number || (each == 1 && !unit.empty()) || number->first * each >= 0x1p62)
    throw Error(Exit::usage, "--memory", "\"" + escaped(*options.memory, 100) + "\" is no amount of memory",
                "give it as 80GB, 16GiB or in bytes");
  return static_cast<int64_t>(number->first * each);
}

std::optional<double> rate_of(const PlanOptions& options) {
  if (!options.rate) return std::nullopt;
  const auto number = number_of(*options.rate);
  if (!number || !number->second.empty())
    throw Error(Exit::usage, "--rate", "\"" + escaped(*options.rate, 100) + "\" is no rate", "give TFLOP/s, such as 400");
  return number->first * 1e12;
}

void print_plan(const PlanOptions& options, const MemoryPlanner& planner, const RunConfig& config, const ModelConfig& shape,
                int64_t available) {
  const std::optional<double> rate = rate_of(options);
  const int64_t asked = planner.asked_micro_batch(), room = memory_of(options).value_or(available);
  const MemoryPlan plan = planner.plan(asked, room);
  const bool fits = plan.total(planner.shared()) <= room;
  const int64_t fitting = fits ? asked : planner.largest_micro_batch(asked - 1, room);
  const double flops = planner.flops_per_step();
  const Count parameters = parameters_of(config, shape);
  nlohmann::ordered_json json = {
      {"parameters", {{"total", parameters.total}, {"trainable", parameters.trainable}}},
      {"memory", {{"device", json_of(plan.device)}, {"host", json_of(plan.host)}}},
      {"worst_batch", {{"samples", plan.samples}, {"rows", plan.rows}, {"stage", plan.stage}}},
      {"flops_per_step", flops},
      {"steps", planner.steps()},
      {"disk_bytes", planner.disk_bytes()},
      {"seconds", rate ? nlohmann::ordered_json(flops * static_cast<double>(planner.steps()) / *rate) : nlohmann::ordered_json()},
      {"fits", fits},
      {"largest_micro_batch", fitting}};
  print_lines(json, "");
  require_printed();
  if (options.json) write_file(*options.json, json.dump(2) + "\n");
  if (fits) return;
  throw memory_refusal(planner, plan, asked, fitting, room);
}

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
  std::string out =
      fmt::format("model       {}: {}, {} layers, hidden {}, {}/{} heads of {}, mlp {}, vocabulary {}, {} head\n", shown_path(text.folder),
                  m.family, m.layers, m.hidden, m.heads, m.kv_heads, m.head_dim, m.mlp, m.vocab, m.tied ? "tied" : "untied");
  if (text.tokenizer) out += fmt::format("tokenizer   {} tokens\n", text.tokenizer->size());
  if (const int64_t positions = m.position_limit(); positions > 0 && positions < config.data.max_tokens)
    out += fmt::format("positions   {}, fewer than data.max_tokens = {}: longer samples are left out\n", positions, config.data.max_tokens);
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

std::string run_summary(const RunConfig& config, const ModelConfig& shape, std::span<const Sample> samples, const LeftOut& left_out) {
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
      "samples     {} ({}{})\n"
      "tokens      question {:.1f}, trace {:.1f}, answer {:.1f} on average; longest sequence {}\n"
      "steps       {} of {} samples, {} a forward; {:.2f} epochs{}",
      n, text_of(left_out, config, shape), config.data.fraction < 1 ? fmt::format("; data.fraction = {}", config.data.fraction) : "",
      question * each, trace * each, answer * each, longest, steps, std::min(config.train.batch, n), std::min(micro, n),
      static_cast<double>(steps) / static_cast<double>(per_epoch), stage_line(config, steps, per_epoch));
}

std::string validation_summary(const RunConfig& config, const ModelConfig& shape, const Validator& valid) {
  return fmt::format("validation  {} rows{} {}", valid.rows(), valid.left_out().all() > 0 ? "; for the losses" : ",",
                     text_of(valid.left_out(), config, shape));
}

}  // namespace kava
