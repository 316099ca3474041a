// Writers beside FileWriter: of a whole folder, and of a file that grows.
#pragma once
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "engine/files/files.h"
#include "engine/files/parts.h"

namespace kava {

struct WrittenFile {
  std::string name;  // in its folder, with those between
  std::uint64_t size = 0;
  std::string sha256;
};

/// A folder that takes its target's place whole, as FileWriter's file does. Files are hashed while they are written.
class FolderWriter {
 public:
  /// Makes the folders above the target where they are missing. Error(code write).
  explicit FolderWriter(const std::filesystem::path& target);
  FolderWriter(const FolderWriter&) = delete;
  FolderWriter& operator=(const FolderWriter&) = delete;
  ~FolderWriter();

  /// A new file, in folders that are made where they are missing; to be committed before this folder is.
  FileWriter file(const std::string& name);
  void write_file(const std::string& name, std::string_view bytes);
  /// Those committed so far.
  const std::vector<WrittenFile>& files() const { return files_; }
  void commit();

 private:
  friend class FileWriter;
  void abandon();

  std::filesystem::path target_, part_;
  MadeFolder parent_;
  std::unique_ptr<PathLock> lock_;
  std::vector<std::filesystem::path> folders_;
  std::vector<WrittenFile> files_;
};

/// A file that grows by whole lines. Failures are Error(code write, path).
class LineWriter {
 public:
  /// The file must be there.
  explicit LineWriter(const std::string& path);
  LineWriter(const LineWriter&) = delete;
  LineWriter& operator=(const LineWriter&) = delete;
  ~LineWriter();

  /// A line that could not be written whole is taken back.
  void append(const std::string& line);
  void sync();

 private:
  std::string path_;
  int descriptor_ = -1;
};

}  // namespace kava
