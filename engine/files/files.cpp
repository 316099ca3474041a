#include "engine/files/files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "engine/files/digest.h"
#include "engine/files/retried.h"
#include "engine/files/unreadable.h"

namespace kava {

namespace {

constexpr std::size_t kChunk = std::size_t{1} << 20;

[[noreturn]] void fail_read(Exit code, const std::string& path, const std::string& what, const std::string& remedy = "check the path") {
  throw Error(code, shown_path(path), what, remedy);
}

bool is_nothing(int error) {
  return error == ENOENT || error == ENOTDIR || error == ELOOP || error == ENAMETOOLONG || error == EINVAL || error == ENXIO;
}

}  // namespace

void fail_to_read(Exit code, const std::string& path, const char* action, int error) {
  const std::string what = error == ENOENT ? "no such file" : fmt::format("could not {}: {}", action, std::strerror(error));
  if (is_nothing(error)) fail_read(code, path, what);
  const bool limit = error == EMFILE || error == ENFILE, forbidden = error == EACCES || error == EPERM;
  throw Unreadable(code, shown_path(path), what,
                   limit       ? "raise the limit of open files (ulimit -n)"
                   : forbidden ? "check its permissions"
                               : "check the disk");
}

FileReader::FileReader(const std::string& path, Exit code) : path_(path), code_(code) {
  if (path.find('\0') != std::string::npos) fail_read(code, path, "the path holds a NUL character");
  // O_NONBLOCK: a pipe without a writer must not hang the program before it is refused below.
  descriptor_ = retried([&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK); });
  if (descriptor_ < 0) fail_to_read(code, path, "open", errno);
  struct stat status;
  const bool known = ::fstat(descriptor_, &status) == 0;
  if (!known || !S_ISREG(status.st_mode)) {
    ::close(std::exchange(descriptor_, -1));
    fail_read(code, path, known && S_ISDIR(status.st_mode) ? "is a folder, not a file" : "is not a regular file");
  }
  size_ = static_cast<std::uint64_t>(status.st_size);
}

FileReader::FileReader(FileReader&& other) noexcept
    : path_(std::move(other.path_)), code_(other.code_), descriptor_(std::exchange(other.descriptor_, -1)), size_(other.size_) {}

FileReader& FileReader::operator=(FileReader&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(code_, other.code_);
  std::swap(descriptor_, other.descriptor_);
  std::swap(size_, other.size_);
  return *this;
}

FileReader::~FileReader() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

std::size_t FileReader::read_some(std::uint64_t offset, void* out, std::size_t bytes) const {
  std::size_t done = 0;
  while (done < bytes) {
    const std::size_t most = std::min(bytes - done, std::size_t{1} << 30);
    const ssize_t n =
        retried([&] { return ::pread(descriptor_, static_cast<char*>(out) + done, most, static_cast<off_t>(offset + done)); });
    if (n < 0) fail_to_read(code_, path_, "read", errno);
    if (n == 0) break;
    done += static_cast<std::size_t>(n);
  }
  return done;
}

void FileReader::read_at(std::uint64_t offset, void* out, std::size_t bytes) const {
  if (read_some(offset, out, bytes) != bytes)
    fail_read(code_, path_, fmt::format("the file ends before byte {}", offset + bytes), "the file is cut off or changed: get it again");
}

std::string read_file(const std::string& path, std::size_t most_bytes, Exit code) {
  const FileReader file(path, code);
  const auto check_limit = [&](std::uint64_t bytes) {
    if (bytes > most_bytes) fail_read(code, path, fmt::format("is larger than {} bytes", most_bytes), "check that this is the right file");
  };
  check_limit(file.size());
  std::string text;
  // One byte more than the size tells a file that is longer than it says (it grows, or lies in /proc).
  std::size_t room = static_cast<std::size_t>(file.size()) + 1;
  for (std::size_t have = 0;; room = kChunk) {
    text.resize(have + room);
    const std::size_t n = file.read_some(have, text.data() + have, room);
    have += n;
    check_limit(have);
    text.resize(have);
    if (n < room) return text;
  }
}

bool is_there(const std::filesystem::path& path) {
  std::error_code ignored;
  return std::filesystem::exists(std::filesystem::symlink_status(path, ignored));
}

std::string sha256(std::string_view bytes) {
  Digest digest;
  digest.add(bytes.data(), bytes.size());
  return digest.hex();
}

std::string sha256_file(const std::string& path) {
  const FileReader file(path);
  Digest digest;
  std::vector<char> chunk(kChunk);
  for (std::uint64_t at = 0;;) {
    const std::size_t n = file.read_some(at, chunk.data(), chunk.size());
    digest.add(chunk.data(), n);
    at += n;
    if (n < chunk.size()) return digest.hex();
  }
}

}  // namespace kava
