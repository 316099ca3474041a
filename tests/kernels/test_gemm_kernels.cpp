// The product kernels, run by the emulator, against sums in f64.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>

#include "tests/kernels/gemm_cases.h"

using namespace kava;
using namespace kava::test;

TEST_CASE("products copy, meet and multiply no more than what is not zero by their bands") {
  if (!simt::supported() || !simt::watchable()) SKIP("kernels tell their accesses in builds without a sanitizer alone");
  simt::set_schedule({});
  struct Stretch {
    int64_t begin, end;
  };
  // Bands of the second product, and what of its k they need, in whole sixteens, for each tile of 64 columns.
  struct Case {
    int64_t m, n, k, k2;
    std::vector<Band> bands;
    std::vector<Stretch> stretches;
  };
  const Case cases[] = {{40, 72, 48, 0, {}, {}},
                        {64, 128, 32, 0, {}, {}},
                        {32, 192, 32, 128, {{0, 64, 0, 40}, {64, 160, 40, 96}}, {{0, 48}, {32, 96}, {32, 96}}},
                        {97, 160, 16, 120, {{0, 100, 8, 56}, {100, 128, 64, 120}, {128, 160, 100, 120}}, {{0, 64}, {0, 120}, {96, 120}}},
                        {16, 64, 16, 120, {{0, 32, 64, 120}, {32, 64, 8, 40}}, {{0, 120}}},
                        {16, 192, 32, 64, {{64, 128, 0, 64}}, {{0, 0}, {0, 64}, {0, 0}}}};
  for (const Case& c : cases)
    for (bool aligned : {true, false}) {
      INFO(c.m << " x " << c.n << " x " << c.k << " + " << c.k2 << (aligned ? "" : ", odd"));
      GemmCase product{GemmForm::nt, c.m, c.n, c.k, c.k2, false, false};
      Matrices in = gemm_inputs<bf16>(product, 39);
      auto in_band = [&](int64_t n, int64_t k) {
        return std::any_of(c.bands.begin(), c.bands.end(),
                           [&](const Band& b) { return n >= b.n_begin && n < b.n_end && k >= b.k_begin && k < b.k_end; });
      };
      for (int64_t n = 0; n < c.n && !c.bands.empty(); ++n)
        for (int64_t k = 0; k < c.k2; ++k)
          if (!in_band(n, k)) in[3](n, k) = 0;
      int64_t copies = 0, barriers = 0, mma = 0;
      for (int64_t row = 0; row < c.m; row += 64)
        for (int64_t col = 0; col < c.n; col += 64) {
          const int64_t warps = (std::min<int64_t>(64, c.m - row) + 31) / 32 * ((std::min<int64_t>(64, c.n - col) + 31) / 32);
          auto add = [&](int64_t k) {
            const int64_t steps = (k + 31) / 32;
            copies += (steps + 2) * 2 * 64 * 32 / 8, barriers += steps + 1, mma += warps * steps * 2 * 2 * 4;
          };
          add(c.k);
          if (c.k2 == 0) continue;
          const Stretch s = c.bands.empty() ? Stretch{0, c.k2} : c.stretches[static_cast<std::size_t>(col / 64)];
          add(s.end - s.begin);
        }
      product.bands = c.bands;
      simt::take_counts();
      simt::set_watched({.counts = true});
      Device device(aligned);
      const Matrix got = gemm_kernel<bf16>(device, product, in, {0, 0}, 1);
      simt::set_watched({});
      const simt::LaunchCounts counts = simt::take_counts().at(0);
      CHECK(counts.copies == (aligned ? copies : 0));
      CHECK(counts.barriers == barriers);
      CHECK(counts.mma == mma);
      CHECK(normalised_error(got, gemm_reference<bf16>(product, in, {}, 1)) < 1e-4);
    }
}

