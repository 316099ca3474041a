// The rules of the emulator itself: what it computes, what it reports, and that its schedules tell a race from a correct kernel.
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cmath>
#include <csignal>
#include <cstring>
#include <string>
#include <vector>

#include "guarded_bytes.h"
#include "kernels/gpu.h"
#include "kernels/tile.h"

using namespace kava;
using Catch::Matchers::ContainsSubstring;
using simt::Schedule;

namespace {

const Schedule kAllSchedules[] = {
    {Schedule::Order::forward, 0, true, false, 0}, {Schedule::Order::forward, 0, true, true, 0},
    {Schedule::Order::reverse, 0, true, true, 0},  {Schedule::Order::reverse, 0, false, false, 1},
    {Schedule::Order::random, 7, false, true, 0},  {Schedule::Order::random, 8, true, false, 3},
};

#define SKIP_IF_UNSUPPORTED() \
  if (!simt::supported()) SKIP("ThreadSanitizer does not know the emulator's fibers")

template <class... Params, class... Args>
std::string report(void (*kernel)(Params...), dim3 block, std::size_t smem, Args... args) {
  try {
    launch(nullptr, kernel, 2, block, smem, args...);
  } catch (const simt::Error& e) {
    return e.what();
  }
  return "";
}

std::string line(unsigned l) { return "test_simt.cpp:" + std::to_string(l); }

// Sums of 256 values by way of the last threads first, so that every barrier is needed.
__global__ void block_sum_kernel(float* y, const float* x) {
  float* shared = dynamic_smem<float>();
  const int t = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  shared[t] = x[static_cast<int>(blockIdx.x) * n + t];
  __syncthreads();
  const float v = warp_sum(shared[n - 1 - t]);
  __syncthreads();
  if (t % 32 == 0) shared[t / 32] = v;
  __syncthreads();
  if (t != 0) return;
  float sum = 0;
  for (int w = 0; w < n / 32; ++w) sum += shared[w];
  y[blockIdx.x] = sum;
}

// Each thread takes its neighbour's value; without the barrier that is a race.
__global__ void neighbour_kernel(int* y, bool with_barrier) {
  int* shared = dynamic_smem<int>();
  const int t = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  shared[t] = t;
  if (with_barrier) __syncthreads();
  y[t] = shared[(t + 33) % n];
}

constexpr unsigned kTwoBarriers = __LINE__ + 3;  // and two lines on
__global__ void two_barriers_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

constexpr unsigned kHalfWarpShuffle = __LINE__ + 2;
__global__ void half_warp_shuffle_kernel(float* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1.f, 1);
}

constexpr unsigned kTwoShuffles = __LINE__ + 3;  // and two lines on
__global__ void two_shuffles_kernel(float* y) {
  if (threadIdx.x % 2) {
    y[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1.f, 1);
  } else {
    y[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1.f, 1);
  }
}

constexpr unsigned kShuffleAgainstBarrier = __LINE__ + 3;
__global__ void shuffle_against_barrier_kernel(float* y) {
  if (threadIdx.x % 2) {
    y[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1.f, 1);
  } else {
    __syncthreads();
  }
}

constexpr unsigned kLdmatrix = __LINE__ + 3;
__global__ void ldmatrix_kernel(int offset) {
  uint32_t r[4];
  ldmatrix_x4<false>(r, smem_addr(dynamic_smem<char>()) + static_cast<uint32_t>(offset));
}

__global__ void copy_kernel(float* y, const float* x, int bytes, bool wait) {
  float* shared = dynamic_smem<float>();
  cp_async_16(smem_addr(shared + 4 * threadIdx.x), x, bytes);
  cp_async_commit();
  if (wait) cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) y[i] = shared[4 * threadIdx.x + i];
}

__global__ void whole_kernel(float* y, const float* x) { store_16(y, load_16(x)); }
__global__ void half_kernel(float* y, const float* x) { store_8(y, load_8(x)); }
__global__ void read_smem_kernel(float* y, int index) { *y = dynamic_smem<float>()[index]; }
__global__ void read_kernel(float* y, const float* x) { *y = *x; }
__global__ void recursion_kernel(volatile int* depth) {
  volatile char frame[4096];
  if (*depth < 0) return;
  frame[*depth % 4096] = 1;
  *depth = *depth + 1;
  recursion_kernel(depth);
  *depth = frame[0];
}
__global__ void throwing_kernel() { throw std::runtime_error("from a kernel"); }

