#include "tools/resume.h"

#include <fmt/core.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

#include "engine/config/config_files.h"
#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/files/paths.h"
#include "models/footprint.h"
#include "models/run_folder.h"
#include "tools/say.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

[[noreturn]] void nothing_to_resume(const fs::path& out, const std::string& what, const std::string& remedy = "choose another --out") {
  throw Error(Exit::data, shown_path(out), "holds no valid checkpoint to resume" + what, remedy);
}

[[noreturn]] void refuse_changes(const fs::path& where, const std::vector<std::string>& changes, const std::string& remedy) {
  throw Error(Exit::usage, shown_path(where), fmt::format("the configuration has changed: {}", fmt::join(changes, ", ")), remedy);
}

// What an older version did not record in its checkpoints.
void complete(TrainingState& state, const RunConfig& before) {
  state.max_steps = before.train.max_steps, state.epochs = before.train.epochs;
  state.micro_batch = before.train.micro_batch > 0 ? before.train.micro_batch : before.train.batch;
  for (std::size_t i = 0; i < state.data.size(); ++i) {
    const bool valid = !before.data.valid.empty() && i + 1 == state.data.size();
    state.data[i].key = valid ? "data.valid" : "data.train";
  }
}

void tell_beginning(const fs::path& out) { say(shown_path(out) + " never had a checkpoint: beginning at step 0"); }

// With nothing in it but what killed writers left, which goes away once the folder is locked.
bool is_bare(const fs::path& out) {
  std::error_code failed;
  for (fs::directory_iterator entry(out, failed); !failed && entry != fs::directory_iterator(); entry.increment(failed))
    if (entry->path().extension() != ".part") return false;
  return !failed;
}

bool becomes_longer(const TrainingState& state, const RunConfig::Train& train) {
  if (train.max_steps > 0) return train.max_steps > state.total_steps;
  return state.max_steps == 0 && train.epochs > state.epochs;
}

// Steps of the warm-up of the longer run, in which a rate that is constant later is not.
int64_t warmup_of(const TrainingState& state, const RunConfig::Train& train) {
  const double steps = train.max_steps > 0
                           ? static_cast<double>(train.max_steps)
                           : static_cast<double>(state.total_steps) / static_cast<double>(state.epochs) * static_cast<double>(train.epochs);
  return static_cast<int64_t>(std::ceil(train.warmup * steps));
}

}  // namespace

bool same_inputs(const RunConfig& a, const RunConfig& b) {
  const auto same_file = [](const DataFile& x, const DataFile& y) { return same_path(x.path, y.path); };
  return same_path(a.model.path, b.model.path) && same_path(a.model.adapter, b.model.adapter) && same_path(a.data.valid, b.data.valid) &&
         std::ranges::equal(a.data.train, b.data.train, same_file);
}

RunConfig with_inputs_there(RunConfig config, const RunConfig& before) {
  const auto there = [](const std::string& path) { return path.empty() || is_there(path); };
  if (!there(config.model.path)) config.model.path = before.model.path;
  if (!there(config.model.adapter)) config.model.adapter = before.model.adapter;
  if (!there(config.data.valid)) config.data.valid = before.data.valid;
  if (!std::ranges::all_of(config.data.train, [&](const DataFile& f) { return there(f.path); })) config.data.train = before.data.train;
  return config;
}

void require_place(const fs::path& out, bool resume) {
  std::error_code ignored;
  if (resume && !fs::is_directory(out, ignored)) nothing_to_resume(out, ": there is no such folder", "start the run without --resume");
  require_usable(out);
  // The lock makes a folder that is not there: behind it this one looks like a new one, of which nothing is told.
  if (!resume && is_bare(out)) tell_beginning(out);
}

std::optional<Checkpoint> checkpoint_to_begin_from(const fs::path& out, bool resume) {
  const FolderState found = state_of(out);
  if (found == FolderState::saved) {
    std::vector<std::string> skipped;
    std::optional<Checkpoint> checkpoint = newest_valid_checkpoint(out, &skipped);
    if (checkpoint && !resume)
      throw Error(Exit::usage, "--out " + shown_path(out), "holds a run", "add --resume, or choose another folder");
    for (const std::string& line : skipped) say("skipped " + line);
    if (!checkpoint) nothing_to_resume(out, "");
    return checkpoint;
  }
  if (found == FolderState::foreign && !resume)
    throw Error(Exit::usage, "--out " + shown_path(out), "holds a run without a checkpoint, and files that are not its own",
                "remove them or the run, or choose another folder");
  if (resume && found != FolderState::never_saved) nothing_to_resume(out, ", and files that are not those of a run");
  if (found == FolderState::never_saved && (resume || !is_bare(out))) tell_beginning(out);
  return std::nullopt;
}

