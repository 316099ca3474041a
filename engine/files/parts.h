// How something takes the place of a file or folder at once: it is made beside its target under a name of its own, flushed, and put there
// by one rename.
#pragma once
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

namespace kava {

/// Error(code write) for a failure of the system.
[[noreturn]] void fail_write(const std::string& path, int error);
/// The same where the failure is of a disk or of a limit (no space, input and output, read-only, open files), whatever the path. Returns
/// for others.
void require_disk(const std::string& path, int error);

/// What a signal that ends the process removes, while it is not forgotten: a file, or a folder with what is told of it. Those in a folder
/// are forgotten with it.
void tell_unfinished(const std::filesystem::path& path);
void forget_unfinished(const std::filesystem::path& path);
/// Removes what is told. For a signal handler.
void remove_unfinished();
/// Removes a file, a link, or a folder and all in it, by one open file at a time. What there is not is no failure.
void remove_tree(const std::filesystem::path& path, std::error_code& failed);

/// Makes a folder and its missing parents. Those of them that are still empty go away with the object.
class MadeFolder {
 public:
  /// Where it sets `failed`, nothing was made.
  MadeFolder(const std::filesystem::path& path, std::error_code& failed);
  /// Error(code write).
  explicit MadeFolder(const std::filesystem::path& path);
  MadeFolder(const MadeFolder&) = delete;
  MadeFolder& operator=(const MadeFolder&) = delete;
  ~MadeFolder();

 private:
  void make(const std::filesystem::path& path, std::error_code& failed);
  void remove();
  std::vector<std::filesystem::path> made_;
};

/// flock on a file or folder, for as long as this lives. It ends with the process, however that ends.
class PathLock {
 public:
  enum class Kind { shared, exclusive };
  PathLock(const std::filesystem::path& path, Kind kind, bool wait);
  PathLock(const PathLock&) = delete;
  PathLock& operator=(const PathLock&) = delete;
  ~PathLock();

  /// 0 where it is held; EWOULDBLOCK where another holds it and it was not to wait; ENOENT where the path leads to nothing, or to something
  /// else than what was locked; else what open or flock say.
  int error() const { return error_; }

 private:
  int take(const std::filesystem::path& path, Kind kind, bool wait);
  int descriptor_ = -1, error_ = 0;
};

/// A name beside the target that nothing has, FOLDER/.NAME.XXXXXX.part, once remove_stale_parts is done.
std::filesystem::path part_beside(const std::filesystem::path& target);
/// Removes what killed writers of this target left under such names; or in a folder, those of targets whose names `stale` takes.
void remove_stale_parts(const std::filesystem::path& target);
void remove_stale_parts(const std::filesystem::path& folder, const std::function<bool(std::string_view)>& stale);
/// NAME of such a name, "" for others.
std::string target_of_part(const std::string& name);
/// Whether a process holds this part locked, as one that writes it does.
bool is_being_written(const std::filesystem::path& part);

/// fsync of a folder, which makes the names in it durable. Returns 0 or the error.
int sync_folder(const std::filesystem::path& folder);

/// The file, folder or link `part` takes the place of `target`, durably; what was there has the name of `part` then, if anything was.
/// Returns 0; or the error, and then all is as it was.
int put_in_place(const std::filesystem::path& part, const std::filesystem::path& target);

}  // namespace kava
