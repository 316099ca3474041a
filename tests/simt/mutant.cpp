#include "mutant.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>

namespace mutant {

namespace {

struct Log {
  static constexpr int kMost = 1 << 14;
  std::atomic<bool> noted[kMost] = {};
  ~Log() {
    const char* path = std::getenv("KAVA_MUTANT_LOG");
    std::FILE* file = path ? std::fopen(path, "w") : nullptr;
    if (!file) return;
    for (int i = 0; i < kMost; ++i)
      if (noted[i]) std::fprintf(file, "%d\n", i);
    std::fclose(file);
  }
} g_log;

}  // namespace

const int chosen = [] {
  const char* number = std::getenv("KAVA_MUTANT");
  return number ? std::atoi(number) : 0;
}();

void note(int number) { g_log.noted[number] = true; }

}  // namespace mutant
