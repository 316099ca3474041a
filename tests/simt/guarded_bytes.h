// Memory between two guard pages: an access beyond its end, or before its first page, is a fault at the line that does it. Where it
// has to begin at a multiple of `align`, up to as many bytes before the page behind it are not guarded. kBegin: it begins right behind the
// page before it instead, and the rest of its last page is not guarded. Its content is anything.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <map>
#include <mutex>
#include <new>
#include <vector>

namespace simt {

class GuardedBytes {
 public:
  static constexpr std::size_t kBegin = 0;

  explicit GuardedBytes(std::size_t bytes, std::size_t align = 1) : bytes_(bytes) {
    const std::size_t room = (bytes + kPage - 1) / kPage * kPage;
    mapped_ = room + 2 * kPage;
    begin_ = take(mapped_);
    if (room && mprotect(begin_ + kPage, room, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    data_ = begin_ + kPage + (align == kBegin ? 0 : room - (bytes + align - 1) / align * align);
  }
  ~GuardedBytes() { give(begin_, mapped_); }
  GuardedBytes(const GuardedBytes&) = delete;
  GuardedBytes& operator=(const GuardedBytes&) = delete;

  unsigned char* data() const { return data_; }
  std::size_t size() const { return bytes_; }

 private:
  // Pages that were given back, by what is mapped: no access is allowed, so that one that comes late is a fault still, but they keep their
  // memory, which the system would have to clear again. Tests of ops take some million.
  struct Idle {
    std::mutex mutex;
    std::map<std::size_t, std::vector<unsigned char*>> begins;
  };
  static Idle& idle() {
    static Idle* const all = new Idle;  // outlives what is static elsewhere
    return *all;
  }
  static constexpr std::size_t kMostKept = std::size_t{1} << 20;

  static unsigned char* take(std::size_t mapped) {
    if (Idle& kept = idle(); mapped <= kMostKept) {
      const std::lock_guard lock(kept.mutex);
      if (auto& begins = kept.begins[mapped]; !begins.empty()) {
        unsigned char* const begin = begins.back();
        begins.pop_back();
        return begin;
      }
    }
    void* const p = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    return static_cast<unsigned char*>(p);
  }
  static void give(unsigned char* begin, std::size_t mapped) {
    if (mapped > kMostKept || mprotect(begin, mapped, PROT_NONE) != 0) {
      munmap(begin, mapped);
      return;
    }
    Idle& kept = idle();
    const std::lock_guard lock(kept.mutex);
    kept.begins[mapped].push_back(begin);
  }

  static inline const std::size_t kPage = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  std::size_t bytes_, mapped_ = 0;
  unsigned char *begin_ = nullptr, *data_ = nullptr;
};

}  // namespace simt