TEST_CASE("products scale as many of their parts as they are told, and keep what lies at the threshold") {
  SKIP_IF_UNSUPPORTED();
  auto check = [](const GemmCase& c) {
    INFO("form " << static_cast<int>(c.form) << ", scaled " << c.scaled << ", threshold " << c.threshold);
    check_gemm<bf16>(c, 40);
    check_gemm<float>(c, 40);
  };
  for (int scaled : {0, 1, 2}) check({GemmForm::nn, 40, 24, 16, 40, false, false, {}, scaled});
  // Half-words of the mask at even and odd columns of rows that each form has; row 1 has the keys (0, 99).
  uint32_t bits[4];
  dropout_bits(bits, dropout_keys(7), 3, 2, 0, 99, 0);
  for (GemmForm form : {GemmForm::nt, GemmForm::nn, GemmForm::tn})
    for (const uint32_t threshold : {bits[1] & 0xffff, bits[2] >> 16}) check({form, 3, 8, 8, 0, true, false, {}, 1, threshold});
}

TEST_CASE("tiles of 128 are taken where they are three quarters of a device's blocks") {
  if (!simt::supported() || !simt::watchable()) SKIP("kernels tell their accesses in builds without a sanitizer alone");
  simt::set_schedule({});
  auto blocks = [](int64_t m, int64_t n, int parts, bool masked = false) {
    Gemm<bf16> g;
    Device device(true);
    g.m = static_cast<int>(m), g.n = static_cast<int>(n), g.set = device.out<bf16>(m, n);
    if (parts > 0) g.parts = parts, g.partial = device.out<float>(parts * m, n);
    g.then(device.in<bf16>(Matrix(m, 16)), device.in<bf16>(Matrix(n, 16)), 16);
    g.masked = masked, g.mask = {device.index(mask_keys(m)), 7, 3, 2, dropout_threshold(0.3), 1};
    simt::take_counts();
    simt::set_watched({.counts = true, .most_blocks = 1});
    gemm<GemmForm::nt>(nullptr, g);
    simt::set_watched({});
    return simt::take_counts().at(0).blocks;
  };
  CHECK(blocks(1152, 21 * 128, 0) == 18 * 42);
  CHECK(blocks(1152, 21 * 128 + 8, 0) == 9 * 22);
  CHECK(blocks(512, 1024, 6) == 8 * 16 * 6);
  CHECK(blocks(512, 1024, 7) == 4 * 8 * 7);
  CHECK(blocks(1152, 21 * 128, 0, true) == 18 * 42);
  CHECK(blocks(1152, 21 * 128 + 8, 0, true) == 9 * 22);
}

TEST_CASE("a sum over rows is cut into parts by shapes alone, where few tiles would leave a device idle") {
  CHECK(row_parts(384, 2048, 11072) == 5);  // dA of q, k and v at 1B's shape
  CHECK(row_parts(128, 2048, 11072) == 16);
  CHECK(row_parts(128, 8192, 11072) == 4);
  CHECK(row_parts(512, 128, 11072) == 21);  // dB of k: 512 rows a part at least
  CHECK(row_parts(128, 2048, 1023) == 1);   // in as many launches as with more rows
  CHECK(row_parts(128, 2048, 0) == 1);
  CHECK(row_parts(2048, 1056, 4096) == 0);
  CHECK(row_parts(2048, 1024, 4096) == 2);
  CHECK(row_parts(0, 8, 4096) == 0);
}

TEST_CASE("sums in parts are exact, the same under every schedule, and add their parts in order") {
  SKIP_IF_UNSUPPORTED();
  for (const auto& [m, n, k, parts] : std::vector<std::array<int64_t, 4>>{
           {1, 1, 1, 1}, {3, 8, 40, 3}, {70, 72, 200, 3}, {64, 64, 96, 3}, {70, 13, 129, 2}, {5, 24, 700, 6}})
    for (GemmForm form : {GemmForm::nt, GemmForm::tn})
      for (bool masked : {false, true}) {
        INFO("form " << static_cast<int>(form) << ", " << m << " x " << n << " x " << k << ", parts " << parts
                     << (masked ? ", masked" : ""));
        GemmCase c{form, m, n, k, 0, masked, false};
        c.parts = static_cast<int>(parts), c.add = form == GemmForm::tn;
        check_gemm<bf16>(c, static_cast<unsigned>(m + k));
        if (parts == 1) c.add = !c.add, check_gemm<bf16>(c, 41), check_gemm<float>(c, 42);
      }
  // Of two stretches of k by themselves, in f32. Without a factor a fused multiply-add rounds no other way.
  const int64_t m = 40, n = 48, k = 112, length = 64;
  GemmCase whole{GemmForm::nt, m, n, k, 0, false, false};
  whole.parts = 2, whole.add = true;
  Matrices in = gemm_inputs<bf16>(whole, 43);
  auto stretch = [&](int64_t from, int64_t to) {
    Device device(true);
    Gemm<bf16> g;
    g.m = m, g.n = n, g.set_sum = device.out<float>(m, n);
    const Rows<const bf16> a = device.in<bf16>(in[0]), b = device.in<bf16>(in[1]);
    g.then({a.data + from, a.stride}, {b.data + from, b.stride}, static_cast<int>(to - from));
    gemm<GemmForm::nt>(nullptr, g);
    return read(g.set_sum, m, n);
  };
  const Matrix first = stretch(0, length), second = stretch(length, k);
  Device device(true);
  const Matrix got = gemm_kernel<bf16>(device, whole, in, {0, 0}, 1);
  for (std::size_t i = 0; i < got.at.size(); ++i) {
    const float sum = static_cast<float>(first.at[i]) + static_cast<float>(second.at[i]);
    REQUIRE(static_cast<float>(got.at[i]) == static_cast<float>(in[5].at[i]) + sum);
  }
}

