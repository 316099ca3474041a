#include <cmath>
#include <tuple>

#include "tests/ops/op_rig.h"

using namespace kava;
using namespace kava::test;

namespace {
// in: x, positions, cosine, sine
OpRun rope_call(Kind kind, int64_t head_dim, bool inverse) {
  return [=](Rig& rig, const Matrices& in) {
    Tensor x = rig.in_out(in[0], kind), p = rig.in(in[1], Kind::i32), c = rig.in(in[2], Kind::sum), s = rig.in(in[3], Kind::sum);
    rig.ops.rope_fwd(x, p, c, s, head_dim, inverse);
    return std::vector<Tensor>{x};
  };
}

// in: dq, dk, dv, positions, cosine, sine. packed: dq lies in its place of dqkv already
OpRun rope_back(int64_t head_dim, bool with_q, bool with_kv, bool packed) {
  return [=](Rig& rig, const Matrices& in) {
    const int64_t n = in[0].rows, q = with_q ? in[0].cols : 0, k = with_kv ? in[1].cols : 0;
    Matrix start(n, q + 2 * k, std::nan(""));
    for (int64_t r = 0; r < n && packed; ++r)
      for (int64_t c = 0; c < q; ++c) start(r, c) = in[0](r, c);
    Tensor dqkv = rig.in_out(start), p = rig.in(in[3], Kind::i32), c = rig.in(in[4], Kind::sum), s = rig.in(in[5], Kind::sum);
    Tensor dq = !with_q ? Tensor{} : packed ? dqkv.col_range(0, q) : rig.in(in[0]);
    Tensor dk = with_kv ? rig.in(in[1], Kind::sum) : Tensor{}, dv = with_kv ? rig.in(in[2], Kind::sum) : Tensor{};
    rig.ops.rope_bwd(dqkv, dq, dk, dv, p, c, s, head_dim);
    return std::vector<Tensor>{dqkv};
  };
}
}  // namespace

TEST_CASE("rope turns pairs by the angle of the row's position, and inverse turns them back", "[device][ops]") {
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
}

TEST_CASE("rope_bwd turns back, casts and packs in one pass", "[device][ops]") {
  Random random(43);
  const int64_t n = 37;
  for (int64_t dim : {6, 16}) {
    Matrix angle = random.normal(11, dim / 2), cosine = angle, sine = angle;
    for (double& v : cosine.at) v = std::cos(v);
    for (double& v : sine.at) v = std::sin(v);
    const Matrix positions = random.whole(1, n, 0, 10);
    const Matrices in = {random.normal(n, 4 * dim), random.normal(n, 2 * dim), random.normal(n, 2 * dim), positions, cosine, sine};
    auto turned = [&](const Matrix& x) { return run_f64(rope_call(Kind::storage, dim, true), {x, positions, cosine, sine})[0]; };
    const Matrix want[] = {turned(in[0]), turned(in[1]), in[2]};
    for (auto [with_q, with_kv, packed] : {std::tuple{true, true, false}, {true, true, true}, {true, false, true}, {false, true, false}}) {
      const OpRun call = rope_back(dim, with_q, with_kv, packed);
      check_op("rope_bwd", in, call);
      const Matrix got = run_f64(call, in)[0];
      int64_t first = 0;
      for (std::size_t i = with_q ? 0 : 1; i < (with_kv ? 3u : 1u); first += want[i++].cols)
        for (int64_t r = 0; r < n; ++r)
          for (int64_t c = 0; c < want[i].cols; ++c) REQUIRE(got(r, first + c) == want[i](r, c));
      REQUIRE(first == got.cols);
    }
  }
}
