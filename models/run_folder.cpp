#include "models/run_folder.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <optional>
#include <thread>
#include <utility>

#include "engine/cli.h"
#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/files/json.h"
#include "engine/files/unreadable.h"
#include "models/adapter.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

constexpr std::string_view kAdapter = "adapter/";
constexpr std::size_t kMostMetrics = std::size_t{4} << 30;

[[noreturn]] void unusable(const fs::path& path, const std::string& what) {
  throw Error(Exit::preflight, "--out " + shown_path(path), what, "choose another folder");
}

// The step of a line of metrics.jsonl, and whether it is a validation's; nothing for a broken line.
std::optional<std::pair<int64_t, bool>> step_of(const std::string& line) {
  const Json json = Json::parse(line, nullptr, false);
  if (!json.is_object()) return std::nullopt;
  const bool valid = json.contains("valid");
  const Json& object = valid ? json["valid"] : json;
  if (!object.is_object() || !object.contains("step") || !object["step"].is_number_integer()) return std::nullopt;
  return std::pair(object["step"].get<int64_t>(), valid);
}

// The lines of metrics.jsonl that a run at `state` has written. What follows them may be broken in any way: it was not yet safe on the disk
// when the run ended.
std::string known_lines(const fs::path& path, const TrainingState& state) {
  std::error_code ignored;
  if (state.step == 0 || !fs::exists(path, ignored)) return "";
  const std::string text = read_file(path.string(), kMostMetrics);
  std::string kept, broken;
  int64_t number = 0;
  for (std::size_t begin = 0, end; (end = text.find('\n', begin)) != std::string::npos; begin = end + 1) {
    const std::string line = text.substr(begin, end - begin);
    const auto found = step_of(line);
    ++number;
    if (!found) {
      if (broken.empty()) broken = fmt::format("{}:{}", shown_path(path), number);
      continue;
    }
    const auto [step, valid] = *found;
    if (step > state.step || (step == state.step && valid && state.validated_step != step)) continue;
    if (!broken.empty()) throw Error(Exit::data, broken, "is no object with a step", "remove the line");
    kept += line + "\n";
  }
  return kept;
}

bool is_part(const std::string& name) { return name.ends_with(".part"); }

bool same_file(const fs::path& path, const ManifestFile& file) {
  std::error_code failed;
  return fs::is_regular_file(path, failed) && fs::file_size(path, failed) == file.size && !failed &&
         sha256_file(path.string()) == file.sha256;
}

void copy(const fs::path& from, FolderWriter& folder, const std::string& name) {
  const FileReader in(from.string());
  FileWriter out = folder.file(name);
  std::vector<char> chunk(std::size_t{1} << 20);
  for (uint64_t at = 0; at < in.size();) {
    const std::size_t n = in.read_some(at, chunk.data(), chunk.size());
    if (n == 0) break;
    out.write(chunk.data(), n);
    at += n;
  }
  out.commit();
}

// Of what is in a folder; nothing where there is no such folder. Unreadable.
std::vector<std::string> names_in(const fs::path& folder) {
  std::vector<std::string> names;
  std::error_code failed;
  for (fs::directory_iterator entry(folder, failed); !failed && entry != fs::directory_iterator(); entry.increment(failed))
    names.push_back(entry->path().filename().string());
  if (failed && failed != std::errc::no_such_file_or_directory && failed != std::errc::not_a_directory)
    fail_to_read(Exit::data, folder.string(), "list", failed.value());
  return names;
}

}  // namespace

FolderState state_of(const fs::path& path) {
  std::error_code failed;
  for (const char* name : {"last", "best", "adapter"})
    if (is_there(path / name)) return FolderState::saved;
  for (const std::string& name : names_in(path / "checkpoints"))
    if (name.starts_with("step_") && !is_part(name)) return FolderState::saved;
  bool own = false, foreign = false;
  for (const std::string& name : names_in(path)) {
    const auto& known = {"config.toml", "metrics.jsonl", "progress.json", "checkpoints", "log"};
    if (std::find(known.begin(), known.end(), name) != known.end()) own = true;
    else if (!is_part(name)) foreign = true;
  }
  if (own) return foreign ? FolderState::foreign : FolderState::never_saved;
  return foreign || !fs::is_directory(path, failed) ? FolderState::free : FolderState::never_saved;
}

void require_usable(const fs::path& path) {
  require_outside_checkpoints("--out", path.string());
  if (const std::optional<FolderFault> fault = folder_fault(path)) unusable(path, fault->what);
}

RunFolder::RunFolder(fs::path path) : path_(std::move(path)) {
  lock();
  require_links();
  recover_checkpoints(path_);
  for (const char* name : {"adapter", "best", "last", "config.toml", "metrics.jsonl", "progress.json", "log/profile.trace.json"})
    remove_stale_parts(path_ / name);
}

// Some file systems have no symbolic links, and a folder in it may be closed, which would come out at the first checkpoint only.
void RunFolder::require_links() const {
  const fs::path probe = part_beside(path_ / "last"), checkpoints = path_ / "checkpoints";
  std::error_code failed, ignored;
  fs::create_symlink("checkpoints", probe, failed);
  fs::remove(probe, ignored);
  require_disk(path_.string(), failed.value());
  if (failed) unusable(path_, "could not make a symbolic link in it: " + failed.message());
  if (!is_there(checkpoints) || ::access(checkpoints.c_str(), W_OK | X_OK) == 0) return;
  require_disk(checkpoints.string(), errno);
  unusable(path_, fmt::format("{} cannot be written: {}", shown_path(checkpoints), std::strerror(errno)));
}

