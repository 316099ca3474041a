#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <fstream>
#include <stdexcept>
#include <tuple>

#include "engine/cli.h"
#include "engine/files/files.h"
#include "engine/files/writers.h"
#include "kernels/gpu_error.h"
#include "tests/folders.h"
#include "tests/io/denied_calls.h"

using namespace kava;
namespace fs = std::filesystem;

namespace {

template <class F>
Exit code_of(F&& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.code();
  }
  return Exit::ok;
}

// What run_program prints on stderr for `body`, and its result.
std::pair<int, std::string> run_quietly(const TempFolder& folder, const std::function<int()>& body) {
  const std::string path = folder / "stderr";
  std::fflush(stderr);
  const int saved = ::dup(2);
  REQUIRE(std::freopen(path.c_str(), "w", stderr));
  const int code = run_program(body);
  std::fflush(stderr);
  ::dup2(saved, 2);
  ::close(saved);
  return {code, read_file(path, 1 << 20)};
}

std::size_t entries(const fs::path& folder) {
  return static_cast<std::size_t>(std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
}

}  // namespace

TEST_CASE("a file is read whole, up to its limit") {
  TempFolder folder;
  const std::string path = folder / "a";
  std::string bytes(3'000'001, 'x');
  bytes[5] = '\0';
  write_file(path, bytes);
  CHECK(read_file(path, bytes.size()) == bytes);
  CHECK(code_of([&] { read_file(path, bytes.size() - 1); }) == Exit::data);
  CHECK(code_of([&] { read_file(path, bytes.size() - 1, Exit::usage); }) == Exit::usage);
  write_file(path, "");
  CHECK(read_file(path, 0).empty());
}

TEST_CASE("a file whose size is not told is read to its end and no further than the limit") {
  if (!fs::exists("/proc/self/status")) SKIP("there is no /proc");
  CHECK(read_file("/proc/self/status", 1 << 20).find("VmSize") != std::string::npos);
  CHECK(code_of([] { read_file("/proc/self/status", 10); }) == Exit::data);
}

TEST_CASE("a GPU that fails has the exit code of its failure") {
  const TempFolder folder;
  const auto [out_of_memory, no_device, lost] = std::tuple(2, 100, 700);
  for (const auto& [status, code, word] : {std::tuple(out_of_memory, 3, "memory"), {no_device, 3, "driver"}, {lost, 6, "--resume"}}) {
    const auto [ended, said] =
        run_quietly(folder, [status = status]() -> int { throw GpuError("kernel launch", status, "what the driver says"); });
    CHECK(ended == code);
    CHECK(said.starts_with("error: device"));
    CHECK(said.find("kernel launch: what the driver says; ") != std::string::npos);
    CHECK(said.find(word) != std::string::npos);
  }
}

TEST_CASE("a link counts as being there, wherever it leads") {
  TempFolder folder;
  CHECK_FALSE(is_there(folder / "file"));
  overwrite(folder / "file", "");
  std::filesystem::create_symlink("nowhere", folder / "dangling");
  std::filesystem::create_symlink("circle", folder / "circle");
  for (const char* name : {"file", "dangling", "circle"}) CHECK(is_there(folder / name));
}

TEST_CASE("what is not a regular file is refused at once") {
  TempFolder folder;
  const std::string fifo = folder / "fifo";
  REQUIRE(::mkfifo(fifo.c_str(), 0600) == 0);
  CHECK(code_of([&] { read_file(fifo, 10); }) == Exit::data);
  CHECK(code_of([&] { read_file(folder.path().string(), 10); }) == Exit::data);
  CHECK(code_of([&] { read_file(folder / "missing", 10); }) == Exit::data);
  CHECK(code_of([&] { read_file("/dev/zero", 10); }) == Exit::data);
  CHECK(code_of([&] { read_file("", 10); }) == Exit::data);
  CHECK(code_of([&] { read_file(std::string("a\0b", 3), 10); }) == Exit::data);
}

TEST_CASE("a file that is cut off while it is open gives an error, not a signal") {
  TempFolder folder;
  const std::string path = folder / "a";
  write_file(path, std::string(10000, 'x'));
  const FileReader file(path);
  fs::resize_file(path, 100);
  char bytes[200];
  CHECK(code_of([&] { file.read_at(0, bytes, 200); }) == Exit::data);
  CHECK(file.read_some(0, bytes, 200) == 100);
}

TEST_CASE("a failed write leaves the older file and nothing else") {
  TempFolder folder;
  const std::string path = folder / "a";
  write_file(path, "old");
  {
    FileWriter file(path);
    file.write("new and longer");
  }
  CHECK(read_file(path, 100) == "old");
  CHECK(entries(folder.path()) == 1);

  // A limit on file sizes fails like a full disk, after a short write.
  struct rlimit before;
  ::getrlimit(RLIMIT_FSIZE, &before);
  struct rlimit small = before;
  small.rlim_cur = 1000;
  auto* handler = std::signal(SIGXFSZ, SIG_IGN);
  ::setrlimit(RLIMIT_FSIZE, &small);
  const Exit code = code_of([&] { write_file(path, std::string(5000, 'y')); });
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  CHECK(code == Exit::write);
  CHECK(read_file(path, 100) == "old");
  CHECK(entries(folder.path()) == 1);
}

