// What holds for all CUDA kernels, run by the emulator: alignment, sizes, launches.
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <random>
#include <tuple>
#include <utility>

#include "tests/kernels/attention_cases.h"
#include "tests/kernels/gemm_cases.h"

using namespace kava;
using namespace kava::test;

TEST_CASE("kernels take any one matrix whose rows, or whose begin, are not aligned") {
  SKIP_IF_UNSUPPORTED();
  simt::set_schedule({});
  auto check = [](const Matrices& exact, const Matrices& rounded, const std::function<Matrices(Device&)>& kernel) {
    Device even(true);
    kernel(even);
    for (std::size_t number = 0; number < even.matrices(); ++number)
      for (Device::Odd how : {Device::Odd::rows, Device::Odd::begin}) {
        INFO("matrix " << number << (how == Device::Odd::rows ? ", rows" : ", begin"));
        Device device(number, how);
        const Matrices got = kernel(device);
        REQUIRE(device.guards_hold());
        check_errors(got, exact, rounded, 1e-12);
      }
  };
  Random random(35);
  const AttentionCase c{tree(), {3, 1, 32}};
  Matrices in = {random.normal(12, 96), random.normal(20, 32), random.normal(20, 32),
                 random.normal(12, 96), random.normal(20, 32), random.normal(20, 32)};
  for (Matrix& m : in) m = stored<bf16>(m);
  check(attention_cpu(c, in), attention_reference<bf16, float>(c, in), [&](Device& d) { return attention_kernels<bf16>(c, in, d); });
  for (GemmForm form : {GemmForm::nt, GemmForm::nn, GemmForm::tn}) {
    INFO("form " << static_cast<int>(form));
    const GemmCase product{form, 40, 72, 48, 24, false, true};
    const Matrices operands = gemm_inputs<bf16>(product, 36);
    check({gemm_reference<double>(product, operands, {}, 0.75)}, {gemm_reference<bf16>(product, operands, {}, 0.75)}, [&](Device& d) {
      return Matrices{gemm_kernel<bf16>(d, product, operands, {0, 0}, 0.75)};
    });
  }
  const Matrix z = stored<float>(random.normal(3, 40));
  Matrix gradient(3, 40);
  for (int64_t r = 0; r < 3; ++r) {
    double sum = 0;
    for (int64_t c = 0; c < 40; ++c) sum += std::exp(z(r, c));
    for (int64_t c = 0; c < 40; ++c) gradient(r, c) = std::exp(z(r, c)) / sum - (c == 7 ? 1 : 0);
  }
  check({gradient}, {stored<bf16>(gradient)}, [&](Device& d) {
    HeadOutputs<bf16> out;
    out.dz = d.out<bf16>(3, 40);
    head_rows<bf16>(nullptr, out, d.in<float>(z), d.index({7, 7, 7}), d.index({0, 0, 0}), {1, 1}, 3, 40);
    return Matrices{read(out.dz, 3, 40)};
  });
}

TEST_CASE("a gradient takes the place of its logits under every schedule") {
  SKIP_IF_UNSUPPORTED();
  constexpr int64_t kVocabulary = 5000;  // three stretches of a block, the last one not whole
  Random random(37);
  const Matrix logits = stored<float>(random.normal(2, kVocabulary));
  Matrix gradient(2, kVocabulary);
  for (int64_t r = 0; r < 2; ++r) {
    double sum = 0;
    for (int64_t c = 0; c < kVocabulary; ++c) sum += std::exp(logits(r, c));
    for (int64_t c = 0; c < kVocabulary; ++c) gradient(r, c) = std::exp(logits(r, c)) / sum - (c == 4999 ? 1 : 0);
  }
  check_kernel({gradient}, {stored<bf16>(gradient)}, [&](Device& d) {
    const Rows<float> z = d.out<float>(2, kVocabulary);
    for (int64_t r = 0; r < 2; ++r)
      for (int64_t c = 0; c < kVocabulary; ++c) z[r][c] = static_cast<float>(logits(r, c));
    HeadOutputs<bf16> out;
    out.dz = {reinterpret_cast<bf16*>(z.data), 2 * z.stride};
    head_rows<bf16>(nullptr, out, {z.data, z.stride}, d.index({4999, 4999}), d.index({0, 0}), {1, 1}, 2, kVocabulary);
    return Matrices{read(out.dz, 2, kVocabulary)};
  });
}

