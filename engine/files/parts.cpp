#include "engine/files/parts.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <utility>

#include "engine/error.h"
#include "engine/files/disk.h"
#include "engine/files/files.h"

namespace kava {

namespace fs = std::filesystem;

namespace {

constexpr std::string_view kEnding = ".part";
constexpr std::size_t kRandom = 6;
constexpr std::size_t kLongestName = 240;  // with what is added a name stays below the 255 bytes of most file systems

std::string random_letters() {
  unsigned char bytes[kRandom] = {};
  if (::getrandom(bytes, sizeof bytes, GRND_NONBLOCK) < 0) {  // as unique as a process has at hand
    static std::uint64_t count = 0;
    const std::uint64_t mixed = (static_cast<std::uint64_t>(::getpid()) << 20) + count++;
    std::memcpy(bytes, &mixed, sizeof bytes);
  }
  std::string text;
  for (unsigned char b : bytes) text += "abcdefghijklmnopqrstuvwxyz234567"[b % 32];
  return text;
}

std::string known_name(const fs::path& target) { return target.filename().string().substr(0, kLongestName); }

fs::path new_part(const fs::path& target) {
  return target.parent_path() / fmt::format(".{}.{}{}", known_name(target), random_letters(), kEnding);
}

fs::path folder_of(const fs::path& path) { return path.has_parent_path() ? path.parent_path() : fs::path("."); }

// Of the system call, the file system, a container's filter of system calls (EPERM), or layers of file systems (EXDEV).
bool lacks_exchange(int error) { return error == EINVAL || error == ENOSYS || error == ENOTSUP || error == EPERM || error == EXDEV; }

// For file systems without an exchange. A folder cannot be renamed over another, so the older one steps aside for a moment; of a file the
// older one gets a second name.
int put_without_exchange(const fs::path& part, const fs::path& target) {
  const fs::path aside = new_part(target);
  std::error_code ignored;
  const bool folder = fs::is_directory(fs::symlink_status(target, ignored));
  const int kept = folder ? disk::rename(target, aside) : ::link(target.c_str(), aside.c_str());
  if (folder && kept != 0) return errno;
  int error = disk::rename(part, target) == 0 ? 0 : errno;
  const bool placed = error == 0;
  if (placed) error = sync_folder(folder_of(target));
  if (error == 0) {
    if (kept == 0) disk::rename(aside, part);
  } else if (kept == 0) {
    if (placed) disk::rename(target, part);
    disk::rename(aside, target);
  }
  return error;
}

}  // namespace

void fail_write(const std::string& path, int error) {
  const bool full = error == ENOSPC || error == EDQUOT || error == EFBIG;
  throw Error(Exit::write, path.empty() ? "\"\"" : escaped(path, 4096), fmt::format("could not write: {}", std::strerror(error)),
              full ? "free some space and run again" : "check the path, its permissions and the disk");
}

MadeFolder::MadeFolder(const fs::path& path, std::error_code& failed) { make(path, failed); }

MadeFolder::MadeFolder(const fs::path& path) {
  std::error_code failed;
  make(path, failed);
  if (failed) fail_write(path.string(), failed.value());
}

void MadeFolder::make(const fs::path& path, std::error_code& failed) {
  failed.clear();
  std::vector<fs::path> missing;
  std::error_code ignored;
  for (fs::path at = path.has_filename() ? path : path.parent_path(); !at.empty() && !fs::exists(at, ignored); at = at.parent_path())
    missing.push_back(at);
  for (auto at = missing.rbegin(); at != missing.rend(); ++at) {
    if (fs::create_directory(*at, failed)) made_.push_back(*at);
    if (failed) return remove();
  }
  if (!fs::is_directory(path, failed)) {
    if (!failed) failed = std::make_error_code(std::errc::not_a_directory);
    remove();
  }
}

void MadeFolder::remove() {
  for (auto at = made_.rbegin(); at != made_.rend(); ++at) ::rmdir(at->c_str());
  made_.clear();
}

MadeFolder::~MadeFolder() { remove(); }

PathLock::PathLock(const fs::path& path, Kind kind, bool wait) : error_(take(path, kind, wait)) {}

int PathLock::take(const fs::path& path, Kind kind, bool wait) {
  descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (descriptor_ < 0) return errno;
  const int operation = (kind == Kind::shared ? LOCK_SH : LOCK_EX) | (wait ? 0 : LOCK_NB);
  int result;
  do result = ::flock(descriptor_, operation);
  while (result != 0 && errno == EINTR);
  if (result != 0) return errno;
  // Between open and flock another process may have removed or replaced it.
  struct stat locked = {}, named = {};
  if (::fstat(descriptor_, &locked) != 0 || ::stat(path.c_str(), &named) != 0) return errno;
  return locked.st_ino == named.st_ino && locked.st_dev == named.st_dev ? 0 : ENOENT;
}

PathLock::~PathLock() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

fs::path part_beside(const fs::path& target) {
  remove_stale_parts(target);
  return new_part(target);
}

void remove_stale_parts(const fs::path& target) {
  std::error_code error;
  std::vector<fs::path> stale;
  for (fs::directory_iterator entry(folder_of(target), error); !error && entry != fs::directory_iterator(); entry.increment(error))
    if (target_of_part(entry->path().filename().string()) == known_name(target)) stale.push_back(entry->path());
  for (const fs::path& path : stale) {
    if (!fs::is_symlink(path, error)) {
      const PathLock lock(path, PathLock::Kind::exclusive, false);
      if (lock.error() == 0) fs::remove_all(path, error);
    } else {
      fs::remove(path, error);
    }
  }
}

std::string target_of_part(const std::string& name) {
  constexpr std::size_t kAdded = 1 + kRandom + kEnding.size();
  if (name.size() < kAdded + 2 || name[0] != '.' || !name.ends_with(kEnding) || name[name.size() - kAdded] != '.') return "";
  return name.substr(1, name.size() - 1 - kAdded);
}

bool is_being_written(const fs::path& part) { return PathLock(part, PathLock::Kind::exclusive, false).error() == EWOULDBLOCK; }

int sync_folder(const fs::path& folder) {
  const int descriptor = disk::open(folder, O_RDONLY | O_DIRECTORY);
  if (descriptor < 0) return errno;
  const int error = disk::sync(descriptor) == 0 ? 0 : errno;
  ::close(descriptor);
  return error;
}

int put_in_place(const fs::path& part, const fs::path& target) {
  bool exchanged = false;
  if (is_there(target)) {
    exchanged = disk::exchange(part, target) == 0;
    if (!exchanged && !lacks_exchange(errno)) return errno;
    if (!exchanged) return put_without_exchange(part, target);
  } else if (disk::rename(part, target) != 0) {
    return errno;
  }
  const int error = sync_folder(folder_of(target));
  if (error != 0) exchanged ? disk::exchange(part, target) : disk::rename(target, part);
  return error;
}

}  // namespace kava
