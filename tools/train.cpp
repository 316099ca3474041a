#include "tools/train.h"

#include <fmt/core.h>

#include <chrono>
#include <filesystem>

#include "engine/cli.h"
#include "engine/config/config_files.h"
#include "engine/device/cuda_module.h"
#include "engine/files/files.h"
#include "engine/files/parts.h"
#include "engine/files/paths.h"
#include "engine/memory.h"
#include "models/adapter.h"
#include "models/alarms.h"
#include "models/flops.h"
#include "models/footprint.h"
#include "models/peft_config.h"
#include "models/run_folder.h"
#include "models/starts.h"
#include "models/text.h"
#include "models/traces.h"
#include "models/train_samples.h"
#include "models/trainer.h"
#include "models/upstream.h"
#include "models/validation.h"
#include "tools/op_check.h"
#include "tools/plan.h"
#include "tools/profile.h"
#include "tools/progress.h"
#include "tools/progress_file.h"
#include "tools/ranks.h"
#include "tools/resume.h"
#include "tools/say.h"
#include "tools/terminal.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

// What a run reads before its model.
struct RunData : TrainSamples {
  std::optional<Validator> valid;
  std::vector<DataDigest> digests;

  /// "FILE:LINE"
  std::string where(const Sample& sample) const {
    int64_t row = sample.row;
    for (const FileFacts& file : files) {
      if (row < file.rows) return fmt::format("{}:{}", shown_path(file.path), sample.line);
      row -= file.rows;
    }
    return fmt::format("row {}", sample.row + 1);
  }
};

RunData read_data(const TextModel& text, const RunConfig& config, bool tell) {
  RunData data;
  static_cast<TrainSamples&>(data) = read_train_samples(text, config);
  if (!data.samples.empty())
    if (const std::string note = require_traces(config, data.files, data.samples); !note.empty() && tell) print_note(note);
  for (const FileFacts& f : data.files) data.digests.push_back({"data.train", f.sha256, name_of(f.format)});
  require_samples(config, text.shape, config.data.train[0].path, data.samples, data.left_out);
  if (!config.data.valid.empty()) {
    data.valid.emplace(text, config);
    data.digests.push_back(data.valid->digest());
  }
  return data;
}

// A rank that never has a forward would only wait.
void require_work_for_all(const RunConfig& config, int64_t samples, int ranks) {
  const int64_t batch = std::min(config.train.batch, samples), micro = forward_samples(config, samples, ranks);
  const int64_t forwards = (batch + micro - 1) / micro;
  if (ranks > forwards)
    throw Error(Exit::usage, "ranks",
                fmt::format("{} ranks are more than the {} forwards of a step: {} samples, {} a forward", ranks, forwards, batch, micro),
                batch < ranks ? "start fewer" : fmt::format("start fewer, or set train.micro_batch = {}", batch / ranks));
}

// Bytes that one of the ranks on a backend's memory may take of it: of a GPU's without what is in no plan, the kernels that are loaded at
// their first call and the executables of graphs.
int64_t memory_for_a_rank(const Ops& ops, int ranks) {
  constexpr int64_t kOutsideOfPlans = int64_t{512} << 20;
  return free_memory(ops) / ranks - (ops.name() == "cuda" ? kOutsideOfPlans : 0);
}

class Run {
 public:
  Run(const TrainCommand& command, Comm& comm, fs::path out, RunConfig config, std::unique_ptr<Ops> ops)
      : command_(command), comm_(comm), told_(config), config_(std::move(config)), ops_(std::move(ops)), out_(std::move(out)) {}

