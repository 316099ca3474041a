#include "engine/files/checkpoint.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <set>

#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/files/json.h"
#include "engine/files/unreadable.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

constexpr int kFormatVersion = 1;
constexpr const char* kManifest = "manifest.json";
constexpr const char* kState = "state.json";
constexpr const char* kAdapter = "adapter/";
constexpr const char* kTemplates = "adapter/additional_chat_templates/";  // of an adapter that is a whole model folder
constexpr std::size_t kLargestManifest = std::size_t{16} << 20;

[[noreturn]] void fail_data(const fs::path& path, const std::string& what, const std::string& remedy = "use another checkpoint") {
  throw Error(Exit::data, shown_path(path), what, remedy);
}

// Throws where a file operation that `error` came from failed.
void require(const std::error_code& error, const fs::path& path, const char* action) {
  if (error)
    throw Error(Exit::write, shown_path(path), fmt::format("could not {}: {}", action, error.message()),
                "check the path, its permissions and the space on the disk");
}

fs::path folder_of(const fs::path& run_dir) { return run_dir / "checkpoints"; }
std::string name_of_step(std::int64_t step) { return "step_" + std::to_string(step); }

// N of "step_N", written the one way that name_of_step writes it.
std::optional<std::int64_t> parse_step(const std::string& name) {
  if (!name.starts_with("step_")) return std::nullopt;
  std::int64_t step = 0;
  std::from_chars(name.data() + 5, name.data() + name.size(), step);
  if (step < 0 || name != name_of_step(step)) return std::nullopt;
  return step;
}

// N of ".step_N.ANYTHING.part".
std::optional<std::int64_t> parse_part(const std::string& name) {
  if (!name.starts_with(".step_") || !name.ends_with(".part")) return std::nullopt;
  return parse_step(name.substr(1, name.find('.', 1) - 1));
}

struct Found {
  std::int64_t step = 0;
  fs::path path;
  bool part = false;  // what a killed process left of it
};

// Everything in the folder of checkpoints that may be one: the highest step first, and of one step the parts last.
std::vector<Found> list_checkpoints(const fs::path& run_dir) {
  std::vector<Found> found;
  std::error_code error;
  fs::directory_iterator entry(folder_of(run_dir), error);
  if (error == std::errc::no_such_file_or_directory || error == std::errc::not_a_directory) return found;
  for (; !error && entry != fs::directory_iterator(); entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    if (const auto step = parse_step(name)) found.push_back({*step, entry->path(), false});
    if (const auto step = parse_part(name)) found.push_back({*step, entry->path(), true});
  }
  if (error) fail_to_read(Exit::data, folder_of(run_dir).string(), "list", error.value());
  std::sort(found.begin(), found.end(), [](const Found& a, const Found& b) {
    return a.step != b.step ? a.step > b.step : std::pair(a.part, a.path) < std::pair(b.part, b.path);
  });
  return found;
}

// Names of all files in a checkpoint folder but the manifest, sorted. Anything else than files and the adapter folder is Error(code data).
std::vector<std::string> list_files(const fs::path& directory) {
  std::vector<std::string> names;
  std::error_code error;
  fs::recursive_directory_iterator entry(directory, error);
  for (; !error && entry != fs::recursive_directory_iterator(); entry.increment(error)) {
    const std::string name = entry->path().lexically_relative(directory).generic_string();
    const fs::file_status status = entry->symlink_status(error);
    if (error) break;
    if (fs::is_directory(status) && (name + "/" == kAdapter || name + "/" == kTemplates)) continue;
    if (!fs::is_regular_file(status)) fail_data(entry->path(), "is neither a file nor the adapter folder", "remove it");
    if (name != kManifest) names.push_back(name);
  }
  if (error) fail_to_read(Exit::data, directory.string(), "list", error.value());
  std::sort(names.begin(), names.end());
  return names;
}

bool is_safe_name(std::string_view name) {
  for (const std::string_view folder : {kTemplates, kAdapter})
    if (name.starts_with(folder)) {
      name.remove_prefix(folder.size());
      break;
    }
  return !name.empty() && name != "." && name != ".." && name != kManifest && name.find_first_of(std::string_view("/\\\0", 3)) == name.npos;
}

bool is_sha256(const std::string& text) { return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos; }

ManifestFile parse_file(const fs::path& path, const Json& entry) {
  const bool typed = entry.is_object() && entry.size() == 3 && entry.contains("name") && entry["name"].is_string() &&
                     entry.contains("size") && entry["size"].is_number_unsigned() && entry.contains("sha256") &&
                     entry["sha256"].is_string();
  if (!typed) fail_data(path, "has a file entry without name, size and sha256");
  ManifestFile file{entry["name"].get<std::string>(), entry["size"].get<std::uint64_t>(), entry["sha256"].get<std::string>()};
  if (!is_safe_name(file.name)) fail_data(path, "names the file \"" + escaped(file.name) + "\", which is not FILE or adapter/FILE");
  if (!is_sha256(file.sha256)) fail_data(path, "has a malformed sha256 for " + escaped(file.name));
  return file;
}

