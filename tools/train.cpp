#include "tools/train.h"

#include <fmt/core.h>

#include <cstdio>
#include <filesystem>

#include "engine/cli.h"
#include "engine/memory.h"
#include "models/adapter.h"
#include "models/footprint.h"
#include "models/run_folder.h"
#include "models/text.h"
#include "models/trainer.h"
#include "models/validation.h"
#include "tools/plan.h"
#include "tools/progress.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

void say(const std::string& text) {
  std::fputs((text + "\n").c_str(), stdout);
  std::fflush(stdout);
}

[[noreturn]] void refuse_resume(const fs::path& out, const std::string& what) {
  throw Error(Exit::data, escaped(out.string(), 4096), what, "start the run without --resume");
}

// The checkpoint to go on from. A changed configuration is refused before anything is read.
Checkpoint checkpoint_to_resume(const fs::path& out, const RunConfig& config) {
  std::error_code ignored;
  if (!fs::is_directory(out, ignored)) refuse_resume(out, "holds no valid checkpoint to resume: there is no such folder");
  const std::string told = (out / "config.toml").string();
  if (fs::exists(told, ignored)) {
    std::string changes;
    for (const std::string& line : config_differences(load_config(told), config)) changes += (changes.empty() ? "" : ", ") + line;
    if (!changes.empty())
      throw Error(Exit::usage, escaped(told, 4096), "the configuration has changed: " + changes, "restore it, or train into another --out");
  }
  std::vector<std::string> skipped;
  std::optional<Checkpoint> checkpoint = newest_valid_checkpoint(out, &skipped);
  for (const std::string& line : skipped) say("skipped " + line);
  if (!checkpoint) refuse_resume(out, "holds no valid checkpoint to resume");
  if (checkpoint->manifest.config_hash != config_hash(config))
    throw Error(Exit::usage, escaped(checkpoint->path.string(), 4096), "was written with another configuration",
                "restore it, or train into another --out");
  return *checkpoint;
}

void require_same_data(const std::vector<DataDigest>& before, const std::vector<DataDigest>& now) {
  for (std::size_t i = 0; i < now.size(); ++i)
    if (i >= before.size() || before[i].sha256 != now[i].sha256)
      throw Error(Exit::data, escaped(now[i].path, 4096), "has changed since the run began",
                  "restore the file, or train into another --out");
}

// What a run reads before its model.
struct RunData {
  std::vector<Sample> train;
  std::optional<Validator> valid;
  std::vector<DataDigest> digests;
  int64_t dropped = 0;
};

RunData read_data(const TextModel& text, const RunConfig& config) {
  RunData data;
  {
    const std::vector<RowFile> files = read_train_files(config);
    data.train = read_samples(text, config, files, &data.dropped);
    for (const RowFile& f : files) data.digests.push_back({f.path, f.sha256});
  }
  if (data.train.empty())
    throw Error(Exit::data, escaped(config.data.train[0].path, 4096),
                fmt::format("no row is left: all {} are longer than data.max_tokens", data.dropped), "raise data.max_tokens");
  if (!config.data.valid.empty()) {
    data.valid.emplace(text, config);
    data.digests.push_back(data.valid->digest());
  }
  return data;
}

class Run {
 public:
  Run(const TrainCommand& command, RunConfig config, std::unique_ptr<Ops> ops)
      : command_(command),
        config_(std::move(config)),
        ops_(std::move(ops)),
        out_(command.out ? fs::path(*command.out) : fs::path("runs") / fs::path(command.config).stem()) {}