TEST_CASE("rows at multiples of 16 bytes are moved 16 bytes at a time") {
  if (!simt::supported() || !simt::watchable()) SKIP("kernels tell their accesses in builds without a sanitizer alone");
  simt::set_schedule({});
  Random random(38);
  const Matrix x = stored<bf16>(random.normal(32, 64));
  auto requests = [&](bool aligned) {
    Device device(aligned);
    const Rows<bf16> y = device.out<bf16>(32, 64);
    simt::take_counts();
    simt::set_watched({.counts = true});
    copy_rows<bf16, bf16>(nullptr, y, device.in<bf16>(x), 32, 64);
    simt::set_watched({});
    CHECK(read(y, 32, 64).at == x.at);
    return simt::take_counts().at(0).total.requests;
  };
  CHECK(requests(true) == 2 * 32 * 64 / 8 / 32);
  CHECK(requests(false) == 2 * 32 * 64 / 32);
}

TEST_CASE("the update and the sum of squares take buffers of any length, and any one that begins anywhere") {
  SKIP_IF_UNSUPPORTED();
  const AdamwRates rates{.lr = 0.1, .beta1 = 0.9, .beta2 = 0.99, .eps = 1e-8, .weight_decay = 0.1, .clip = 1};
  const double square = 4;
  const int32_t updates = 3;
  AdamwFactors factors;
  for (int64_t n : {1, 3, 4, 5, 1021, 1024, 1026, 8197}) {
    // What stands before and behind a buffer stays, and is no number.
    struct Buffer {
      std::vector<float> at;
      float* begin;
      Buffer(int64_t n, int64_t shift, float base) : at(static_cast<std::size_t>(n) + 24, NAN) {
        begin = at.data();
        while (reinterpret_cast<std::uintptr_t>(begin) % 16) ++begin;
        begin += 4 + shift;
        for (int64_t i = 0; i < n; ++i) begin[i] = base + static_cast<float>(i % 37) / 64;
      }
    };
    std::vector<float> first;
    for (int odd = -1; odd < 5; ++odd) {
      INFO(n << " elements, buffer " << odd << " begins anywhere");
      Buffer value(n, odd == 0, 1), m(n, odd == 1, -0.25), v(n, odd == 2, 0.5), grad(n, odd == 3, -0.5), halves(n, 0, 0);
      bf16* const half = reinterpret_cast<bf16*>(halves.begin) + (odd == 4);
      std::fill_n(half, n + 8, bf16{0x7fff});
      const std::vector<float> before[] = {value.at, m.at, v.at};
      adamw(nullptr, value.begin, m.begin, v.begin, half, grad.begin, &factors, &square, &updates, rates, n);
      int checked = 0;
      for (const Buffer* b : {&value, &m, &v}) {
        const std::vector<float>& was = before[checked++];
        for (std::size_t i = 0; i < b->at.size(); ++i) {
          const float* here = b->at.data() + i;
          if (here < b->begin || here >= b->begin + n) REQUIRE(std::memcmp(here, &was[i], sizeof(float)) == 0);
          else REQUIRE(*here == *here);
        }
      }
      for (int64_t i = 0; i < n; ++i) REQUIRE(half[i].bits == to_bf16(value.begin[i]).bits);
      for (int64_t i = n; i < n + 8; ++i) REQUIRE(half[i].bits == 0x7fff);
      std::vector<float> all(value.begin, value.begin + n);
      all.insert(all.end(), m.begin, m.begin + n), all.insert(all.end(), v.begin, v.begin + n);
      if (odd < 0) first = all;
      REQUIRE(all == first);

      const auto sum_of = [&](const auto* x) {
        std::vector<double> partials(static_cast<std::size_t>(sum_squares_partials(n)));
        double sum = 0, want = 0;
        sum_squares(nullptr, &sum, partials.data(), x, n);
        for (int64_t i = 0; i < n; ++i) want += static_cast<double>(to_float(x[i])) * static_cast<double>(to_float(x[i]));
        REQUIRE(std::fabs(sum - want) <= 1e-13 * want);
      };
      sum_of(static_cast<const float*>(grad.begin));
      sum_of(static_cast<const bf16*>(half));
    }
  }
}

