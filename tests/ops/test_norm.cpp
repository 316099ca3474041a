#include "tests/ops/op_rig.h"

using namespace kava;
using namespace kava::test;

namespace {
OpRun rms_norm_fwd(bool add) {
  return [add](Rig& rig, const Matrices& in) {
    const Matrix& a = in[0];
    Tensor ta = rig.in(a), tb = add ? rig.in(in[1]) : Tensor{}, w = rig.in(in[2]);
    Tensor y = rig.out(a.rows, a.cols), rstd = rig.out(a.rows, 1, Kind::sum), sum = add ? rig.out(a.rows, a.cols) : Tensor{};
    if (add && rig.emulates()) {
      rig.ops.copy(sum, ta);
      rig.ops.add(sum, tb);
      rig.round(sum);
      rig.ops.add_rms_norm_fwd(y, {}, rstd, sum, {}, w, 1e-5);
    } else {
      rig.ops.add_rms_norm_fwd(y, sum, rstd, ta, tb, w, 1e-5);
    }
    return add ? std::vector<Tensor>{y, rstd, sum} : std::vector<Tensor>{y, rstd};
  };
}

// in: x, w, dy, dx before, dw before
OpRun rms_norm_bwd(Kind dy_kind) {
  return [dy_kind](Rig& rig, const Matrices& in) {
    const Matrix& x = in[0];
    Tensor tx = rig.in(x), w = rig.in(in[1]), dy = rig.in(in[2], dy_kind), dx = rig.in_out(in[3]), dw = rig.in_out(in[4], Kind::sum);
    Tensor y = rig.out(x.rows, x.cols), rstd = rig.out(x.rows, 1, Kind::sum);
    rig.ops.add_rms_norm_fwd(y, {}, rstd, tx, {}, w, 1e-5);
    rig.round(rstd);
    rig.ops.rms_norm_bwd(rig.arena, dx, dw, dy, tx, rstd, w);
    return std::vector<Tensor>{dx, dw};
  };
}

// in: a, b, w, bias
OpRun layer_norm_fwd(bool add) {
  return [add](Rig& rig, const Matrices& in) {
    const int64_t n = in[0].rows, c = in[0].cols;
    Tensor a = rig.in(in[0]), b = add ? rig.in(in[1]) : Tensor{}, w = rig.in(in[2]), bias = rig.in(in[3]);
    Tensor y = rig.out(n, c), mean = rig.out(n, 1, Kind::sum), rstd = rig.out(n, 1, Kind::sum), sum = add ? rig.out(n, c) : Tensor{};
    if (add && rig.emulates()) {
      rig.ops.copy(sum, a);
      rig.ops.add(sum, b);
      rig.round(sum);
      rig.ops.add_layer_norm_fwd(y, {}, mean, rstd, sum, {}, w, bias, 1e-5);
    } else {
      rig.ops.add_layer_norm_fwd(y, sum, mean, rstd, a, b, w, bias, 1e-5);
    }
    return add ? std::vector<Tensor>{y, mean, rstd, sum} : std::vector<Tensor>{y, mean, rstd};
  };
}

// in: x, w, bias, dy, dx before, dw before, db before
OpRun layer_norm_bwd(Kind dy_kind) {
  return [dy_kind](Rig& rig, const Matrices& in) {
    const int64_t n = in[0].rows, c = in[0].cols;
    Tensor x = rig.in(in[0]), w = rig.in(in[1]), b = rig.in(in[2]), dy = rig.in(in[3], dy_kind), dx = rig.in_out(in[4]);
    Tensor dw = rig.in_out(in[5], Kind::sum), db = rig.in_out(in[6], Kind::sum);
    Tensor y = rig.out(n, c), mean = rig.out(n, 1, Kind::sum), rstd = rig.out(n, 1, Kind::sum);
    rig.ops.add_layer_norm_fwd(y, {}, mean, rstd, x, {}, w, b, 1e-5);
    rig.ops.layer_norm_bwd(rig.arena, dx, dw, db, dy, x, mean, rstd, w);
    return std::vector<Tensor>{dx, dw, db};
  };
}
}  // namespace

