// Files: whole reads with a limit, reads at an offset, writes that survive a kill at any moment, digests.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/error.h"

namespace kava {

/// The whole file. A missing, unreadable or larger one, or one that is not a regular file, is Error(`code`, path).
std::string read_file(const std::string& path, std::size_t most_bytes, Exit code = Exit::data);

/// Whether there is anything of this name. A link that leads nowhere, or in a circle, counts: reading it then says so.
bool is_there(const std::filesystem::path& path);

/// Writes the whole file as FileWriter does.
void write_file(const std::string& path, std::string_view bytes);

/// Error(code usage) where a path that is to be written lies in a checkpoint, which would not verify any more, or where a run keeps its
/// own.
void require_outside_checkpoints(const std::string& option, const std::string& path);

/// Why no folder can be made and written at `path`: something on the way is no folder, or the system says no. Makes nothing.
struct FolderFault {
  bool is_no_folder = false;
  std::string what;
};
/// Error(code write) where it is the disk's.
std::optional<FolderFault> folder_fault(const std::filesystem::path& path);

/// For an option that names a file to write at the end of the work: Error(code usage) where it is empty or lies in a checkpoint,
/// Error(code preflight) where the file could not be opened for writing. Leaves what is there.
void require_writable(const std::string& option, const std::string& path);

/// Lower-case hex SHA-256.
std::string sha256(std::string_view bytes);
/// The same of a file, in one pass of small reads. Error(code data) where the file cannot be read.
std::string sha256_file(const std::string& path);

/// A regular file, read at offsets. Not mapped: a file that shrinks while it is read is an Error, not a signal.
class FileReader {
 public:
  /// Missing, unreadable or not a regular file: Error(`code`, path).
  explicit FileReader(const std::string& path, Exit code = Exit::data);
  FileReader(FileReader&& other) noexcept;
  FileReader& operator=(FileReader&& other) noexcept;
  ~FileReader();

  const std::string& path() const { return path_; }
  /// Bytes, when it was opened.
  std::uint64_t size() const { return size_; }
  /// Fills all of out[bytes] from `offset`; the end of the file before that is Error.
  void read_at(std::uint64_t offset, void* out, std::size_t bytes) const;
  /// Fills up to out[bytes], fewer only at the end of the file; returns how many.
  std::size_t read_some(std::uint64_t offset, void* out, std::size_t bytes) const;

 private:
  std::string path_;
  Exit code_ = Exit::data;
  int descriptor_ = -1;
  std::uint64_t size_ = 0;
};

class Digest;
class FolderWriter;

/// Writes beside the target, under a name that no other writer has; commit() flushes, puts the file in the target's place and makes that
/// durable. Without commit(), and where it fails, nothing is left behind and an older file stays as it was; what a killed writer left goes
/// away with the next writer of the target. A target that exists and is a device or a pipe is written to directly. Failures are Error(code
/// write, path).
class FileWriter {
 public:
  explicit FileWriter(const std::string& path);
  FileWriter(const FileWriter&) = delete;
  FileWriter& operator=(const FileWriter&) = delete;
  ~FileWriter();

  void write(const void* bytes, std::size_t count);
  void write(std::string_view bytes) { write(bytes.data(), bytes.size()); }
  void commit();

 private:
  friend class FolderWriter;
  FileWriter(FolderWriter& folder, const std::string& name);
  void put(const void* bytes, std::size_t count);
  void abandon();

  std::string target_;     // as given, for messages
  std::string final_;      // where the bytes end up: target_ with a link followed
  std::string temporary_;  // empty when written to directly
  int descriptor_ = -1;
  std::string buffer_;
  // Of a file in a folder that is written.
  FolderWriter* folder_ = nullptr;
  std::string name_;
  std::uint64_t size_ = 0;
  std::unique_ptr<Digest> digest_;
};

}  // namespace kava
