// Checkpoints of a run: checkpoints/step_N, a folder that is either whole or not there.
//
// It is written as checkpoints/.step_N.part; manifest.json, which names every other file with its size and SHA-256, comes last; then the
// folder is renamed. A kill at any moment leaves the older checkpoints whole and at most a .part folder, which the next begin_checkpoint
// removes.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace kava {

struct ManifestFile {
  std::string name;  // FILE or adapter/FILE
  std::uint64_t size = 0;
  std::string sha256;
};

struct Manifest {
  std::int64_t step = 0;
  std::string config_hash;
  std::vector<ManifestFile> files;  // by name

  bool has(std::string_view name) const;
};

/// Removes what a killed run left and makes the empty folder to write the files of this step into, with its adapter/ subfolder made by the
/// caller. Error(code write).
std::filesystem::path begin_checkpoint(const std::filesystem::path& run_dir, std::int64_t step);

/// Writes the manifest over all files in the folder that begin_checkpoint gave, makes everything durable and renames it to
/// checkpoints/step_N, in place of an older one of this step. Returns that path. Error(code write).
std::filesystem::path commit_checkpoint(const std::filesystem::path& run_dir, std::int64_t step, const std::string& config_hash);

/// begin, `fill` with the folder to write into, commit. Where any of them throws, the unfinished folder is removed and the error goes on.
std::filesystem::path write_checkpoint(const std::filesystem::path& run_dir, std::int64_t step, const std::string& config_hash,
                                       const std::function<void(const std::filesystem::path&)>& fill);

/// The manifest of a checkpoint folder after checking every file against it. Error(code data) naming the file where one is missing, not in
/// the manifest, or changed; or the manifest is malformed or of another format version. `read`: what the names of the files begin with that
/// are going to be read; of the others only the size is checked.
Manifest verify_checkpoint(const std::filesystem::path& directory, std::string_view read = "");

struct Checkpoint {
  std::filesystem::path path;
  Manifest manifest;
};
/// The highest step that verifies. What is passed over is told in `skipped`, one line each, when it is given. Nothing valid: nullopt.
std::optional<Checkpoint> newest_valid_checkpoint(const std::filesystem::path& run_dir, std::vector<std::string>* skipped = nullptr);

/// Makes run_dir/name ("best", "last") a link to the checkpoint of a step, in one step. Error(code write).
void set_link(const std::filesystem::path& run_dir, const std::string& name, std::int64_t step);
/// The step that a link names; nullopt where there is no such link. The checkpoint itself may be gone.
std::optional<std::int64_t> linked_step(const std::filesystem::path& run_dir, const std::string& name);

/// Deletes the checkpoints up to step `last` but the newest `keep` (at least 1) of them and those of the steps in `protect`. Later ones did
/// not verify when the run went on, and must not count in the place of whole ones. Error(code write).
void prune_checkpoints(const std::filesystem::path& run_dir, std::int64_t last, int keep, const std::vector<std::int64_t>& protect);

}  // namespace kava