// d = a b for one warp, operands by way of shared memory in any of the layouts that tile.h knows.
template <bool kATransposed, bool kBTransposed>
__global__ void product_kernel(float* d, const bf16* a, const bf16* b) {
  const Tile<16, 16> a_smem{smem_addr(dynamic_smem<char>())}, b_smem{a_smem.base + a_smem.kBytes};
  load_tile<kWarpSize, true>(a_smem, 16, a, [&](int r) { return a + 16 * r; });
  load_tile<kWarpSize, false>(b_smem, 16, b, [&](int r) { return b + 16 * r; });
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  uint32_t a_reg[4], b_reg[2][2];
  load_a<kATransposed>(a_reg, a_smem, 0, 0);
  load_b<kBTransposed>(b_reg, b_smem, 0, 0);
  const AccumulatorPlace place;
  for (int half = 0; half < 2; ++half) {
    float acc[4] = {};
    mma_m16n8k16_bf16(acc, a_reg, b_reg[half]);
    for (int i = 0; i < 4; ++i) d[place.row(i) * 16 + half * 8 + place.col(i)] = acc[i];
  }
}

/// Runs `body` in a child process; true if it did not come back whole.
template <class F>
bool dies(F body) {
  const pid_t child = fork();
  if (child == 0) {
    std::freopen("/dev/null", "w", stderr);
    for (int signal : {SIGSEGV, SIGBUS}) std::signal(signal, SIG_DFL);
    body();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return !WIFEXITED(status) || WEXITSTATUS(status) != 0;
}

}  // namespace

TEST_CASE("the emulator gives the same sums under every schedule") {
  SKIP_IF_UNSUPPORTED();
  std::vector<float> x(256 * 9), first;
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::sin(static_cast<float>(i));
  for (const Schedule& s : kAllSchedules) {
    simt::set_schedule(s);
    std::vector<float> y(9, NAN);
    launch(nullptr, block_sum_kernel, 9, 256, 256 * sizeof(float), y.data(), x.data());
    for (int b = 0; b < 9; ++b) {
      double want = 0;
      for (int i = 0; i < 256; ++i) want += x[static_cast<std::size_t>(b * 256 + i)];
      REQUIRE(std::fabs(y[static_cast<std::size_t>(b)] - want) < 1e-5);
    }
    if (first.empty()) first = y;
    REQUIRE(y == first);
  }
}

TEST_CASE("the emulator's schedules tell a missing barrier") {
  SKIP_IF_UNSUPPORTED();
  for (bool with_barrier : {true, false}) {
    bool right = true;
    for (const Schedule& s : kAllSchedules) {
      simt::set_schedule(s);
      std::vector<int> y(96);
      launch(nullptr, neighbour_kernel, 1, 96, 96 * sizeof(int), y.data(), with_barrier);
      for (int t = 0; t < 96; ++t) right = right && y[static_cast<std::size_t>(t)] == (t + 33) % 96;
    }
    REQUIRE(right == with_barrier);
  }
}

TEST_CASE("the emulator reports barriers and warp operations that are not reached together") {
  SKIP_IF_UNSUPPORTED();
  for (const Schedule& s : kAllSchedules) {
    simt::set_schedule(s);
    std::vector<float> y(64);
    const std::string barriers = report(two_barriers_kernel, 64, 0);
    CHECK_THAT(barriers, ContainsSubstring("divergent __syncthreads") && ContainsSubstring(line(kTwoBarriers)) &&
                             ContainsSubstring(line(kTwoBarriers + 2)));
    CHECK_THAT(report(half_warp_shuffle_kernel, 32, 0, y.data()), ContainsSubstring(line(kHalfWarpShuffle)));
    const std::string shuffles = report(two_shuffles_kernel, 32, 0, y.data());
    CHECK_THAT(shuffles, ContainsSubstring("divergent warp operations") && ContainsSubstring(line(kTwoShuffles)) &&
                             ContainsSubstring(line(kTwoShuffles + 2)));
    CHECK_THAT(report(shuffle_against_barrier_kernel, 32, 0, y.data()),
               ContainsSubstring("deadlock") && ContainsSubstring(line(kShuffleAgainstBarrier)));
    CHECK_THAT(report(half_warp_shuffle_kernel, 16, 0, y.data()), ContainsSubstring("do not exist"));
    // and is whole afterwards
    std::vector<float> x(64, 1), sum(2);
    launch(nullptr, block_sum_kernel, 2, 32, 128, sum.data(), x.data());
    CHECK(sum == std::vector<float>{32, 32});
  }
}

