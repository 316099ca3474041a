#include "tests/ops/op_rig.h"

using namespace kava;
using namespace kava::test;

namespace {
constexpr int kParts = 5;  // matrices per linear map in the inputs: W, bias, A, B, dy

struct MapGroup {
  int64_t rows, in;
  std::vector<int64_t> outs, ranks;
  bool bias;
  double p;
  double scale = 0.5;  // a power of two, so that the op's scale * B is exact in every type
};

Matrices inputs_of(const MapGroup& g, Random& random) {
  Matrices m = {random.normal(g.rows, g.in)};
  for (std::size_t j = 0; j < g.outs.size(); ++j) {
    m.push_back(random.normal(g.outs[j], g.in, 0.3));
    m.push_back(random.normal(1, g.bias ? g.outs[j] : 0));
    m.push_back(random.normal(g.ranks[j], g.in, 0.3));
    m.push_back(random.normal(g.outs[j], g.ranks[j], 0.3));
    m.push_back(random.normal(g.rows, g.outs[j]));
  }
  return m;
}

struct Placed {
  Tensor x, xa;
  std::vector<Linear> linears;
  std::vector<Tensor> y, dy;
  Dropout dropout;
};

Placed place(Rig& rig, const MapGroup& g, const Matrices& m) {
  Placed t;
  t.x = rig.in(m[0]);
  int64_t ranks = 0;
  for (std::size_t j = 0; j < g.outs.size(); ++j) {
    const Matrix* part = &m[1 + kParts * j];
    Linear l{.w = rig.in(part[0]), .bias = {}, .lora_a = {}, .lora_b = {}, .scale = g.scale};
    if (g.bias) l.bias = rig.in(part[1]);
    if (g.ranks[j] > 0) l.lora_a = rig.in(part[2]), l.lora_b = rig.in(part[3]);
    t.linears.push_back(l);
    t.y.push_back(rig.out(m[0].rows, g.outs[j]));
    t.dy.push_back(rig.in(part[4]));
    ranks += g.ranks[j];
  }
  if (ranks > 0) t.xa = rig.out(m[0].rows, ranks);
  Matrix keys(m[0].rows, 2);
  for (int64_t n = 0; n < m[0].rows; ++n) keys(n, 0) = double(n / 7), keys(n, 1) = double(n % 7);
  t.dropout = {.p = g.p, .seed = 9, .step = 3, .site = 5, .row_keys = rig.packed().in(keys, Kind::i32)};
  return t;
}

OpCall linear_fwd(const MapGroup& g) {
  return [g](Rig& rig, const Matrices& m) {
    Placed t = place(rig, g, m);
    if (rig.emulates() && t.xa) {  // xa is stored before it is used
      rig.ops.linear_group_fwd(rig.arena, t.y, t.xa, t.x, t.linears, t.dropout);
      rig.round(t.xa);
    }
    rig.ops.linear_group_fwd(rig.arena, t.y, t.xa, t.x, t.linears, t.dropout);
    std::vector<Tensor> out = t.y;
    if (t.xa) out.push_back(t.xa);
    return out;
  };
}

// Outputs: dx, then dW, dbias, dA, dB of each map where they exist. All gradients of parameters start from zero.
OpCall linear_bwd(const MapGroup& g) {
  return [g](Rig& rig, const Matrices& m) {
    Placed t = place(rig, g, m);
    Tensor dx = rig.out(m[0].rows, g.in), dxa = t.xa ? rig.out(m[0].rows, t.xa.cols) : Tensor{};
    std::vector<LinearGrad> grads(g.outs.size());
    std::vector<Tensor> out = {dx};
    auto zero = [&](int64_t rows, int64_t cols) { return out.emplace_back(rig.in_out(Matrix(rows, cols), Kind::sum)); };
    for (std::size_t j = 0; j < grads.size(); ++j) {
      grads[j].dw = zero(g.outs[j], g.in);
      if (g.bias) grads[j].dbias = zero(1, g.outs[j]);
      if (g.ranks[j] > 0) grads[j].dlora_a = zero(g.ranks[j], g.in), grads[j].dlora_b = zero(g.outs[j], g.ranks[j]);
    }
    rig.ops.linear_group_fwd(rig.arena, t.y, t.xa, t.x, t.linears, t.dropout);
    if (t.xa) rig.round(t.xa);
    rig.ops.linear_group_bwd_input(rig.arena, dx, dxa, t.dy, t.linears, t.dropout);
    if (dxa) rig.round(dxa);
    rig.ops.linear_group_bwd_params(rig.arena, grads, t.dy, dxa, t.x, t.xa, t.linears, t.dropout);
    return out;
  };
}

const MapGroup kGroups[] = {
    {1, 8, {5}, {0}, false, 0},
    {1, 8, {3}, {2}, true, 0},
    {33, 19, {12, 4, 4}, {3, 0, 2}, true, 0},
    {70, 24, {24, 8, 8}, {4, 4, 4}, false, 0.3},
    {40, 64, {32}, {8}, false, 0.1},
    {300, 16, {10, 10}, {0, 0}, true, 0},
};
}  // namespace

