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
  dropout_bits(bits, 7, 3, 2, 0, 99, 0);
  for (GemmForm form : {GemmForm::nt, GemmForm::nn, GemmForm::tn})
    for (const uint32_t threshold : {bits[1] & 0xffff, bits[2] >> 16}) check({form, 3, 8, 8, 0, true, false, {}, 1, threshold});
}

TEST_CASE("tiles of 128 are taken from 2048 x 2048 on") {
  if (!simt::supported() || !simt::watchable()) SKIP("kernels tell their accesses in builds without a sanitizer alone");
  simt::set_schedule({});
  for (int64_t n : {2040, 2048}) {
    Gemm<bf16> g;
    Device device(true);
    g.m = 2048, g.n = static_cast<int>(n), g.set = device.out<bf16>(2048, n);
    g.then(device.in<bf16>(Matrix(2048, 16)), device.in<bf16>(Matrix(n, 16)), 16);
    simt::take_counts();
    simt::set_watched({.counts = true, .most_blocks = 1});
    gemm<GemmForm::nt>(nullptr, g);
    simt::set_watched({});
    CHECK(simt::take_counts().at(0).blocks == (n == 2048 ? 16 * 16 : 32 * 32));
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
