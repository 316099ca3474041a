#include <cmath>
#include <numeric>

#include "tests/ops/op_rig.h"

using namespace kava;
using namespace kava::test;

namespace {
OpRun moments_call(const std::vector<int>& valid) {
  return [=](Rig& rig, const Matrices& m) {
    Tensor x = rig.in(m[0]), v = rig.in(row_of(valid), Kind::i32), out = rig.out(1, 3, Kind::sum), inverse = rig.out(1, 1, Kind::sum);
    rig.ops.moments(rig.arena, out, {&x, 1}, v);
    rig.ops.inverse_std(inverse, out);
    return std::vector<Tensor>{out, inverse};
  };
}

// in: x, target, loss before; outputs: loss, dx
OpRun distill_call(const std::vector<int>& valid, Distance kind, double inverse, double factor, double weight) {
  return [=](Rig& rig, const Matrices& m) {
    Tensor x = rig.in(m[0]), target = rig.in(m[1]), v = rig.in(row_of(valid), Kind::i32), loss = rig.in_out(m[2], Kind::f64);
    Tensor dx = rig.out(m[0].rows, m[0].cols, Kind::sum), inv = inverse > 0 ? rig.in(Matrix(1, 1, inverse), Kind::sum) : Tensor{};
    rig.ops.distill(rig.arena, loss, dx, x, target, v, inv, kind, factor, weight);
    return std::vector<Tensor>{loss, dx};
  };
}

double naive_distance(Distance kind, double d) {
  d = std::fabs(d);
  return kind == Distance::mse ? d * d : kind == Distance::l1 ? d : d < 1 ? 0.5 * d * d : d - 0.5;
}
}  // namespace

TEST_CASE("moments and inverse_std are those of the valid rows, also far from zero", "[device][ops]") {
  Random random(36);
  const std::vector<int> valid = {3, 0, 7, 1};
  const Matrices in = {random.normal(28, 19, 2, 50)};
  for (const std::vector<int>& rows : {std::vector<int>{0, 3, 7, 1}, valid}) {
    Matrices read = in;  // what no group counts is not looked at
    for (int64_t r = 0; r < 28; ++r)
      if (r % 7 >= rows[std::size_t(r / 7)]) std::fill_n(read[0].at.begin() + r * 19, 19, std::nan(""));
    check_op("moments", read, moments_call(rows));
  }
  const Matrices out = run_f64(moments_call(valid), in);
  std::vector<double> x;
  for (int64_t g = 0; g < 4; ++g)
    for (int64_t r = 0; r < valid[std::size_t(g)]; ++r)
      for (int64_t c = 0; c < 19; ++c) x.push_back(in[0](g * 7 + r, c));
  const double n = double(x.size()), mean = std::accumulate(x.begin(), x.end(), 0.0) / n;
  double squares = 0;
  for (double v : x) squares += (v - mean) * (v - mean);
  REQUIRE(out[0](0, 0) == n);
  REQUIRE(std::fabs(out[0](0, 1) - mean) < 1e-12);
  REQUIRE(std::fabs(out[0](0, 2) / squares - 1) < 1e-12);
  REQUIRE(std::fabs(out[1](0, 0) * std::sqrt(squares / (n - 1)) - 1) < 1e-12);

  // f32 numbers whose spread is far below their mean.
  Matrix far(4, 64);
  for (std::size_t i = 0; i < far.at.size(); ++i) far.at[i] = 10000 + double(i % 4) / 64;
  for (auto [ops, type] : every_backend()) {
    if (type == DType::bf16) continue;
    Rig rig(*ops, type, type, 0);
    const Matrices got = read_all(rig, moments_call({4})(rig, {far}));
    REQUIRE(std::fabs(got[0](0, 2) / (256 * 1.25 / 4096) - 1) < 1e-5);
  }
}