TEST_CASE("linear_group computes its formula") {
  Random random(21);
  for (MapGroup g : kGroups) {
    g.p = 0, g.scale = 0.7;
    const Matrices m = inputs_of(g, random), out = run_f64(linear_fwd(g), m);
    for (std::size_t j = 0; j < g.outs.size(); ++j) {
      const Matrix *part = &m[1 + kParts * j], &y = out[j];
      for (int64_t n = 0; n < g.rows; ++n)
        for (int64_t o = 0; o < g.outs[j]; ++o) {
          double want = g.bias ? part[1](0, o) : 0;
          for (int64_t c = 0; c < g.in; ++c) {
            double weight = part[0](o, c);
            for (int64_t r = 0; r < g.ranks[j]; ++r) weight += g.scale * part[3](o, r) * part[2](r, c);
            want += m[0](n, c) * weight;
          }
          REQUIRE(std::fabs(y(n, o) - want) < 1e-11);
        }
    }
  }
}

TEST_CASE("linear_group is as exact as its storage and has the gradients of central differences") {
  Random random(22);
  for (const MapGroup& g : kGroups) {
    INFO("rows " << g.rows << ", in " << g.in << ", maps " << g.outs.size() << ", dropout " << g.p);
    const Matrices m = inputs_of(g, random);
    check_op("linear_group_fwd", m, linear_fwd(g));
    check_op("linear_group_bwd", m, linear_bwd(g));
    std::vector<std::size_t> which = {0};
    Matrices weights;
    for (std::size_t j = 0; j < g.outs.size(); ++j) {
      const std::size_t at = 1 + kParts * j;
      which.push_back(at);
      if (g.bias) which.push_back(at + 1);
      if (g.ranks[j] > 0) which.push_back(at + 2), which.push_back(at + 3);
      weights.push_back(m[at + 4]);
    }
    check_gradient(
        "linear_group", m, [&](const Matrices& moved) { return weighted(run_f64(linear_fwd(g), moved), weights); }, which,
        run_f64(linear_bwd(g), m));
  }
}

TEST_CASE("a row of linear_group has the same bytes whatever rows stand beside it") {
  Random random(23);
  const MapGroup g{600, 96, {80, 33}, {4, 0}, true, 0.2};
  const Matrices m = inputs_of(g, random);
  for (DType type : {DType::f32, DType::bf16, DType::f64}) {
    auto rows = [&](int64_t n) {
      Matrices some = m;
      for (Matrix* x : {&some[0], &some[kParts], &some[2 * kParts]}) x->rows = n, x->at.resize(std::size_t(n * x->cols));
      Rig rig(2, type, type, 0);
      Matrices out = read_all(rig, linear_fwd(g)(rig, some));
      for (Matrix& y : out) y.at.resize(std::size_t(y.cols));
      return out;
    };
    const Matrices all = rows(600);
    for (int64_t n : {1, 2, 31, 256, 257, 300}) {
      INFO(name_of(type) << ", " << n << " rows");
      const Matrices some = rows(n);
      for (std::size_t j = 0; j < all.size(); ++j) REQUIRE(some[j].at == all[j].at);
    }
  }
}

