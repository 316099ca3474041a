#include "engine/files/writers.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "engine/error.h"
#include "engine/files/digest.h"
#include "engine/files/disk.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

constexpr std::size_t kBuffer = std::size_t{1} << 20;

// Returns 0 or the error.
int write_all(int descriptor, const void* bytes, std::size_t count) {
  const char* at = static_cast<const char*>(bytes);
  while (count > 0) {
    const ssize_t n = disk::write(descriptor, at, count);
    if (n < 0) return errno;
    at += n;
    count -= static_cast<std::size_t>(n);
  }
  return 0;
}

constexpr int kAttempts = 8;  // at a name that no process cleaning up takes for a killed one's before it is locked

}  // namespace

FileWriter::FileWriter(const std::string& path) : target_(path), final_(path) {
  if (path.empty() || path.find('\0') != std::string::npos) fail_write(path, EINVAL);
  struct stat status;
  if (::stat(path.c_str(), &status) == 0) {
    if (S_ISDIR(status.st_mode)) fail_write(path, EISDIR);
    if (!S_ISREG(status.st_mode)) {  // a rename would replace the device or the pipe by a file
      descriptor_ = disk::open(path, O_WRONLY | O_NONBLOCK | O_NOCTTY);
      if (descriptor_ < 0) fail_write(path, errno);
      ::fcntl(descriptor_, F_SETFL, ::fcntl(descriptor_, F_GETFL) & ~O_NONBLOCK);
      return;
    }
    std::error_code ignored;
    if (auto resolved = fs::canonical(path, ignored); !ignored) final_ = resolved.string();
  }
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    if (descriptor_ >= 0) ::close(descriptor_), forget_unfinished(temporary_);
    temporary_ = part_beside(final_).string();
    descriptor_ = disk::open(temporary_, O_WRONLY | O_CREAT | O_EXCL);
    if (descriptor_ < 0) fail_write(path, errno);
    tell_unfinished(temporary_);
    if (::flock(descriptor_, LOCK_EX | LOCK_NB) == 0) {
      if (::fstat(descriptor_, &status) == 0 && status.st_nlink > 0) return;
    } else if (errno != EWOULDBLOCK) {
      return;  // a file system without locks, where nothing cleans up either
    }
  }
}

FileWriter::FileWriter(FolderWriter& folder, const std::string& name)
    : target_((folder.target_ / name).string()),
      temporary_((folder.part_ / name).string()),
      folder_(&folder),
      name_(name),
      digest_(std::make_unique<Digest>()) {
  descriptor_ = disk::open(temporary_, O_WRONLY | O_CREAT | O_EXCL);
  if (descriptor_ < 0) fail_write(target_, errno);
  tell_unfinished(temporary_);
}

FileWriter::~FileWriter() { abandon(); }

void FileWriter::abandon() {
  if (descriptor_ < 0) return;
  ::close(std::exchange(descriptor_, -1));
  if (temporary_.empty()) return;
  ::unlink(temporary_.c_str());
  forget_unfinished(temporary_);
}

void FileWriter::write(const void* bytes, std::size_t count) {
  KAVA_CHECK(descriptor_ >= 0, "{} is already written", target_);
  if (buffer_.size() + count > kBuffer) {
    put(buffer_.data(), buffer_.size());
    buffer_.clear();
  }
  if (count >= kBuffer) put(bytes, count);
  else buffer_.append(static_cast<const char*>(bytes), count);
}

void FileWriter::put(const void* bytes, std::size_t count) {
  if (count == 0) return;
  if (const int error = write_all(descriptor_, bytes, count)) {
    abandon();
    fail_write(target_, error);
  }
  size_ += count;
  if (digest_) digest_->add(bytes, count);
}

void FileWriter::commit() {
  KAVA_CHECK(descriptor_ >= 0, "{} is already written", target_);
  put(buffer_.data(), buffer_.size());
  int error = disk::sync(descriptor_) == 0 ? 0 : errno;
  if (error == 0 && !folder_ && !temporary_.empty()) error = put_in_place(temporary_, final_);
  if (error != 0) {
    abandon();
    fail_write(target_, error);
  }
  ::close(std::exchange(descriptor_, -1));  // only now: the lock on the part ends with it
  if (folder_) return folder_->files_.push_back({name_, size_, digest_->hex()});
  if (temporary_.empty()) return;
  ::unlink(temporary_.c_str());  // what was there before
  forget_unfinished(temporary_);
}

FolderWriter::FolderWriter(const fs::path& target)
    : target_(target.has_filename() ? target : target.parent_path()), parent_(fs::absolute(target_).parent_path()) {
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    part_ = part_beside(target_);
    std::error_code failed;
    fs::create_directory(part_, failed);
    if (failed) fail_write(target_.string(), failed.value());
    tell_unfinished(part_);
    lock_ = std::make_unique<PathLock>(part_, PathLock::Kind::exclusive, false);
    if (lock_->error() != EWOULDBLOCK && lock_->error() != ENOENT) return;
    forget_unfinished(part_);
  }
}

FolderWriter::~FolderWriter() { abandon(); }

