#include "models/open_model.h"

#include "engine/error.h"
#include "engine/files/checkpoint.h"
#include "engine/files/files.h"
#include "engine/memory.h"
#include "models/adapter.h"
#include "models/weights.h"

namespace kava {

namespace {

namespace fs = std::filesystem;

std::string shown(const fs::path& path) { return escaped(path.string(), 4096); }

RunConfig plain_config(const std::string& folder) {
  RunConfig c;
  c.method = Method::full_cot;
  c.model.path = folder;
  c.data.drop_last_step = false;
  c.loss.student = c.kv.weight = c.codi.weight = 0;
  c.lora.targets.clear();
  return c;
}

void choose_weights(OpenedModel& m) {
  if (const std::optional<int64_t> best = linked_step(m.run_dir, "best")) {
    const fs::path checkpoint = m.run_dir / "checkpoints" / fmt::format("step_{}", *best);
    try {
      verify_checkpoint(checkpoint);
      m.adapter = checkpoint / "adapter";
      m.weights = fmt::format("checkpoints/step_{} (best)", *best);
      return;
    } catch (const Error& e) {
      m.note = std::string("the best checkpoint was passed over: ") + e.what();
    }
  }
  if (is_there(m.run_dir / "adapter")) {
    m.adapter = m.run_dir / "adapter";
    m.weights = "adapter";
    return;
  }
  const std::optional<Checkpoint> newest = newest_valid_checkpoint(m.run_dir);
  if (!newest) throw Error(Exit::data, shown(m.run_dir), "the run has no valid checkpoint and no adapter", "train it first");
  m.adapter = newest->path / "adapter";
  m.weights = fmt::format("checkpoints/step_{} (newest)", newest->manifest.step);
}

// Linux gives memory that it does not have and ends the program when it is used.
void require_room_for_weights(const RunConfig& config, const ModelConfig& shape) {
  // A config.json that is not that of the weights is told as such, not as a lack of memory.
  if (config.model.init == Init::pretrained) WeightFiles::open(config.model.path, shape);
  int64_t bytes = 0;
  for (const WeightSpec& w : weight_specs(shape)) bytes += w.rows * w.cols * size_of(storage_of(config.model.dtype));
  if (const int64_t available = available_memory(); bytes > available)
    throw Error(Exit::preflight, "memory", fmt::format("the weights take {} MiB, {} are available", bytes >> 20, available >> 20),
                "use a smaller model or --dtype bf16");
}

}  // namespace

OpenedModel open_model(const std::string& given, std::optional<StorageType> dtype) {
  std::error_code failed;
  const fs::path path = fs::canonical(given, failed);
  if (failed)
    throw Error(Exit::data, given.empty() ? "MODEL" : escaped(given, 4096), given.empty() ? "is empty" : failed.message(),
                "give a Hugging Face folder, a run directory or a checkpoint in one");
  OpenedModel m;
  if (is_there(path / "config.toml")) {
    m.run_dir = path;
    choose_weights(m);
  } else if (is_there(path / "manifest.json")) {
    verify_checkpoint(path);
    m.run_dir = path.parent_path().parent_path();
    if (!is_there(m.run_dir / "config.toml"))
      throw Error(Exit::data, shown(path), "the checkpoint does not lie in its run, whose config.toml names the base",
                  "give a checkpoint in a run directory");
    m.adapter = path / "adapter";
    m.weights = "checkpoints/" + path.filename().string();
  } else if (is_there(path / "config.json")) {
    m.weights = "the folder's own";
  } else {
    throw Error(Exit::data, shown(path), "is no model: it has neither config.json nor config.toml nor manifest.json",
                "give a Hugging Face folder, a run directory or a checkpoint in one");
  }
  m.config = m.plain() ? plain_config(path.string()) : load_config((m.run_dir / "config.toml").string());
  if (dtype) m.config.model.dtype = *dtype;
  m.text = open_text_model(m.config.model.path);
  return m;
}

void require_method(const OpenedModel& m, std::optional<Method> method) {
  if (!method || *method == m.config.method) return;
  const std::string& name = name_of(*method);
  if (*method == Method::icot || *method == Method::coconut)
    throw Error(Exit::usage, "--method", name + " is not built yet", "give full_cot, no_cot, codi, pccot or kava");
  if (m.plain())
    throw Error(Exit::usage, "--method", name + " needs a trained run, and MODEL is a plain folder",
                "give a run directory, or --method full_cot");
  if (has_latents(*method) && !has_latents(m.config.method))
    throw Error(Exit::usage, "--method", fmt::format("{} needs latents, and the run's method {} has none", name, name_of(m.config.method)),
                "give a run trained with latents");
}

std::unique_ptr<Model> load_model(Ops& ops, const OpenedModel& opened) {
  require_room_for_weights(opened.config, opened.text.shape);
  auto model = std::make_unique<Model>(ops, opened.config, opened.text.shape);
  if (!opened.adapter.empty()) load_adapter(*model, opened.adapter.string());
  return model;
}

}  // namespace kava