  int run() {
    std::optional<RunFolder> folder;
    std::optional<Checkpoint> from;
    together(comm_, "opening the run's folder", [&] {
      if (!comm_.leads()) return;
      require_place(out_, command_.resume);
      // The lock comes before anything is read: what another process is writing here must not be taken for what a run left.
      folder.emplace(out_);
      from = checkpoint_to_begin_from(out_, command_.resume);
    });
    const std::optional<Continued> before = go_on_together(from);
    const bool finished = before && before->same_length() && before->state.finished() && before->state.updates > 0 &&
                          (config_.data.valid.empty() || before->state.validated_step == before->state.step);
    TrainingState state = before ? before->state : TrainingState();
    bool renamed = false;
    if (finished) {
      config_ = with_inputs_there(config_, before->before);
      renamed = comm_.any(!same_inputs(before->before, config_), "naming model and data");
    }
    together(comm_, "reading model and data", [&] {
      if (!finished) prepare(before, state);
      else if (renamed) require_same_inputs(*before, state);
    });
    require_same(comm_, "the data", shown(state.data), Exit::data);
    require_same(comm_, "the base model", shown(state.model), Exit::data);
    require_same(comm_, "model.adapter", shown(state.adapter), Exit::data);
    if (finished) return folder ? already_finished(*folder, state) : 0;
    std::string why;
    const std::unique_ptr<DeviceLink> link = link_devices(comm_, *ops_, fs::absolute(out_ / "log").string(), why);
    if (link && command_.profile) link->measure();
    if (link) say("gradients   summed by " + link->text());
    else if (!why.empty()) say("gradients   summed through the host: " + why);
    together(comm_, "planning the memory", [&] { require_room(); });
    std::optional<Model> model;
    together(comm_, "loading the model", [&] { load(model, from, state); });
    require_same(comm_, "the base model", state.base, Exit::data);
    const int code = train(folder ? &*folder : nullptr, *model, std::move(state));
    if (command_.profile && !comm_.alone()) say(Profile::table(comm_));
    return code;
  }
  bool stepped() const { return stepped_; }

 private:
  // Where rank 0 goes on from a checkpoint, all do; each holds it against what is given now.
  std::optional<Continued> go_on_together(std::optional<Checkpoint>& from) {
    const std::string place = comm_.broadcast(from ? fs::absolute(from->path).string() : "", "naming the checkpoint");
    std::optional<Continued> before;
    together(comm_, "reading the checkpoint", [&] {
      if (!place.empty()) {
        if (!from) from = open_checkpoint(place);
        before = go_on(out_, *from, config_, command_.extend, comm_.size());
        config_ = before->config;
      }
    });
    if (!from) return before;
    std::string files;
    for (const ManifestFile& file : from->manifest.files) files += file.name + " " + file.sha256 + "\n";
    require_same(comm_, "the checkpoint", files, Exit::data);
    return before;
  }

  // Of a finished run nothing is read, but where model or data are named anew.
  void require_same_inputs(const Continued& before, TrainingState& state) {
    require_contents_there(config_);
    text_ = open_text_model(config_.model.path);
    data_ = read_data(text_, config_, false);
    take_contents(state, &before.before);
  }

  void prepare(const std::optional<Continued>& before, TrainingState& state) {
    if (before) require_contents_there(config_);
    else if (const std::string& adapter = config_.model.adapter; !adapter.empty() && UpstreamAdapter::is_at(adapter))
      throw Error(Exit::data, shown_path(adapter), "holds parts of its base, which an adapter trained from it would lack",
                  "make a base of it with kava_merge, and name that in model.path");
    text_ = open_text_model(config_.model.path);
    text_.shape.require_for_training(config_.model.dropout);
    if (!text_.note.empty() && comm_.leads()) print_note(text_.note);
    data_ = read_data(text_, config_, comm_.leads());
    if (config_.train.micro_batch == 0 && !comm_.alone())
      config_.train.micro_batch = forward_samples(config_, std::ssize(data_.samples), comm_.size());
    require_work_for_all(config_, std::ssize(data_.samples), comm_.size());
    take_contents(state, before ? &before->before : nullptr);
    if (before) tell_resumption(*before);
    say(parameter_table(config_, text_) + run_summary(config_, text_.shape, data_.samples, data_.left_out));
    if (!comm_.alone()) say(fmt::format("ranks       {}", comm_.size()));
    if (data_.valid) say(validation_summary(config_, text_.shape, *data_.valid));
  }

  // After the link, which has taken its own.
  void require_room() {
    const MemoryPlanner planner(*ops_, config_, text_.shape, data_.samples, data_.valid ? &*data_.valid : nullptr, comm_.size());
    require_memory(planner, config_, text_.shape, memory_for_a_rank(*ops_, ranks_on_its_memory_), uncertain_memory());
  }

