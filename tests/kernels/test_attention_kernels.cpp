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
  const Layout layout = few_queries({{100, 1}, {140, 2}, {90, 20}}, 47);  // of both forms, in one part and in two
  const int64_t rows = layout.query_rows, step_rows = layout.step_rows;
  const FlatLayout l(layout);
  const Matrix q = random.normal(rows, 64), k = random.normal(step_rows, 32), v = random.normal(step_rows, 32);
  auto output = [&]<class T>(bool with_lse) {
    Device device(true);
    const Rows<T> o = device.out<T>(rows, 64);
    const SegmentLists segments = lists(device, l);
    const AttentionDims dims{heads.heads, heads.kv_heads, heads.dim, static_cast<float>(heads.scale())};
    attention_fwd<T>(nullptr, o, with_lse ? device.out<float>(rows, heads.heads) : Rows<float>{},
                     room(device, attention_fwd_workspace<T>(segments, dims)), device.in<T>(q), device.in<T>(k), device.in<T>(v), segments,
                     dims);
    return without_last_row(read(o, rows, 64)).at;
  };
  CHECK(output.operator()<bf16>(true) == output.operator()<bf16>(false));
  CHECK(output.operator()<float>(true) == output.operator()<float>(false));
}

TEST_CASE("attention of few rows takes keys in any order, of one part and of many, and any heads") {
  SKIP_IF_UNSUPPORTED();
  const Layout one = few_queries({{1, 1}, {2, 2}, {31, 1}, {33, 3}, {64, 4}, {100, 1}, {128, 2}}, 41),
               several = few_queries({{129, 1}, {128, 2}, {130, 4}, {256, 1}, {257, 2}, {16, 1}, {300, 1}}, 42),
               mixed = few_queries({{140, 2}, {130, 30}, {260, 16}, {90, 17}}, 43),
               many = few_queries({{8192, 1}, {4097, 2}, {100, 1}}, 44);
  const AttentionCase cases[] = {{one, {4, 1, 64}},      {one, {6, 2, 128}},    {one, {3, 3, 1}},      {several, {7, 1, 64}},
                                 {several, {3, 1, 128}}, {several, {8, 2, 16}}, {several, {1, 1, 32}}, {several, {2, 1, 100}},
                                 {mixed, {1, 1, 64}},    {mixed, {8, 1, 5}},    {many, {4, 1, 64}}};
  unsigned seed = 51;
  for (const AttentionCase& c : cases) {
    INFO("heads " << c.heads.heads << "/" << c.heads.kv_heads << " of " << c.heads.dim << ", step rows " << c.layout.step_rows);
    check_attention_case<bf16>(c, seed, seed % 2 == 0 ? 1 : 4), ++seed;
  }
}

TEST_CASE("attention of more rows than a tile has takes eight thousand keys, forward and backward") {
  SKIP_IF_UNSUPPORTED();
  simt::set_schedule({});
  // 34 queries of two heads are two of the forward's tiles, 8192 keys many of either's; beside them two of the backward's, and one.
  const AttentionCase c{few_queries({{8192, 34}, {97, 40}, {90, 33}}, 48), {2, 1, 16}};
  // size: a score of 20 has an error of 1e-6 in f32, as large as all that is allowed.
  const auto check = [&]<class T>(const AttentionCase& a, T, double size) {
    const Matrices in = attention_inputs<T>(a, 49, size), exact = attention_cpu(a, in), rounded = attention_reference<T, float>(a, in);
    Device device(true);
    check_errors(attention_kernels<T>(a, in, device), exact, rounded);
  };
  check(c, bf16{}, 4);
  check(c, float{}, 1);
  check(AttentionCase{few_queries({{8192, 34}}, 48), {1, 1, 128}}, bf16{}, 4);
}