TEST_CASE("kernels launch nothing where there is nothing to do") {
  Unrun none;
  const Rows<float> x{nullptr, 8};
  const Rows<const float> cx = x;
  const float weights[2] = {1, 1};
  const RopeTables at{nullptr, cx, cx};
  fill_rows<float>(&none, x, 0, 0, 8), fill_rows<float>(&none, x, 0, 3, 0), copy_rows<float, float>(&none, x, cx, 0, 8);
  embed_bwd(&none, x, x, cx, nullptr, 0, 8), embed_bwd(&none, x, x, cx, nullptr, 3, 0);
  add_rms_norm_fwd<float>(&none, x, {}, {}, cx, {}, nullptr, 0, 0, 8);
  rms_norm_bwd<float, float>(&none, x, nullptr, nullptr, cx, cx, cx, nullptr, 0, 8);
  add_layer_norm_fwd<float>(&none, x, {}, x, x, cx, {}, nullptr, nullptr, 0, 0, 8);
  layer_norm_bwd<float, float>(&none, x, nullptr, nullptr, nullptr, cx, cx, cx, cx, nullptr, 0, 8);
  rope<float, float>(&none, x, cx, nullptr, cx, cx, 0, 2, 8, false);
  norm_rope_fwd<float>(&none, x, {}, cx, nullptr, at, 0, 0, 2, 8);
  norm_rope_bwd<float, float>(&none, x, nullptr, nullptr, cx, cx, cx, nullptr, at, 0, 2, 8);
  head_rows<float>(&none, {}, cx, nullptr, nullptr, weights, 0, 8);
  head_draw(&none, nullptr, cx, {}, nullptr, 1, 1, 0, 8);
  head_loss(&none, nullptr, nullptr, nullptr, 0), head_correct(&none, nullptr, nullptr, nullptr, 0);
  distill<float>(&none, nullptr, {}, nullptr, cx, cx, nullptr, nullptr, GroupDistance::mse, 1, 1, 0, 4, 8);
  bias_bwd<float>(&none, nullptr, nullptr, cx, 0, 8), bias_bwd<float>(&none, nullptr, nullptr, cx, 3, 0);
  for (const auto& [samples, kv_heads] : {std::pair{0, 2}, {3, 0}}) {
    RkvDims dims{.samples = samples, .heads = 2, .kv_heads = kv_heads, .head_dim = 8, .latents = 2, .trace_tokens = 4};
    rkv_select<float>(&none, {}, nullptr, {}, dims);
  }
  for (const auto& [count, groups, queries] : {std::tuple{0, 1, 1}, {1, 0, 1}, {1, 1, 0}}) {
    SegmentLists lists;
    lists.count = count, lists.groups = groups, lists.most_queries = lists.fewest_queries = queries;
    attention_fwd<bf16>(&none, {}, {}, {}, {}, {}, {}, lists, {2, 1, 64, 1.f});
    attention_fwd<float>(&none, {}, {}, {}, {}, {}, {}, lists, {2, 1, 64, 1.f});
    attention_bwd<bf16>(&none, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, lists, {2, 1, 64, 1.f});
    attention_bwd<float>(&none, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, lists, {2, 1, 64, 1.f});
  }
  // Attention has a form for up to 16 stacked rows, in parts of 128 keys, and one for more: each where some segment may need it.
  for (const auto& [fewest, most, keys, kernels] :
       {std::tuple{1, 8, 128, 1}, {1, 8, 129, 2}, {8, 9, 128, 2}, {9, 9, 129, 1}, {0, 9, 129, 3}}) {
    SegmentLists lists;
    lists.count = lists.groups = 1, lists.fewest_queries = fewest, lists.most_queries = most, lists.most_keys = keys;
    attention_fwd<bf16>(&none, {}, {}, {}, {}, {}, {}, lists, {2, 1, 64, 1.f});
    CHECK(std::exchange(none.launches, 0) == kernels);
    CHECK((attention_fwd_workspace<bf16>(lists, {2, 1, 64, 1.f}) > 0) == (fewest <= 8 && keys > 128));
    lists.most_keys -= 32;
    CHECK((attention_bwd_workspace<bf16>(9, lists, {2, 1, 60, 1.f}) == (keys > 128 ? 9 * 2 * 64 : 0)));
  }
  for (const auto& [m, n] : {std::pair{0, 3}, {3, 0}}) {
    Gemm<float> g;
    g.m = m, g.n = n;
    gemm<GemmForm::nt>(&none, g);
  }
  CHECK(none.launches == 0);
  // What is left of a launcher's work.
  auto launched = [&] { return std::exchange(none.launches, 0); };
  moments<float>(&none, {}, nullptr, {.x = {cx}, .count = 1}, nullptr, 0, 4, 8);
  CHECK(launched() == 1);
  sum_squares<float>(&none, nullptr, nullptr, static_cast<const float*>(nullptr), 0);
  CHECK(launched() == 1);
  adamw(&none, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, {}, 0);
  CHECK(launched() == 1);
  rms_norm_bwd<float, float>(&none, x, nullptr, nullptr, cx, cx, cx, nullptr, 3, 8);
  CHECK(launched() == 1);
  for (const auto& [w, b] : {std::pair{true, false}, {false, true}}) {
    float gain;
    layer_norm_bwd<float, float>(&none, x, w ? &gain : nullptr, b ? &gain : nullptr, nullptr, cx, cx, cx, cx, nullptr, 3, 8);
    CHECK(launched() == 3);
  }
}

