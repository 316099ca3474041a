#include "engine/device/indices.h"
#include "tests/ops/op_rig.h"

using namespace kava;
using namespace kava::test;

TEST_CASE("fill, copy and add treat storage and sum types and every stride, and refuse other pairs", "[device][ops]") {
  Random random(6);
  for (auto [n, c] : {Size{1, 1}, Size{5, 33}, Size{1, 40000}, Size{67, 300}})
    for (Kind to : {Kind::storage, Kind::sum})
      for (Kind from : {Kind::storage, Kind::sum}) {
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
  const Tensor single = rig.out(1, 3), wide = rig.out(1, 3, Kind::f64), longer = rig.out(1, 4);
  REQUIRE_THROWS_AS(rig.ops.copy(single, wide), Error);
  REQUIRE_THROWS_AS(rig.ops.copy(single, x), Error);
  REQUIRE_THROWS_AS(rig.ops.add(y, x), Error);
  REQUIRE_THROWS_AS(rig.ops.copy(longer, single), Error);
}

TEST_CASE("upload and download take the host's rows without gaps, whatever lies between a tensor's", "[device][ops]") {
  for (Ops* ops : {&cpu(1), tested_cuda()})
    for (int64_t gap : {0, 3}) {
      if (!ops) continue;
      INFO(ops->name() << ", gap " << gap);
      Rig rig(*ops, DType::f32, DType::f32, gap);
      const Tensor x = rig.out(5, 7);
      std::vector<float> sent(35), got(35);
      for (std::size_t i = 0; i < sent.size(); ++i) sent[i] = float(i) + 0.5f;
      ops->upload(x, sent.data());
      REQUIRE(rig.guards_hold());
      REQUIRE(rig.read(x)(3, 2) == 23.5);
      ops->download(got.data(), x);
      REQUIRE(got == sent);
    }
}

TEST_CASE("copying to bf16 rounds to nearest, ties to even, and keeps infinities and NaN", "[device][ops]") {
  for (auto [ops, type] : every_backend()) {
    if (type != DType::f32) continue;
    Rig rig(*ops, type, type, 0);
    const Tensor x = rig.out(1, 6);
    const Buffer y(*ops, DType::bf16, 1, 6);
    const uint32_t bits[] = {0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0xFF800000, 0x7F800001};
    ops->upload(x, bits);
    ops->copy(y.tensor(), x);
    bf16 got[6];
    ops->download(got, y.tensor());
    REQUIRE((got[0].bits == 0x3F80 && got[1].bits == 0x3F82 && got[2].bits == 0x3F81 && got[3].bits == 0x7F80 && got[4].bits == 0xFF80));
    REQUIRE(std::isnan(to_float(got[5])));
  }
}

TEST_CASE("gather_rows, scatter_rows and scatter_add_rows move rows by index", "[device][ops]") {
  Random random(7);
  const std::vector<int> order = {7, 2, 60, 0, 33, 5, 41, 12, 59};  // of 61 rows, distinct
  for (int64_t c : {1, 19, 200})
    for (Kind kind : {Kind::storage, Kind::sum}) {
      const Matrices in = {random.normal(61, c), row_of(order), random.normal(9, c)};
      check_op("gather_rows", in, [=](Rig& rig, const Matrices& m) {
        Tensor x = rig.in(m[0], kind), rows = rig.in(m[1], Kind::i32), y = rig.out(9, m[0].cols, kind);
        rig.ops.gather_rows(y, x, rows);
        const Matrix from = rig.read(x), got = rig.read(y);
        for (int64_t i = 0; i < 9; ++i)
          for (int64_t j = 0; j < m[0].cols; ++j) REQUIRE(got(i, j) == from(order[std::size_t(i)], j));
        return std::vector<Tensor>{y};
      });
      for (bool add : {false, true}) {
        auto scatter = [=](Rig& rig, const Matrices& m) {
          Tensor y = rig.in_out(m[0], Kind::sum), x = rig.in(m[2], kind), rows = rig.in(m[1], Kind::i32);
          if (add) rig.ops.scatter_add_rows(y, x, rows);
          else rig.ops.scatter_rows(y, x, rows);
          return std::vector<Tensor>{y};
        };
        check_op(add ? "scatter_add_rows" : "scatter_rows", in, scatter);
        Matrix want = in[0];
        for (int64_t i = 0; i < 9; ++i)
          for (int64_t j = 0; j < c; ++j) want(order[std::size_t(i)], j) = in[2](i, j) + (add ? want(order[std::size_t(i)], j) : 0);
        REQUIRE(run_f64(scatter, in)[0].at == want.at);
      }
    }
}

TEST_CASE("lists of indices are refused on the host where one is out of range, stands twice, or falls") {
  const std::vector<int32_t> rows = {3, 0, 2}, twice = {3, 0, 3}, offsets = {0, 2, 2, 5};
  check_indices(rows, 0, 4);
  check_distinct(rows, 4);
  check_offsets(offsets, 5);
  REQUIRE_THROWS_AS(check_indices(rows, 0, 3), Error);
  REQUIRE_THROWS_AS(check_indices(rows, 1, 4), Error);
  REQUIRE_THROWS_AS(check_distinct(rows, 3), Error);
  REQUIRE_THROWS_AS(check_distinct(twice, 4), Error);
  REQUIRE_THROWS_AS(check_offsets(offsets, 6), Error);
  REQUIRE_THROWS_AS(check_offsets(std::vector<int32_t>{0, 3, 2, 5}, 5), Error);
  REQUIRE_THROWS_AS(check_offsets(std::vector<int32_t>{}, 0), Error);
}

TEST_CASE("embedding takes rows of two tables, and its gradient adds repeated ids", "[device][ops]") {
  Random random(8);
  for (int64_t c : {150, 152}) {
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

    for (auto [ops, type] : every_backend()) {
      Rig rig(*ops, type, type, 0);
      Tensor only = rig.in_out(Matrix(3, c), Kind::sum), dx = rig.in(in[3], Kind::sum), ids = rig.in(in[2], Kind::i32);
      rig.ops.embed_bwd({}, only, dx, ids);
      require_close(rig.read(only), dextra, type == DType::f64 ? 0 : 1e-6);
      REQUIRE(rig.guards_hold());
    }
  }
}
