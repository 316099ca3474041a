// The attention kernels, run by the emulator, against the cpu backend in f64.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>

#include "tests/kernels/attention_cases.h"

using namespace kava;
using namespace kava::test;

TEST_CASE("attention kernels are as exact as bf16 tensor cores allow and the same under every schedule") {
  SKIP_IF_UNSUPPORTED();
  check_attention<bf16>("bf16");
}

TEST_CASE("attention kernels in f32 are exact and the same under every schedule") {
  SKIP_IF_UNSUPPORTED();
  check_attention<float>("f32");
}

TEST_CASE("attention kernels give the same output where no lse is wanted") {
  SKIP_IF_UNSUPPORTED();
  simt::set_schedule({});
  Random random(33);
  const Heads heads{4, 2, 16};
  const FlatLayout l(tree());
  const Matrix q = random.normal(12, 64), k = random.normal(20, 32), v = random.normal(20, 32);
  auto output = [&]<class T>(bool with_lse) {
    Device device(true);
    const Rows<T> o = device.out<T>(12, 64);
    attention_fwd<T>(nullptr, o, with_lse ? device.out<float>(12, heads.heads) : Rows<float>{}, device.in<T>(q), device.in<T>(k),
                     device.in<T>(v), lists(device, l), {heads.heads, heads.kv_heads, heads.dim, static_cast<float>(heads.scale())});
    return without_last_row(read(o, 12, 64)).at;
  };
  CHECK(output.operator()<bf16>(true) == output.operator()<bf16>(false));
  CHECK(output.operator()<float>(true) == output.operator()<float>(false));
}

TEST_CASE("attention gives queries and keys no gradient where all values are equal, whatever the size of scores") {
  SKIP_IF_UNSUPPORTED();
  simt::set_schedule({});
  Random random(34);
  // The sum of a row's weights is then as far from 1 as the rounding of lse, some 1e-4, makes it.
  const AttentionCase c{long_segments(), {2, 1, 16}};
  const Matrices in = {random.normal(77, 32, 400), random.normal(275, 16), Matrix(275, 16, 1),
                       random.normal(77, 32),      Matrix(275, 16),        Matrix(275, 16)};
  Device device(true);
  const Matrices out = attention_kernels<float>(c, in, device);
  // At most a few roundings (2^-24) of dp, some 12, times queries of some 1,400 and the scale of a quarter; by that sum it were 0.1 and
  // more.
  for (std::size_t i : {2u, 3u})
    for (double v : out[i].at) REQUIRE(std::fabs(v) < 1e-3);
  // Weights are divided by their sum: of n equal scores each is 1/n, though lse is rounded. Queries have no last column, keys differ there.
  Matrices equal = in;
  for (int64_t r = 0; r < 77; ++r)
    for (int64_t d = 0; d < 32; ++d) equal[0](r, d) = d % 16 == 0 ? stored<float>(in[0](r, d) * 10) : 0;
  for (int64_t r = 0; r < 275; ++r)
    for (int64_t d = 0; d < 16; ++d) equal[1](r, d) = d == 0 ? 1 : d == 15 ? in[1](r, d) : 0;
  equal[2] = stored<float>(random.normal(275, 16));
  Device other(true);
  const Matrices got = attention_kernels<float>(c, equal, other);
  for (const SegmentSpec& s : c.layout.segments)
    for (int i = 0; i < s.queries; ++i)
      for (int64_t head = 0; head < 2; ++head) {
        const std::size_t seen = s.keys.size() - static_cast<std::size_t>(s.queries - 1 - i);
        const int64_t row = s.query_begin + i;
        double mean = 0, want = 0, size = 0;
        std::vector<double> dp;
        for (std::size_t j = 0; j < seen; ++j) {
          double sum = 0;
          for (int64_t d = 0; d < 16; ++d) sum += equal[3](row, head * 16 + d) * equal[2](s.keys[j], d);
          dp.push_back(sum), mean += sum / static_cast<double>(seen);
        }
        for (std::size_t j = 0; j < seen; ++j) {
          const double term = c.heads.scale() / static_cast<double>(seen) * (dp[j] - mean) * equal[1](s.keys[j], 15);
          want += term, size += std::fabs(term);
        }
        REQUIRE(std::fabs(got[2](row, head * 16 + 15) - want) <= 3e-6 * size);
      }
  // Each row adds its dout to the keys' dv, by weights whose sum is 1.
  for (int64_t col = 0; col < 16; ++col) {
    double sum = 0, want = 0;
    for (int64_t r = 0; r < 275; ++r) sum += out[4](r, col);
    for (int64_t r = 0; r < 76; ++r) want += in[3](r, col) + in[3](r, 16 + col);
    REQUIRE(std::fabs(sum - want) < 1e-4);
  }
}