void FolderWriter::abandon() {
  if (part_.empty()) return;
  // Without a list of what it holds, for which no file may be left to open.
  for (const WrittenFile& file : files_) ::unlink((part_ / file.name).c_str());
  for (auto folder = folders_.rbegin(); folder != folders_.rend(); ++folder) ::rmdir(folder->c_str());
  std::error_code ignored;
  if (::rmdir(part_.c_str()) != 0) remove_tree(part_, ignored);
  forget_unfinished(part_);
}

FileWriter FolderWriter::file(const std::string& name) {
  KAVA_CHECK(!part_.empty(), "{} is already written", target_.string());
  fs::path folder = part_;
  for (const fs::path& part : fs::path(name).parent_path()) {
    folder /= part;
    std::error_code failed;
    if (fs::create_directory(folder, failed)) folders_.push_back(folder), tell_unfinished(folder);
    if (failed) fail_write((target_ / name).string(), failed.value());
  }
  return FileWriter(*this, name);
}

void FolderWriter::write_file(const std::string& name, std::string_view bytes) {
  FileWriter out = file(name);
  out.write(bytes);
  out.commit();
}

void FolderWriter::commit() {
  int error = 0;
  for (const fs::path& folder : folders_)
    if (error == 0) error = sync_folder(folder);
  if (error == 0) error = sync_folder(part_);
  std::error_code ignored;
  // The older one gets the part's name, and what a link leads to is no part.
  if (fs::is_symlink(target_, ignored)) forget_unfinished(part_);
  if (error == 0) error = put_in_place(part_, target_);
  if (error == 0) remove_tree(part_, ignored);
  else abandon();
  forget_unfinished(part_);
  part_.clear();
  lock_.reset();
  if (error != 0) fail_write(target_.string(), error);
}

LineWriter::LineWriter(const std::string& path) : path_(path), descriptor_(disk::open(path, O_WRONLY | O_APPEND)) {
  if (descriptor_ < 0) fail_write(path, errno);
}

LineWriter::~LineWriter() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

void LineWriter::append(const std::string& line) {
  const std::string text = line + "\n";
  const off_t before = ::lseek(descriptor_, 0, SEEK_END);
  if (const int error = write_all(descriptor_, text.data(), text.size())) {
    (void)!::ftruncate(descriptor_, before);
    fail_write(path_, error);
  }
}

void LineWriter::sync() {
  if (disk::sync(descriptor_) != 0) fail_write(path_, errno);
}

void require_outside_checkpoints(const std::string& option, const std::string& path) {
  std::error_code failed;
  const auto refuse = [&](const std::string& what) {
    throw Error(Exit::usage, option + " " + shown_path(path), what, "name another place");
  };
  for (fs::path at = fs::weakly_canonical(fs::absolute(path, failed), failed); !failed && at.has_relative_path(); at = at.parent_path()) {
    if (is_there(at / "manifest.json") && is_there(at / "state.json"))
      refuse("lies in the checkpoint " + shown_path(at) + ", which further files make invalid");
    const fs::path folder = at.parent_path(), run = folder.parent_path();
    if (at.filename().string().starts_with("step_") && folder.filename() == "checkpoints" && is_there(run / "config.toml"))
      refuse("lies among the checkpoints of the run " + shown_path(run) + ", which replaces and removes them");
  }
}

std::optional<FolderFault> folder_fault(const fs::path& path) {
  std::error_code failed;
  fs::path at = fs::absolute(path, failed).lexically_normal();
  while (at.has_relative_path() && fs::symlink_status(at, failed).type() == fs::file_type::not_found) at = at.parent_path();
  const fs::file_type type = fs::status(at, failed).type();
  if (type != fs::file_type::none && type != fs::file_type::directory) return FolderFault{true, shown_path(at) + " is no folder"};
  if (type == fs::file_type::directory && ::access(at.c_str(), W_OK | X_OK) == 0) return std::nullopt;
  const int error = type == fs::file_type::none ? failed.value() : errno;
  require_disk(path.string(), error);
  return FolderFault{false, fmt::format("{} cannot be written: {}", shown_path(at), std::strerror(error))};
}

void require_writable(const std::string& option, const std::string& path) {
  if (path.empty()) throw Error(Exit::usage, option, "is empty", "name a file");
  require_outside_checkpoints(option, path);
  struct stat status;
  const bool there = ::stat(path.c_str(), &status) == 0, beside = !there || S_ISREG(status.st_mode);
  // The probe's name may be shorter than the file's.
  const bool possible = (there || errno == ENOENT) && path.find('\0') == std::string::npos;
  std::error_code ignored;
  const fs::path resolved = there ? fs::canonical(path, ignored) : fs::path(path);
  const std::string probe = beside ? part_beside(resolved).string() : path;
  const int flags = O_WRONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | (beside ? O_CREAT | O_EXCL : 0);
  const int descriptor = possible ? ::open(probe.c_str(), flags, 0666) : -1;
  if (descriptor < 0 && possible) require_disk(path, errno);
  if (descriptor < 0)
    throw Error(Exit::preflight, option + " " + shown_path(path), "cannot be written to",
                "name a file in a folder that exists and can be written to");
  ::close(descriptor);
  if (beside) ::unlink(probe.c_str());
}

void write_file(const std::string& path, std::string_view bytes) {
  FileWriter file(path);
  file.write(bytes);
  file.commit();
}

}  // namespace kava