// A folder that was moved is not to be written to, nor what took its place.
bool RunFolder::is_in_place() const {
  struct stat now = {};
  return ::stat(path_.c_str(), &now) == 0 && identity_ == std::pair<uint64_t, uint64_t>(now.st_dev, now.st_ino);
}

void RunFolder::require_in_place() const {
  if (is_in_place()) return;
  throw Error(Exit::write, shown_path(path_), "was moved or replaced while the run goes on", "put it back, and go on with --resume");
}

void RunFolder::lock() {
  using Clock = std::chrono::steady_clock;
  constexpr int kAttempts = 8;
  const Clock::time_point patient = Clock::now() + std::chrono::seconds(5);
  for (int attempt = 1;; ++attempt) {
    std::error_code failed;
    made_.reset();
    made_ = std::make_unique<MadeFolder>(path_, failed);
    require_disk(path_.string(), failed.value());
    if (failed) unusable(path_, "could not make the folder: " + failed.message());
    std::error_code ignored;
    const fs::path real = fs::canonical(path_, ignored);
    lock_ = std::make_unique<PathLock>(real, PathLock::Kind::exclusive, false);
    if (lock_->error() == 0) {
      struct stat locked = {};
      if (::stat(real.c_str(), &locked) != 0) unusable(path_, fmt::format("could not look at the folder: {}", std::strerror(errno)));
      identity_ = {locked.st_dev, locked.st_ino};
      return;
    }
    // The ranks of a run whose launcher was killed are given the time to end.
    if (lock_->error() == EWOULDBLOCK && Clock::now() < patient) {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      --attempt;
      continue;
    }
    require_disk(path_.string(), lock_->error());
    if (lock_->error() == EWOULDBLOCK) unusable(path_, "another process is training there");
    // Another process that made it and refused to train may just have removed it.
    if (lock_->error() != ENOENT || attempt == kAttempts)
      unusable(path_, fmt::format("could not lock the folder: {}", std::strerror(lock_->error())));
  }
}

void RunFolder::open(const RunConfig& config, const TrainingState& state) {
  require_in_place();
  config_ = config;
  passed_ = later_checkpoints(path_, state.step);
  const fs::path metrics = path_ / "metrics.jsonl", told = path_ / "config.toml";
  const bool had_metrics = is_there(metrics), had_config = is_there(told);
  try {
    const std::string lines = known_lines(metrics, state);
    write_file(told.string(), to_toml(config, path_.string()));
    write_file(metrics.string(), lines);
    metrics_.emplace(metrics.string());
  } catch (...) {
    std::error_code ignored;
    if (!had_metrics) fs::remove(metrics, ignored);
    if (!had_config) fs::remove(told, ignored);
    throw;
  }
  set_links(state);
  prune(state);
}

void RunFolder::append(const std::string& line) { metrics_->append(line); }

void RunFolder::save(const Model& model, const TrainingState& state) {
  require_in_place();
  // A checkpoint must not tell of a step whose line could be lost.
  metrics_->sync();
  write_checkpoint(path_, state.step, config_hash(config_), [&](FolderWriter& folder) {
    save_adapter(model, folder, "adapter/", state.last_stage);
    save_training_state(folder, model, state);
  });
  passed_.erase(state.step);
  set_links(state);
  prune(state);
}

void RunFolder::prune(const TrainingState& state) {
  if (state.skipped_in_row > 0) return;  // what came before the steps that fail may be all that is sound
  std::vector<int64_t> protect;
  if (state.best) protect.push_back(state.best->step);
  for (const std::string& line : prune_checkpoints(path_, state.step, static_cast<int>(config_.train.keep_checkpoints), protect, passed_))
    print_note(line);
}

void RunFolder::set_links(const TrainingState& state) {
  auto link = [&](const char* name, int64_t step) {
    std::error_code ignored;
    if (fs::exists(path_ / "checkpoints" / fmt::format("step_{}", step), ignored) && linked_step(path_, name) != step)
      set_link(path_, name, step);
  };
  link("last", state.step);
  link("best", state.best ? state.best->step : state.step);
}

void RunFolder::publish_adapter(int64_t step) {
  require_in_place();
  const fs::path checkpoint = path_ / "checkpoints" / fmt::format("step_{}", step);
  std::vector<ManifestFile> files;
  bool same = true;
  for (const ManifestFile& file : read_manifest(checkpoint).files) {
    if (!file.name.starts_with(kAdapter)) continue;
    files.push_back(file);
    same = same && same_file(path_ / file.name, file);
  }
  if (same) return;
  FolderWriter folder(path_ / "adapter");
  for (const ManifestFile& file : files) {
    copy(checkpoint / file.name, folder, file.name.substr(kAdapter.size()));
    if (folder.files().back().sha256 != file.sha256)
      throw Error(Exit::data, shown_path(checkpoint / file.name), "has another SHA-256 than the manifest says",
                  "resume from another checkpoint");
  }
  folder.commit();
}

}  // namespace kava