Continued go_on(const fs::path& out, const Checkpoint& checkpoint, const RunConfig& given, bool extend, int ranks) {
  Continued c{load_training_state(checkpoint.path), given, given, {}, {}};
  const fs::path told = out / "config.toml";
  const bool is_told = is_there(told);
  if (is_told) c.before = load_run_config(out.string());
  // The default of lora.targets goes by the model, which need not be there any more.
  if (!is_there(given.model.path) && given.lora.targets == RunConfig().lora.targets) c.config.lora.targets = c.before.lora.targets;
  const RunConfig config = c.config;
  if (c.state.older) {
    if (!is_told)
      throw Error(Exit::data, shown_path(out), "was trained by an older version, and its config.toml is not there",
                  "train into another --out");
    complete(c.state, c.before);
  }
  TrainingState& state = c.state;
  if (state.step != checkpoint.manifest.step)
    throw Error(Exit::data, shown_path(checkpoint.path),
                fmt::format("is that of step {}, and its state.json says {}", checkpoint.manifest.step, state.step),
                "use another checkpoint");
  if (state.max_steps != config.train.max_steps)
    c.length.push_back(fmt::format("train.max_steps: {} -> {}", state.max_steps, config.train.max_steps));
  if (state.epochs != config.train.epochs) c.length.push_back(fmt::format("train.epochs: {} -> {}", state.epochs, config.train.epochs));
  std::vector<std::string> parts;
  int64_t& micro = c.config.train.micro_batch;
  if (micro == 0) micro = c.before.train.micro_batch == 0 ? state.micro_batch : forward_samples(config, config.train.batch, ranks);
  if (micro != state.micro_batch) parts.push_back(fmt::format("train.micro_batch: {} -> {}", state.micro_batch, micro));

  std::vector<std::string> extensions = c.length;
  extensions.insert(extensions.end(), parts.begin(), parts.end());
  const fs::path where = is_told ? told : checkpoint.path;
  if (std::vector<std::string> changes = config_differences(c.before, config); !changes.empty()) {
    changes.insert(changes.end(), extensions.begin(), extensions.end());
    refuse_changes(where, changes, "restore it, or train into another --out");
  }
  if (!state.older && checkpoint.manifest.config_hash != config_hash(config))
    throw Error(Exit::usage, shown_path(checkpoint.path), "was written with another configuration",
                "restore it, or train into another --out");
  const bool only_longer = parts.empty() && config.train.schedule == Schedule::constant && becomes_longer(state, config.train) &&
                           state.step >= warmup_of(state, config.train);
  if (!extensions.empty() && !extend && !only_longer)
    refuse_changes(where, extensions, "add --extend to go on with it, restore it, or train into another --out");
  if (!parts.empty())
    c.notes.push_back(
        fmt::format("extended: {}; from step {} on the standard deviations of the distillation losses are those of such parts "
                    "of a batch",
                    parts[0], state.step));
  return c;
}

void require_contents_there(const RunConfig& config) {
  auto require = [](const char* key, const std::string& path) {
    if (std::error_code ignored; !path.empty() && !fs::exists(path, ignored))
      throw Error(Exit::data, shown_path(path), "is not there", fmt::format("name it where it lies now with --set {}=...", key));
  };
  require("model.path", config.model.path);
  for (const DataFile& file : config.data.train) require("data.train", file.path);
  require("data.valid", config.data.valid);
}

void require_out_is_no_input(const fs::path& out, const std::string& file, const RunConfig& config, bool resume) {
  const std::string told = (out / "config.toml").string();
  std::error_code failed;
  auto refuse = [&](const std::string& path) {
    throw Error(Exit::usage, "--out " + shown_path(out), "would write over " + shown_path(path) + ", which is read",
                "choose another folder");
  };
  // The run's own file may be given as its configuration, and one that a user has written there only where a run goes on.
  const bool own = fs::equivalent(file, told, failed) || (is_there(told) && fs::equivalent(file, out, failed));
  if (own && (!resume || state_of(out) == FolderState::never_saved) &&
      read_file(told, std::size_t{1} << 20) != to_toml(load_run_config(out.string()), out))
    refuse(told);
  if (fs::is_regular_file(out, failed) && fs::equivalent(file, out, failed)) refuse(file);
  std::vector<std::string> inputs;
  const bool run = fs::is_directory(file, failed);  // that is gone on with
  for (const std::string& input : run ? contents_of(config) : inputs_of(file, config))
    if (!same_path(input, file)) inputs.push_back(input);
  const fs::path folder = fs::weakly_canonical(out, failed);
  for (const std::string& input : inputs) {
    if (input.empty()) continue;
    const fs::path relative = fs::weakly_canonical(input, failed).lexically_relative(folder);
    const std::string first = relative.empty() ? ".." : relative.begin()->string();
    if (first == "." || first == "adapter" || first == "checkpoints" || first == "log") refuse(input);
    for (const char* name : {"config.toml", "metrics.jsonl", "progress.json"})
      if (fs::equivalent(input, out / name, failed)) refuse(input);
  }
}

}  // namespace kava
