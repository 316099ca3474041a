// The emulator's counters and its search for races, on kernels whose counts are known and whose races are planted.
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <string>
#include <vector>

#include "kernels/gpu.h"
#include "kernels/tile.h"
#include "watch.h"

using namespace kava;
using Catch::Matchers::ContainsSubstring;

namespace {

#define SKIP_IF_UNWATCHED() \
  if (!simt::supported() || !simt::watchable()) SKIP("kernels tell their accesses in builds without a sanitizer alone")

/// Watches until it goes.
struct Watching {
  explicit Watching(const simt::Watched& w) {
    simt::set_schedule({});
    simt::set_watched(w);
    simt::take_counts();
  }
  ~Watching() { simt::set_watched({}); }
};

template <class... Params, class... Args>
simt::LaunchCounts counts_of(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t smem, Args... args) {
  const Watching watching({.counts = true});
  launch(nullptr, kernel, grid, block, smem, args...);
  std::vector<simt::LaunchCounts> counts = simt::take_counts();
  REQUIRE(counts.size() == 1);
  return counts[0];
}

template <class... Params, class... Args>
std::string race_in(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t smem, Args... args) {
  const Watching watching({.races = true});
  try {
    launch(nullptr, kernel, grid, block, smem, args...);
  } catch (const simt::Error& e) {
    return e.what();
  }
  return "";
}

std::string at_line(unsigned l) { return "test_watch.cpp:" + std::to_string(l); }

// ---- known counts

__global__ void shared_stride_kernel(float* y, int stride) {
  float* shared = dynamic_smem<float>();
  shared[static_cast<int>(threadIdx.x) * stride] = 1;
  __syncthreads();
  y[threadIdx.x] = shared[threadIdx.x];
}
struct alignas(16) Four {
  float at[4];
};
__global__ void shared_chunks_kernel(Four* y, int stride) {
  Four* shared = dynamic_smem<Four>();
  shared[static_cast<int>(threadIdx.x) * stride] = y[threadIdx.x];
}
__global__ void ldmatrix_rows_kernel(int pitch) {
  const uint32_t base = smem_addr(dynamic_smem<char>());
  uint32_t r[4];
  ldmatrix_x4<false>(r, base + static_cast<uint32_t>(static_cast<int>(threadIdx.x) * pitch));
}
__global__ void ldmatrix_tile_kernel() {
  uint32_t a[4], b[2][2];
  const Tile<64, 32> tile{smem_addr(dynamic_smem<char>())};
  load_a<false>(a, tile, 16, 16);
  load_b<true>(b, tile, 0, 32 - 16);
}
__global__ void global_stride_kernel(const float* x, float* y, int stride, int offset) {
  y[threadIdx.x] = x[static_cast<int>(threadIdx.x) * stride + offset];
}
__global__ void read_again_kernel(const float* x, float* y, int times) {
  float sum = 0;
  for (int i = 0; i < times; ++i) sum += const_cast<const volatile float*>(x)[threadIdx.x];
  y[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
__global__ void mma_kernel(int count) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  for (int i = 0; i < count; ++i) {
    mma_m16n8k16_bf16(d, a, b);
    __syncthreads();
  }
}
__global__ void copies_kernel(const float* x) {
  const uint32_t smem = smem_addr(dynamic_smem<char>());
  for (unsigned stage = 0; stage < 3; ++stage) {
    cp_async_16(smem + (stage * blockDim.x + threadIdx.x) * 16, x + 4 * threadIdx.x, 16);
    cp_async_commit();
  }
  cp_async_wait<2>();
  cp_async_wait<0>();
}

// ---- planted races; the constants are the lines of what is wrong

constexpr unsigned kReadAfterWrite = __LINE__ + 5;
__global__ void read_after_write_kernel(int* y, bool barrier) {
  int* shared = dynamic_smem<int>();
  shared[threadIdx.x] = 1;
  if (barrier) __syncthreads();
  y[threadIdx.x] = shared[threadIdx.x ? threadIdx.x - 1 : 0];
}
constexpr unsigned kWriteAfterRead = __LINE__ + 7;
__global__ void write_after_read_kernel(int* y, bool barrier) {
  int* shared = dynamic_smem<int>();
  shared[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
  if (barrier) __syncthreads();
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
}
constexpr unsigned kWriteWrite = __LINE__ + 2;
__global__ void write_write_kernel(int value_step) {
  dynamic_smem<int>()[0] = static_cast<int>(threadIdx.x) * value_step;
  __syncthreads();
}
constexpr unsigned kUnwritten = __LINE__ + 4;
__global__ void unwritten_kernel(int* y, bool all) {
  int* shared = dynamic_smem<int>();
  if (all || threadIdx.x != 7) shared[threadIdx.x] = 1;
  y[threadIdx.x] = shared[threadIdx.x];
}
// Reads own (distance 0) or the neighbour's chunk, as soon as `waits` and `barrier` allow.
constexpr unsigned kCopied = __LINE__ + 7;
__global__ void copied_kernel(float* y, const float* x, unsigned distance, bool waits, bool barrier) {
  float* shared = dynamic_smem<float>();
  cp_async_16(smem_addr(shared + 4 * threadIdx.x), x + 4 * threadIdx.x, 16);
  cp_async_commit();
  if (waits) cp_async_wait<0>();
  if (barrier) __syncthreads();
  y[threadIdx.x] = shared[4 * ((threadIdx.x + distance) % blockDim.x)];
}
// The next copy into a chunk that the neighbour may still read.
constexpr unsigned kOverwritten = __LINE__ + 9;
__global__ void overwritten_kernel(float* y, const float* x, bool barrier) {
  float* shared = dynamic_smem<float>();
  const uint32_t mine = smem_addr(shared + 4 * threadIdx.x);
  cp_async_16(mine, x, 16);
  cp_async_commit(), cp_async_wait<0>();
  __syncthreads();
  y[threadIdx.x] = shared[4 * ((threadIdx.x + 1) % blockDim.x)];
  if (barrier) __syncthreads();
  cp_async_16(mine, x, 16);
  cp_async_commit(), cp_async_wait<0>();
}
__global__ void ldmatrix_race_kernel(bool barrier) {
  uint32_t* shared = dynamic_smem<uint32_t>();
  for (int i = 0; i < 4; ++i) shared[4 * threadIdx.x + static_cast<unsigned>(i)] = 1;
  if (barrier) __syncthreads();
  uint32_t r[4];
  ldmatrix_x4<false>(r, smem_addr(shared + 4 * threadIdx.x));
}
// A shuffle of the warp is no fence.
__global__ void shuffle_is_no_fence_kernel(float* y) {
  float* shared = dynamic_smem<float>();
  shared[threadIdx.x] = 1;
  const float sum = warp_sum(1.f);
  y[threadIdx.x] = shared[threadIdx.x ^ 1] + sum;
}
constexpr unsigned kBlocks = __LINE__ + 1;
__global__ void blocks_kernel(float* y, unsigned step) { y[blockIdx.x * step] = static_cast<float>(blockIdx.x); }
__global__ void block_reads_kernel(float* y) {
  if (blockIdx.x == 0) y[0] = 1;
  else y[1] = y[0];
}
__global__ void global_barrier_kernel(float* y, bool barrier) {
  y[threadIdx.x] = 1;
  if (barrier) __syncthreads();
  y[(threadIdx.x + 1) % blockDim.x] += 1;
}
__global__ void bad_shuffle_kernel(float* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_sync(0xffffu, 1.f, 20);
}

}  // namespace

TEST_CASE("the emulator counts the wavefronts of shared accesses") {
  SKIP_IF_UNWATCHED();
  std::vector<Four> y(32);
  auto wavefronts = [&](auto kernel, std::size_t smem, auto... args) {
    const simt::Traffic t = counts_of(kernel, 1, 32, smem, args...).total;
    return std::pair(t.wavefronts, t.fewest_wavefronts);
  };
  using Counts = std::pair<std::int64_t, std::int64_t>;
  float* to = y[0].at;
  // One store of the stride and one load without a conflict.
  for (int stride : {1, 2, 4, 8, 16, 32, 33})
    CHECK(wavefronts(shared_stride_kernel, 33 * 32 * 4, to, stride) == Counts(1 + (stride == 33 ? 1 : stride), 2));
  CHECK(wavefronts(shared_stride_kernel, 256, to, 0) == Counts(2, 2));  // one word, written by all
  CHECK(wavefronts(shared_chunks_kernel, 512, y.data(), 1) == Counts(4, 4));
  CHECK(wavefronts(shared_chunks_kernel, 1024, y.data(), 2) == Counts(8, 4));
  CHECK(wavefronts(shared_chunks_kernel, 8 * 512, y.data(), 8) == Counts(32, 4));
  CHECK(wavefronts(ldmatrix_rows_kernel, 32 * 16, 16) == Counts(4, 4));
  CHECK(wavefronts(ldmatrix_rows_kernel, 32 * 32, 32) == Counts(8, 4));
  CHECK(wavefronts(ldmatrix_rows_kernel, 32 * 128, 128) == Counts(32, 4));
  CHECK(wavefronts(ldmatrix_rows_kernel, 32 * 144, 144) == Counts(4, 4));
  CHECK(wavefronts(ldmatrix_tile_kernel, 64 * 32 * 2) == Counts(8, 8));
}

TEST_CASE("the emulator counts the sectors and bytes of global accesses") {
  SKIP_IF_UNWATCHED();
  alignas(32) static float x[32 * 33 + 8], y[256];
  std::vector<float> from(32 * 33 + 16), to(256 + 8);
  auto aligned = [](std::vector<float>& v) { return v.data() + (32 - reinterpret_cast<std::uintptr_t>(v.data()) % 32) % 32 / 4; };
  const float* in = aligned(from);
  float* out = aligned(to);
  auto sectors = [&](int stride, int offset) {
    const simt::LaunchCounts c = counts_of(global_stride_kernel, 1, 32, 0, in, out, stride, offset);
    CHECK(c.total.requests == 2);
    CHECK(c.total.fewest_sectors == 4 + (stride == 0 ? 1 : 4));
    CHECK(c.fewest == 128 + (stride == 0 ? 4 : 128));
    CHECK(c.moved == 32 * c.total.sectors);
    return c.total.sectors - 4;
  };
  CHECK(sectors(1, 0) == 4);
  CHECK(sectors(1, 1) == 5);
  CHECK(sectors(2, 0) == 8);
  CHECK(sectors(4, 0) == 16);
  CHECK(sectors(8, 0) == 32);
  CHECK(sectors(33, 0) == 32);
  CHECK(sectors(0, 0) == 1);
  // Constants of the program are no traffic.
  CHECK(counts_of(global_stride_kernel, 1, 32, 0, static_cast<const float*>(x), static_cast<float*>(y), 1, 0).total.requests == 0);

  // What a block reads again costs requests but moves nothing; another block's reads do.
  const simt::LaunchCounts again = counts_of(read_again_kernel, 1, 64, 0, in, out, 5),
                           blocks = counts_of(read_again_kernel, 3, 64, 0, in, out, 1);
  CHECK(again.total.sectors == 2 * (5 + 1) * 4);
  CHECK(again.moved == again.fewest);
  CHECK(blocks.moved == 3 * 256 + 3 * 256);
  CHECK(blocks.fewest == 256 + 3 * 256);
  CHECK(blocks.counted == 3);
}

TEST_CASE("the emulator counts products, barriers and copies, and names the kernel and its lines") {
  SKIP_IF_UNWATCHED();
  const simt::LaunchCounts products = counts_of(mma_kernel, 2, 64, 0, 3);
  CHECK(products.mma == 2 * 2 * 3);
  CHECK(products.barriers == 2 * 3);
  CHECK(products.kernel == "mma_kernel");
  const std::vector<float> x(256);
  const simt::LaunchCounts copies =
      counts_of(copies_kernel, 1, 32, 3 * 512, x.data() + (16 - reinterpret_cast<std::uintptr_t>(x.data()) % 16) % 16 / 4);
  CHECK(copies.copies == 3 * 32);
  CHECK(copies.most_in_flight == 2 * 512);
  std::vector<float> y(32);
  const simt::LaunchCounts conflicts = counts_of(shared_stride_kernel, 1, 32, 4096, y.data(), 32);
  REQUIRE(!conflicts.lines.empty());
  CHECK_THAT(conflicts.lines[0].place, ContainsSubstring("test_watch.cpp:"));
  CHECK(conflicts.lines[0].traffic.wavefronts == 32);
}

TEST_CASE("a sample of blocks stands for a launch") {
  SKIP_IF_UNWATCHED();
  std::vector<float> x(64), y(64 * 100);
  const Watching watching({.counts = true, .most_blocks = 7});
  launch(nullptr, read_again_kernel, 100, 64, 0, x.data(), y.data(), 1);
  const std::vector<simt::LaunchCounts> counts = simt::take_counts();
  REQUIRE(counts.size() == 1);
  CHECK(counts[0].blocks == 100);
  CHECK(counts[0].counted == 7);
  CHECK(counts[0].total.requests == 7 * 2 * 2);
}

TEST_CASE("the emulator finds every planted race and none where a barrier stands") {
  SKIP_IF_UNWATCHED();
  std::vector<int> y(64);
  std::vector<float> to(64);
  std::vector<float> from(256 + 4);
  const float* x = from.data() + (16 - reinterpret_cast<std::uintptr_t>(from.data()) % 16) % 16 / 4;
  CHECK(race_in(read_after_write_kernel, 1, 64, 256, y.data(), true).empty());
  CHECK_THAT(race_in(read_after_write_kernel, 1, 64, 256, y.data(), false),
             ContainsSubstring("race in read_after_write_kernel") && ContainsSubstring("reads what was written") &&
                 ContainsSubstring(at_line(kReadAfterWrite)) && ContainsSubstring(at_line(kReadAfterWrite - 2)));
  CHECK(race_in(write_after_read_kernel, 1, 64, 256, y.data(), true).empty());
  CHECK(race_in(write_after_read_kernel, 2, 64, 256, y.data(), true).empty());  // each block has shared memory of its own
  CHECK_THAT(race_in(write_after_read_kernel, 1, 64, 256, y.data(), false),
             ContainsSubstring("writes what was read") && ContainsSubstring(at_line(kWriteAfterRead)));
  CHECK(race_in(write_write_kernel, 1, 64, 256, 0).empty());  // all write the same
  CHECK_THAT(race_in(write_write_kernel, 1, 64, 256, 1),
             ContainsSubstring("writes what was written") && ContainsSubstring(at_line(kWriteWrite)));
  CHECK(race_in(unwritten_kernel, 1, 64, 256, y.data(), true).empty());
  CHECK_THAT(race_in(unwritten_kernel, 1, 64, 256, y.data(), false),
             ContainsSubstring("thread 7") && ContainsSubstring("reads what was not written") && ContainsSubstring(at_line(kUnwritten)));
  CHECK(race_in(copied_kernel, 1, 32, 512, to.data(), x, 0u, true, false).empty());
  CHECK(race_in(copied_kernel, 1, 32, 512, to.data(), x, 1u, true, true).empty());
  for (unsigned distance : {0u, 1u})
    CHECK_THAT(race_in(copied_kernel, 1, 32, 512, to.data(), x, distance, false, true),
               ContainsSubstring("a copy is under way") && ContainsSubstring(at_line(kCopied)));
  CHECK_THAT(race_in(copied_kernel, 1, 32, 512, to.data(), x, 1u, true, false), ContainsSubstring("simt: race"));
  CHECK(race_in(overwritten_kernel, 1, 32, 512, to.data(), x, true).empty());
  CHECK_THAT(race_in(overwritten_kernel, 1, 32, 512, to.data(), x, false),
             ContainsSubstring("simt: race") && ContainsSubstring(at_line(kOverwritten)));
  CHECK(race_in(ldmatrix_race_kernel, 1, 32, 512, true).empty());
  CHECK_THAT(race_in(ldmatrix_race_kernel, 1, 32, 512, false), ContainsSubstring("by thread"));
  CHECK_THAT(race_in(shuffle_is_no_fence_kernel, 1, 32, 128, to.data()), ContainsSubstring("simt: race"));
  CHECK(race_in(blocks_kernel, 4, 1, 0, to.data(), 1u).empty());
  CHECK_THAT(race_in(blocks_kernel, 4, 1, 0, to.data(), 0u), ContainsSubstring("global memory") && ContainsSubstring(at_line(kBlocks)));
  CHECK_THAT(race_in(block_reads_kernel, 2, 1, 0, to.data()), ContainsSubstring("global memory"));
  CHECK(race_in(global_barrier_kernel, 1, 32, 0, to.data(), true).empty());
  CHECK_THAT(race_in(global_barrier_kernel, 1, 32, 0, to.data(), false), ContainsSubstring("global memory"));
  CHECK_THAT(race_in(bad_shuffle_kernel, 1, 32, 0, to.data()), ContainsSubstring("a shuffle reads lane 20"));
}
