#include "tests/ops/op_rig.h"

using namespace kava;
using namespace kava::test;

// A sanitizer's allocator ends the program where malloc would refuse, unless told to refuse too.
#if defined(KAVA_TSAN)
extern "C" const char* __tsan_default_options() { return "allocator_may_return_null=1"; }
#elif defined(KAVA_ASAN)
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1"; }
#endif

TEST_CASE("memory of the cpu backend is aligned, and asking for too much is refused with exit 3") {
  Ops& ops = cpu(1);
  for (int64_t bytes : {int64_t{0}, int64_t{1}, int64_t{100}, int64_t{5} << 20}) {
    void* data = ops.allocate(bytes);
    REQUIRE(reinterpret_cast<uintptr_t>(data) % 64 == 0);
    ops.release(data, bytes);
  }
  try {
    ops.allocate(std::numeric_limits<int64_t>::max() / 2);
    FAIL("allocated");
  } catch (const Error& e) {
    REQUIRE(e.code() == Exit::preflight);
  }
}