TEST_CASE("inverse_std pools rows of moments, and is 0 where the spread is zero or undefined", "[device][ops]") {
  Random random(37);
  const Matrix x = random.normal(24, 9, 1, 3);
  for (auto [ops, type] : every_backend()) {
    const double tolerance = type == DType::f64 ? 1e-13 : 1e-6;
    Rig rig(*ops, type, type, 0);
    Tensor tx = rig.in(x), three = rig.out(3, 3, Kind::sum), one = rig.out(1, 3, Kind::sum), full = rig.in(row_of({8}), Kind::i32);
    Tensor whole = rig.in(row_of({24}), Kind::i32), pooled = rig.out(1, 1, Kind::sum), direct = rig.out(1, 1, Kind::sum);
    const Tensor parts[] = {tx.row_range(0, 8), tx.row_range(8, 16), tx.row_range(16, 24)};
    rig.ops.moments(rig.arena, three, parts, full);
    rig.ops.moments(rig.arena, one, {&tx, 1}, whole);
    rig.ops.inverse_std(pooled, three);
    rig.ops.inverse_std(direct, one);
    const double once = rig.read(direct)(0, 0);
    REQUIRE(std::fabs(rig.read(pooled)(0, 0) / once - 1) < tolerance);
    rig.ops.inverse_std(direct, one, 2);
    REQUIRE(std::fabs(rig.read(direct)(0, 0) / (once * once) - 1) < tolerance);
    // Of each part by itself.
    Tensor each = rig.out(1, 3, Kind::sum);
    rig.ops.inverse_std(each, three);
    for (int64_t i = 0; i < 3; ++i) {
      rig.ops.moments(rig.arena, one, {&parts[i], 1}, full);
      REQUIRE(rig.read(one).at == rig.read(three.row_range(i, i + 1)).at);
      rig.ops.inverse_std(direct, one);
      REQUIRE(rig.read(direct)(0, 0) == rig.read(each)(0, i));
    }
    REQUIRE_THROWS_AS(rig.ops.inverse_std(rig.out(1, 2, Kind::sum), three), Error);
    REQUIRE_THROWS_AS(rig.ops.moments(rig.arena, one, parts, full), Error);
    REQUIRE_THROWS_AS(rig.ops.moments(rig.arena, one, {}, full), Error);
    REQUIRE(rig.guards_hold());
  }
  // More tensors than the cuda backend takes at a time.
  for (auto [ops, type] : every_backend()) {
    Rig rig(*ops, type, type, 0);
    Tensor many = rig.in(random.normal(140, 8)), moments = rig.out(70, 3, Kind::sum), two = rig.in(row_of({2}), Kind::i32);
    std::vector<Tensor> xs;
    for (int64_t i = 0; i < 70; ++i) xs.push_back(many.row_range(2 * i, 2 * i + 2));
    rig.ops.moments(rig.arena, moments, xs, two);
    const Matrix x = rig.read(many), got = rig.read(moments);
    for (int64_t i = 0; i < 70; ++i) {
      double sum = 0;
      for (int64_t c = 0; c < 16; ++c) sum += x(2 * i + c / 8, c % 8);
      REQUIRE(got(i, 0) == 16);
      REQUIRE(std::fabs(got(i, 1) - sum / 16) < 1e-6);
    }
    REQUIRE(rig.guards_hold());
  }
  for (const auto& [m, valid] : {std::pair{Matrix(4, 5, 0.1), std::vector<int>{2, 2}},
                                 {Matrix(6, 5, -0.1), {1, 2, 0}},
                                 {Matrix(900, 5, -0.1), std::vector<int>(300, 3)},
                                 {random.normal(2, 1), {1, 0}},
                                 {random.normal(2, 3), {0, 0}}})
    for (auto [ops, type] : every_backend()) {
      Rig flat(*ops, type, type, 0);
      REQUIRE(read_all(flat, moments_call(valid)(flat, {m}))[1](0, 0) == 0);
    }
}

TEST_CASE("inverse_std of two numbers is that of their difference", "[device][ops]") {
  for (auto [ops, type] : every_backend()) {
    Rig rig(*ops, type, type, 0);
    Matrix two(2, 1, 1);
    two(1, 0) = 3;
    REQUIRE(std::fabs(read_all(rig, moments_call({2})(rig, {two}))[1](0, 0) - 1 / std::sqrt(2.0)) < 1e-6);
  }
}

TEST_CASE("distill of whole chunks is as exact", "[device][ops]") {
  Random random(39);
  for (Distance kind : {Distance::smooth_l1, Distance::mse, Distance::l1})
    for (double inverse : {0.0, 0.7})
      check_op("distill of whole chunks", {random.normal(15, 24, 1.5), random.normal(15, 24), Matrix(1, 1, 2.5)},
               distill_call({3, 0, 5}, kind, inverse, 0.3, 2));
}

