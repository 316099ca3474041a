#include "tests/ops/op_rig.h"

using namespace kava;
using namespace kava::test;

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
