#include "tools/inspect_step.h"

#include <fmt/core.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <span>

#include "engine/cli.h"
#include "engine/config/config_files.h"
#include "engine/device/cuda_module.h"
#include "engine/files/files.h"
#include "engine/files/hub.h"
#include "engine/files/paths.h"
#include "engine/files/safetensors.h"
#include "engine/memory.h"
#include "models/adapter.h"
#include "models/curriculum.h"
#include "models/footprint.h"
#include "models/kava.h"
#include "models/text.h"
#include "models/traces.h"
#include "models/train_samples.h"
#include "tools/command.h"
#include "tools/device.h"

namespace kava {

namespace {

struct StepCommand {
  std::string config, adapter, out;
  std::vector<std::string> sets;
  DeviceOptions device;
};

// Of the trace, with stages, what is left.
void add_ids(Dump& dump, const Recipe& recipe, std::span<const Sample> samples) {
  const std::pair<const char*, std::vector<int32_t> Sample::*> parts[] = {
      {"ids.question", &Sample::question}, {"ids.trace", &Sample::trace}, {"ids.answer", &Sample::answer}};
  for (const auto& [name, part] : parts) {
    DumpTensor ids, offsets;
    ids.is_index = offsets.is_index = true;
    offsets.indices.push_back(0);
    for (std::size_t i = 0; i < samples.size(); ++i) {
      const Sample& s = samples[i];
      const bool cuts = recipe.has_stages() && part == &Sample::trace;
      const Cut cut = cuts ? cut_of(recipe, s, static_cast<int64_t>(i)) : Cut{};
      const auto begin = (s.*part).begin() + cut.begin, end = cuts ? (s.*part).begin() + cut.end : (s.*part).end();
      ids.indices.insert(ids.indices.end(), begin, end);
      offsets.indices.push_back(static_cast<int32_t>(ids.indices.size()));
    }
    ids.shape = {static_cast<int64_t>(ids.indices.size())}, offsets.shape = {static_cast<int64_t>(offsets.indices.size())};
    dump[name] = std::move(ids), dump[std::string(name) + "_offsets"] = std::move(offsets);
  }
}

void add_losses(Dump& dump, const StepLosses& losses, const RunConfig& config) {
  const std::pair<const char*, double> all[] = {{"loss.total", losses.total(config)},
                                                {"loss.student_ce", losses.student_ce},
                                                {"loss.teacher_ce", losses.teacher_ce},
                                                {"loss.kv", losses.kv},
                                                {"loss.codi", losses.codi}};
  for (const auto& [name, value] : all) {
    DumpTensor t;
    t.shape = {1}, t.values = {value};
    dump[name] = std::move(t);
  }
}

void add_gradients(Dump& dump, const Model& model) {
  for (const Parameter& p : model.parameters.all()) {
    if (p.name == "new_tokens.weight" && !model.dnew_tokens) continue;  // frozen
    DumpTensor t;
    t.shape = p.file_shape();
    t.values = model.parameters.get_as_stored(p, p.grad);
    dump["grad." + p.name] = std::move(t);
  }
}

void write_dump(const std::string& path, const Dump& dump, bool f64) {
  std::vector<std::vector<float>> narrow;
  narrow.reserve(dump.size());
  std::vector<TensorOut> tensors;
  for (const auto& [name, t] : dump) {
    if (t.is_index) tensors.push_back({name, "I32", t.shape, t.indices.data()});
    else if (f64) tensors.push_back({name, "F64", t.shape, t.values.data()});
    else tensors.push_back({name, "F32", t.shape, narrow.emplace_back(t.values.begin(), t.values.end()).data()});
  }
  write_safetensors(path, tensors);
}

// The losses, logits and gradients that hold a number that is not finite: the first three, and how many more.
std::string not_finite(const Dump& dump) {
  std::vector<std::string> names;
  for (const auto& [name, t] : dump) {
    if (!name.starts_with("loss.") && !name.starts_with("grad.") && !name.starts_with("logits")) continue;
    if (!std::ranges::all_of(t.values, [](double x) { return std::isfinite(x); })) names.push_back(name);
  }
  const std::size_t more = names.size() - std::min<std::size_t>(3, names.size());
  names.resize(names.size() - more);
  return fmt::format("{}{}", fmt::join(names, ", "), more > 0 ? fmt::format(" and {} more", more) : "");
}

int inspect_step(const StepCommand& command) {
  RunConfig config = load_config(command.config, command.sets);
  require_for_training(config, command.config);
  if (!command.adapter.empty()) config.model.adapter = model_folder(command.adapter);
  const std::unique_ptr<Ops> ops = make_ops(command.device);
  require_no_input("--out", command.out, inputs_of(command.config, config));
  require_writable("--out", command.out);
  const TextModel text = open_text_model(config.model.path);
  text.shape.require_for_training(config.model.dropout);
  if (!text.note.empty()) print_note(text.note);
  auto [samples, files, left_out] = read_train_samples(text, config);
  require_samples(config, text.shape, config.data.train[0].path, samples, left_out);
  const std::string fewer = text_of(left_out, config, text.shape);
  if (left_out.all() > 0) print_note("rows " + fewer);
  if (const std::string note = require_traces(config, files, samples); !note.empty()) print_note(note);
  if (static_cast<int64_t>(samples.size()) > config.train.batch) samples.resize(static_cast<std::size_t>(config.train.batch));

  RunConfig one = config;
  one.train.max_steps = 1, one.train.micro_batch = config.train.micro_batch > 0 ? config.train.micro_batch : std::ssize(samples);
  require_memory(MemoryPlanner(*ops, one, text.shape, samples, nullptr, 1), one, text.shape, free_memory(*ops), uncertain_memory());
  Model model(*ops, config, text.shape, config.model.adapter.empty() ? Values::start : Values::loaded);
  if (!config.model.adapter.empty()) load_adapter(model, config.model.adapter);
  Arena arena(*ops);
  const int64_t micro = config.train.micro_batch > 0 ? config.train.micro_batch : static_cast<int64_t>(samples.size());
  const Recipe recipe = Curriculum(config, 1).recipe(0);
  const BatchTotals totals = batch_totals(config, recipe, samples, micro);
  const std::vector<BatchTotals> forwards = totals_of_forwards(config, recipe, totals, samples, micro);
  Dump dump;
  StepLosses losses;
  model.parameters.zero_grad();
  const std::span<const Sample> all(samples);
  for (int64_t first = 0; first < static_cast<int64_t>(all.size()); first += micro) {
    Dump piece;
    StepOptions options;
    options.recipe = recipe, options.first_index = first, options.dump = &piece;
    const auto count = std::min(static_cast<std::size_t>(micro), all.size() - static_cast<std::size_t>(first));
    losses += run_step(model, arena, all.subspan(static_cast<std::size_t>(first), count), forwards[static_cast<std::size_t>(first / micro)],
                       options);
    join(dump, piece);
  }
  add_ids(dump, recipe, samples);
  add_losses(dump, losses, config);
  add_gradients(dump, model);
  if (const std::string names = not_finite(dump); !names.empty()) print_note("not finite: " + names);
  fmt::print("{}: {} samples ({}), loss {:.9g}: student_ce {:.9g}, teacher_ce {:.9g}, kv {:.9g}, codi {:.9g}\n", shown_path(command.out),
             samples.size(), fewer, losses.total(config), losses.student_ce, losses.teacher_ce, losses.kv, losses.codi);
  require_printed();
  write_dump(command.out, dump, config.model.dtype == StorageType::f64);
  return 0;
}

}  // namespace

void add_step_command(CLI::App& app, std::function<int()>& chosen) {
  auto command = std::make_shared<StepCommand>();
  CLI::App* step =
      app.add_subcommand("step", "Run one batch without an update and write out everything: losses, logits, targets, gradients");
  step->footer(
      "Example (after tools/quickstart.sh):\n  kava_inspect step configs/quickstart.toml --set train.batch=4 --out runs/step.safetensors\n"
      "Keys and their values: --keys, and docs/configuration.md.");
  step->add_option("CONFIG", command->config, "The run's configuration (TOML)")->required();
  step->add_option("--adapter", command->adapter, "Start from this adapter folder");
  add_set_option(*step, command->sets);
  step->add_option("--out", command->out, "The safetensors file to write")->required();
  add_device_options(*step, command->device);
  step->callback([command, &chosen] { chosen = [command] { return inspect_step(*command); }; });
}

}  // namespace kava