  void load(std::optional<Model>& model, std::optional<Checkpoint>& from, TrainingState& state) {
    model.emplace(*ops_, config_, text_.shape, from || !config_.model.adapter.empty() ? Values::loaded : Values::start);
    if (from) {
      if (state.base != model->base_digest)
        throw Error(Exit::data, shown_path(config_.model.path), "has changed since the run began", "restore the model's folder");
      load_optimizer(*model, from->path);
      from->lock.reset();  // this run may prune it now
    } else if (!config_.model.adapter.empty()) {
      load_adapter(*model, config_.model.adapter);
    }
    state.base = model->base_digest;
  }

  static std::string shown(const std::vector<DataDigest>& data) {
    std::string text;
    for (const DataDigest& d : data) text += fmt::format("{}{} {} {}", text.empty() ? "" : ", ", d.key, d.sha256.substr(0, 16), d.format);
    return text;
  }
  static std::string shown(const FileDigests& files) {
    std::string text;
    for (const auto& [name, sha256] : files) text += fmt::format("{}{} {}", text.empty() ? "" : ", ", name, sha256.substr(0, 16));
    return text;
  }

  void tell_resumption(const Continued& before) {
    const TrainingState& state = before.state;
    const int64_t steps = total_steps(config_.train, static_cast<int64_t>(data_.samples.size()));
    if (steps < state.step)
      throw Error(Exit::usage, shown_path(out_), fmt::format("has done {} steps, and is to end after {}", state.step, steps),
                  "give more train.max_steps or train.epochs");
    say(fmt::format("resuming {} from step {} of {}", shown_path(out_), state.step, steps));
    if (steps != state.total_steps)
      say(fmt::format("extended: {} -> {} steps; from step {} on the learning rate is that of {} steps", state.total_steps, steps,
                      state.step, steps));
    else
      for (const std::string& line : before.length) say("extended: " + line + "; the number of steps stays");
    for (const std::string& line : before.notes) say(line);
    if (!state.device.empty() && state.device != ops_->name())
      say(fmt::format("device      {}, and {} before: the bytes are not those of a run on one of them", ops_->name(), state.device));
  }

  // Epoch and samples follow from the step.
  void require_same_counts(const TrainingState& state) const {
    const auto rows = static_cast<int64_t>(data_.samples.size()), per_epoch = (rows + config_.train.batch - 1) / config_.train.batch;
    if (state.epoch != state.step / per_epoch || state.cursor != state.step % per_epoch * config_.train.batch ||
        state.samples != state.epoch * rows + state.cursor)
      throw Error(Exit::data, shown_path(out_),
                  fmt::format("its checkpoint of step {} has other counts of epochs and samples than {} rows give", state.step, rows),
                  "use another checkpoint");
  }

  // What the run reads is, wherever it lies now, what it was at its start.
  void take_contents(TrainingState& state, const RunConfig* before) {
    const FileDigests model = model_digests(text_.folder, text_.shape, config_.model.init), adapter = folder_digests(config_.model.adapter);
    if (before) {
      require_same_data(config_, state.data, data_.digests);
      require_same_counts(state);
      if (!state.older) {
        require_same_files("model.path", config_.model.path, state.model, model, "name it with --set model.path=DIR");
        require_same_adapter(state.adapter, adapter, before->model.adapter);
      }
    }
    state.data = data_.digests, state.model = model;
    if (!before) state.adapter = adapter;
  }

  void require_same_adapter(const FileDigests& before, const FileDigests& now, const std::string& path_before) const {
    const std::string& path = config_.model.adapter;
    constexpr const char* kRemedy = "name it with --set model.adapter=DIR";
    if (now.empty() && (!path.empty() || before.empty()) && same_path(path, path_before)) return;  // its values are in the checkpoint
    if (path.empty() && !before.empty())
      throw Error(Exit::data, "model.adapter", "is empty, and was " + shown_path(path_before) + " when the run began", kRemedy);
    if (!path.empty() && now.empty()) throw Error(Exit::data, shown_path(path), "is not there", kRemedy);
    require_same_files("model.adapter", path, before, now, kRemedy);
  }

  bool out_of_time() const {
    const double hours = std::chrono::duration<double, std::ratio<3600>>(std::chrono::steady_clock::now() - start_).count();
    return config_.train.max_hours > 0 && stepped_ && hours >= config_.train.max_hours;
  }