TEST_CASE("the emulator reports accesses out of range") {
  SKIP_IF_UNSUPPORTED();
  simt::set_schedule({});
  CHECK(report(ldmatrix_kernel, 32, 16, 0).empty());
  CHECK_THAT(report(ldmatrix_kernel, 32, 16, 16), ContainsSubstring("beyond the 16 bytes") && ContainsSubstring(line(kLdmatrix)));
  CHECK_THAT(report(ldmatrix_kernel, 32, 64, 8), ContainsSubstring("misaligned") && ContainsSubstring(line(kLdmatrix)));
  alignas(16) float x[8] = {};
  std::vector<float> y(4);
  CHECK_THAT(report(copy_kernel, 2, 16, y.data(), x, 16, true), ContainsSubstring("beyond the 16 bytes"));
  CHECK_THAT(report(copy_kernel, 1, 16, y.data(), x + 1, 16, true), ContainsSubstring("misaligned global address"));
  alignas(16) float to[8];
  for (int odd : {0, 1}) {
    CHECK_THAT(report(whole_kernel, 1, 0, to + odd, x + 1 - odd), ContainsSubstring("a misaligned address at"));
    CHECK_THAT(report(half_kernel, 1, 0, to + odd, x + 1 - odd), ContainsSubstring("a misaligned address at"));
  }
  for (int bytes : {-2, 18})
    CHECK_THAT(report(copy_kernel, 1, 16, y.data(), x, bytes, true), ContainsSubstring("a copy of 16 bytes that reads"));

  CHECK_FALSE(dies([&] { launch(nullptr, read_smem_kernel, 1, 1, 64, y.data(), 15); }));
  CHECK(dies([&] { launch(nullptr, read_smem_kernel, 1, 1, 64, y.data(), 16); }));
  const simt::GuardedBytes memory(64);
  const float* end = reinterpret_cast<const float*>(memory.data() + 64);
  CHECK_FALSE(dies([&] { launch(nullptr, read_kernel, 1, 1, 0, y.data(), end - 1); }));
  CHECK(dies([&] { launch(nullptr, read_kernel, 1, 1, 0, y.data(), end); }));
  int depth = 0;
  CHECK(dies([&] { launch(nullptr, recursion_kernel, 1, 1, 0, &depth); }));
}

TEST_CASE("the emulator refuses launches that no GPU takes and passes a kernel's exceptions on") {
  SKIP_IF_UNSUPPORTED();
  simt::set_schedule({});
  CHECK_THROWS_AS(launch(nullptr, two_barriers_kernel, dim3(1, 70000), 32, 0), simt::Error);
  CHECK_THROWS_AS(launch(nullptr, two_barriers_kernel, 0, 32, 0), simt::Error);
  CHECK_THROWS_AS(launch(nullptr, two_barriers_kernel, 1, 1056, 0), simt::Error);
  CHECK_THROWS_AS(launch(nullptr, two_barriers_kernel, 1, 32, 228 * 1024), simt::Error);
  CHECK_THROWS_WITH(launch(nullptr, throwing_kernel, 3, 64, 0), "from a kernel");
}

TEST_CASE("shared memory starts as NaN and asynchronous copies come between issue and wait") {
  SKIP_IF_UNSUPPORTED();
  alignas(16) const float x[4] = {1, 2, 3, 4};
  std::vector<float> y(4);
  for (bool eager : {false, true}) {
    Schedule s;
    s.eager_copies = eager;
    simt::set_schedule(s);
    launch(nullptr, copy_kernel, 1, 1, 16, y.data(), x, 8, true);
    CHECK(y == std::vector<float>{1, 2, 0, 0});
    launch(nullptr, copy_kernel, 1, 1, 16, y.data(), x, 16, false);
    CHECK(std::isnan(y[0]) == !eager);
  }
}

TEST_CASE("tensor-core fragments from every operand layout give the matrix product") {
  SKIP_IF_UNSUPPORTED();
  simt::set_schedule({});
  alignas(16) bf16 a[16][16], b[16][16];
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j)
      a[i][j] = to_bf16(static_cast<float>((i * 7 + j * 3) % 11)), b[i][j] = to_bf16(static_cast<float>((i * 5 + j) % 13 - 6));
  auto check = [&]<bool kATransposed, bool kBTransposed>() {
    float d[16][16];
    launch(nullptr, product_kernel<kATransposed, kBTransposed>, 1, 32, 1024, &d[0][0], &a[0][0], &b[0][0]);
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 16; ++n) {
        float want = 0;
        for (int k = 0; k < 16; ++k) want += to_float(kATransposed ? a[k][m] : a[m][k]) * to_float(kBTransposed ? b[k][n] : b[n][k]);
        REQUIRE(d[m][n] == want);
      }
  };
  check.operator()<false, false>();
  check.operator()<false, true>();
  check.operator()<true, true>();
  check.operator()<true, false>();
}
