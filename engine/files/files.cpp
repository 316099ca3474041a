#include "engine/files/files.h"

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

namespace kava {

namespace {

constexpr std::size_t kChunk = std::size_t{1} << 20;

std::string shown(const std::string& path) { return path.empty() ? "\"\"" : escaped(path, 4096); }

template <class Call>
auto retried(Call call) {
  decltype(call()) result;
  do result = call();
  while (result == -1 && errno == EINTR);
  return result;
}

[[noreturn]] void fail_read(Exit code, const std::string& path, const std::string& what, const std::string& remedy = "check the path") {
  throw Error(code, shown(path), what, remedy);
}

[[noreturn]] void fail_write(const std::string& path, int error) {
  const bool full = error == ENOSPC || error == EDQUOT || error == EFBIG;
  throw Error(Exit::write, shown(path), fmt::format("could not write: {}", std::strerror(error)),
              full ? "free some space and run again" : "check the path and its permissions");
}

// Returns 0 or the error. File systems and devices that have no fsync are no failure.
int sync(int descriptor) {
  if (retried([&] { return ::fsync(descriptor); }) == 0 || errno == EINVAL || errno == ENOTSUP || errno == EROFS) return 0;
  return errno;
}

class Digest {
 public:
  Digest() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
    KAVA_CHECK(context_ && EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1, "SHA-256 is not available");
  }
  void add(const void* bytes, std::size_t count) { KAVA_CHECK(EVP_DigestUpdate(context_.get(), bytes, count) == 1, "SHA-256 failed"); }
  std::string hex() {
    unsigned char bytes[EVP_MAX_MD_SIZE];
    unsigned count = 0;
    KAVA_CHECK(EVP_DigestFinal_ex(context_.get(), bytes, &count) == 1, "SHA-256 failed");
    std::string out;
    for (unsigned i = 0; i < count; ++i) out += fmt::format("{:02x}", bytes[i]);
    return out;
  }

 private:
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

}  // namespace

FileReader::FileReader(const std::string& path, Exit code) : path_(path), code_(code) {
  if (path.find('\0') != std::string::npos) fail_read(code, path, "the path holds a NUL character");
  // O_NONBLOCK: a pipe without a writer must not hang the program before it is refused below.
  descriptor_ = retried([&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK); });
  if (descriptor_ < 0) fail_read(code, path, errno == ENOENT ? "no such file" : fmt::format("could not open: {}", std::strerror(errno)));
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
    if (n < 0) fail_read(code_, path_, fmt::format("could not read: {}", std::strerror(errno)), "check the disk");
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

FileWriter::FileWriter(const std::string& path) : target_(path), final_(path) {
  if (path.empty() || path.find('\0') != std::string::npos) fail_write(path, EINVAL);
  struct stat status;
  if (::stat(path.c_str(), &status) == 0) {
    if (S_ISDIR(status.st_mode)) fail_write(path, EISDIR);
    if (!S_ISREG(status.st_mode)) {  // a rename would replace the device or the pipe by a file
      descriptor_ = retried([&] { return ::open(path.c_str(), O_WRONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY); });
      if (descriptor_ < 0) fail_write(path, errno);
      ::fcntl(descriptor_, F_SETFL, ::fcntl(descriptor_, F_GETFL) & ~O_NONBLOCK);
      return;
    }
    std::error_code ignored;
    if (auto resolved = std::filesystem::canonical(path, ignored); !ignored) final_ = resolved.string();
  }
  temporary_ = final_ + ".part";
  ::unlink(temporary_.c_str());
  descriptor_ = retried([&] { return ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666); });
  if (descriptor_ < 0) fail_write(path, errno);
}

FileWriter::~FileWriter() { abandon(); }

void FileWriter::abandon() {
  if (descriptor_ < 0) return;
  ::close(std::exchange(descriptor_, -1));
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void FileWriter::write(const void* bytes, std::size_t count) {
  KAVA_CHECK(descriptor_ >= 0, "{} is already written", target_);
  const char* at = static_cast<const char*>(bytes);
  while (count > 0) {
    const ssize_t n = retried([&] { return ::write(descriptor_, at, std::min(count, std::size_t{1} << 30)); });
    if (n < 0) {
      const int error = errno;
      abandon();
      fail_write(target_, error);
    }
    at += n;
    count -= static_cast<std::size_t>(n);
  }
}

void FileWriter::commit() {
  KAVA_CHECK(descriptor_ >= 0, "{} is already written", target_);
  int error = sync(descriptor_);
  if (error == 0 && ::close(std::exchange(descriptor_, -1)) != 0 && errno != EINTR) error = errno;
  if (error == 0 && !temporary_.empty() && ::rename(temporary_.c_str(), final_.c_str()) != 0) error = errno;
  if (error != 0) {
    if (descriptor_ >= 0) ::close(std::exchange(descriptor_, -1));
    if (!temporary_.empty()) ::unlink(temporary_.c_str());
    fail_write(target_, error);
  }
  if (!temporary_.empty()) sync_directory(std::filesystem::path(final_).parent_path());
}

void require_writable(const std::string& option, const std::string& path) {
  if (path.empty()) throw Error(Exit::usage, option, "is empty", "name a file");
  try {
    FileWriter probe(path);
  } catch (const Error&) {
    throw Error(Exit::preflight, option + " " + escaped(path, 4096), "cannot be written to",
                "name a file in a folder that exists and can be written to");
  }
}

void write_file(const std::string& path, std::string_view bytes) {
  FileWriter file(path);
  file.write(bytes);
  file.commit();
}

void sync_directory(const std::filesystem::path& directory) {
  const std::string path = directory.empty() ? "." : directory.string();
  const int descriptor = retried([&] { return ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); });
  if (descriptor < 0) fail_write(path, errno);
  const int error = sync(descriptor);
  ::close(descriptor);
  if (error != 0) fail_write(path, error);
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
