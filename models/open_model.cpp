#include "models/open_model.h"

#include "engine/error.h"
#include "engine/files/checkpoint.h"
#include "engine/files/files.h"
#include "engine/files/hub.h"
#include "engine/files/unreadable.h"
#include "engine/memory.h"
#include "engine/no_signals.h"
#include "models/adapter.h"
#include "models/contents.h"
#include "models/decode.h"
#include "models/footprint.h"
#include "models/recipe.h"
#include "models/training_state.h"
#include "models/upstream.h"
#include "models/weights.h"

namespace kava {

namespace {

namespace fs = std::filesystem;

// What is read of a checkpoint: hashing the moments too would take longer than that.
constexpr std::string_view kRead = "adapter/";

RunConfig plain_config(const std::string& folder) {
  RunConfig c;
  c.method = Method::full_cot;
  c.model.path = folder;
  c.data.drop_last_step = false;
  c.loss.student = c.kv.weight = c.codi.weight = 0;
  c.lora.targets.clear();
  return c;
}

void take_checkpoint(OpenedModel& m, Checkpoint checkpoint, const char* which) {
  m.adapter = checkpoint.path / "adapter";
  m.weights = fmt::format("checkpoints/step_{} ({})", checkpoint.manifest.step, which);
  m.step = checkpoint.manifest.step;
  m.lock = std::move(checkpoint.lock);
}

void choose_weights(OpenedModel& m) {
  for (std::optional<int64_t> best = linked_step(m.run_dir, "best"); best;) {
    try {
      take_checkpoint(m, open_checkpoint(m.run_dir / "checkpoints" / fmt::format("step_{}", *best), kRead), "best");
      m.note.clear();
      return;
    } catch (const Unreadable&) {
      throw;
    } catch (const Error& e) {
      m.note = std::string("the best checkpoint was passed over: ") + e.what();
    }
    // It was pruned for a better one, or it is damaged.
    const std::optional<int64_t> now = linked_step(m.run_dir, "best");
    if (now == best) break;
    best = now;
  }
  if (is_there(m.run_dir / "adapter")) {
    m.adapter = m.run_dir / "adapter";
    m.weights = "adapter";
    return;
  }
  std::optional<Checkpoint> newest = newest_valid_checkpoint(m.run_dir);
  if (!newest) throw Error(Exit::data, shown_path(m.run_dir), "the run has no valid checkpoint and no adapter", "train it first");
  take_checkpoint(m, std::move(*newest), "newest");
}

// What a run's checkpoint tells, and an adapter folder alone does not: what its base held, and the stage that it ends in, which may come
// before the last one of its configuration. Of a damaged one nothing is taken.
void take_state(OpenedModel& m) {
  const fs::path checkpoint = m.step ? m.adapter.parent_path() : m.run_dir / "last";
  if (!is_there(checkpoint / "state.json")) return;
  if (!m.step) try {
      (void)open_checkpoint(checkpoint, kRead);
    } catch (const Unreadable&) {
      throw;
    } catch (const Error& e) {
      if (m.note.empty()) m.note = std::string("the last checkpoint was passed over: ") + e.what();
      return;
    }
  const TrainingState state = load_training_state(checkpoint);
  if (state.last_stage && m.config.stages.fixed < 0) m.config.stages.last = *state.last_stage;
  if (state.model.empty()) return;
  m.base_before = state.model;
  const NoSignals none;
  m.base_now = std::async(std::launch::async, model_digests, m.text.folder, m.text.shape, m.config.model.init);
}

// Linux gives memory that it does not have and ends the program when it is used. Returns the bytes that the model takes.
int64_t require_room_for_weights(const RunConfig& config, const ModelConfig& shape) {
  // A config.json that is not that of the weights is told as such, not as a lack of memory.
  if (config.model.init == Init::pretrained) WeightFiles::open(config.model.path, shape);
  const int64_t bytes = inference_bytes(config, shape);
  if (const int64_t available = available_memory(); bytes > available)
    throw Error(Exit::preflight, "memory", fmt::format("the weights take {} MiB, {} are available", bytes >> 20, available >> 20),
                "use a smaller model or --dtype bf16");
  return bytes;
}

}  // namespace

OpenedModel open_model(const std::string& given, std::optional<StorageType> dtype, const std::optional<std::string>& base) {
  std::error_code failed;
  const fs::path path = fs::canonical(model_folder(given), failed);
  if (failed == std::errc::no_such_file_or_directory) require_no_hub_name(given);
  if (failed)
    throw Error(Exit::data, given.empty() ? "MODEL" : shown_path(given),
                given.empty()                                    ? "is empty"
                : failed == std::errc::no_such_file_or_directory ? "no such file"
                                                                 : failed.message(),
                "give a Hugging Face folder, a run directory or a checkpoint in one");
  OpenedModel m;
  if (is_there(path / "config.toml")) {
    m.run_dir = path;
    choose_weights(m);
  } else if (is_there(path / "manifest.json")) {
    Checkpoint checkpoint = open_checkpoint(path, kRead);
    m.step = checkpoint.manifest.step;
    m.lock = std::move(checkpoint.lock);
    m.run_dir = path.parent_path().parent_path();
    if (!is_there(m.run_dir / "config.toml"))
      throw Error(Exit::data, shown_path(path), "the checkpoint does not lie in its run, whose config.toml names the base",
                  "give a checkpoint in a run directory");
    m.adapter = path / "adapter";
    m.weights = "checkpoints/" + path.filename().string();
  } else if (UpstreamAdapter::is_at(path.string())) {
    throw Error(Exit::data, shown_path(path), "is an adapter of PCCoT's or CODI's own program, which does not tell the whole configuration",
                "name it adapter/ beside a config.toml, and give the folder of both");
  } else if (is_there(path / "config.json")) {
    m.weights = "the folder's own";
    if (is_there(path / "kava.safetensors"))
      m.note =
          "kava.safetensors in the folder is of a run's latents and not read: the folder alone is a plain model; name the run to have both";
  } else if (is_there(path / "adapter_config.json")) {
    throw Error(Exit::data, shown_path(path), "is an adapter without its base",
                "give the run that it belongs to, or what kava_merge makes of it");
  } else {
    throw Error(Exit::data, shown_path(path), "is no model: it has neither config.json nor config.toml nor manifest.json",
                "give a Hugging Face folder, a run directory or a checkpoint in one");
  }
  if (m.plain() && base)
    throw Error(Exit::usage, "--base", "is given for " + shown_path(path) + ", which is a base itself", "leave it out, or name a run");
  m.config = m.plain() ? plain_config(path.string()) : load_run_config(m.run_dir.string());
  m.base_given = base.has_value();
  if (base) m.config.model.path = fs::absolute(model_folder(*base)).string();
  if (dtype) m.config.model.dtype = *dtype;
  if (!fs::exists(m.config.model.path, failed))
    throw Error(Exit::data, shown_path(m.config.model.path), "the run's base is not there", "name it where it lies now with --base DIR");
  m.text = open_text_model(m.config.model.path);
  if (!m.plain()) take_state(m);
  return m;
}

void require_method(const OpenedModel& m, std::optional<Method> method) {
  if (!method || *method == m.config.method) return;
  const std::string& name = name_of(*method);
  if (m.plain())
    throw Error(Exit::usage, "--method", name + " needs a trained run, and MODEL is a plain folder",
                "give a run directory, or --method full_cot");
  DecodeChoice choice;
  choice.method = method;
  const Recipe decoding = decoding_of(m.config, choice).recipe;
  if (decoding.has_stages())
    throw Error(Exit::usage, "--method",
                fmt::format("{} needs a run of its own, and the run's method is {}", name, name_of(m.config.method)),
                "give a run trained by it, or leave --method out");
  if (decoding.markers && !recipe_of(m.config).markers)
    throw Error(Exit::usage, "--method", fmt::format("{} needs latents, and the run's method {} has none", name, name_of(m.config.method)),
                "give a run trained with latents");
}

void require_stage(const OpenedModel& m, std::optional<Method> method, std::optional<int64_t> stage) {
  if (!stage) return;
  const Method used = method.value_or(m.config.method);
  if (used != Method::coconut)
    throw Error(Exit::usage, "--stage", fmt::format("method {} decodes alike at every stage", name_of(used)), "leave it out");
  if (*stage < 0 || *stage > m.config.coconut.max_stage + 1)
    throw Error(Exit::usage, "--stage", fmt::format("{} is beyond the run's stages", *stage),
                fmt::format("give 0 to {}", m.config.coconut.max_stage + 1));
}

void require_same_base(const OpenedModel& m) {
  if (!m.base_now.valid()) return;
  require_same_files("the base", m.config.model.path, m.base_before, m.base_now.get(),
                     m.base_given ? "name the run's base with --base" : "name it with --base DIR");
}

std::unique_ptr<Model> load_model(Ops& ops, const OpenedModel& opened) {
  try {
    const int64_t bytes = require_room_for_weights(opened.config, opened.text.shape), before = ops.held_bytes();
    const Values values = opened.adapter.empty() ? Values::start : Values::loaded;
    auto model = std::make_unique<Model>(ops, opened.config, opened.text.shape, values, ModelUse::inference);
    KAVA_CHECK(ops.held_bytes() - before <= bytes, "a model takes {} bytes for inference, not {}", ops.held_bytes() - before, bytes);
    if (!opened.adapter.empty()) load_adapter(*model, opened.adapter.string());
    require_same_base(opened);
    return model;
  } catch (const Error&) {
    require_same_base(opened);  // another base is told as such, not by what does not fit to it
    throw;
  }
}

}  // namespace kava
