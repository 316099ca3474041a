#include "models/run_folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/files/json.h"
#include "models/adapter.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

constexpr std::size_t kMostMetrics = std::size_t{4} << 30;

std::string shown(const fs::path& path) { return escaped(path.string(), 4096); }

[[noreturn]] void unusable(const fs::path& path, const std::string& what) {
  throw Error(Exit::preflight, "--out " + shown(path), what, "choose another folder");
}

[[noreturn]] void write_failed(const fs::path& path, int error) {
  throw Error(Exit::write, shown(path), fmt::format("could not write: {}", std::strerror(error)), "free some space or check the disk");
}

// The lines of metrics.jsonl that a run at `state` has written, and nothing of a line that a kill cut short.
std::string known_lines(const fs::path& path, const TrainingState& state) {
  std::error_code ignored;
  if (!fs::exists(path, ignored)) return "";
  const std::string text = read_file(path.string(), kMostMetrics);
  std::string kept;
  int64_t number = 0;
  for (std::size_t begin = 0, end; (end = text.find('\n', begin)) != std::string::npos; begin = end + 1) {
    const std::string line = text.substr(begin, end - begin), where = fmt::format("{}:{}", shown(path), ++number);
    const Json json = parse_json(line, where);
    const bool valid = json.is_object() && json.contains("valid");
    const Json object = valid ? json["valid"] : json;
    if (!object.is_object() || !object.contains("step") || !object["step"].is_number_integer())
      throw Error(Exit::data, where, "is no object with a step", "remove the line");
    const int64_t step = object["step"].get<int64_t>();
    if (step < state.step || (step == state.step && (!valid || state.validated_step == step))) kept += line + "\n";
  }
  return kept;
}

bool same_file(const fs::path& path, const ManifestFile& file) {
  std::error_code failed;
  return fs::is_regular_file(path, failed) && fs::file_size(path, failed) == file.size && !failed &&
         sha256_file(path.string()) == file.sha256;
}

void copy_durably(const fs::path& from, const fs::path& to) {
  const FileReader in(from.string());
  FileWriter out(to.string());
  std::vector<char> chunk(std::size_t{1} << 20);
  for (uint64_t at = 0; at < in.size();) {
    const std::size_t n = in.read_some(at, chunk.data(), chunk.size());
    if (n == 0) break;
    out.write(chunk.data(), n);
    at += n;
  }
  out.commit();
}

}  // namespace

bool holds_run(const fs::path& path) {
  std::error_code ignored;
  for (const char* name : {"config.toml", "metrics.jsonl", "checkpoints"})
    if (fs::exists(path / name, ignored)) return true;
  return false;
}

void require_usable(const fs::path& path) {
  std::error_code failed;
  fs::path at = fs::absolute(path, failed).lexically_normal();
  while (!at.empty() && !fs::exists(at, failed) && at.has_relative_path()) at = at.parent_path();
  if (!fs::is_directory(at, failed)) unusable(path, shown(at) + " is no folder");
  if (::access(at.c_str(), W_OK | X_OK) != 0) unusable(path, fmt::format("{} cannot be written: {}", shown(at), std::strerror(errno)));
}

RunFolder::RunFolder(fs::path path) : path_(std::move(path)) {
  std::error_code failed;
  fs::create_directories(path_, failed);
  if (failed) unusable(path_, "could not make the folder: " + failed.message());
  lock_ = ::open(path_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (lock_ < 0) unusable(path_, fmt::format("could not open the folder: {}", std::strerror(errno)));
  if (::flock(lock_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
    ::close(lock_);
    unusable(path_, "another process is training there");
  }
}

RunFolder::~RunFolder() {
  if (metrics_ >= 0) ::close(metrics_);
  if (lock_ >= 0) ::close(lock_);
}

void RunFolder::open(const RunConfig& config, const TrainingState& state) {
  config_ = config;
  const fs::path metrics = path_ / "metrics.jsonl";
  const std::string lines = known_lines(metrics, state);
  write_file((path_ / "config.toml").string(), to_toml(config));
  write_file(metrics.string(), lines);
  metrics_ = ::open(metrics.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC);
  if (metrics_ < 0) write_failed(metrics, errno);
  set_links(state);
}

void RunFolder::append(const std::string& line) {
  const std::string text = line + "\n";
  const off_t before = ::lseek(metrics_, 0, SEEK_END);
  for (std::size_t done = 0; done < text.size();) {
    const ssize_t n = ::write(metrics_, text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      const int error = errno;
      (void)!::ftruncate(metrics_, before);
      write_failed(path_ / "metrics.jsonl", error);
    }
    done += static_cast<std::size_t>(n);
  }
}

void RunFolder::save(const Model& model, const TrainingState& state) {
  // A checkpoint must not tell of a step whose line could be lost.
  if (::fdatasync(metrics_) != 0 && errno != EINVAL && errno != EROFS) write_failed(path_ / "metrics.jsonl", errno);
  write_checkpoint(path_, state.step, config_hash(config_), [&](const fs::path& part) {
    save_adapter(model, (part / "adapter").string());
    save_training_state(part, model, state);
  });
  set_links(state);
  std::vector<int64_t> protect;
  if (state.best) protect.push_back(state.best->step);
  prune_checkpoints(path_, state.step, static_cast<int>(config_.train.keep_checkpoints), protect);
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

void RunFolder::publish_adapter(const Checkpoint& checkpoint) {
  const std::string prefix = "adapter/";
  std::error_code failed;
  fs::create_directories(path_ / "adapter", failed);
  if (failed) write_failed(path_ / "adapter", failed.value());
  for (const ManifestFile& file : checkpoint.manifest.files)
    if (file.name.starts_with(prefix) && !same_file(path_ / file.name, file)) copy_durably(checkpoint.path / file.name, path_ / file.name);
}

}  // namespace kava