TEST_CASE("attention copies, meets and multiplies no more than what its tiles see") {
  if (!simt::supported() || !simt::watchable()) SKIP("kernels tell their accesses in builds without a sanitizer alone");
  simt::set_schedule({});
  Random random(37);
  // Ends at and beside those of sixteens and of tiles; keys without queries; queries without keys before them.
  Layout l{{{range(0, 64), 0, 64},
            {range(64, 129), 64, 3},
            {range(130, 162), 67, 16},
            {range(0, 20), 83, 0},
            {range(163, 291), 83, 33},
            {range(300, 332), 116, 15}},
           {0, 1, 4, 5, 6},
           332,
           132};
  for (const Heads heads : {Heads{1, 1, 16}, Heads{4, 2, 32}, Heads{3, 1, 64}, Heads{2, 1, 128}}) {
    INFO("heads " << heads.heads << "/" << heads.kv_heads << " of " << heads.dim);
    struct Work {
      int64_t copies = 0, barriers = 0, mma = 0;
      bool operator==(const Work&) const = default;
    } forward, queries, keys;
    const int64_t D = heads.dim, group = heads.heads / heads.kv_heads, steps = D / 16, parts = D > 64 ? 2 : 1;
    auto sixteens = [](int64_t n) { return (n + 15) / 16; };
    for (const SegmentSpec& s : l.segments) {
      const int64_t n = s.queries * group, all = std::ssize(s.keys);
      auto seen = [&](int64_t row) { return all - s.queries + 1 + std::min(row, n - 1) / group; };
      for (int64_t first = 0; first < n; first += 64) {
        const int64_t tiles = (seen(first + 63) + 63) / 64;
        forward.copies += (64 + tiles * 2 * 64) * D / 8, queries.copies += (2 * 64 + tiles * 2 * 64) * D / 8;
        forward.barriers += 2 * tiles, queries.barriers += 2 * tiles;
        for (int64_t row = first; row < std::min(first + 64, n); row += 16)
          forward.mma += 4 * steps * sixteens(seen(row + 15)), queries.mma += 6 * steps * sixteens(seen(row + 15));
      }
      for (int64_t first_key = 0; n > 0 && first_key < all; first_key += 64) {
        int64_t row = 0;
        while (seen(row) <= first_key) ++row;
        const int64_t tiles = (n + 31) / 32 - row / 32;
        keys.copies += (2 * 64 + tiles * 2 * 32) * D / 8;
        keys.barriers += (parts == 2 ? 3 : 2) * tiles;
        for (int64_t key = first_key; key < std::min(first_key + 64, all); key += 16)
          for (int64_t r = row / 32 * 32; r < n; r += 16)
            if (seen(r + 15) > key) keys.mma += 8 * steps;
      }
    }
    for (Work* w : {&forward, &queries, &keys})
      for (int64_t* x : {&w->copies, &w->barriers, &w->mma}) *x *= heads.kv_heads;
    const int64_t width = heads.heads * D, kv = heads.kv_heads * D;
    const Matrices in = {random.normal(132, width), random.normal(332, kv), random.normal(332, kv),
                         random.normal(132, width), Matrix(332, kv),        Matrix(332, kv)};
    simt::take_counts();
    simt::set_watched({.counts = true});
    Device device(true);
    attention_kernels<bf16>({l, heads}, in, device);
    simt::set_watched({});
    const std::vector<simt::LaunchCounts> counts = simt::take_counts();
    REQUIRE(counts.size() == 4);
    auto check = [](const simt::LaunchCounts& c, const Work& want) {
      INFO(c.kernel);
      CHECK(c.copies == want.copies);
      CHECK(c.barriers == want.barriers);
      CHECK(c.mma == want.mma);
    };
    check(counts[0], forward), check(counts[2], queries), check(counts[3], keys);
  }
}
