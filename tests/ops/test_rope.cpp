#include "tests/ops/op_rig.h"

using namespace kava;
using namespace kava::test;

namespace {
// in: x, positions, cosine, sine
OpCall rope_call(Kind kind, int64_t head_dim, bool inverse) {
  return [=](Rig& rig, const Matrices& in) {
    Tensor x = rig.in_out(in[0], kind), p = rig.in(in[1], Kind::i32), c = rig.in(in[2], Kind::sum), s = rig.in(in[3], Kind::sum);
    rig.ops.rope(x, p, c, s, head_dim, inverse);
    return std::vector<Tensor>{x};
  };
}
}  // namespace

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