TEST_CASE("add_rms_norm adds, normalises each row and has the gradient of central differences", "[device][ops]") {
  Random random(1);
  for (auto [n, c] : kSizes) {
    const Matrices in = {random.normal(n, c), random.normal(n, c), random.normal(1, c, 0.3, 1)};
    check_op("add_rms_norm_fwd", in, rms_norm_fwd(true));
    check_op("rms_norm_fwd", in, rms_norm_fwd(false));
    const Matrices out = run_f64(rms_norm_fwd(true), in);
    Matrix want(n, c);
    for (int64_t r = 0; r < n; ++r) {
      double square = 0;
      for (int64_t j = 0; j < c; ++j) square += std::pow(in[0](r, j) + in[1](r, j), 2);
      for (int64_t j = 0; j < c; ++j) want(r, j) = (in[0](r, j) + in[1](r, j)) / std::sqrt(square / double(c) + 1e-5) * in[2](0, j);
    }
    require_close(out[0], want);

    if (c == 1) continue;  // the gradient of one column is zero up to eps: nothing but rounding is left
    const Matrices back = {in[0], in[2], random.normal(n, c), random.normal(n, c), random.normal(1, c)};
    check_op("rms_norm_bwd", back, rms_norm_bwd(Kind::storage));
    check_op("rms_norm_bwd, dy in the sum type", back, rms_norm_bwd(Kind::sum));
    Matrices zero = back;
    zero[3] = Matrix(n, c), zero[4] = Matrix(1, c);
    const Matrices gradient = run_f64(rms_norm_bwd(Kind::storage), zero), added = run_f64(rms_norm_bwd(Kind::storage), back);
    auto loss = [&](const Matrices& moved) { return weighted(run_f64(rms_norm_fwd(false), {moved[0], {}, moved[1]}), {back[2]}); };
    check_gradient("rms_norm", zero, loss, {0, 1}, gradient);
    for (std::size_t i = 0; i < 2; ++i) {
      Matrix total = gradient[i];
      for (std::size_t e = 0; e < total.at.size(); ++e) total.at[e] += back[3 + i].at[e];
      require_close(added[i], total);
    }
  }
}

TEST_CASE("norms may add into their own input", "[device][ops]") {
  Random random(2);
  const Matrix a = random.normal(5, 40), b = random.normal(5, 40), w = random.normal(1, 40);
  for (auto [ops, type] : every_backend()) {
    Rig rig(*ops, type, type, 1);
    const Matrices apart = read_all(rig, rms_norm_fwd(true)(rig, {a, b, w}));
    Tensor ta = rig.in_out(a), tb = rig.in(b), tw = rig.in(w), y = rig.out(5, 40);
    rig.ops.add_rms_norm_fwd(y, ta, {}, ta, tb, tw, 1e-5);
    REQUIRE(rig.guards_hold());
    REQUIRE(rig.read(y).at == apart[0].at);
    REQUIRE(rig.read(ta).at == apart[2].at);
    const Matrices layer = read_all(rig, layer_norm_fwd(true)(rig, {a, b, w, w}));
    Tensor again = rig.in_out(a), mean = rig.out(5, 1, Kind::sum), rstd = rig.out(5, 1, Kind::sum);
    rig.ops.add_layer_norm_fwd(y, again, mean, rstd, again, tb, tw, tw, 1e-5);
    REQUIRE(rig.guards_hold());
    REQUIRE(rig.read(y).at == layer[0].at);
    REQUIRE(rig.read(again).at == layer[3].at);
  }
}

TEST_CASE("norms store a sum of one term, and add the gradients that are wanted", "[device][ops]") {
  Random random(3);
  const Matrix a = random.normal(70, 40), w = random.normal(1, 40), bias = random.normal(1, 40), dy = random.normal(70, 40);
  for (auto [ops, type] : every_backend()) {
    INFO(ops->name() << ", " << name_of(type));
    Rig rig(*ops, type, type, 0);
    Tensor ta = rig.in(a), tw = rig.in(w), tb = rig.in(bias), y = rig.out(70, 40);
    Tensor sum = rig.out(70, 40), layer_sum = rig.out(70, 40), mean = rig.out(70, 1, Kind::sum), rstd = rig.out(70, 1, Kind::sum);
    rig.ops.add_rms_norm_fwd(y, sum, {}, ta, {}, tw, 1e-5);
    rig.ops.add_layer_norm_fwd(y, layer_sum, mean, rstd, ta, {}, tw, tb, 1e-5);
    REQUIRE(rig.read(sum).at == rig.read(ta).at);
    REQUIRE(rig.read(layer_sum).at == rig.read(ta).at);
    auto gradients = [&](bool with_dw, bool with_db) {
      Tensor dx = rig.in_out(a), dw = rig.in_out(w, Kind::sum), db = rig.in_out(w, Kind::sum), t = rig.in(dy);
      rig.ops.layer_norm_bwd(rig.arena, dx, with_dw ? dw : Tensor{}, with_db ? db : Tensor{}, t, ta, mean, rstd, tw);
      return read_all(rig, {dx, dw, db});
    };
    const Matrices both = gradients(true, true), none = gradients(false, false);
    for (bool with_dw : {false, true}) {
      const Matrices one = gradients(with_dw, !with_dw);
      REQUIRE(one[0].at == both[0].at);
      REQUIRE(one[1].at == (with_dw ? both : none)[1].at);
      REQUIRE(one[2].at == (with_dw ? none : both)[2].at);
    }
    REQUIRE(none[0].at == both[0].at);
    REQUIRE(rig.guards_hold());
  }
}

