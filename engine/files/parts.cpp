#include "engine/files/parts.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <climits>
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

fs::path holder_of(const fs::path& path) { return path.has_parent_path() ? path.parent_path() : fs::path("."); }

// Of the system call, the file system, a container's filter of system calls (EPERM), or layers of file systems (EXDEV).
bool lacks_exchange(int error) { return error == EINVAL || error == ENOSYS || error == ENOTSUP || error == EPERM || error == EXDEV; }

// A place of what a signal that ends the process removes. Static, as a handler can neither allocate nor wait.
struct Unfinished {
  enum State { free, changing, told };
  std::atomic<int> state = free;
  std::array<char, PATH_MAX> path;
};
static_assert(std::atomic<int>::is_always_lock_free);
std::array<Unfinished, 64> g_unfinished;

// For file systems without an exchange. A folder cannot be renamed over another, so the older one steps aside for a moment; of a file the
// older one gets a second name.
int put_without_exchange(const fs::path& part, const fs::path& target) {
  const fs::path aside = new_part(target);
  forget_unfinished(part);  // for a moment it is all there is
  std::error_code ignored;
  const bool folder = fs::is_directory(fs::symlink_status(target, ignored));
  const int kept = folder ? disk::rename(target, aside) : ::link(target.c_str(), aside.c_str());
  if (folder && kept != 0) return errno;
  int error = disk::rename(part, target) == 0 ? 0 : errno;
  const bool placed = error == 0;
  if (placed) error = sync_folder(holder_of(target));
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
  const bool full = error == ENOSPC || error == EDQUOT || error == EFBIG, limit = error == EMFILE || error == ENFILE;
  throw Error(Exit::write, shown_path(path), fmt::format("could not write: {}", std::strerror(error)),
              full    ? "free some space and run again"
              : limit ? "raise the limit of open files (ulimit -n)"
                      : "check the path, its permissions and the disk");
}

void require_disk(const std::string& path, int error) {
  for (const int disk : {ENOSPC, EDQUOT, EIO, EROFS, EMFILE, ENFILE})
    if (error == disk) fail_write(path, error);
}

void tell_unfinished(const fs::path& path) {
  const std::string& name = path.native();
  if (name.size() >= PATH_MAX) return;
  for (Unfinished& place : g_unfinished) {
    int expected = Unfinished::free;
    if (!place.state.compare_exchange_strong(expected, Unfinished::changing)) continue;
    std::memcpy(place.path.data(), name.c_str(), name.size() + 1);
    place.state = Unfinished::told;
    return;
  }
}

void forget_unfinished(const fs::path& path) {
  const std::string& name = path.native();
  for (Unfinished& place : g_unfinished) {
    int expected = Unfinished::told;
    if (!place.state.compare_exchange_strong(expected, Unfinished::changing)) continue;
    const std::string_view told = place.path.data();
    const bool same = told.starts_with(name) && (told.size() == name.size() || told[name.size()] == '/');
    place.state = same ? Unfinished::free : Unfinished::told;
  }
}

void remove_unfinished() {
  constexpr int kDeepest = 4;  // folders in each other
  for (int depth = 0; depth < kDeepest; ++depth)
    for (Unfinished& place : g_unfinished)
      if (place.state == Unfinished::told && ::unlink(place.path.data()) != 0) ::rmdir(place.path.data());
}

void remove_tree(const fs::path& path, std::error_code& failed) {
  if (fs::is_directory(fs::symlink_status(path, failed))) {
    std::vector<fs::path> inside;
    for (fs::directory_iterator entry(path, failed); !failed && entry != fs::directory_iterator(); entry.increment(failed))
      inside.push_back(entry->path());
    for (auto at = inside.begin(); !failed && at != inside.end(); ++at) remove_tree(*at, failed);
    if (failed) return;
  }
  fs::remove(path, failed);
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
    if (fs::create_directory(*at, failed)) made_.push_back(*at), tell_unfinished(*at);
    if (failed) return remove();
  }
  if (!fs::is_directory(path, failed)) {
    if (!failed) failed = std::make_error_code(std::errc::not_a_directory);
    remove();
  }
}

void MadeFolder::remove() {
  for (auto at = made_.rbegin(); at != made_.rend(); ++at) {
    ::rmdir(at->c_str());
    forget_unfinished(*at);
  }
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
  remove_stale_parts(holder_of(target), [name = known_name(target)](std::string_view of) { return of == name; });
}

void remove_stale_parts(const fs::path& folder, const std::function<bool(std::string_view)>& stale) {
  std::error_code error;
  std::vector<fs::path> found;
  for (fs::directory_iterator entry(folder, error); !error && entry != fs::directory_iterator(); entry.increment(error))
    if (const std::string of = target_of_part(entry->path().filename().string()); !of.empty() && stale(of)) found.push_back(entry->path());
  for (const fs::path& path : found) {
    if (!fs::is_symlink(path, error)) {
      const PathLock lock(path, PathLock::Kind::exclusive, false);
      if (lock.error() == 0) remove_tree(path, error);
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
  std::error_code failed;
  const bool empty = fs::is_directory(fs::symlink_status(target, failed)) && fs::is_empty(target, failed);  // a rename replaces it
  if (is_there(target) && !empty) {
    exchanged = disk::exchange(part, target) == 0;
    if (!exchanged && !lacks_exchange(errno)) return errno;
    if (!exchanged) return put_without_exchange(part, target);
  } else if (disk::rename(part, target) != 0) {
    return errno;
  }
  const int error = sync_folder(holder_of(target));
  if (error != 0) exchanged ? disk::exchange(part, target) : disk::rename(target, part);
  if (error != 0 && empty) fs::create_directory(target, failed);
  return error;
}

}  // namespace kava