TEST_CASE("kernels take the largest counts that they say, and refuse the next") {
  Unrun none;
  const Rows<float> x{nullptr, 8};
  const Rows<const float> cx = x;
  const int64_t most = int64_t{1} << 31;
  CHECK_NOTHROW(copy_rows<float, float>(&none, x, cx, most - 1, 8));
  CHECK_THROWS_AS((copy_rows<float, float>(&none, x, cx, most, 8)), std::invalid_argument);
  CHECK_NOTHROW(copy_rows<float, float>(&none, x, cx, 1, kLongestRow));
  CHECK_THROWS_AS((copy_rows<float, float>(&none, x, cx, 1, kLongestRow + 1)), std::invalid_argument);
  // Of two bytes as many columns are filled in whole chunks; of four element by element.
  CHECK_NOTHROW(fill_rows<bf16>(&none, {nullptr, 8}, {}, 1, kLongestRow));
  CHECK_NOTHROW(fill_rows<float>(&none, x, 0, 1, kLongestRow));
  CHECK_NOTHROW((rope<float, float>(&none, x, cx, nullptr, cx, cx, most - 1, 2, 8, false)));
  CHECK_THROWS_AS((rope<float, float>(&none, x, cx, nullptr, cx, cx, most, 2, 8, false)), std::invalid_argument);
  const RopeTables at{nullptr, cx, cx};
  for (const auto& [head_dim, lanes] : {std::pair{8, 1}, {128, 8}, {512, 32}}) {
    CHECK_NOTHROW(norm_rope_fwd<float>(&none, x, {}, cx, nullptr, at, 0, most / 8 / lanes - 1, 8, head_dim));
    CHECK_THROWS_AS(norm_rope_fwd<float>(&none, x, {}, cx, nullptr, at, 0, most / 8 / lanes, 8, head_dim), std::invalid_argument);
  }
  CHECK_THROWS_AS(norm_rope_fwd<float>(&none, x, {}, cx, nullptr, at, 0, 1, 1, 514), std::invalid_argument);
  CHECK_NOTHROW(add_rms_norm_fwd<float>(&none, x, {}, {}, cx, {}, nullptr, 0, 1, longest_norm(4)));
  CHECK_THROWS_AS(add_rms_norm_fwd<float>(&none, x, {}, {}, cx, {}, nullptr, 0, 1, longest_norm(4) + 1), std::invalid_argument);
  for (const AttentionDims& dims : {AttentionDims{2, 2, 1, 1.f}, AttentionDims{1, 1, 128, 1.f}, AttentionDims{6, 3, 64, 1.f}})
    CHECK_NOTHROW(attention_fwd<bf16>(&none, {}, {}, {}, {}, {}, {}, {}, dims));
}