  std::string not_finite_text(const StepReport& r) const {
    constexpr std::size_t kMost = 5;
    const auto n = r.not_finite.size();
    if (n == 0) return fmt::format("step {}: no sample by itself gives a loss or gradient that is not finite", r.step);
    if (n > kMost && static_cast<int64_t>(n) == r.batch_samples) return fmt::format("step {}: every sample of the batch gives it", r.step);
    std::string text = fmt::format("step {}: from {}", r.step, data_.where(*r.not_finite[0]));
    for (std::size_t i = 1; i < std::min(n, kMost); ++i) text += ", " + data_.where(*r.not_finite[i]);
    return text + (n > kMost ? fmt::format(" and {} more", n - kMost) : "");
  }

  int train(RunFolder* folder, Model& model, TrainingState state) {
    together(comm_, "opening the run's files", [&] {
      if (folder) folder->open(told_, state);
    });
    const int64_t first = state.step;
    const std::optional<Best> best = state.best;
    Trainer trainer(model, data_.samples, std::move(state), &comm_);
    if (best && !trainer.state().best)
      say(fmt::format("best        step {} no longer: it is of a stage that is not the last of the longer run", best->step));
    const auto batch = std::span(data_.samples).first(std::min(data_.samples.size(), static_cast<std::size_t>(config_.train.batch)));
    const double work =
        minimum_flops(config_, recipe_of(config_), text_.shape, batch) * static_cast<double>(trainer.state().total_steps - first);
    std::optional<MatrixRate> rate;
    if (!trainer.state().finished()) {
      rate.emplace(*ops_, model.storage, work);
      say(fmt::format("products    {:.1f} GFLOP/s in {}: this machine's matrix rate, measured", rate->measured() * 1e-9,
                      name_of(config_.model.dtype)));
    }
    if (command_.check_ops) check_ = std::make_unique<OpCheck>(*ops_);
    Progress progress(trainer.state().total_steps, config_, comm_.alone());
    ProgressFile outside(out_, first, trainer.state().total_steps);
    Alarms alarms(config_, trainer.state().total_steps);
    const auto warn = [&](const std::vector<std::string>& lines) {
      for (const std::string& line : lines) progress.note(line);
    };
    warn(alarms.start(data_.samples));
    TrainingHooks hooks;
    hooks.on_step = [&](const StepReport& r, const Speed& s) {
      stepped_ = true;
      tell_not_finite(progress, r);
      const double own = s.flops_per_s / comm_.size();
      progress.step(r, s, rate ? own / rate->after(own) : 0);
      if (folder && folder->is_in_place()) outside.step(r, s);
      warn(alarms.step(r));
      if (!r.updated) progress.note(not_finite_text(r));
    };
    hooks.on_validation = [&](int64_t step, const Validation& v) {
      progress.validation(step, v, trainer.state().best);
      outside.validation(step, v, folder && folder->is_in_place());
      warn(alarms.validation(step, v));
    };
    hooks.note = [&](const std::string& text) { progress.note(text); };
    hooks.stop = [&] { return stop_requested() || out_of_time(); };
    hooks.checkpoint = checkpoint_requested;
    if (rate) hooks.matrix_rate = [&](double reached) { return rate->after(reached); };
    const auto stop_of_any = [&] { return comm_.any(hooks.stop(), "validation"); };
    if (data_.valid)
      hooks.validate = [&](Arena& arena, int64_t stage) {
        return data_.valid->run(
            model, arena, stage, stop_of_any,
            [&](int64_t done, int64_t total, int64_t correct) { progress.validating(done, total, correct); }, &comm_);
      };
    bool finished = false;
    try {
      finished = trainer.run(folder, hooks);
    } catch (const std::exception& e) {
      if (!comm_.abort_link()) end_here(Error(Exit::comm, comm_.name(), e.what(), "start all ranks again"));
      throw;
    }
    if (folder && folder->is_in_place()) outside.end();
    progress.finish();
    if (const std::string text = alarms.summary(); !text.empty()) say("warnings    " + text);
    tell_best(trainer.state());
    if (!finished) {
      const bool told = comm_.any(stop_requested(), "ending");
      say(fmt::format("stopped at step {} of {}{}; go on with --resume", trainer.state().step, trainer.state().total_steps,
                      told ? "" : " after train.max_hours"));
      return static_cast<int>(Exit::stopped);
    }
    if (folder) folder->publish_adapter(trainer.state().step);
    tell_end(trainer.state());
    return 0;
  }