Manifest parse_manifest(const fs::path& path) {
  const Json json = read_json(path.string(), kLargestManifest);
  if (!json.is_object() || !json.contains("format_version")) fail_data(path, "has no format_version");
  if (json["format_version"] != kFormatVersion)
    fail_data(path, "has format_version " + escaped(json["format_version"].dump(-1, ' ', true)),
              fmt::format("this program reads {}", kFormatVersion));
  const bool typed = json.contains("step") && json["step"].is_number_unsigned() &&
                     json["step"].get<std::uint64_t>() < (std::uint64_t{1} << 62) && json.contains("config_hash") &&
                     json["config_hash"].is_string() && json.contains("files") && json["files"].is_array();
  if (!typed) fail_data(path, "lacks one of step, config_hash and files, or has it in another type");
  Manifest manifest;
  manifest.step = json["step"].get<std::int64_t>();
  manifest.config_hash = json["config_hash"].get<std::string>();
  std::set<std::string> names;
  for (const Json& entry : json["files"]) {
    manifest.files.push_back(parse_file(path, entry));
    if (!names.insert(manifest.files.back().name).second) fail_data(path, "names " + escaped(manifest.files.back().name) + " twice");
  }
  std::sort(manifest.files.begin(), manifest.files.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
  return manifest;
}

void remove_checkpoint(const fs::path& path) {
  std::error_code error;
  // Of a link only the link goes, not what it leads to. Without its manifest a checkpoint is none, so a kill in the middle leaves no half
  // of one that looks whole.
  if (!fs::is_symlink(fs::symlink_status(path, error))) fs::remove(path / kManifest, error);
  remove_tree(path, error);
  require(error, path, "remove");
}

// Whether it may be removed as a checkpoint: a link, what has a manifest, or what is left of one whose removal a kill ended.
bool is_removable(const fs::path& path) {
  std::error_code failed;
  if (fs::is_symlink(fs::symlink_status(path, failed)) || is_there(path / kManifest)) return true;
  const auto& held = {"adapter", "optimizer.safetensors", kState};
  for (fs::directory_iterator entry(path, failed); !failed && entry != fs::directory_iterator(); entry.increment(failed))
    if (std::find(held.begin(), held.end(), entry->path().filename().string()) == held.end()) return false;
  return failed != std::errc::not_a_directory;  // of one that cannot be listed the removal tells
}

// Nothing where it does not verify. Unreadable.
std::optional<Manifest> verified(const fs::path& path, std::int64_t step) {
  try {
    Manifest manifest = verify_checkpoint(path);
    if (manifest.step == step) return manifest;
  } catch (const Unreadable&) {
    throw;
  } catch (const Error& e) {
    if (e.code() != Exit::data) throw;
  }
  return std::nullopt;
}

}  // namespace

bool Manifest::has(std::string_view name) const {
  return std::any_of(files.begin(), files.end(), [&](const ManifestFile& f) { return f.name == name; });
}

