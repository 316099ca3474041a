// The arena: one range of addresses, memory for the largest step and no more.
#include <sys/resource.h>

#include <catch2/catch_test_macros.hpp>
#include <cstring>
#include <functional>
#include <random>

#include "engine/device/ops.h"
#include "engine/memory.h"

#ifdef KAVA_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace kava {

namespace {

// What a layer of hidden size C and MLP width F keeps of a step, and what a pass gives back.
void step(Arena& arena, int64_t layers, int64_t rows, int64_t C, int64_t F) {
  for (int64_t l = 0; l < layers; ++l) {
    for (int64_t cols : {C, C, C / 4, C / 4, C, C}) arena.alloc(DType::bf16, rows, cols);
    for (int i = 0; i < 2; ++i) arena.alloc(DType::f32, rows, 1), arena.alloc(DType::f32, rows, C / 4);
    for (int i = 0; i < 2; ++i) arena.alloc(DType::bf16, rows, F);
    const ArenaScope temporaries(arena);
    arena.alloc(DType::f32, rows / 3, F), arena.alloc(DType::bf16, rows / 3, F);
  }
}

std::vector<const void*> addresses(Arena& arena, int64_t rows) {
  const ArenaScope scope(arena);
  std::vector<const void*> all;
  for (int i = 0; i < 40; ++i) all.push_back(arena.alloc(DType::bf16, rows, 1 + 97 * i).data);
  return all;
}

int64_t page_faults() {
  rusage usage = {};
  REQUIRE(getrusage(RUSAGE_SELF, &usage) == 0);
  return usage.ru_minflt + usage.ru_majflt;
}

}  // namespace

TEST_CASE("the memory of an arena is its largest step, and addresses do not move") {
  // A step of 128 samples of some 160 rows each on 16 layers of 2,048, a standard deviation of 20 rows a sample.
  constexpr int kSteps = 300;
  std::mt19937 random(1);
  std::normal_distribution<double> rows_of_128(20454, 20 * std::sqrt(128.0));
  const std::function<int64_t(int)> patterns[] = {[](int i) { return 20000 + 3 * i; }, [](int i) { return 21000 - 3 * i; },
                                                  [&](int) { return static_cast<int64_t>(rows_of_128(random)); }};
  for (const auto& rows_of : patterns) {
    const std::unique_ptr<Ops> null = make_cpu_ops(1, true);
    Arena arena(*null);
    int64_t largest = 0;
    const std::vector<const void*> before = addresses(arena, 20000);
    for (int i = 0; i < kSteps; ++i) {
      const int64_t rows = rows_of(i);
      const ArenaScope scope(arena);
      step(arena, 16, rows, 2048, 8192);
      Arena alone(*null);
      step(alone, 16, rows, 2048, 8192);
      largest = std::max(largest, alone.peak_bytes());
      REQUIRE(arena.peak_bytes() == largest);
      REQUIRE(arena.committed_bytes() >= largest);
      REQUIRE(arena.committed_bytes() < largest + Arena::kPiece);
    }
    CHECK(largest > int64_t{15} << 30);
    CHECK(arena.mark().used == 0);
    CHECK(addresses(arena, 20000) == before);
  }
}

TEST_CASE("tensors of an arena are aligned, apart, and lie in one range") {
  const std::unique_ptr<Ops> ops = make_cpu_ops(1);
  Arena arena(*ops);
  const char *end = nullptr, *begin = nullptr;
  for (int64_t bytes : {0, 1, 63, 64, 65, 3 << 20, 1, 9 << 20}) {
    const Tensor t = arena.alloc(DType::i32, 1, (bytes + 3) / 4);
    char* data = static_cast<char*>(t.data);
    CHECK(reinterpret_cast<std::uintptr_t>(data) % 64 == 0);
    if (!begin) begin = data;
    CHECK(data >= end);
    std::memset(data, 0x5A, static_cast<std::size_t>(t.count()) * 4);
    end = data + t.count() * 4;
  }
  CHECK(end - begin <= arena.peak_bytes());
}

TEST_CASE("a step touches its memory once") {
  const std::unique_ptr<Ops> ops = make_cpu_ops(1);
  Arena arena(*ops);
  auto fill = [&](int64_t mebibytes) {
    const ArenaScope scope(arena);
    const int64_t before = page_faults();
    for (int64_t i = 0; i < 3; ++i) ops->fill(arena.alloc(DType::f32, mebibytes, 1 << 18), 1);
    return page_faults() - before;
  };
  CHECK(fill(70) > 0);
  for (int64_t smaller : {69, 70, 3, 66, 70}) CHECK(fill(smaller) <= 4);
}

TEST_CASE("a step that no machine holds is refused with exit 3, and the arena stays as it was") {
  const std::unique_ptr<Ops> ops = make_cpu_ops(1);
  Arena arena(*ops);
  const Tensor first = arena.alloc(DType::f32, 1, 5);
  for (int64_t rows : {int64_t{1} << 61, int64_t{1} << 40, machine_memory() / 4}) {
    try {
      arena.alloc(DType::f32, rows, 1);
      FAIL("allocated");
    } catch (const Error& e) {
      CHECK(e.code() == Exit::preflight);
      CHECK(e.where() == "memory");
    }
  }
  CHECK(arena.alloc(DType::f32, 1, 1).data == static_cast<char*>(first.data) + 64);
  CHECK(arena.committed_bytes() == Arena::kPiece);
}

TEST_CASE("memory that was given out and is not touched yet is not given twice") {
#if defined(KAVA_ASAN) || defined(KAVA_TSAN)
  SKIP("a sanitizer keeps books of its own for every byte");
#else
  const std::unique_ptr<Ops> ops = make_cpu_ops(1);
  const int64_t most = available_physical_memory() / 10 * 7;
  Arena arena(*ops);
  arena.alloc(DType::f32, most / 4, 1);
  try {
    void* data = ops->allocate(most);
    ops->release(data, most);
    FAIL("allocated");
  } catch (const Error& e) {
    CHECK(e.code() == Exit::preflight);
  }
#endif
}

TEST_CASE("a sanitizer knows which memory of an arena is in use") {
#ifndef KAVA_ASAN
  SKIP("not built with the address sanitizer");
#else
  const std::unique_ptr<Ops> ops = make_cpu_ops(1);
  Arena arena(*ops);
  const Tensor kept = arena.alloc(DType::f32, 1, 2);
  Tensor released;
  {
    const ArenaScope scope(arena);
    released = arena.alloc(DType::f32, 1, 2);
    CHECK(__asan_address_is_poisoned(released.data) == 0);
    CHECK(__asan_address_is_poisoned(static_cast<char*>(kept.data) + 8) != 0);
  }
  CHECK(__asan_address_is_poisoned(kept.data) == 0);
  CHECK(__asan_address_is_poisoned(released.data) != 0);
#endif
}

}  // namespace kava
