// The folder of a run (docs/formats.md): its configuration, metrics.jsonl, checkpoints, the links best and last, the final adapter.
#pragma once
#include <filesystem>
#include <string>

#include "engine/config/config.h"
#include "engine/files/checkpoint.h"
#include "models/training_state.h"

namespace kava {

/// Whether the folder holds (part of) a run.
bool holds_run(const std::filesystem::path& path);

/// Error(code preflight) where a folder could not be made or written at `path`; makes nothing.
void require_usable(const std::filesystem::path& path);

class RunFolder {
 public:
  /// Makes the folder where it is missing and locks it against other processes. Error(code preflight).
  explicit RunFolder(std::filesystem::path path);
  RunFolder(const RunFolder&) = delete;
  RunFolder& operator=(const RunFolder&) = delete;
  ~RunFolder();

  const std::filesystem::path& path() const { return path_; }

  /// Writes config.toml and opens metrics.jsonl, cut behind the lines that `state` knows of. Error(code write); code data for a line that
  /// is no JSON object.
  void open(const RunConfig& config, const TrainingState& state);

  /// Appends one line to metrics.jsonl; a line that could not be written whole is taken back. Error(code write).
  void append(const std::string& line);

  /// Saves the checkpoint of state.step, points last and best at theirs and deletes those no longer kept. On failure the older checkpoints
  /// are whole. Error(code write).
  void save(const Model& model, const TrainingState& state);

  /// Copies the adapter of a checkpoint to adapter/, where it is not the same already. Error(code write).
  void publish_adapter(const Checkpoint& checkpoint);

 private:
  void set_links(const TrainingState& state);

  std::filesystem::path path_;
  RunConfig config_;
  int lock_ = -1, metrics_ = -1;
};

}  // namespace kava
