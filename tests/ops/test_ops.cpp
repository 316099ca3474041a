#include "tests/ops/op_rig.h"

using namespace kava;
using namespace kava::test;

// A sanitizer's allocator ends the program where malloc would refuse, unless told to refuse too.
#if defined(__SANITIZE_THREAD__)
extern "C" const char* __tsan_default_options() { return "allocator_may_return_null=1"; }
#elif defined(__SANITIZE_ADDRESS__)
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1"; }
#endif

namespace {
struct Size {
  int64_t rows, cols;
};
const Size kSizes[] = {{1, 1}, {1, 7}, {3, 16}, {33, 19}, {70, 64}, {65, 130}};

OpCall rms_norm_fwd(bool add) {
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
OpCall rms_norm_bwd(Kind dy_kind) {
  return [dy_kind](Rig& rig, const Matrices& in) {
    const Matrix& x = in[0];
    Tensor tx = rig.in(x), w = rig.in(in[1]), dy = rig.in(in[2], dy_kind), dx = rig.in_out(in[3]), dw = rig.in_out(in[4], Kind::sum);
    Tensor y = rig.out(x.rows, x.cols), rstd = rig.out(x.rows, 1, Kind::sum);
    rig.ops.add_rms_norm_fwd(y, {}, rstd, tx, {}, w, 1e-5);
    rig.round(rstd);
    rig.ops.rms_norm_bwd(dx, dw, dy, tx, rstd, w);
    return std::vector<Tensor>{dx, dw};
  };
}

// in: x, positions, cosine, sine
OpCall rope_call(Kind kind, int64_t head_dim, bool inverse) {
  return [=](Rig& rig, const Matrices& in) {
    Tensor x = rig.in_out(in[0], kind), p = rig.in(in[1], Kind::i32), c = rig.in(in[2], Kind::sum), s = rig.in(in[3], Kind::sum);
    rig.ops.rope(x, p, c, s, head_dim, inverse);
    return std::vector<Tensor>{x};
  };
}

std::vector<Tensor> swiglu_fwd(Rig& rig, const Matrices& in) {
  Tensor g = rig.in(in[0]), u = rig.in(in[1]), y = rig.out(in[0].rows, in[0].cols);
  rig.ops.swiglu_fwd(y, g, u);
  return {y};
}

std::vector<Tensor> swiglu_bwd(Rig& rig, const Matrices& in) {
  Tensor g = rig.in(in[0]), u = rig.in(in[1]), dy = rig.in(in[2]);
  Tensor dg = rig.out(in[0].rows, in[0].cols), du = rig.out(in[0].rows, in[0].cols);
  rig.ops.swiglu_bwd(dg, du, dy, g, u);
  return {dg, du};
}

std::vector<Tensor> gelu_fwd(Rig& rig, const Matrices& in) {
  Tensor x = rig.in(in[0]), y = rig.out(in[0].rows, in[0].cols);
  rig.ops.gelu_fwd(y, x);
  return {y};
}

std::vector<Tensor> gelu_bwd(Rig& rig, const Matrices& in) {
  Tensor x = rig.in(in[0]), dy = rig.in(in[1]), dx = rig.out(in[0].rows, in[0].cols);
  rig.ops.gelu_bwd(dx, dy, x);
  return {dx};
}

// in: x, w, b
std::vector<Tensor> layer_norm_fwd(Rig& rig, const Matrices& in) {
  const int64_t n = in[0].rows, c = in[0].cols;
  Tensor x = rig.in(in[0]), w = rig.in(in[1]), b = rig.in(in[2]);
  Tensor y = rig.out(n, c), mean = rig.out(n, 1, Kind::sum), rstd = rig.out(n, 1, Kind::sum);
  rig.ops.layer_norm_fwd(y, mean, rstd, x, w, b, 1e-5);
  return {y, mean, rstd};
}

// in: x, w, b, dy, dw before, db before
std::vector<Tensor> layer_norm_bwd(Rig& rig, const Matrices& in) {
  const int64_t n = in[0].rows, c = in[0].cols;
  Tensor x = rig.in(in[0]), w = rig.in(in[1]), b = rig.in(in[2]), dy = rig.in(in[3]);
  Tensor dw = rig.in_out(in[4], Kind::sum), db = rig.in_out(in[5], Kind::sum);
  Tensor y = rig.out(n, c), mean = rig.out(n, 1, Kind::sum), rstd = rig.out(n, 1, Kind::sum), dx = rig.out(n, c);
  rig.ops.layer_norm_fwd(y, mean, rstd, x, w, b, 1e-5);
  rig.ops.layer_norm_bwd(dx, dw, db, dy, x, mean, rstd, w);
  return {dx, dw, db};
}

void require_close(const Matrix& got, const Matrix& want, double tolerance = 1e-12) {
  REQUIRE(got.at.size() == want.at.size());
  for (std::size_t i = 0; i < got.at.size(); ++i) {
    INFO("element " << i << ": " << got.at[i] << " for " << want.at[i]);
    REQUIRE(std::fabs(got.at[i] - want.at[i]) <= tolerance * std::max(1.0, std::fabs(want.at[i])));
  }
}
}  // namespace

TEST_CASE("add_rms_norm adds, normalises each row and has the gradient of central differences") {
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

TEST_CASE("add_rms_norm may add into its own input") {
  Random random(2);
  const Matrix a = random.normal(5, 40), b = random.normal(5, 40), w = random.normal(1, 40);
  const Matrices apart = run_f64(rms_norm_fwd(true), {a, b, w});
  Rig rig(2, DType::f64, DType::f64, 1);
  Tensor ta = rig.in_out(a), tb = rig.in(b), tw = rig.in(w), y = rig.out(5, 40);
  rig.ops.add_rms_norm_fwd(y, ta, {}, ta, tb, tw, 1e-5);
  REQUIRE(rig.guards_hold());
  REQUIRE(rig.read(y).at == apart[0].at);
  REQUIRE(rig.read(ta).at == apart[2].at);
}

TEST_CASE("rope turns pairs by the angle of the row's position, and inverse turns them back") {
  Random random(3);
  for (int64_t half : {1, 3, 16, 32})
    for (int64_t n : {1, 37}) {
      Matrix angle = random.normal(11, half), cosine = angle, sine = angle;
      for (double& v : cosine.at) v = std::cos(v);
      for (double& v : sine.at) v = std::sin(v);
      const int64_t heads = 3, dim = 2 * half;
      const Matrices in = {random.normal(n, heads * dim), random.whole(1, n, 0, 10), cosine, sine};
      for (bool inverse : {false, true}) {
        check_op("rope", in, rope_call(Kind::storage, dim, inverse));
        check_op("rope of sums", in, rope_call(Kind::sum, dim, inverse));
      }
      Matrices turned = in;
      turned[0] = run_f64(rope_call(Kind::storage, dim, false), in)[0];
      for (int64_t r = 0; r < n; ++r)
        for (int64_t h = 0; h < heads; ++h)
          for (int64_t d = 0; d < half; ++d) {
            const double a = in[0](r, h * dim + d), b = in[0](r, h * dim + half + d), t = angle(int64_t(in[1](0, r)), d);
            REQUIRE(std::fabs(turned[0](r, h * dim + d) - (a * std::cos(t) - b * std::sin(t))) < 1e-12);
            REQUIRE(std::fabs(turned[0](r, h * dim + half + d) - (b * std::cos(t) + a * std::sin(t))) < 1e-12);
          }
      require_close(run_f64(rope_call(Kind::storage, dim, true), turned)[0], in[0]);
      // The inverse is the gradient: <rope(x), g> = <x, inverse(g)>.
      Matrices g = in;
      g[0] = random.normal(n, heads * dim);
      const double left = weighted({turned[0]}, {g[0]}), right = weighted({in[0]}, run_f64(rope_call(Kind::storage, dim, true), g));
      REQUIRE(std::fabs(left - right) < 1e-10);
    }
  Matrices far = {random.normal(1, 4), row_of({11}), random.normal(11, 2), random.normal(11, 2)};
  REQUIRE_THROWS_AS(run_f64(rope_call(Kind::storage, 4, false), far), Error);
}

TEST_CASE("swiglu and gelu have the values of their formulas and the gradients of central differences") {
  Random random(4);
  for (auto [n, c] : kSizes) {
    const Matrices in = {random.normal(n, c, 2), random.normal(n, c), random.normal(n, c)};
    check_op("swiglu_fwd", in, swiglu_fwd);
    check_op("swiglu_bwd", in, swiglu_bwd);
    check_op("gelu_fwd", in, gelu_fwd);
    check_op("gelu_bwd", {in[0], in[2]}, gelu_bwd);
    Matrix silu = in[0], gelu = in[0];
    for (std::size_t i = 0; i < silu.at.size(); ++i) silu.at[i] = in[0].at[i] / (1 + std::exp(-in[0].at[i])) * in[1].at[i];
    for (double& v : gelu.at) v = v * 0.5 * std::erfc(-v / std::sqrt(2.0));
    require_close(run_f64(swiglu_fwd, in)[0], silu);
    require_close(run_f64(gelu_fwd, in)[0], gelu);
    check_gradient(
        "swiglu", in, [&](const Matrices& m) { return weighted(run_f64(swiglu_fwd, m), {in[2]}); }, {0, 1}, run_f64(swiglu_bwd, in));
    check_gradient(
        "gelu", in, [&](const Matrices& m) { return weighted(run_f64(gelu_fwd, m), {in[2]}); }, {0}, run_f64(gelu_bwd, {in[0], in[2]}));
  }
}

TEST_CASE("swiglu of gates far from zero is finite, and NaN goes through") {
  for (DType type : {DType::f32, DType::bf16, DType::f64}) {
    Rig rig(1, type, type, 0);
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

TEST_CASE("layer_norm normalises each row and has the gradient of central differences") {
  Random random(5);
  for (auto [n, c] : kSizes) {
    if (c == 1) continue;
    const Matrices in = {random.normal(n, c, 1, 0.5), random.normal(1, c, 0.3, 1), random.normal(1, c)};
    check_op("layer_norm_fwd", in, layer_norm_fwd);
    Matrix want(n, c);
    for (int64_t r = 0; r < n; ++r) {
      double mean = 0, square = 0;
      for (int64_t j = 0; j < c; ++j) mean += in[0](r, j) / double(c);
      for (int64_t j = 0; j < c; ++j) square += std::pow(in[0](r, j) - mean, 2) / double(c);
      for (int64_t j = 0; j < c; ++j) want(r, j) = (in[0](r, j) - mean) / std::sqrt(square + 1e-5) * in[1](0, j) + in[2](0, j);
    }
    require_close(run_f64(layer_norm_fwd, in)[0], want, 1e-11);
    const Matrices back = {in[0], in[1], in[2], random.normal(n, c), Matrix(1, c), Matrix(1, c)};
    check_op("layer_norm_bwd", back, layer_norm_bwd);
    auto loss = [&](const Matrices& m) { return weighted(run_f64(layer_norm_fwd, {m[0], m[1], m[2]}), {back[3]}); };
    const Matrices gradient = run_f64(layer_norm_bwd, back);
    check_gradient("layer_norm", back, loss, {0, 1, 2}, gradient, 1e-7);
    Matrices twice = back;
    twice[4] = gradient[1], twice[5] = gradient[2];
    const Matrices added = run_f64(layer_norm_bwd, twice);
    for (std::size_t i : {1u, 2u}) {
      Matrix doubled = gradient[i];
      for (double& v : doubled.at) v *= 2;
      require_close(added[i], doubled);
    }
  }
}

TEST_CASE("fill, copy and add treat every pair of types and every stride") {
  Random random(6);
  for (auto [n, c] : {Size{1, 1}, Size{5, 33}, Size{1, 40000}, Size{67, 300}})
    for (Kind to : {Kind::storage, Kind::sum, Kind::f64})
      for (Kind from : {Kind::storage, Kind::sum, Kind::f64}) {
        const Matrices in = {random.normal(n, c), random.normal(n, c)};
        check_op("copy", in, [=](Rig& rig, const Matrices& m) {
          Tensor x = rig.in(m[0], from), y = rig.out(m[0].rows, m[0].cols, to);
          rig.ops.copy(y, x);
          return std::vector<Tensor>{y};
        });
        check_op("add", in, [=](Rig& rig, const Matrices& m) {
          Tensor y = rig.in_out(m[0], to), x = rig.in(m[1], from);
          rig.ops.add(y, x);
          return std::vector<Tensor>{y};
        });
        check_op("fill", in, [=](Rig& rig, const Matrices& m) {
          Tensor y = rig.out(m[0].rows, m[0].cols, to);
          rig.ops.fill(y, -1.5);
          REQUIRE(rig.read(y).at == std::vector<double>(m[0].at.size(), -1.5));
          return std::vector<Tensor>{y};
        });
      }
  Rig rig(2, DType::f32, DType::f32, 2);
  Tensor x = rig.in(row_of({3, -7, 2000000011}), Kind::i32), y = rig.out(1, 3, Kind::i32);
  rig.ops.copy(y, x);
  REQUIRE(rig.read(y).at == std::vector<double>{3, -7, 2000000011});
  rig.ops.fill(y, 0);
  REQUIRE(rig.read(y).at == std::vector<double>{0, 0, 0});
  REQUIRE(rig.guards_hold());
}

TEST_CASE("copying to bf16 rounds to nearest, ties to even, and keeps infinities and NaN") {
  Rig rig(1, DType::f32, DType::f32, 0);
  Tensor x = rig.in(Matrix(1, 6)), y = {std::malloc(12), DType::bf16, 1, 6, 6};
  const uint32_t bits[] = {0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0xFF800000, 0x7F800001};
  std::memcpy(x.data, bits, sizeof bits);
  rig.ops.copy(y, x);
  const uint16_t* got = static_cast<uint16_t*>(y.data);
  REQUIRE((got[0] == 0x3F80 && got[1] == 0x3F82 && got[2] == 0x3F81 && got[3] == 0x7F80 && got[4] == 0xFF80));
  REQUIRE(std::isnan(to_float(y.as<bf16>()[5])));
  std::free(y.data);
}

TEST_CASE("gather_rows and scatter_add_rows move rows by index, adding in the order of the index") {
  Random random(7);
  for (int64_t c : {1, 19, 200}) {
    const Matrices in = {random.normal(9, c), random.whole(1, 50, 0, 8), random.normal(50, c), random.normal(9, c)};
    check_op("gather_rows", in, [](Rig& rig, const Matrices& m) {
      Tensor x = rig.in(m[0]), rows = rig.in(m[1], Kind::i32), y = rig.out(50, m[0].cols);
      rig.ops.gather_rows(y, x, rows);
      const Matrix from = rig.read(x), got = rig.read(y);
      for (int64_t i = 0; i < 50; ++i)
        for (int64_t j = 0; j < m[0].cols; ++j) REQUIRE(got(i, j) == from(int64_t(m[1](0, i)), j));
      return std::vector<Tensor>{y};
    });
    check_op("scatter_add_rows", in, [](Rig& rig, const Matrices& m) {
      Tensor y = rig.in_out(m[3], Kind::sum), x = rig.in(m[2]), rows = rig.in(m[1], Kind::i32);
      rig.ops.scatter_add_rows(y, x, rows);
      return std::vector<Tensor>{y};
    });
  }
  // 2^24 + 1 + 1 is 2^24 in f32 one by one, 2^24 + 2 where the ones come first.
  for (auto [order, want] :
       {std::pair{std::vector<double>{16777216, 1, 1}, 16777216.0}, {std::vector<double>{1, 1, 16777216}, 16777218.0}}) {
    Rig rig(3, DType::f32, DType::f32, 0);
    Matrix values(3, 1);
    values.at = order;
    Tensor y = rig.in_out(Matrix(2, 1)), x = rig.in(values), rows = rig.in(row_of({1, 1, 1}), Kind::i32);
    rig.ops.scatter_add_rows(y, x, rows);
    REQUIRE(rig.read(y).at == std::vector<double>{0, want});
  }
  Rig rig(1, DType::f32, DType::f32, 0);
  Tensor y = rig.in_out(Matrix(2, 1)), x = rig.in(Matrix(2, 1)), bad = rig.in(row_of({0, 2}), Kind::i32);
  REQUIRE_THROWS_AS(rig.ops.scatter_add_rows(y, x, bad), Error);
  REQUIRE_THROWS_AS(rig.ops.gather_rows(y, x, bad), Error);
}

TEST_CASE("embedding takes rows of two tables, and its gradient adds repeated ids") {
  Random random(8);
  const int64_t c = 150;
  const Matrices in = {random.normal(12, c), random.normal(3, c), row_of({5, -1, 5, 11, -3, 0, -1, 5}), random.normal(8, c)};
  check_op("embed_fwd", in, [](Rig& rig, const Matrices& m) {
    Tensor table = rig.in(m[0]), extra = rig.in(m[1]), ids = rig.in(m[2], Kind::i32), x = rig.out(8, m[0].cols);
    rig.ops.embed_fwd(x, table, extra, ids);
    return std::vector<Tensor>{x};
  });
  auto backward = [](Rig& rig, const Matrices& m) {
    Tensor dtable = rig.in_out(Matrix(12, m[0].cols), Kind::sum), dextra = rig.in_out(Matrix(3, m[0].cols), Kind::sum);
    Tensor dx = rig.in(m[3], Kind::sum), ids = rig.in(m[2], Kind::i32);
    rig.ops.embed_bwd(dtable, dextra, dx, ids);
    return std::vector<Tensor>{dtable, dextra};
  };
  check_op("embed_bwd", in, backward);
  const Matrices gradient = run_f64(backward, in);
  Matrix dtable(12, c), dextra(3, c);
  for (int64_t n = 0; n < 8; ++n)
    for (int64_t j = 0; j < c; ++j) {
      const int64_t id = int64_t(in[2](0, n));
      (id < 0 ? dextra(-1 - id, j) : dtable(id, j)) += in[3](n, j);
    }
  REQUIRE(gradient[0].at == dtable.at);
  REQUIRE(gradient[1].at == dextra.at);

  Rig rig(2, DType::f64, DType::f64, 0);
  Tensor only = rig.in_out(Matrix(3, c)), dx = rig.in(in[3]), ids = rig.in(in[2], Kind::i32), x = rig.out(8, c), table = rig.in(in[0]);
  rig.ops.embed_bwd({}, only, dx, ids);
  REQUIRE(rig.read(only).at == dextra.at);
  REQUIRE(rig.guards_hold());
  REQUIRE_THROWS_AS(rig.ops.embed_fwd(x, table, {}, ids), Error);
}

TEST_CASE("memory of the cpu backend is aligned, and asking for too much is refused with exit 3") {
  Ops& ops = cpu(1);
  for (int64_t bytes : {int64_t{0}, int64_t{1}, int64_t{100}, int64_t{5} << 20}) {
    void* data = ops.allocate(bytes);
    REQUIRE(reinterpret_cast<uintptr_t>(data) % 64 == 0);
    ops.release(data, bytes);
  }
  try {
    ops.allocate(std::numeric_limits<int64_t>::max() / 2);
    FAIL("allocated");
  } catch (const Error& e) {
    REQUIRE(e.code() == Exit::preflight);
  }
}
