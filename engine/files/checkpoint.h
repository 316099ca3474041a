// Checkpoints of a run: checkpoints/step_N, a folder that is either whole or not there.
//
// It is written beside its place (FolderWriter); manifest.json, which names every other file with its size and SHA-256, comes last. A kill
// at any moment leaves the other checkpoints whole and at most a .part folder, which counts where its manifest verifies.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "engine/files/writers.h"

namespace kava {

using ManifestFile = WrittenFile;  // FILE or adapter/FILE

struct Manifest {
  std::int64_t step = 0;
  std::string config_hash;
  std::vector<ManifestFile> files;  // by name

  bool has(std::string_view name) const;
};

/// Writes checkpoints/step_N, in the place of an older one of this step: what `fill` writes and the manifest over it. Returns its path. On
/// failure all is as it was: Error(code write), or what `fill` throws.
std::filesystem::path write_checkpoint(const std::filesystem::path& run_dir, std::int64_t step, const std::string& config_hash,
                                       const std::function<void(FolderWriter&)>& fill);

/// What killed processes left: a .part that verifies, of a step that has no whole checkpoint, becomes that; all others go away. For the
/// one process that trains there. Error(code write).
void recover_checkpoints(const std::filesystem::path& run_dir);

/// The manifest of a checkpoint folder, its files unread. Error(code data).
Manifest read_manifest(const std::filesystem::path& directory);

/// The manifest of a checkpoint folder after checking every file against it. Error(code data) naming the file where one is missing, not in
/// the manifest, or changed; or the manifest is malformed or of another format version. `read`: what the names of the files begin with that
/// are going to be read beside state.json; of the others only the size is checked.
Manifest verify_checkpoint(const std::filesystem::path& directory, std::string_view read = "");

/// A checkpoint that verified.
struct Checkpoint {
  std::filesystem::path path;
  Manifest manifest;
  std::shared_ptr<const PathLock> lock;  // while it lives the checkpoint is not pruned
};
/// The checkpoint that a path, perhaps a link, leads to. Error(code data) as verify_checkpoint.
Checkpoint open_checkpoint(const std::filesystem::path& path, std::string_view read = "");
/// The highest step that verifies. What is passed over is told in `skipped`, one line each, when it is given. Nothing valid: nullopt.
std::optional<Checkpoint> newest_valid_checkpoint(const std::filesystem::path& run_dir, std::vector<std::string>* skipped = nullptr);

/// Makes run_dir/name ("best", "last") a link to the checkpoint of a step, in one step. Error(code write).
void set_link(const std::filesystem::path& run_dir, const std::string& name, std::int64_t step);
/// The step that a link names; nullopt where there is no such link. The checkpoint itself may be gone.
std::optional<std::int64_t> linked_step(const std::filesystem::path& run_dir, const std::string& name);

/// Deletes the checkpoints up to step `last` but the newest `keep` of them and those of the steps in `protect`. Those in
/// `passed` did not verify when the run went on: they go, and count in no whole one's place. One that another process reads stays until the
/// next time, and so does one that cannot be removed, for which a line is returned. What has a checkpoint's name and is none stays.
std::vector<std::string> prune_checkpoints(const std::filesystem::path& run_dir, std::int64_t last, int keep,
                                           const std::vector<std::int64_t>& protect, const std::set<std::int64_t>& passed = {});
/// The steps behind `step` of which there are checkpoints.
std::set<std::int64_t> later_checkpoints(const std::filesystem::path& run_dir, std::int64_t step);

}  // namespace kava