TEST_CASE("masked products take large tiles too, and give what small ones give") {
  SKIP_IF_UNSUPPORTED();
  simt::set_schedule({});
  const std::vector<int> keys = mask_keys(1600);
  for (const auto& [form, m, n, k, few] :
       {std::tuple{GemmForm::nt, 1600, 2048, 40, 72}, {GemmForm::nn, 1600, 2048, 40, 72}, {GemmForm::tn, 1544, 2048, 40, 72}}) {
    INFO("form " << static_cast<int>(form));
    const GemmCase large{form, m, n, k, 0, true, false};
    GemmCase small = large;
    small.m = few;
    const Matrices in = gemm_inputs<bf16>(large, 6);
    Matrices some = in;
    const bool by_k = form == GemmForm::tn;
    some[0] = by_k ? Matrix(k, few) : Matrix(few, k);
    for (int64_t r = 0; r < some[0].rows; ++r)
      for (int64_t c = 0; c < some[0].cols; ++c) some[0](r, c) = in[0](r, c);
    Device device(true), other(true);
    const Matrix all = gemm_kernel<bf16>(device, large, in, keys, 0.75), part = gemm_kernel<bf16>(other, small, some, keys, 0.75);
    CHECK(std::equal(part.at.begin(), part.at.end(), all.at.begin()));
    CHECK(normalised_error(part, gemm_reference<bf16>(small, some, keys, 0.75)) < 1e-5);
  }
}

TEST_CASE("product kernels are as exact as bf16 tensor cores allow and the same under every schedule") {
  SKIP_IF_UNSUPPORTED();
  check_gemms<bf16>("bf16");
}

TEST_CASE("product kernels in f32 are exact and the same under every schedule") {
  SKIP_IF_UNSUPPORTED();
  check_gemms<float>("f32");
}

TEST_CASE("a large product takes large tiles and gives what small ones give") {
  SKIP_IF_UNSUPPORTED();
  simt::set_schedule({});
  GemmCase large{GemmForm::nt, 2048, 2048, 40, 0, false, false};
  // Those of parts that end within a large tile, of ranks that are no whole steps of the tensor cores.
  if (GENERATE(false, true)) large.bands = {{0, 576, 0, 24}, {576, 2048, 24, 40}};
  GemmCase small = large;
  small.m = 40;
  Matrices in = gemm_inputs<bf16>(large, 5);
  for (int64_t n = 0; n < large.n && !large.bands.empty(); ++n)
    for (int64_t k = 0; k < large.k; ++k)
      if ((n < 576) != (k < 24)) in[1].at[static_cast<std::size_t>(n * large.k + k)] = 0;
  Matrices few = in;
  few[0] = Matrix(40, 40);
  std::copy_n(in[0].at.begin(), few[0].at.size(), few[0].at.begin());
  Device device(true), other(true);
  const Matrix all = gemm_kernel<bf16>(device, large, in, {0, 0}, 1), part = gemm_kernel<bf16>(other, small, few, {0, 0}, 1);
  CHECK(std::equal(part.at.begin(), part.at.end(), all.at.begin()));
  CHECK(normalised_error(part, gemm_reference<bf16>(small, few, {}, 1)) < 1e-5);
}
