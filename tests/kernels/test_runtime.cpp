// The emulated runtime is as nasty as tests of the backend rely on: late, full of NaN, and strict about memory.
#include <unistd.h>

#include <array>
#include <catch2/catch_test_macros.hpp>
#include <cmath>

#include "engine/device/cuda/ops_cuda.h"
#include "tests/ops/op_rig.h"

namespace kava::test {

namespace {

/// Whether the memory there can be read; the kernel is asked, which tells no by an error.
bool readable(const void* data) {
  std::array<int, 2> ends{};
  REQUIRE(pipe(ends.data()) == 0);
  const bool yes = write(ends[1], data, 1) == 1;
  close(ends[0]), close(ends[1]);
  return yes;
}

}  // namespace

TEST_CASE("the emulated device copies late, and what nobody wrote there is NaN") {
  GpuRuntime device(0);
  auto* there = static_cast<float*>(device.allocate(4));
  CHECK(std::isnan(*there));
  float here = 1;
  device.write(there, &here, 4);
  here = 2;
  CHECK(std::isnan(*there));
  device.finish();
  CHECK(*there == 1);

  float got = 5;
  device.begin_read(there, 4);
  device.write(there, &here, 4);
  CHECK((got == 5 && *there == 1));
  device.end_read(&got, 4);
  CHECK(got == 1);
  device.finish();
  CHECK(*there == 2);

  device.discard(there, 4);
  CHECK(*there == 2);
  device.finish();
  CHECK(std::isnan(*there));
  device.release(there);
}

TEST_CASE("memory of the emulated device that is released, or not asked for, cannot be touched") {
  GpuRuntime device(0);
  void* data = device.allocate(4);
  CHECK(readable(data));
  device.release(data);
  CHECK_FALSE(readable(data));
  CHECK_THROWS_AS(device.release(data), Error);

  const AddressRange range = device.reserve();
  CHECK_FALSE(readable(range.begin));
  device.commit(range.begin, 4096);
  CHECK(readable(range.begin));
  CHECK_FALSE(readable(range.begin + 4096));
  device.unreserve(range, 4096);
  CHECK_FALSE(readable(range.begin));
}

TEST_CASE("what an arena on the emulated device gives is NaN, also where it was written before") {
  const std::unique_ptr<Ops> ops = make_emulated_cuda();
  Arena arena(*ops);
  const auto value = [&](const Tensor& x) {
    float v = 0;
    ops->download(&v, x);
    return v;
  };
  {
    ArenaScope scope(arena);
    const Tensor x = arena.alloc(DType::f32, 1, 1);
    CHECK(std::isnan(value(x)));
    const float one = 1;
    ops->upload(x, &one);
    CHECK(value(x) == 1);
  }
  CHECK(std::isnan(value(arena.alloc(DType::f32, 1, 1))));
}

}  // namespace kava::test