  // Of --check-ops. Where calls are queued the op of this step was taken with the report before: what is taken now is of the next step and
  // of the samples that were run again.
  void tell_not_finite(Progress& progress, const StepReport& r) {
    if (!check_) return;
    std::string made = check_->take();
    const std::string& told = made.empty() || (ops_->queues() && !made_before_.empty()) ? made_before_ : made;
    if (!r.updated && !told.empty()) progress.note(fmt::format("step {}: {}", r.step, told));
    made_before_ = std::move(made);
  }

  // What came out, what it cost, and what to type next.
  void tell_end(const TrainingState& state) const {
    std::string text =
        fmt::format("finished at step {} in {}: {}", thousands(state.step), duration_text(state.seconds), shown_path(out_ / "adapter"));
    if (state.best) text += fmt::format("; best {:.2f} % strict at step {}", 100 * state.best->score, thousands(state.best->step));
    const double host = static_cast<double>(peak_resident_memory()) * 1e-9, device = static_cast<double>(taken_memory(*ops_)) * 1e-9;
    text += ops_->name() == "cpu" ? fmt::format("; peak memory {:.2f} GB", host)
                                  : fmt::format("; peak memory {:.2f} GB of the device, {:.2f} GB of the host", device, host);
    say(text);
    const std::string data = config_.data.valid.empty() ? "FILE" : shell_word(fs::proximate(config_.data.valid).string());
    say(fmt::format("next: {} {} --data {}", program_beside("kava_eval"), shell_word(out_.string()), data));
  }

  static void tell_best(const TrainingState& state) {
    if (state.best && state.best->score == 0)
      say(fmt::format("validation  0 % in every one: best is step {}, the one of the lowest loss", state.best->step));
  }

  // The end may have been cut short after its checkpoint. What the run read need not be there any more.
  int already_finished(RunFolder& folder, const TrainingState& state) {
    RunConfig config = told_;
    config.lora.targets = config_.lora.targets;
    config.model.path = config_.model.path, config.model.adapter = config_.model.adapter;
    config.data.train = config_.data.train, config.data.valid = config_.data.valid;
    folder.open(config, state);
    folder.publish_adapter(state.step);
    say(fmt::format("{} is finished: {} steps of {}", shown_path(out_), state.step, state.total_steps));
    return 0;
  }

  const TrainCommand& command_;
  Comm& comm_;
  const RunConfig told_;  // as given
  RunConfig config_;      // as run
  const std::unique_ptr<Ops> ops_;
  const int ranks_on_its_memory_ = ranks_on_its_memory(comm_, *ops_);
  const fs::path out_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  bool stepped_ = false;
  TextModel text_;
  RunData data_;
  std::unique_ptr<OpCheck> check_;  // of --check-ops
  std::string made_before_;
};

// The folder of the run that a command names by itself, in place of a configuration; else nothing.
std::optional<fs::path> run_named(const TrainCommand& command) {
  std::error_code ignored;
  const fs::path path = command.config;
  if (!fs::is_directory(path, ignored)) {
    if (command.resume && path.extension() != ".toml" && !fs::exists(path, ignored))
      throw Error(Exit::data, shown_path(command.config), "holds no valid checkpoint to resume: there is no such folder",
                  "name a run or a configuration");
    return std::nullopt;
  }
  const std::string where = shown_path(command.config);
  if (!is_there(path / "config.toml"))
    throw Error(command.resume ? Exit::data : Exit::usage, where, "is a folder without config.toml",
                "name the configuration, and this folder with --out");
  if (!command.resume && !command.plan) throw Error(Exit::usage, where, "is a run", "add --resume to go on with it");
  if (command.out && !fs::equivalent(*command.out, path, ignored))
    throw Error(Exit::usage, "--out " + shown_path(*command.out), "is not the run " + where, "leave it out");
  return path;
}

