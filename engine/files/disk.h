// The calls by which this project changes what a disk holds: open, write, fsync, rename. Everything that is written goes through them, so
// that tests can let each of them fail. In a build with KAVA_FAILPOINTS the environment variable KAVA_FAIL=KIND:K:ACTION does that to the
// K-th call (from 1) of a kind (open, write, fsync, rename): `kill` ends the process there as kill -9 does, in a write after half of its
// bytes; `term` sends it SIGTERM before the call; `eio`, `enospc`, `erofs`, `emfile` and `eintr` are its errno; `short` lets a write take
// half. KAVA_FAIL=count prints each kind's range at the end.
#pragma once
#include <sys/types.h>

#include <cstddef>
#include <string>

namespace kava::disk {

/// Each is the system's call of this name, again after EINTR: -1 and errno where it fails.
int open(const std::string& path, int flags);
ssize_t write(int descriptor, const void* bytes, std::size_t count);
/// fsync. What has none (a pipe, a device, some file systems) is no failure.
int sync(int descriptor);
int rename(const std::string& from, const std::string& to);
/// Both names change what they name, in one step. EINVAL, ENOSYS or ENOTSUP where the file system cannot.
int exchange(const std::string& a, const std::string& b);

#ifdef KAVA_FAILPOINTS
/// Error(code usage) where KAVA_FAIL is malformed.
void check_failpoints();
/// For KAVA_FAIL=count: "failpoints: open 1..12 write 1..9 fsync 1..20 rename 1..4" on stderr.
void report_failpoints();
#endif

}  // namespace kava::disk
