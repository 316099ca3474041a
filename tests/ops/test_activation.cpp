#include "tests/ops/op_rig.h"

using namespace kava;
using namespace kava::test;

namespace {
std::vector<Tensor> swiglu(Rig& rig, const Matrices& in) {
  Tensor g = rig.in(in[0]), u = rig.in(in[1]), y = rig.out(in[0].rows, in[0].cols);
  rig.ops.swiglu_fwd(y, g, u);
  return {y};
}

std::vector<Tensor> swiglu_gradient(Rig& rig, const Matrices& in) {
  Tensor g = rig.in(in[0]), u = rig.in(in[1]), dy = rig.in(in[2]);
  Tensor dg = rig.out(in[0].rows, in[0].cols), du = rig.out(in[0].rows, in[0].cols);
  rig.ops.swiglu_bwd(dg, du, dy, g, u);
  return {dg, du};
}

OpRun gelu_fwd(Gelu form) {
  return [form](Rig& rig, const Matrices& in) {
    Tensor x = rig.in(in[0]), y = rig.out(in[0].rows, in[0].cols);
    rig.ops.gelu_fwd(y, x, form);
    return std::vector<Tensor>{y};
  };
}

OpRun gelu_bwd(Gelu form, Kind of_dy = Kind::storage) {
  return [=](Rig& rig, const Matrices& in) {
    Tensor x = rig.in(in[0]), dy = rig.in(in[1], of_dy), dx = rig.out(in[0].rows, in[0].cols);
    rig.ops.gelu_bwd(dx, dy, x, form);
    return std::vector<Tensor>{dx};
  };
}

// in: x, and the gradient of y.
void check_gelu(Gelu form, const Matrices& in, const Matrix& want) {
  check_op("gelu_fwd", in, gelu_fwd(form));
  check_op("gelu_bwd", in, gelu_bwd(form));
  check_op("gelu_bwd of a gradient in the sum type", in, gelu_bwd(form, Kind::sum));
  require_close(run_f64(gelu_fwd(form), in)[0], want);
  check_gradient(
      "gelu", in, [&](const Matrices& m) { return weighted(run_f64(gelu_fwd(form), m), {in[1]}); }, {0}, run_f64(gelu_bwd(form), in));
}
}  // namespace

TEST_CASE("swiglu and gelu have the values of their formulas and the gradients of central differences", "[device][ops]") {
  Random random(4);
  for (auto [n, c] : kSizes) {
    const Matrices in = {random.normal(n, c, 2), random.normal(n, c), random.normal(n, c)};
    check_op("swiglu_fwd", in, swiglu);
    check_op("swiglu_bwd", in, swiglu_gradient);
    Matrix silu = in[0], by_erf = in[0];
    for (std::size_t i = 0; i < silu.at.size(); ++i) silu.at[i] = in[0].at[i] / (1 + std::exp(-in[0].at[i])) * in[1].at[i];
    for (double& v : by_erf.at) v = v * 0.5 * std::erfc(-v / std::sqrt(2.0));
    require_close(run_f64(swiglu, in)[0], silu);
    check_gradient(
        "swiglu", in, [&](const Matrices& m) { return weighted(run_f64(swiglu, m), {in[2]}); }, {0, 1}, run_f64(swiglu_gradient, in));
    check_gelu(Gelu::erf, {in[0], in[2]}, by_erf);
  }
}

TEST_CASE("gelu with tanh has the values of its formula and the gradients of central differences", "[device][ops]") {
  Random random(5);
  for (auto [n, c] : kSizes) {
    const Matrices in = {random.normal(n, c, 2), random.normal(n, c)};
    Matrix by_tanh = in[0];
    for (double& v : by_tanh.at) v = v / 2 * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (v + 0.044715 * v * v * v)));
    check_gelu(Gelu::tanh, in, by_tanh);
  }
}

TEST_CASE("gelu with tanh of inputs far from zero is finite", "[device][ops]") {
  for (auto [ops, type] : every_backend()) {
    INFO(ops->name() << ", " << name_of(type));
    Rig rig(*ops, type, type, 0);
    Matrix in(1, 40);
    for (int64_t i = 0; i < 40; ++i) in(0, i) = i % 2 ? 20 + 300 * double(i) : -20 - 300 * double(i);
    Tensor x = rig.in(in), dy = rig.in(Matrix(1, 40, 1)), y = rig.out(1, 40), dx = rig.out(1, 40);
    rig.ops.gelu_fwd(y, x, Gelu::tanh);
    rig.ops.gelu_bwd(dx, dy, x, Gelu::tanh);
    const Matrix given = rig.read(x), out = rig.read(y), slope = rig.read(dx);
    for (int64_t i = 0; i < 40; ++i) {
      REQUIRE(std::fabs(out(0, i) - (i % 2 ? given(0, i) : 0)) < 1e-30);
      REQUIRE(std::fabs(slope(0, i) - (i % 2 ? 1 : 0)) < 1e-30);
    }
  }
}

TEST_CASE("swiglu of gates far from zero is finite, and NaN goes through", "[device][ops]") {
  for (auto [ops, type] : every_backend()) {
    INFO(ops->name() << ", " << name_of(type));
    Rig rig(*ops, type, type, 0);
    Matrix gate(1, 40), up(1, 40, 2);
    for (int64_t i = 0; i < 40; ++i) gate(0, i) = i % 2 ? 200 + 300 * double(i) : -200 - 300 * double(i);
    gate(0, 17) = std::nan("");
    Tensor g = rig.in(gate), u = rig.in(up), y = rig.out(1, 40), dg = rig.out(1, 40), du = rig.out(1, 40);
    rig.ops.swiglu_fwd(y, g, u);
    rig.ops.swiglu_bwd(dg, du, u, g, u);
    const Matrix out = rig.read(y), dgate = rig.read(dg), dup = rig.read(du), in = rig.read(g);
    for (int64_t i = 0; i < 40; ++i) {
      if (i == 17) {
        REQUIRE((std::isnan(out(0, i)) && std::isnan(dgate(0, i)) && std::isnan(dup(0, i))));
        continue;
      }
      REQUIRE(std::fabs(out(0, i) - (i % 2 ? 2 * in(0, i) : 0)) <= 1e-6 * std::fabs(in(0, i)));
      REQUIRE(std::fabs(dgate(0, i) - (i % 2 ? 4 : 0)) < 1e-6);
    }
  }
}