TEST_CASE("kernels refuse dimensions that they do not take and have nothing to do without rows") {
  for (const AttentionDims& dims : {AttentionDims{2, 1, 129, 1.f}, AttentionDims{2, 1, 0, 1.f}, AttentionDims{3, 2, 64, 1.f},
                                    AttentionDims{0, 1, 64, 1.f}, AttentionDims{2, 0, 64, 1.f}, AttentionDims{0, 0, 64, 1.f}}) {
    CHECK_THROWS_AS(attention_fwd<bf16>(nullptr, {}, {}, {}, {}, {}, {}, {}, dims), std::invalid_argument);
    CHECK_THROWS_AS(attention_bwd<float>(nullptr, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, dims), std::invalid_argument);
  }
  CHECK_THROWS_AS(fill_rows(nullptr, Rows<float>{}, 0.f, int64_t{1} << 31, 1), std::invalid_argument);
  CHECK_THROWS_AS(fill_rows(nullptr, Rows<float>{}, 0.f, 1, kLongestRow + 1), std::invalid_argument);
  CHECK_NOTHROW(attention_fwd<bf16>(nullptr, {}, {}, {}, {}, {}, {}, {}, {2, 1, 64, 1.f}));
  CHECK_NOTHROW(attention_bwd<float>(nullptr, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {2, 1, 64, 1.f}));
}

TEST_CASE("kernels are exact at sizes drawn around the edges of tiles (KAVA_SEED draws others)") {
  SKIP_IF_UNSUPPORTED();
  const char* text = std::getenv("KAVA_SEED");
  const unsigned seed = text ? static_cast<unsigned>(std::strtoul(text, nullptr, 10)) : 1;
  std::printf("kernels at drawn sizes: KAVA_SEED=%u\n", seed);
  std::mt19937 engine(seed);
  auto below = [&](int n) { return static_cast<int>(engine() % static_cast<unsigned>(n)); };
  auto at_edge = [&](std::initializer_list<int> tiles) { return tiles.begin()[below(static_cast<int>(tiles.size()))] + below(3) - 1; };
  for (const GemmForm form : {GemmForm::nt, GemmForm::nn, GemmForm::tn}) {
    const bool masked = below(2) == 1;
    const GemmCase c{form,
                     at_edge({16, 32, 64, 128}),
                     at_edge({8, 32, 64, 128}),
                     at_edge({16, 32, 96}),
                     masked && form != GemmForm::nn ? 0 : below(2) * 33,
                     masked,
                     below(2) == 1};
    INFO("KAVA_SEED " << seed << ", form " << static_cast<int>(form) << ", " << c.m << " x " << c.n << " x " << c.k << " + " << c.k2);
    check_gemm<bf16>(c, seed);
  }
  for (int draw = 0; draw < 2; ++draw) {
    // A segment of drawn queries and keys behind them, and one on keys of the first; scores of size 1, or so large that one key has all
    // weight.
    const Heads heads{1 + below(4), 1, at_edge({16, 32, 64, 127})};
    const int own = at_edge({16, 32, 64}), before = below(2) * at_edge({16, 48, 64}), more = at_edge({2, 16}), all = before + own;
    Layout l{
        {{range(0, all), 0, own}, {joined(range(0, all / 2), range(all, all + more)), own, more}}, {0, 2}, all + more + 1, own + more + 1};
    INFO("KAVA_SEED " << seed << ", draw " << draw << ": " << before << " + " << own << " and " << more << " rows, " << heads.heads
                      << " heads of " << heads.dim);
    check_attention_case<bf16>({l, heads}, seed, draw == 0 ? 1 : 8);
  }
}

TEST_CASE("a launch that no GPU takes throws to the caller") {
  SKIP_IF_UNSUPPORTED();
  float memory[1] = {};
  // More blocks in y than a GPU takes.
  Gemm<float> g;
  g.add = {memory, 1}, g.m = 1 << 22, g.n = 1;
  g.then({memory, 1}, {memory, 1}, 1);
  CHECK_THROWS_AS(gemm<GemmForm::nt>(nullptr, g), std::runtime_error);
}