  int run() {
    TrainingState state;
    std::optional<Checkpoint> from;
    if (command_.resume) {
      from = checkpoint_to_resume(out_, config_);
      state = load_training_state(from->path);
      if (state.finished() && (config_.data.valid.empty() || state.validated_step == state.step)) return already_finished(*from, state);
      say(fmt::format("resuming {} from step {} of {}", escaped(out_.string(), 4096), state.step, state.total_steps));
    } else {
      if (holds_run(out_))
        throw Error(Exit::usage, "--out " + escaped(out_.string(), 4096), "holds a run", "add --resume, or choose another folder");
      require_usable(out_);
    }
    text_ = open_text_model(config_.model.path);
    data_ = read_data(text_, config_);
    if (from) require_same_data(state.data, data_.digests);
    state.data = data_.digests;
    say(parameter_table(config_, text_) + run_summary(config_, data_.train, data_.dropped));
    if (data_.valid) say(fmt::format("validation  {} rows, {} of them over data.max_tokens", data_.valid->rows(), data_.valid->dropped()));
    require_memory(config_, text_.shape, data_.train, available_memory());

    Model model(*ops_, config_, text_.shape);
    if (from) {
      if (state.base != model.base_digest)
        throw Error(Exit::data, escaped(config_.model.path, 4096), "has changed since the run began", "restore the model's folder");
      load_optimizer(model, from->path);
    } else if (!config_.model.adapter.empty()) {
      load_adapter(model, config_.model.adapter);
    }
    state.base = model.base_digest;
    return train(model, std::move(state));
  }

 private:
  int train(Model& model, TrainingState state) {
    RunFolder folder(out_);
    folder.open(config_, state);
    const int64_t first = state.step;
    Trainer trainer(model, data_.train, std::move(state));
    const double rate = trainer.state().finished() ? 0 : measure_matrix_rate(*ops_, model.storage);
    if (rate > 0) say(fmt::format("peak        {:.1f} GFLOP/s in {}, measured", rate * 1e-9, name_of(config_.model.dtype)));
    Progress progress(first, trainer.state().total_steps, config_.train.log_every, rate);
    TrainingHooks hooks;
    hooks.on_step = [&](const StepReport& r, const Speed& s) { progress.step(r, s); };
    hooks.on_validation = [&](int64_t step, const Validation& v) { progress.validation(step, v); };
    hooks.note = [&](const std::string& text) { progress.note(text); };
    hooks.stop = stop_requested;
    hooks.matrix_rate = rate;
    if (data_.valid) hooks.validate = [&](Arena& arena) { return data_.valid->run(model, arena, stop_requested); };
    const bool finished = trainer.run(folder, hooks);
    progress.finish();
    if (!finished) {
      say(fmt::format("stopped at step {} of {}; go on with --resume", trainer.state().step, trainer.state().total_steps));
      return static_cast<int>(Exit::stopped);
    }
    const fs::path last = out_ / "checkpoints" / fmt::format("step_{}", trainer.state().step);
    folder.publish_adapter({last, verify_checkpoint(last)});
    say(fmt::format("finished at step {}: {}", trainer.state().step, escaped((out_ / "adapter").string(), 4096)));
    return 0;
  }

  // The end may have been cut short after its checkpoint.
  int already_finished(const Checkpoint& last, const TrainingState& state) {
    RunFolder folder(out_);
    folder.open(config_, state);
    folder.publish_adapter(last);
    say(fmt::format("{} is finished: {} steps of {}", escaped(out_.string(), 4096), state.step, state.total_steps));
    return 0;
  }

  const TrainCommand& command_;
  const RunConfig config_;
  const std::unique_ptr<Ops> ops_;
  const fs::path out_;
  TextModel text_;
  RunData data_;
};

}  // namespace

int train(const TrainCommand& command) {
  for (const auto& [given, name] : {std::pair(command.profile, "--profile"), std::pair(command.check_ops, "--check-ops")})
    if (given) throw Error(Exit::usage, name, "is not built yet", "leave it out");
  if (command.out && command.out->empty()) throw Error(Exit::usage, "--out", "is empty", "name a folder");
  const RunConfig config = load_config(command.config, command.sets);
  require_for_training(config, command.config);
  std::unique_ptr<Ops> ops = make_ops(command.device);
  if (command.plan) {
    say(parameter_table(config, open_text_model(config.model.path)) +
        "not planned yet: memory, the worst batch, FLOPs, steps, disk and time");
    return 0;
  }
  catch_signals();
  return Run(command, config, std::move(ops)).run();
}

}  // namespace kava
