// MODEL of the command line: a Hugging Face folder, a run directory, or a checkpoint in one.
#pragma once
#include <filesystem>
#include <future>
#include <memory>
#include <optional>
#include <string>

#include "engine/files/checkpoint.h"
#include "models/contents.h"
#include "models/model.h"
#include "models/text.h"

namespace kava {

struct OpenedModel {
  RunConfig config;  // of the run, stages.last that which it reaches; for a plain folder full_cot without trainables
  TextModel text;
  std::filesystem::path run_dir;             // empty for a plain folder
  std::filesystem::path adapter;             // whose weights are loaded on the base; empty for a plain folder
  std::string weights;                       // the same in words: "checkpoints/step_20 (best)", "adapter", "the folder's own"
  std::shared_ptr<const PathLock> lock;      // keeps its checkpoint from being pruned
  std::optional<int64_t> step;               // of the checkpoint whose weights these are
  std::string note;                          // why a better choice was passed over; mostly empty
  FileDigests base_before;                   // of a run's base when it was trained
  bool base_given = false;                   // in place of the run's own
  std::shared_future<FileDigests> base_now;  // computed while the weights are loaded; invalid where the run does not tell

  bool plain() const { return run_dir.empty(); }
};

/// Reads configurations and the tokenizer, no weights. Of a run its best checkpoint is taken if it verifies, else its adapter folder, else
/// the newest checkpoint that verifies. dtype in place of the run's; `base` is where a run's base lies, if not where config.toml says.
/// Error(code data) naming what is missing or broken.
OpenedModel open_model(const std::string& path, std::optional<StorageType> dtype = std::nullopt,
                       const std::optional<std::string>& base = std::nullopt);

/// Error(code usage) where these weights cannot decode by the method: a plain folder does only full_cot, and latents need a run with them.
void require_method(const OpenedModel& opened, std::optional<Method> method);

/// Error(code usage) where the method has no stages that decode apart, or not this one.
void require_stage(const OpenedModel& opened, std::optional<Method> method, std::optional<int64_t> stage);

/// Error(code data) naming the file of the base that is not what the run was trained on.
void require_same_base(const OpenedModel& opened);

/// The weights, with require_same_base.
std::unique_ptr<Model> load_model(Ops& ops, const OpenedModel& opened);

}  // namespace kava