fs::path write_checkpoint(const fs::path& run_dir, std::int64_t step, const std::string& config_hash,
                          const std::function<void(FolderWriter&)>& fill) {
  KAVA_CHECK(step >= 0, "checkpoint of step {}", step);
  recover_checkpoints(run_dir);
  const fs::path target = folder_of(run_dir) / name_of_step(step);
  FolderWriter folder(target);
  fill(folder);
  Json files = Json::array();
  std::vector<ManifestFile> written = folder.files();
  std::sort(written.begin(), written.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
  for (const ManifestFile& file : written) {
    KAVA_CHECK(is_safe_name(file.name), "{} in a checkpoint", file.name);
    files.push_back({{"name", file.name}, {"size", file.size}, {"sha256", file.sha256}});
  }
  const Json manifest = {{"format_version", kFormatVersion}, {"step", step}, {"config_hash", config_hash}, {"files", files}};
  folder.write_file(kManifest, manifest.dump(1) + "\n");
  folder.commit();
  return target;
}

void recover_checkpoints(const fs::path& run_dir) {
  for (const Found& found : list_checkpoints(run_dir)) {
    if (!found.part || is_being_written(found.path)) continue;
    const fs::path target = folder_of(run_dir) / name_of_step(found.step);
    if (!verified(target, found.step) && verified(found.path, found.step))
      if (const int error = put_in_place(found.path, target)) fail_write(target.string(), error);
    remove_checkpoint(found.path);
  }
}

Manifest read_manifest(const fs::path& directory) { return parse_manifest(directory / kManifest); }

Manifest verify_checkpoint(const fs::path& directory, std::string_view read) {
  Manifest manifest = parse_manifest(directory / kManifest);
  for (const std::string& name : list_files(directory))
    if (!manifest.has(name)) fail_data(directory / name, "is not in the manifest", "remove it if you put it there");
  for (const ManifestFile& file : manifest.files) {
    const fs::path path = directory / file.name;
    if (const std::uint64_t size = FileReader(path.string()).size(); size != file.size)
      fail_data(path, fmt::format("has {} bytes, but the manifest says {}", size, file.size));
    if ((file.name.starts_with(read) || file.name == kState) && sha256_file(path.string()) != file.sha256)
      fail_data(path, "has another SHA-256 than the manifest says");
  }
  return manifest;
}

Checkpoint open_checkpoint(const fs::path& path, std::string_view read) {
  constexpr int kAttempts = 8;
  for (int attempt = 1;; ++attempt) {
    std::error_code failed;
    const fs::path named = path.has_filename() ? path : path.parent_path();
    // A link may move at any moment, so it is followed once.
    const fs::path real = fs::is_symlink(fs::symlink_status(named, failed)) ? fs::canonical(named, failed) : named;
    if (failed && attempt < kAttempts) continue;
    if (failed == std::errc::no_such_file_or_directory) fail_data(path, "no such checkpoint", "check the path");
    if (failed) fail_to_read(Exit::data, path.string(), "open", failed.value());
    auto lock = std::make_shared<PathLock>(real, PathLock::Kind::shared, true);
    if (lock->error() == ENOENT && attempt < kAttempts) continue;  // pruned or replaced in between
    return {real, verify_checkpoint(real, read), std::move(lock)};
  }
}

std::optional<Checkpoint> newest_valid_checkpoint(const fs::path& run_dir, std::vector<std::string>* skipped) {
  for (const Found& found : list_checkpoints(run_dir)) {
    if (found.part && (is_being_written(found.path) || !verified(found.path, found.step))) continue;
    try {
      Checkpoint checkpoint = open_checkpoint(found.path);
      if (checkpoint.manifest.step != found.step)
        fail_data(found.path / kManifest, fmt::format("is that of step {}", checkpoint.manifest.step));
      return checkpoint;
    } catch (const Unreadable&) {
      throw;
    } catch (const Error& e) {
      if (e.code() != Exit::data) throw;
      if (skipped) skipped->push_back(fmt::format("{}: {}", name_of_step(found.step), e.what()));
    }
  }
  return std::nullopt;
}

void set_link(const fs::path& run_dir, const std::string& name, std::int64_t step) {
  const fs::path link = run_dir / name, temporary = part_beside(link);
  std::error_code failed;
  fs::create_directory_symlink(fs::path("checkpoints") / name_of_step(step), temporary, failed);
  require(failed, link, "make the link");
  int error = is_there(link) && !fs::is_symlink(fs::symlink_status(link, failed)) ? EEXIST : put_in_place(temporary, link);
  fs::remove(temporary, failed);
  if (error != 0) fail_write(link.string(), error);
}

std::optional<std::int64_t> linked_step(const fs::path& run_dir, const std::string& name) {
  std::error_code error;
  const fs::path target = fs::read_symlink(run_dir / name, error);
  if (error) return std::nullopt;
  return parse_step(target.filename().string());
}

std::vector<std::string> prune_checkpoints(const fs::path& run_dir, std::int64_t last, int keep, const std::vector<std::int64_t>& protect,
                                           const std::set<std::int64_t>& passed) {
  KAVA_CHECK(keep >= 0, "{} checkpoints to keep", keep);
  std::vector<std::string> stay;
  std::vector<Found> all = list_checkpoints(run_dir);
  std::erase_if(all, [&](const Found& found) { return found.part || found.step > last || !is_removable(found.path); });
  int kept = 0;
  for (const Found& found : all) {
    if (!passed.contains(found.step) && ++kept <= keep) continue;
    if (std::find(protect.begin(), protect.end(), found.step) != protect.end()) continue;
    const PathLock lock(found.path, PathLock::Kind::exclusive, false);
    if (lock.error() == EWOULDBLOCK) continue;
    try {
      remove_checkpoint(found.path);
    } catch (const Error& e) {
      stay.push_back(fmt::format("an old checkpoint stays: {}", e.what()));
    }
  }
  return stay;
}

std::set<std::int64_t> later_checkpoints(const fs::path& run_dir, std::int64_t step) {
  std::set<std::int64_t> steps;
  for (const Found& found : list_checkpoints(run_dir))
    if (!found.part && found.step > step) steps.insert(found.step);
  return steps;
}

}  // namespace kava