TEST_CASE("distill adds its loss, sets the gradient of valid rows and zeroes the others", "[device][ops]") {
  Random random(38);
  const std::vector<int> valid = {3, 0, 5};
  for (Distance kind : {Distance::smooth_l1, Distance::mse, Distance::l1})
    for (double inverse : {0.0, 0.7}) {
      const Matrices in = {random.normal(15, 19, 1.5), random.normal(15, 19), Matrix(1, 1, 2.5)};
      const double s = 0.3 * (inverse > 0 ? inverse : 1);
      const OpRun call = distill_call(valid, kind, inverse, 0.3, 2);
      check_op("distill", in, call);
      const Matrices out = run_f64(call, in);
      double want = 2.5;
      for (int64_t r = 0; r < 15; ++r)
        for (int64_t c = 0; c < 19; ++c) {
          if (r % 5 < valid[std::size_t(r / 5)]) want += s * naive_distance(kind, in[0](r, c) - in[1](r, c));
          else REQUIRE(out[1](r, c) == 0);
        }
      REQUIRE(std::fabs(out[0](0, 0) - want) < 1e-11);
      // Near a kink the difference quotient of fourth order is good to some 1e-3; so the kinks are kept away from.
      Matrices smooth = in;
      for (std::size_t i = 0; i < smooth[0].at.size(); ++i) {
        const double d = std::fabs(smooth[0].at[i] - smooth[1].at[i]);
        if (d < 0.01 || std::fabs(d - 1) < 0.01) smooth[0].at[i] += 0.03;
      }
      check_gradient("distill", smooth, [&](const Matrices& m) { return 2 * run_f64(call, m)[0](0, 0); }, {0}, {run_f64(call, smooth)[1]});
    }
  // Equal rows: no loss, no gradient; a spread of zero: nothing. A NaN stays one.
  const Matrices same = {Matrix(2, 3, 1), Matrix(2, 3, 1), Matrix(1, 1)};
  Matrices unknown = same;
  unknown[0](0, 1) = std::nan("");
  for (auto [ops, type] : every_backend()) {
    INFO(ops->name() << ", " << name_of(type));
    for (Distance kind : {Distance::smooth_l1, Distance::mse, Distance::l1}) {
      Rig rig(*ops, type, type, 0);
      for (const Matrix& m : read_all(rig, distill_call({2}, kind, 0, 1, 1)(rig, same)))
        for (double v : m.at) REQUIRE(v == 0);
      const Matrices lost = read_all(rig, distill_call({2}, kind, 0, 1, 1)(rig, unknown));
      REQUIRE(std::isnan(lost[0](0, 0)));
      for (int64_t c = 0; c < 3; ++c) REQUIRE(std::isnan(lost[1](0, c)) == (c == 1));
      // The loss alone.
      Tensor alone = rig.in_out(Matrix(1, 1), Kind::f64), valid = rig.in(row_of({2}), Kind::i32);
      rig.ops.distill(rig.arena, alone, {}, rig.in(Matrix(2, 3, 3)), rig.in(Matrix(2, 3, 1)), valid, {}, kind, 1, 1);
      REQUIRE(rig.read(alone)(0, 0) == 6 * naive_distance(kind, 2));
      // A distance of one.
      const Matrices far = {Matrix(2, 3, 2), Matrix(2, 3, 1), Matrix(1, 1)};
      const Matrices one = read_all(rig, distill_call({2}, kind, 0, 1, 1)(rig, far));
      REQUIRE(one[0](0, 0) == (kind == Distance::smooth_l1 ? 3 : 6));
      REQUIRE(one[1](1, 2) == (kind == Distance::mse ? 2 : 1));
    }
    Rig rig(*ops, type, type, 0);
    Tensor x = rig.in(Matrix(2, 3, 4)), y = rig.in(Matrix(2, 3, 1)), v = rig.in(row_of({2}), Kind::i32),
           loss = rig.in_out(Matrix(1, 1, 0.5), Kind::f64);
    Tensor zero = rig.in(Matrix(1, 1), Kind::sum), dx = rig.out(2, 3, Kind::sum), bad = rig.in(row_of({1, 1, 0}), Kind::i32);
    rig.ops.distill(rig.arena, loss, dx, x, y, v, zero, Distance::mse, 1, 1);
    REQUIRE(rig.read(loss)(0, 0) == 0.5);
    REQUIRE(rig.read(dx).at == std::vector<double>(6, 0.0));
    REQUIRE_THROWS_AS(rig.ops.distill(rig.arena, loss, dx, x, y, bad, zero, Distance::mse, 1, 1), Error);
  }
}