TEST_CASE("attention of a segment has the same bytes alone and beside any others") {
  SKIP_IF_UNSUPPORTED();
  simt::set_schedule({});
  Random random(45);
  const Heads heads{4, 2, 64};
  // One query and a few, on one part of keys and on several; beside them more keys, and more queries.
  const Layout all = few_queries({{90, 1}, {200, 1}, {300, 3}, {700, 1}, {150, 20}, {40, 4}}, 46);
  const Matrix q = random.normal(all.query_rows, 256), k = random.normal(all.step_rows, 128), v = random.normal(all.step_rows, 128);
  auto output = [&](const std::vector<SegmentSpec>& segments) {
    const FlatLayout l({segments, range(0, static_cast<int>(segments.size()) + 1), all.step_rows, all.query_rows});
    Device device(true);
    const SegmentLists lists_ = lists(device, l);
    const AttentionDims dims{heads.heads, heads.kv_heads, heads.dim, static_cast<float>(heads.scale())};
    const Rows<bf16> o = device.out<bf16>(all.query_rows, 256);
    const Rows<float> lse = device.out<float>(all.query_rows, heads.heads);
    attention_fwd<bf16>(nullptr, o, lse, room(device, attention_fwd_workspace<bf16>(lists_, dims)), device.in<bf16>(q), device.in<bf16>(k),
                        device.in<bf16>(v), lists_, dims);
    return std::pair(read(o, all.query_rows, 256), read(lse, all.query_rows, heads.heads));
  };
  const auto together = output(all.segments);
  for (const SegmentSpec& s : all.segments) {
    INFO(s.queries << " queries on " << s.keys.size() << " keys");
    const auto alone = output({s});
    for (int64_t r = s.query_begin; r < s.query_begin + s.queries; ++r) {
      for (int64_t c = 0; c < 256; ++c) REQUIRE(alone.first(r, c) == together.first(r, c));
      for (int64_t c = 0; c < heads.heads; ++c) REQUIRE(alone.second(r, c) == together.second(r, c));
    }
  }
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
            {range(300, 332), 116, 15},
            {range(340, 489), 131, 2},
            {range(490, 586), 133, 32}},
           {0, 1, 4, 5, 6, 7, 8},
           586,
           166};
  for (const Heads heads : {Heads{1, 1, 16}, Heads{4, 2, 32}, Heads{3, 1, 64}, Heads{2, 1, 128}}) {
    INFO("heads " << heads.heads << "/" << heads.kv_heads << " of " << heads.dim);
    struct Work {
      int64_t copies = 0, barriers = 0, mma = 0;
      bool operator==(const Work&) const = default;
    } forward, few, backward;
    const int64_t D = heads.dim, group = heads.heads / heads.kv_heads, steps = D / 16, step_rows = D > 64 ? 32 : 48;
    auto sixteens = [](int64_t n) { return (n + 15) / 16; };
    for (const SegmentSpec& s : l.segments) {
      const int64_t n = s.queries * group, all = std::ssize(s.keys);
      auto seen = [&](int64_t row) { return all - s.queries + 1 + std::min(row, n - 1) / group; };
      for (int64_t first = 0; first < n; first += 64) {
        const int64_t tiles = (seen(first + 63) + 63) / 64;
        if (n > 16) forward.copies += (64 + tiles * 2 * 64) * D / 8, forward.barriers += tiles;
        for (int64_t row = first; row < std::min(first + 64, n); row += 16)
          (n > 16 ? forward : few).mma += 4 * steps * sixteens(seen(row + 15)), backward.mma += 10 * steps * sixteens(seen(row + 15));
      }
      for (int64_t part = 0; n > 0 && n <= 16 && part * 128 < all; ++part) few.copies += (16 + 2 * 128) * D / 8, few.barriers += 3;
      for (int64_t first_key = 0; n > 0 && first_key < all; first_key += 96) {
        int64_t row = 0;
        while (seen(row) <= first_key) ++row;
        const int64_t tiles = (n + step_rows - 1) / step_rows - row / step_rows;
        backward.copies += (2 * 96 + tiles * 2 * step_rows) * D / 8, backward.barriers += 2 * tiles + 1;
      }
    }
    for (Work* w : {&forward, &few, &backward})
      for (int64_t* x : {&w->copies, &w->barriers, &w->mma}) *x *= heads.kv_heads;
    const int64_t width = heads.heads * D, kv = heads.kv_heads * D;
    const Matrices in = {random.normal(166, width), random.normal(586, kv), random.normal(586, kv),
                         random.normal(166, width), Matrix(586, kv),        Matrix(586, kv)};
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
    check(counts[0], few), check(counts[2], forward), check(counts[3], backward);
  }
}
