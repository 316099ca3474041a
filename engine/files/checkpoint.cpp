#include "engine/files/checkpoint.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <set>

#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/files/json.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

constexpr int kFormatVersion = 1;
constexpr const char* kManifest = "manifest.json";
constexpr const char* kAdapter = "adapter/";
constexpr const char* kTemplates = "adapter/additional_chat_templates/";  // of an adapter that is a whole model folder
constexpr std::size_t kLargestManifest = std::size_t{16} << 20;

[[noreturn]] void fail_data(const fs::path& path, const std::string& what, const std::string& remedy = "use another checkpoint") {
  throw Error(Exit::data, escaped(path.string(), 4096), what, remedy);
}

// Throws where a file operation that `error` came from failed.
void require(const std::error_code& error, const fs::path& path, const char* action) {
  if (error)
    throw Error(Exit::write, escaped(path.string(), 4096), fmt::format("could not {}: {}", action, error.message()),
                "check the path, its permissions and the space on the disk");
}

fs::path folder_of(const fs::path& run_dir) { return run_dir / "checkpoints"; }
std::string name_of_step(std::int64_t step) { return "step_" + std::to_string(step); }
fs::path part_of(const fs::path& run_dir, std::int64_t step) { return folder_of(run_dir) / fmt::format(".step_{}.part", step); }

// N of "step_N", written the one way that name_of_step writes it.
std::optional<std::int64_t> parse_step(const std::string& name) {
  if (!name.starts_with("step_")) return std::nullopt;
  std::int64_t step = 0;
  std::from_chars(name.data() + 5, name.data() + name.size(), step);
  if (step < 0 || name != name_of_step(step)) return std::nullopt;
  return step;
}

// All steps for which there is a folder, the highest first.
std::vector<std::int64_t> steps_of(const fs::path& run_dir) {
  std::vector<std::int64_t> steps;
  std::error_code error;
  fs::directory_iterator entry(folder_of(run_dir), error);
  if (error == std::errc::no_such_file_or_directory) return steps;
  for (; !error && entry != fs::directory_iterator(); entry.increment(error))
    if (const auto step = parse_step(entry->path().filename().string())) steps.push_back(*step);
  if (error) fail_data(folder_of(run_dir), "could not list: " + error.message(), "check its permissions");
  std::sort(steps.rbegin(), steps.rend());
  return steps;
}

// Names of all files in a checkpoint folder but the manifest, sorted. Anything else than files and the adapter folder is Error(`code`).
std::vector<std::string> list_files(const fs::path& directory, Exit code) {
  std::vector<std::string> names;
  std::error_code error;
  fs::recursive_directory_iterator entry(directory, error);
  for (; !error && entry != fs::recursive_directory_iterator(); entry.increment(error)) {
    const std::string name = entry->path().lexically_relative(directory).generic_string();
    const fs::file_status status = entry->symlink_status(error);
    if (error) break;
    if (fs::is_directory(status) && (name + "/" == kAdapter || name + "/" == kTemplates)) continue;
    if (!fs::is_regular_file(status))
      throw Error(code, escaped(entry->path().string(), 4096), "is neither a file nor the adapter folder", "remove it");
    if (name != kManifest) names.push_back(name);
  }
  if (error) throw Error(code, escaped(directory.string(), 4096), "could not list: " + error.message(), "check its permissions");
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

void sync_file(const fs::path& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  const bool done = descriptor >= 0 && ::fsync(descriptor) == 0;
  const std::error_code error(done ? 0 : errno, std::generic_category());
  if (descriptor >= 0) ::close(descriptor);
  require(error, path, "write");
}

void remove_tree(const fs::path& path) {
  std::error_code error;
  // Of a link only the link goes, not what it leads to. Without its manifest a checkpoint is none, so a kill in the middle leaves no half
  // of one that looks whole.
  if (!fs::is_symlink(fs::symlink_status(path, error))) fs::remove(path / kManifest, error);
  fs::remove_all(path, error);
  require(error, path, "remove");
}

void remove_leftovers(const fs::path& run_dir) {
  std::vector<fs::path> leftovers;
  std::error_code error;
  for (fs::directory_iterator entry(folder_of(run_dir), error); !error && entry != fs::directory_iterator(); entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    if (name.starts_with(".step_") && name.ends_with(".part")) leftovers.push_back(entry->path());
  }
  require(error, folder_of(run_dir), "list");
  for (const fs::path& path : leftovers) remove_tree(path);
}

}  // namespace

bool Manifest::has(std::string_view name) const {
  return std::any_of(files.begin(), files.end(), [&](const ManifestFile& f) { return f.name == name; });
}