TEST_CASE("what a killed writer left goes away with the next one, and what another is writing does not") {
  TempFolder folder;
  overwrite(folder / ".a.abcdef.part", "rest of a longer file that was never finished");
  overwrite(folder / ".ab.abcdef.part", "of another target");
  FileWriter first(folder / "a"), second(folder / "a");
  first.write("first");
  second.write("second");
  CHECK_FALSE(fs::exists(folder / ".a.abcdef.part"));
  first.commit();
  CHECK(read_file(folder / "a", 100) == "first");
  second.commit();
  CHECK(read_file(folder / "a", 100) == "second");
  CHECK(entries(folder.path()) == 2);
  CHECK(fs::exists(folder / ".ab.abcdef.part"));
}

TEST_CASE("writers of one target in several processes all succeed") {
  TempFolder folder;
  std::vector<pid_t> children;
  for (int i = 0; i < 4; ++i) {
    children.push_back(::fork());
    if (children.back() != 0) continue;
    try {
      for (int n = 0; n < 50; ++n) write_file(folder / "a", std::string(static_cast<std::size_t>(5000 + i), static_cast<char>('a' + i)));
    } catch (...) {
      ::_exit(1);
    }
    ::_exit(0);
  }
  for (pid_t child : children) {
    int status = 1;
    ::waitpid(child, &status, 0);
    CHECK(status == 0);
  }
  const std::string text = read_file(folder / "a", 1 << 20);
  CHECK(text == std::string(5000 + static_cast<std::size_t>(text[0] - 'a'), text[0]));
  CHECK(entries(folder.path()) == 1);
}

TEST_CASE("an fsync of the folder that fails after the rename puts back what was there") {
  TempFolder folder;
  write_file(folder / "old", "old");
  for (int rename_error : {0, EINVAL}) {
    std::vector<DeniedCall> denied = {{SYS_fsync, EIO}};
    if (rename_error != 0) denied.push_back({SYS_renameat2, rename_error});
    CHECK(ends_well_without(denied, [&] {
      for (const char* name : {"old", "new"}) {
        overwrite(folder / "part", "new");
        if (put_in_place(folder / "part", folder / name) != EIO) std::abort();
        if (read_file(folder / "part", 100) != "new") std::abort();
      }
    }));
    CHECK(read_file(folder / "old", 100) == "old");
    CHECK_FALSE(fs::exists(folder / "new"));
    CHECK(entries(folder.path()) == 2);
  }
}

TEST_CASE("a file system that has no fsync is no failure, one that fails is") {
  TempFolder folder;
  for (int error : {EINVAL, ENOTSUP})
    CHECK(ends_well_without({{SYS_fsync, error}}, [&] {
      write_file(folder / "a", "x");
      LineWriter lines(folder / "a");
      lines.append("y");
      lines.sync();
    }));
  for (int error : {EIO, EROFS, ENOSPC})
    CHECK(ends_well_without({{SYS_fsync, error}}, [&] {
      if (code_of([&] { write_file(folder / "b", "x"); }) != Exit::write) std::abort();
      LineWriter lines(folder / "a");
      if (code_of([&] { lines.sync(); }) != Exit::write) std::abort();
    }));
  CHECK(entries(folder.path()) == 1);
}

TEST_CASE("a folder takes its target's place whole or not at all, with the digests of its files") {
  TempFolder folder;
  const fs::path target = folder.path() / "new" / "made";
  const auto fill = [&](const std::string& text) {
    FolderWriter out(target);
    out.write_file("a", text);
    FileWriter file = out.file("sub/b");
    file.write(std::string(3 << 20, 'x'));
    file.write("end");
    file.commit();
    CHECK(out.files()[0].sha256 == sha256(text));
    CHECK(out.files()[1].name == "sub/b");
    CHECK(out.files()[1].size == (3 << 20) + 3);
    CHECK(out.files()[1].sha256 == sha256(std::string(3 << 20, 'x') + "end"));
    CHECK(entries(target.parent_path()) == (text == "old" ? 1 : 2));
    out.commit();
    CHECK(read_file((target / "a").string(), 100) == text);
    CHECK(entries(target.parent_path()) == 1);
  };
  fill("old");
  fill("new");
  { FolderWriter(target).write_file("a", "lost"); }
  CHECK(read_file((target / "a").string(), 100) == "new");
  CHECK(entries(target.parent_path()) == 1);
  { FolderWriter(folder.path() / "x" / "y" / "z").write_file("a", "lost"); }
  CHECK_FALSE(fs::exists(folder / "x"));
}

