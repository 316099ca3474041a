#include <cmath>
#include <limits>
#include <tuple>

#include "tests/ops/op_rig.h"

using namespace kava;
using namespace kava::test;

namespace {
// in: value, m, v, grad; outputs: value, m, v, half
OpRun adamw_call(double grad_square, int64_t step, const AdamwOptions& o) {
  return [=](Rig& rig, const Matrices& m) {
    Tensor value = rig.packed().in_out(m[0], Kind::sum), first = rig.packed().in_out(m[1], Kind::sum),
           second = rig.packed().in_out(m[2], Kind::sum);
    Tensor grad = rig.packed().in(m[3], Kind::sum), half = rig.packed().in_out(Matrix(m[0].rows, m[0].cols, 7));
    rig.ops.adamw(value, first, second, half, grad, rig.in(Matrix(1, 1, grad_square), Kind::f64), rig.in(row_of({int(step)}), Kind::i32),
                  o);
    return std::vector<Tensor>{value, first, second, half};
  };
}
}  // namespace

TEST_CASE("sum_squares sums in f64 in a fixed order", "[device][ops]") {
  Random random(39);
  for (int64_t n : {1, 100, 40001}) {
    const Matrices in = {random.normal(1, n)};
    check_op("sum_squares", in, [](Rig& rig, const Matrices& m) {
      Tensor x = rig.packed().in(m[0]), out = rig.out(1, 1, Kind::f64);
      rig.ops.sum_squares(rig.arena, out, x);
      double want = 0;
      for (double v : rig.read(x).at) want += v * v;
      REQUIRE(std::fabs(rig.read(out)(0, 0) / want - 1) < 1e-13);
      return std::vector<Tensor>{out};
    });
  }
}

TEST_CASE("adamw follows the scalar formula over many steps, with and without clipping and decay", "[device][ops]") {
  Random random(40);
  for (double clip : {0.0, 0.5, 1e9})
    for (double decay : {0.0, 0.1}) {
      Matrices state = {random.normal(3, 19), Matrix(3, 19), Matrix(3, 19), {}};
      std::vector<double> value = state[0].at, first(57), second(57);
      for (int64_t step = 1; step <= 20; ++step) {
        state[3] = random.normal(3, 19);
        double square = 0;
        for (double g : state[3].at) square += g * g;
        const AdamwOptions o{.lr = 0.01, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = decay, .clip = clip};
        check_op("adamw", state, adamw_call(square, step, o));
        const Matrices out = run_f64(adamw_call(square, step, o), state);
        const double scale = clip > 0 ? std::min(1.0, clip / (std::sqrt(square) + 1e-6)) : 1;
        for (std::size_t i = 0; i < value.size(); ++i) {
          const double g = state[3].at[i] * scale;
          value[i] *= 1 - o.lr * decay;
          first[i] += (g - first[i]) * (1 - 0.9);
          second[i] = second[i] * 0.999 + (1 - 0.999) * g * g;
          value[i] -= o.lr / (1 - std::pow(0.9, step)) * first[i] / (std::sqrt(second[i]) / std::sqrt(1 - std::pow(0.999, step)) + 1e-8);
          REQUIRE(std::fabs(out[0].at[i] - value[i]) < 1e-13);
          REQUIRE(out[3].at[i] == out[0].at[i]);
        }
        for (std::size_t i : {0u, 1u, 2u}) state[i] = out[i];
      }
    }
}

TEST_CASE("adamw changes nothing where the gradient is not finite", "[device][ops]") {
  Random random(41);
  const Matrices in = {random.normal(1, 40), random.normal(1, 40), Matrix(1, 40, 1), random.normal(1, 40)};
  const AdamwOptions o{.lr = 1, .beta1 = 0.9, .beta2 = 0.9, .eps = 1e-8, .weight_decay = 1, .clip = 1};
  for (auto [ops, type] : every_backend())
    for (double square : {std::nan(""), std::numeric_limits<double>::infinity()}) {
      Rig rig(*ops, type, type, 0);
      const Matrices out = read_all(rig, adamw_call(square, 1, o)(rig, in));
      for (std::size_t i : {0u, 1u, 2u})
        for (std::size_t e = 0; e < 40; ++e) REQUIRE(out[i].at[e] == (type == DType::f64 ? in[i].at[e] : static_cast<float>(in[i].at[e])));
      // In f32 the cuda backend copies the values.
      REQUIRE(out[3].at == (ops == tested_cuda() && type == DType::f32 ? out[0].at : std::vector<double>(40, 7.0)));
    }
}

TEST_CASE("adamw updates values that have no half", "[device][ops]") {
  Random random(42);
  const AdamwOptions o{.lr = 0.01, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0.1, .clip = 0};
  const Matrices in = {random.normal(1, 40), random.normal(1, 40), Matrix(1, 40, 1), random.normal(1, 40)};
  for (auto [ops, type] : every_backend()) {
    Rig rig(*ops, type, type, 0);
    const Matrices want = read_all(rig, adamw_call(2, 3, o)(rig, in));
    Tensor value = rig.in_out(in[0], Kind::sum), m = rig.in_out(in[1], Kind::sum), v = rig.in_out(in[2], Kind::sum);
    rig.ops.adamw(value, m, v, {}, rig.in(in[3], Kind::sum), rig.in(Matrix(1, 1, 2), Kind::f64), rig.in(row_of({3}), Kind::i32), o);
    REQUIRE(rig.read(value).at == want[0].at);
    REQUIRE(rig.guards_hold());
  }
}

TEST_CASE("count_update counts a step with finite losses and gradient, and marks any other", "[device][ops]") {
  const double infinity = std::numeric_limits<double>::infinity();
  for (auto [square, loss, made] :
       {std::tuple{2.5, -3.0, true}, {2.5, std::nan(""), false}, {2.5, infinity, false}, {infinity, 1.0, false}}) {
    for (auto [ops, type] : every_backend()) {
      Rig rig(*ops, type, type, 0);
      Matrix values(1, 3, 1);
      values(0, 1) = loss;
      Tensor updates = rig.in_out(row_of({6}), Kind::i32), grad_square = rig.in_out(Matrix(1, 1, square), Kind::f64);
      rig.ops.count_update(updates, grad_square, rig.in(values, Kind::f64));
      REQUIRE(rig.guards_hold());
      REQUIRE(rig.read(updates)(0, 0) == (made ? 7 : 6));
      if (made) REQUIRE(rig.read(grad_square)(0, 0) == square);
      else REQUIRE(!std::isfinite(rig.read(grad_square)(0, 0)));
    }
  }
}