void plan_run(const TrainCommand& command, const RunConfig& config, const Ops& ops, int ranks, int ranks_on_its_memory) {
  (void)memory_of(command.plan_options), (void)rate_of(command.plan_options);
  if (command.plan_options.json) {
    require_no_input("--json", *command.plan_options.json, inputs_of(command.config, config));
    require_writable("--json", *command.plan_options.json);
  }
  const TextModel text = open_text_model(config.model.path);
  text.shape.require_for_training(config.model.dropout);
  if (const std::string& adapter = config.model.adapter; !adapter.empty()) {
    require_adapter_kind(adapter, config.train.trainable == Trainable::all);
    if (config.train.trainable == Trainable::all) (void)ModelConfig::load(adapter);
    else check_peft_config(config, text.shape, (fs::path(adapter) / "adapter_config.json").string());
  }
  const RunData data = read_data(text, config, true);
  require_work_for_all(config, std::ssize(data.samples), ranks);
  require_token_init(config);
  say(parameter_table(config, text) + run_summary(config, text.shape, data.samples, data.left_out));
  const MemoryPlanner planner(ops, config, text.shape, data.samples, data.valid ? &*data.valid : nullptr, ranks);
  // A dry backend has no memory; one is planned with --memory alone.
  print_plan(command.plan_options, planner, config, text.shape, ops.dry() ? 0 : memory_for_a_rank(ops, ranks_on_its_memory));
}

// The backend asked for; where only its memory is planned, one that takes what it would.
std::unique_ptr<Ops> make_planned_ops(const TrainCommand& command, const RunConfig& config, int local_rank) {
  if (command.device.device == "cuda" && config.model.dtype == StorageType::f64) refuse_storage(DType::f64, "cuda");
  if (!command.plan) return make_ops(command.device, local_rank);
  if (!command.plan_options.memory) {
    std::string why;
    if (command.device.device == "cuda" && cuda_devices(why) == 0)
      throw Error(Exit::preflight, "--device", why, "give the memory of the device to plan for: --memory 80GB");
    return make_ops(command.device, local_rank);
  }
  if (command.device.device == "cuda")
    if (auto dry = make_dry_cuda_ops()) return dry;
  try {
    return make_ops(command.device, local_rank);
  } catch (const Error& e) {
    if (e.code() != Exit::preflight) throw;
    print_note(std::string(e.what()) + ": planned with the temporaries of the cpu backend");
  }
  DeviceOptions here = command.device;
  here.device = "cpu";
  return make_ops(here, local_rank);
}

// A single step may be looked at without a loss.
void require_loss(const RunConfig& c) {
  if (c.loss.student == 0 && c.loss.teacher == 0 && c.kv.weight == 0 && c.codi.weight == 0)
    throw Error(Exit::usage, "loss.student, loss.teacher, kv.weight, codi.weight", "all are 0, so that nothing would be trained",
                "give one of them a weight");
}

int train_on_rank(const TrainCommand& command, Comm& comm, const World& world) {
  RunConfig config;
  fs::path out;
  std::unique_ptr<Ops> ops;
  together(comm, "reading the configuration", [&] {
    const std::optional<fs::path> run = run_named(command);
    config = run ? load_run_config(command.config, command.sets) : load_config(command.config, command.sets);
    require_for_training(config, command.config);
    require_loss(config);
    out = run ? *run : command.out ? fs::path(*command.out) : fs::path("runs") / fs::path(command.config).stem();
    ops = make_planned_ops(command, config, world.local_rank);
    if (!command.plan) require_out_is_no_input(out, command.config, config, command.resume);
  });
  require_same_config(comm, config);
  if (command.plan) {
    const int sharing = ranks_on_its_memory(comm, *ops);
    together(comm, "planning", [&] {
      if (comm.leads()) plan_run(command, config, *ops, comm.size(), sharing);
    });
    return 0;
  }
  std::optional<Profile> profile;
  if (command.profile && comm.leads()) profile.emplace(*ops, storage_of(config.model.dtype));
  Run run(command, comm, out, config, std::move(ops));
  const int code = run.run();
  if (profile && run.stepped()) {
    say(profile->table());
    const MadeFolder log(out / "log");
    profile->write_trace(out / "log" / "profile.trace.json");
    say(fmt::format("written {}", shown_path(out / "log" / "profile.trace.json")));
  }
  return code;
}

}  // namespace

int train(const TrainCommand& given) {
  TrainCommand command = given;
  command.resume = command.resume || command.extend;
  // Before the ranks meet, which may take long: a signal that comes meanwhile stops the run before its first step.
  if (!command.plan) catch_signals();
  return on_ranks(command.ranks, command.device, [&](Comm& comm, const World& world) { return train_on_rank(command, comm, world); });
}

}  // namespace kava
