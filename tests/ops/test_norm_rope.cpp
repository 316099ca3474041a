#include <cmath>

#include "tests/ops/op_rig.h"

using namespace kava;
using namespace kava::test;

namespace {
// in: x, w, positions, cosine, sine
OpRun norm_rope_fwd(bool in_place, bool with_rstd) {
  return [=](Rig& rig, const Matrices& in) {
    const int64_t n = in[0].rows, heads = in[0].cols / in[1].cols;
    Tensor x = in_place ? rig.in_out(in[0]) : rig.in(in[0]), y = in_place ? x : rig.out(n, in[0].cols);
    Tensor w = rig.in(in[1]), p = rig.in(in[2], Kind::i32), c = rig.in(in[3], Kind::sum), s = rig.in(in[4], Kind::sum);
    Tensor rstd = with_rstd ? rig.out(n, heads, Kind::sum) : Tensor{};
    rig.ops.norm_rope_fwd(y, rstd, x, w, p, c, s, 1e-6);
    return with_rstd ? std::vector<Tensor>{y, rstd} : std::vector<Tensor>{y};
  };
}

// in: x, w, positions, cosine, sine, dy, dw before
OpRun norm_rope_bwd(Kind dy_kind, bool in_place, bool with_dw) {
  return [=](Rig& rig, const Matrices& in) {
    const int64_t n = in[0].rows, heads = in[0].cols / in[1].cols;
    Tensor x = rig.in(in[0]), w = rig.in(in[1]), p = rig.in(in[2], Kind::i32), c = rig.in(in[3], Kind::sum), s = rig.in(in[4], Kind::sum);
    Tensor dy = in_place ? rig.in_out(in[5]) : rig.in(in[5], dy_kind), dx = in_place ? dy : rig.out(n, in[0].cols);
    Tensor dw = with_dw ? rig.in_out(in[6], Kind::sum) : Tensor{};
    Tensor y = rig.out(n, in[0].cols), rstd = rig.out(n, heads, Kind::sum);
    rig.ops.norm_rope_fwd(y, rstd, x, w, p, c, s, 1e-6);
    rig.round(rstd);
    rig.ops.norm_rope_bwd(rig.arena, dx, dw, dy, x, rstd, w, p, c, s);
    return with_dw ? std::vector<Tensor>{dx, dw} : std::vector<Tensor>{dx};
  };
}
}  // namespace

TEST_CASE("norm_rope normalises each head by itself, turns it, and has the gradient of central differences", "[device][ops]") {
  Random random(11);
  for (int64_t half : {1, 3, 8, 24, 64})
    for (auto [n, heads] : {std::pair<int64_t, int64_t>{1, 1}, {37, 3}, {70, 2}}) {
      const int64_t D = 2 * half;
      Matrix angle = random.normal(11, half), cosine = angle, sine = angle;
      for (double& v : cosine.at) v = std::cos(v);
      for (double& v : sine.at) v = std::sin(v);
      const Matrices in = {random.normal(n, heads * D, 0.5, 1.5), random.normal(1, D, 0.3, 1), random.whole(1, n, 0, 10), cosine, sine};
      check_op("norm_rope_fwd", in, norm_rope_fwd(false, true));
      check_op("norm_rope_fwd in place", in, norm_rope_fwd(true, false));
      Matrix want(n, heads * D);
      for (int64_t r = 0; r < n; ++r)
        for (int64_t h = 0; h < heads; ++h) {
          double square = 0;
          for (int64_t d = 0; d < D; ++d) square += std::pow(in[0](r, h * D + d), 2);
          const double scale = 1 / std::sqrt(square / double(D) + 1e-6);
          for (int64_t d = 0; d < half; ++d) {
            const double a = in[0](r, h * D + d) * scale * in[1](0, d), b = in[0](r, h * D + half + d) * scale * in[1](0, half + d);
            const double t = angle(int64_t(in[2](0, r)), d);
            want(r, h * D + d) = a * std::cos(t) - b * std::sin(t);
            want(r, h * D + half + d) = b * std::cos(t) + a * std::sin(t);
          }
        }
      require_close(run_f64(norm_rope_fwd(false, true), in)[0], want);

      Matrices back = in;
      back.push_back(random.normal(n, heads * D)), back.push_back(random.normal(1, D));
      check_op("norm_rope_bwd", back, norm_rope_bwd(Kind::storage, false, true));
      check_op("norm_rope_bwd in place", back, norm_rope_bwd(Kind::storage, true, true));
      check_op("norm_rope_bwd, dy in the sum type", back, norm_rope_bwd(Kind::sum, false, true));
      check_op("norm_rope_bwd of a frozen gain", back, norm_rope_bwd(Kind::storage, false, false));
      Matrices zero = back;
      zero[6] = Matrix(1, D);
      const Matrices gradient = run_f64(norm_rope_bwd(Kind::storage, false, true), zero);
      auto loss = [&](const Matrices& m) {
        return weighted(run_f64(norm_rope_fwd(false, false), {m[0], m[1], m[2], m[3], m[4]}), {back[5]});
      };
      check_gradient("norm_rope", zero, loss, {0, 1}, gradient);
      Matrix total = gradient[1];
      for (std::size_t e = 0; e < total.at.size(); ++e) total.at[e] += back[6].at[e];
      require_close(run_f64(norm_rope_bwd(Kind::storage, false, true), back)[1], total);
    }
}
