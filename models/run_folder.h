// The folder of a run (docs/formats.md): its configuration, metrics.jsonl, checkpoints, the links best and last, the final adapter.
#pragma once
#include <filesystem>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>

#include "engine/config/config.h"
#include "engine/files/checkpoint.h"
#include "models/training_state.h"

namespace kava {

/// What a folder is to a run that would begin or go on in it.
enum class FolderState {
  free,         // nothing of a run in it, or no such folder
  never_saved,  // empty or what a run writes, none of it by a checkpoint: the run died before its first one
  foreign,      // the same, among other files
  saved         // checkpoints, links to them or a final adapter
};
FolderState state_of(const std::filesystem::path& path);

/// Error(code preflight) where a folder could not be made or written at `path`; makes nothing.
void require_usable(const std::filesystem::path& path);

class RunFolder {
 public:
  /// Makes the folder where it is missing, locks it against other processes and clears up what killed ones left. Comes before anything in
  /// it is read. A folder that it made and that stays empty goes away with it. Error(code preflight).
  explicit RunFolder(std::filesystem::path path);

  const std::filesystem::path& path() const { return path_; }
  /// Whether the folder lies where it did: what follows but append() ends the run by Error(code write) where it does not.
  bool is_in_place() const;

  /// Writes config.toml and opens metrics.jsonl, cut behind the lines that `state` knows of; makes up for links and pruning that a kill
  /// prevented. Error(code write); code data for a broken line among them.
  void open(const RunConfig& config, const TrainingState& state);

  /// Appends one line to metrics.jsonl; a line that could not be written whole is taken back. Error(code write).
  void append(const std::string& line);

  /// Saves the checkpoint of state.step, points last and best at theirs and deletes those no longer kept. On failure the older checkpoints
  /// are whole. Error(code write).
  void save(const Model& model, const TrainingState& state);

  /// Copies the adapter of a step's checkpoint to adapter/, where it is not the same already. Error(code write); code data where the
  /// checkpoint is damaged.
  void publish_adapter(int64_t step);

 private:
  void lock();
  void require_in_place() const;
  void require_links() const;
  void set_links(const TrainingState& state);
  void prune(const TrainingState& state);

  std::filesystem::path path_;
  std::unique_ptr<PathLock> lock_;
  std::pair<uint64_t, uint64_t> identity_;  // device and inode of the folder that is locked
  std::set<int64_t> passed_;                // steps of checkpoints that did not verify when the run went on
  std::unique_ptr<MadeFolder> made_;        // goes first: an empty folder is removed while it is locked
  RunConfig config_;
  std::optional<LineWriter> metrics_;
};

}  // namespace kava
