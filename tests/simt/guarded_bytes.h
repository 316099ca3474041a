// Memory between two guard pages: an access beyond its end, or before its first page, is a fault at the line that does it. Where it
// has to begin at a multiple of `align`, up to as many bytes before the page behind it are not guarded. kBegin: it begins right behind the
// page before it instead, and the rest of its last page is not guarded.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <new>

namespace simt {

class GuardedBytes {
 public:
  static constexpr std::size_t kBegin = 0;

  explicit GuardedBytes(std::size_t bytes, std::size_t align = 1) : bytes_(bytes) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE)), room = (bytes + page - 1) / page * page;
    mapped_ = room + 2 * page;
    void* p = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    begin_ = static_cast<unsigned char*>(p);
    if (room && mprotect(begin_ + page, room, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    data_ = begin_ + page + (align == kBegin ? 0 : room - (bytes + align - 1) / align * align);
  }
  ~GuardedBytes() { munmap(begin_, mapped_); }
  GuardedBytes(const GuardedBytes&) = delete;
  GuardedBytes& operator=(const GuardedBytes&) = delete;

  unsigned char* data() const { return data_; }
  std::size_t size() const { return bytes_; }

 private:
  std::size_t bytes_, mapped_ = 0;
  unsigned char *begin_ = nullptr, *data_ = nullptr;
};

}  // namespace simt