TEST_CASE("add_layer_norm adds, normalises each row and has the gradient of central differences", "[device][ops]") {
  Random random(5);
  for (auto [n, c] : kSizes) {
    if (c == 1) continue;
    const Matrices in = {random.normal(n, c, 1, 0.5), random.normal(n, c), random.normal(1, c, 0.3, 1), random.normal(1, c)};
    check_op("add_layer_norm_fwd", in, layer_norm_fwd(true));
    check_op("layer_norm_fwd", in, layer_norm_fwd(false));
    Matrix want(n, c), sum = in[0];
    for (std::size_t i = 0; i < sum.at.size(); ++i) sum.at[i] += in[1].at[i];
    for (int64_t r = 0; r < n; ++r) {
      double mean = 0, square = 0;
      for (int64_t j = 0; j < c; ++j) mean += sum(r, j) / double(c);
      for (int64_t j = 0; j < c; ++j) square += std::pow(sum(r, j) - mean, 2) / double(c);
      for (int64_t j = 0; j < c; ++j) want(r, j) = (sum(r, j) - mean) / std::sqrt(square + 1e-5) * in[2](0, j) + in[3](0, j);
    }
    const Matrices out = run_f64(layer_norm_fwd(true), in);
    require_close(out[0], want, 1e-11);
    require_close(out[3], sum);
    const Matrices back = {in[0], in[2], in[3], random.normal(n, c), random.normal(n, c), random.normal(1, c), random.normal(1, c)};
    check_op("layer_norm_bwd", back, layer_norm_bwd(Kind::storage));
    check_op("layer_norm_bwd, dy in the sum type", back, layer_norm_bwd(Kind::sum));
    Matrices zero = back;
    zero[4] = Matrix(n, c), zero[5] = zero[6] = Matrix(1, c);
    auto loss = [&](const Matrices& m) { return weighted(run_f64(layer_norm_fwd(false), {m[0], {}, m[1], m[2]}), {back[3]}); };
    const Matrices gradient = run_f64(layer_norm_bwd(Kind::storage), zero), added = run_f64(layer_norm_bwd(Kind::storage), back);
    check_gradient("layer_norm", zero, loss, {0, 1, 2}, gradient, 1e-7);
    for (std::size_t i = 0; i < 3; ++i) {
      Matrix total = gradient[i];
      for (std::size_t e = 0; e < total.at.size(); ++e) total.at[e] += back[4 + i].at[e];
      require_close(added[i], total);
    }
  }
}

TEST_CASE("norms of rows that the cuda backend has no room for end with a line, a gradient's in a dry run too", "[device][ops]") {
  if (!tested_cuda()) SKIP(kNoTestedCuda);
  const auto dry = tested_cuda()->dry_twin();
  const auto refusal = [](const std::function<void()>& run) -> std::string {
    try {
      run();
    } catch (const Error& e) {
      REQUIRE(e.code() == Exit::preflight);
      return e.what();
    }
    return {};
  };
  // What a warp keeps of a row in f32: four bytes a column, and four more of its gradient.
  for (const auto& [cols, fits] : {std::pair{24576, true}, {24577, false}}) {
    Rig rig(*tested_cuda(), DType::f32, DType::f32, 0);
    const Tensor x = rig.in(Matrix(1, cols, 1)), w = rig.in(Matrix(1, cols, 1)), y = rig.out(1, cols), rstd = rig.out(1, 1, Kind::sum);
    const std::string said = refusal([&] { rig.ops.add_rms_norm_fwd(y, {}, rstd, x, {}, w, 1e-5); });
    CHECK((fits ? said.empty() : said.find("rows of 24577 numbers in these types, 24576 at most") != std::string::npos));
  }
  for (Ops* ops : {tested_cuda(), dry.get()})
    for (const auto& [cols, fits] : {std::pair{12288, true}, {12289, false}}) {
      Rig rig(*ops, DType::f32, DType::f32, 0);
      const Tensor x = rig.in(Matrix(1, cols, 1)), w = rig.in(Matrix(1, cols, 1)), dx = rig.in_out(Matrix(1, cols, 0)),
                   rstd = rig.in(Matrix(1, 1, 1), Kind::sum);
      const std::string said = refusal([&] { rig.ops.rms_norm_bwd(rig.arena, dx, {}, x, x, rstd, w); });
      CHECK((fits ? said.empty() : said.find("rows of 12289 numbers in these types, 12288 at most") != std::string::npos));
    }
}