fs::path begin_checkpoint(const fs::path& run_dir, std::int64_t step) {
  KAVA_CHECK(step >= 0, "checkpoint of step {}", step);
  std::error_code error;
  fs::create_directories(folder_of(run_dir), error);
  require(error, folder_of(run_dir), "make the folder");
  remove_leftovers(run_dir);
  const fs::path part = part_of(run_dir, step);
  fs::create_directory(part, error);
  require(error, part, "make the folder");
  return part;
}

fs::path commit_checkpoint(const fs::path& run_dir, std::int64_t step, const std::string& config_hash) {
  const fs::path part = part_of(run_dir, step), target = folder_of(run_dir) / name_of_step(step);
  Json files = Json::array();
  bool adapter = false;
  for (const std::string& name : list_files(part, Exit::write)) {
    KAVA_CHECK(is_safe_name(name), "{} in a checkpoint", name);
    adapter |= name.starts_with(kAdapter);
    sync_file(part / name);
    files.push_back({{"name", name}, {"size", fs::file_size(part / name)}, {"sha256", sha256_file((part / name).string())}});
  }
  const Json manifest = {{"format_version", kFormatVersion}, {"step", step}, {"config_hash", config_hash}, {"files", files}};
  if (adapter) sync_directory(part / "adapter");
  write_file((part / kManifest).string(), manifest.dump(1) + "\n");
  sync_directory(part);

  std::error_code error;
  const fs::path replaced = folder_of(run_dir) / fmt::format(".step_{}.replaced.part", step);
  if (is_there(target)) fs::rename(target, replaced, error);
  require(error, target, "replace");
  fs::rename(part, target, error);
  require(error, target, "rename to");
  sync_directory(folder_of(run_dir));
  remove_tree(replaced);
  return target;
}

fs::path write_checkpoint(const fs::path& run_dir, std::int64_t step, const std::string& config_hash,
                          const std::function<void(const fs::path&)>& fill) {
  try {
    fill(begin_checkpoint(run_dir, step));
    return commit_checkpoint(run_dir, step, config_hash);
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(part_of(run_dir, step), ignored);
    throw;
  }
}

Manifest verify_checkpoint(const fs::path& directory, std::string_view read) {
  Manifest manifest = parse_manifest(directory / kManifest);
  for (const std::string& name : list_files(directory, Exit::data))
    if (!manifest.has(name)) fail_data(directory / name, "is not in the manifest", "remove it if you put it there");
  for (const ManifestFile& file : manifest.files) {
    const fs::path path = directory / file.name;
    if (const std::uint64_t size = FileReader(path.string()).size(); size != file.size)
      fail_data(path, fmt::format("has {} bytes, but the manifest says {}", size, file.size));
    if (file.name.starts_with(read) && sha256_file(path.string()) != file.sha256)
      fail_data(path, "has another SHA-256 than the manifest says");
  }
  return manifest;
}

std::optional<Checkpoint> newest_valid_checkpoint(const fs::path& run_dir, std::vector<std::string>* skipped) {
  for (std::int64_t step : steps_of(run_dir)) {
    const fs::path path = folder_of(run_dir) / name_of_step(step);
    try {
      Manifest manifest = verify_checkpoint(path);
      if (manifest.step != step) fail_data(path / kManifest, fmt::format("is that of step {}", manifest.step));
      return Checkpoint{path, std::move(manifest)};
    } catch (const Error& e) {
      if (e.code() != Exit::data) throw;
      if (skipped) skipped->push_back(e.what());
    }
  }
  return std::nullopt;
}

void set_link(const fs::path& run_dir, const std::string& name, std::int64_t step) {
  const fs::path link = run_dir / name, temporary = run_dir / fmt::format(".{}.part", name);
  std::error_code error;
  fs::remove(temporary, error);
  fs::create_directory_symlink(fs::path("checkpoints") / name_of_step(step), temporary, error);
  require(error, link, "make the link");
  fs::rename(temporary, link, error);
  if (error) {
    std::error_code ignored;
    fs::remove(temporary, ignored);
  }
  require(error, link, "make the link");
  sync_directory(run_dir);
}

std::optional<std::int64_t> linked_step(const fs::path& run_dir, const std::string& name) {
  std::error_code error;
  const fs::path target = fs::read_symlink(run_dir / name, error);
  if (error) return std::nullopt;
  return parse_step(target.filename().string());
}

void prune_checkpoints(const fs::path& run_dir, std::int64_t last, int keep, const std::vector<std::int64_t>& protect) {
  KAVA_CHECK(keep >= 1, "{} checkpoints to keep", keep);
  std::vector<std::int64_t> steps = steps_of(run_dir);
  std::erase_if(steps, [&](std::int64_t step) { return step > last; });
  for (std::size_t i = static_cast<std::size_t>(keep); i < steps.size(); ++i)
    if (std::find(protect.begin(), protect.end(), steps[i]) == protect.end()) remove_tree(folder_of(run_dir) / name_of_step(steps[i]));
}

}  // namespace kava