TEST_CASE("dropout keeps its share of elements, by the row's keys, site, step and seed alone") {
  const int64_t n = 40, c = 300;
  const double p = 0.3;
  Matrix identity(c, c);
  for (int64_t i = 0; i < c; ++i) identity(i, i) = 1;
  // With x all ones and A the identity, xa is the mask.
  auto mask = [&](const Matrix& keys, uint64_t seed, uint32_t step, uint32_t site) {
    Rig rig(2, DType::f32, DType::f32, 0);
    Linear l{.w = rig.in(Matrix(1, c)), .bias = {}, .lora_a = rig.in(identity), .lora_b = rig.in(Matrix(1, c)), .scale = 1};
    Tensor x = rig.in(Matrix(keys.rows, c, 1)), xa = rig.out(keys.rows, c), y = rig.out(keys.rows, 1);
    const Dropout d{.p = p, .seed = seed, .step = step, .site = site, .row_keys = rig.in(keys, Kind::i32)};
    rig.ops.linear_group_fwd(rig.arena, std::span(&y, 1), xa, x, std::span(&l, 1), d);
    return rig.read(xa);
  };
  Matrix keys(n, 2);
  for (int64_t i = 0; i < n; ++i) keys(i, 0) = double(i / 8), keys(i, 1) = double(i % 8);
  const Matrix first = mask(keys, 1, 1, 1);
  double kept = 0;
  for (double v : first.at) {
    REQUIRE((v == 0 || std::fabs(v - 1 / (1 - p)) < 1e-6));
    kept += v > 0;
  }
  const double count = double(n * c), spread = std::sqrt(count * p * (1 - p));
  REQUIRE(std::fabs(kept - count * (1 - p)) < 5 * spread);
  Matrix backwards(n, 2);
  for (int64_t i = 0; i < n; ++i) backwards(i, 0) = keys(n - 1 - i, 0), backwards(i, 1) = keys(n - 1 - i, 1);
  const Matrix turned = mask(backwards, 1, 1, 1);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < c; ++j) REQUIRE(turned(i, j) == first(n - 1 - i, j));
  for (const Matrix& other : {mask(keys, 2, 1, 1), mask(keys, 1, 2, 1), mask(keys, 1, 1, 2)}) {
    double equal = 0;
    for (std::size_t i = 0; i < first.at.size(); ++i) equal += other.at[i] == first.at[i];
    REQUIRE(std::fabs(equal / count - (p * p + (1 - p) * (1 - p))) < 0.03);
  }
  for (int64_t i = 1; i < n; ++i) REQUIRE(!std::equal(&first.at[0], &first.at[std::size_t(c)], &first.at[std::size_t(i * c)]));
}

TEST_CASE("what dropout keeps is divided by 1 - p in the type of the sums") {
  Rig rig(1, DType::f64, DType::f64, 0);
  const int64_t c = 64;
  const double p = 0.1;
  Linear l{.w = rig.in(Matrix(1, c)), .bias = {}, .lora_a = rig.in(Matrix(1, c, 1)), .lora_b = rig.in(Matrix(1, 1, 1)), .scale = 1};
  const Tensor x = rig.in(Matrix(1, c, 1)), xa = rig.out(1, 1), dx = rig.out(1, c), dxa = rig.out(1, 1), dy = rig.in(Matrix(1, 1, 1));
  Tensor y = rig.out(1, 1);
  const Dropout d{.p = p, .seed = 1, .step = 1, .site = 1, .row_keys = rig.in(Matrix(1, 2), Kind::i32)};
  rig.ops.linear_group_fwd(rig.arena, std::span(&y, 1), xa, x, std::span(&l, 1), d);
  rig.ops.linear_group_bwd_input(rig.arena, dx, dxa, std::span(&dy, 1), std::span(&l, 1), d);
  double kept = 0;
  for (double v : rig.read(dx).at) {
    REQUIRE((v == 0 || v == 1 / (1 - p)));
    kept += v;
  }
  REQUIRE(kept > 0);
  REQUIRE(std::fabs(rig.read(xa)(0, 0) - kept) < 1e-13);
}