TEST_CASE("a path is locked by one that writes or by all that read, and no longer once it names something else") {
  TempFolder folder;
  overwrite(folder / "a", "");
  {
    const PathLock reader(folder / "a", PathLock::Kind::shared, false), other(folder / "a", PathLock::Kind::shared, false);
    CHECK(reader.error() == 0);
    CHECK(other.error() == 0);
    CHECK(PathLock(folder / "a", PathLock::Kind::exclusive, false).error() == EWOULDBLOCK);
  }
  CHECK(PathLock(folder / "a", PathLock::Kind::exclusive, false).error() == 0);
  CHECK(PathLock(folder / "none", PathLock::Kind::shared, false).error() == ENOENT);
  CHECK(ends_well_without({{SYS_flock, ENOLCK}}, [&] {
    if (PathLock(folder / "a", PathLock::Kind::shared, false).error() != ENOLCK) std::abort();
    write_file(folder / "b", "x");  // needs no lock
  }));
}

TEST_CASE("a full device gives the exit code for writing and stays a device") {
  CHECK(code_of([] { write_file("/dev/full", "x"); }) == Exit::write);
  CHECK(fs::is_character_file("/dev/full"));
  CHECK(code_of([] { write_file("/dev/null", "x"); }) == Exit::ok);
  CHECK(fs::is_character_file("/dev/null"));
}

TEST_CASE("a target that cannot be written is an error of writing") {
  TempFolder folder;
  CHECK(code_of([&] { write_file(folder.path().string(), "x"); }) == Exit::write);
  CHECK(code_of([&] { write_file(folder / "no/such/folder", "x"); }) == Exit::write);
  CHECK(code_of([&] { write_file("", "x"); }) == Exit::write);
  CHECK(code_of([&] { write_file(folder / std::string(300, 'n'), "x"); }) == Exit::write);
  const std::string fifo = folder / "fifo";
  REQUIRE(::mkfifo(fifo.c_str(), 0600) == 0);
  CHECK(code_of([&] { write_file(fifo, "x"); }) == Exit::write);  // nobody reads: an error, not a wait
}

TEST_CASE("an option for a file is refused before the work, and what is there stays") {
  TempFolder folder;
  write_file(folder / "old", "old");
  CHECK(code_of([] { require_writable("--out", ""); }) == Exit::usage);
  CHECK(code_of([&] { require_writable("--out", folder / "no/such/folder"); }) == Exit::preflight);
  CHECK(code_of([&] { require_writable("--out", folder.path().string()); }) == Exit::preflight);
  CHECK(code_of([&] { require_writable("--out", folder / "old"); }) == Exit::ok);
  CHECK(code_of([&] { require_writable("--out", folder / "new"); }) == Exit::ok);
  CHECK(code_of([] { require_writable("--out", "/dev/full"); }) == Exit::ok);
  CHECK(read_file(folder / "old", 100) == "old");
  CHECK(entries(folder.path()) == 1);
}

TEST_CASE("an empty path has a name in its error") {
  try {
    read_file("", 1);
    FAIL("no error");
  } catch (const Error& e) {
    CHECK(std::string(e.what()).starts_with("\"\": no such file; "));
  }
}

TEST_CASE("writing through a link keeps the link") {
  TempFolder folder;
  write_file(folder / "real", "old");
  fs::create_symlink("real", folder / "link");
  write_file(folder / "link", "new");
  CHECK(fs::is_symlink(folder / "link"));
  CHECK(read_file(folder / "real", 100) == "new");
}

TEST_CASE("SHA-256 of text and of files agrees with the published vectors") {
  CHECK(sha256("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(sha256("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  TempFolder folder;
  const std::string million(1'000'000, 'a');
  write_file(folder / "a", million);
  CHECK(sha256_file(folder / "a") == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  write_file(folder / "b", std::string(1 << 20, 'a'));  // exactly one read
  CHECK(sha256_file(folder / "b") == sha256(std::string(1 << 20, 'a')));
}

TEST_CASE("what a program throws becomes one line and its exit code") {
  TempFolder folder;
  auto [code, text] = run_quietly(folder, []() -> int { throw Error(Exit::data, "file\nname", "is bad", "mend it"); });
  CHECK(code == 4);
  CHECK(text == "error: file\\nname: is bad; mend it\n");
  std::tie(code, text) = run_quietly(folder, []() -> int { throw std::bad_alloc(); });
  CHECK(code == 3);
  CHECK(text.starts_with("error: memory: "));
  for (const char* message : {"vector::_M_range_check: __n", "std::bad_cast", "[json.exception.type_error.302] type must be string"}) {
    std::tie(code, text) = run_quietly(folder, [&]() -> int { throw std::out_of_range(message); });
    CHECK(code == 1);
    CHECK(text.find("::") == std::string::npos);
    CHECK(text.find("exception") == std::string::npos);
    CHECK(std::count(text.begin(), text.end(), '\n') == 1);
  }
  std::tie(code, text) = run_quietly(folder, [] { return 75; });
  CHECK(code == 75);
  CHECK(text.empty());
}

TEST_CASE("the version names the program, its version and the devices") {
  const std::string text = version_text("kava_test");
  CHECK(text.starts_with("kava_test 0."));
  CHECK(text.find("cpu: ") != std::string::npos);
  CHECK(text.find("cuda") != std::string::npos);
}
