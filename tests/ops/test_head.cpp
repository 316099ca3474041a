#include "tests/ops/op_rig.h"

using namespace kava;
using namespace kava::test;

namespace {
// dh and dw where the gradient of the logits is stored in the storage type on the way.
void gradients_from_rounded_logits(Rig& rig, const Tensor& dh, const Tensor& dw, const Tensor& logits, const Tensor& h, const Tensor& w,
                                   const Matrices& m, double weight) {
  const int64_t n = h.rows, V = w.rows, C = h.cols;
  Tensor dz = rig.out(n, V);
  for (int64_t i = 0; i < n; ++i) {
    const double* z = logits.row<double>(i);
    double sum = 0;
    for (int64_t j = 0; j < V; ++j) sum += std::exp(z[j]);
    for (int64_t j = 0; j < V; ++j) dz.row<double>(i)[j] = weight * (std::exp(z[j]) / sum - (j == int64_t(m[2](0, i)) ? 1 : 0));
  }
  rig.round(dz);
  rig.ops.fill(dh, 0);
  for (int64_t j = 0; j < V; ++j) std::copy_n(m[3].at.begin() + j * C, C, dw.row<double>(j));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < V; ++j)
      for (int64_t c = 0; c < C; ++c) {
        dh.row<double>(i)[c] += dz.row<double>(i)[j] * w.row<double>(j)[c];
        dw.row<double>(j)[c] += dz.row<double>(i)[j] * h.row<double>(i)[c];
      }
}

// in: h, w, targets, dw before
OpCall head(double weight) {
  return [=](Rig& rig, const Matrices& m) {
    const int64_t n = m[0].rows, V = m[1].rows;
    Tensor h = rig.in(m[0]), w = rig.in(m[1]), targets = rig.in(m[2], Kind::i32), dw = rig.in_out(m[3], Kind::sum);
    Tensor nll = rig.out(n, 1, Kind::sum), dh = rig.out(n, m[0].cols, Kind::sum), logits = rig.out(n, V, Kind::sum);
    rig.ops.head_cross_entropy(rig.arena, nll, dh, dw, logits, {}, h, w, targets, weight);
    if (rig.emulates()) gradients_from_rounded_logits(rig, dh, dw, logits, h, w, m, weight);
    return std::vector<Tensor>{nll, dh, dw, logits};
  };
}
}  // namespace

TEST_CASE("head_cross_entropy is the cross-entropy of the head's softmax and has the gradients of central differences") {
  Random random(26);
  for (auto [n, c, V] : {std::tuple{1, 3, 2}, {5, 16, 37}, {70, 24, 301}}) {
    const Matrices in = {random.normal(n, c), random.normal(V, c, 0.5), random.whole(1, n, 0, V - 1), Matrix(V, c)};
    check_op("head_cross_entropy", in, head(0.3));
    const Matrices out = run_f64(head(0.3), in);
    auto nll = [&](const Matrices& m) {
      Matrix loss(n, 1);
      for (int64_t i = 0; i < n; ++i) {
        std::vector<double> z(std::size_t(V), 0.0);
        double sum = 0;
        for (int64_t j = 0; j < V; ++j) {
          for (int64_t k = 0; k < c; ++k) z[std::size_t(j)] += m[0](i, k) * m[1](j, k);
          sum += std::exp(z[std::size_t(j)]);
        }
        loss(i, 0) = std::log(sum) - z[std::size_t(m[2](0, i))];
      }
      return loss;
    };
    const Matrix want = nll(in);
    for (int64_t i = 0; i < n; ++i) REQUIRE(std::fabs(out[0](i, 0) - want(i, 0)) < 1e-11);
    check_gradient("head_cross_entropy", in, [&](const Matrices& m) { return weighted({nll(m)}, {Matrix(n, 1, 0.3)}); }, {0, 1},
                   {out[1], out[2]});
  }
}

TEST_CASE("head_cross_entropy gives the first best token, works in chunks, and refuses a target outside") {
  Random random(27);
  const int64_t n = 4200;
  const Matrices in = {random.normal(n, 3), random.normal(5, 3), random.whole(1, n, 0, 4), Matrix(5, 3)};
  const Matrices out = run_f64(head(1), in);
  Rig rig(2, DType::f64, DType::f64, 0);
  Tensor h = rig.in(in[0]), w = rig.in(in[1]), best = rig.out(1, n, Kind::i32);
  rig.ops.head_cross_entropy(rig.arena, {}, {}, {}, {}, best, h, w, {}, 1);
  REQUIRE(rig.guards_hold());
  const Matrix got = rig.read(best);
  for (int64_t i = 0; i < n; ++i) {
    const auto row = out[3].at.begin() + i * 5;
    REQUIRE(got(0, i) == double(std::max_element(row, row + 5) - row));
  }
  Matrix same(40, 3, 1);
  Tensor tied = rig.in(same), first = rig.out(1, 1, Kind::i32), one = rig.in(Matrix(1, 3, 1)), bad = rig.in(row_of({40}), Kind::i32);
  rig.ops.head_cross_entropy(rig.arena, {}, {}, {}, {}, first, one, tied, {}, 1);
  REQUIRE(rig.read(first)(0, 0) == 0);
  Tensor nll = rig.out(1, 1, Kind::sum);
  REQUIRE_THROWS_AS(rig.ops.head_cross_entropy(rig.arena, nll, {}, {}, {}, {}, one, tied, bad, 1), Error);
}
