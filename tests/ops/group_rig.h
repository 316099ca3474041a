// A packed group of linear maps from the matrices of its maps.
#pragma once
#include "tests/ops/op_rig.h"

namespace kava::test {

constexpr int kMapParts = 5;  // matrices of a map in the inputs: W, bias, A, B, dy

/// Matrices side by side.
inline Matrix beside(const Matrices& all) {
  Matrix m(all[0].rows, 0);
  for (const Matrix& x : all) m.cols += x.cols;
  m.at.resize(static_cast<std::size_t>(m.rows * m.cols));
  int64_t at = 0;
  for (const Matrix& x : all) {
    for (int64_t r = 0; r < x.rows; ++r)
      for (int64_t c = 0; c < x.cols; ++c) m(r, at + c) = x(r, c);
    at += x.cols;
  }
  return m;
}

/// Matrices one below the other; those without rows are left out.
inline Matrix stacked(const Matrices& all) {
  Matrix m;
  for (const Matrix& x : all)
    if (x.rows > 0) m.rows += x.rows, m.cols = x.cols, m.at.insert(m.at.end(), x.at.begin(), x.at.end());
  return m;
}

struct PlacedGroup {
  LinearGroup map;
  Tensor xx, dy;  // [x | xa], xa not yet written
};

/// m: x, then kMapParts matrices of each map; those of A and B are ignored where the rank is 0, the bias where it has no columns. W stands
/// packed, its rank columns prepared.
inline PlacedGroup place_group(Rig& rig, const Matrices& m, const std::vector<int64_t>& ranks, double scale) {
  Matrices w, bias, a, dy;
  PlacedGroup t;
  t.map.in = m[0].cols;
  int64_t outs = 0, rank = 0;
  for (std::size_t j = 0; j < ranks.size(); ++j) {
    const Matrix* part = &m[1 + kMapParts * j];
    LinearPart p{.out_begin = outs, .outs = part[0].rows, .rank_begin = rank, .rank = ranks[j], .scale = scale};
    if (ranks[j] > 0) p.b = rig.in(part[3]), a.push_back(part[2]);
    t.map.parts.push_back(p);
    w.push_back(part[0]), bias.push_back(part[1]), dy.push_back(part[4]);
    outs += p.outs, rank += p.rank;
  }
  const double nan = std::nan("");
  t.map.joined = rig.in_out(beside({stacked(w), Matrix(outs, rank, nan)}));
  if (beside(bias).cols > 0) t.map.bias = rig.in(beside(bias));
  if (rank > 0) t.map.a = rig.in(stacked(a));
  t.xx = rig.in_out(beside({m[0], Matrix(m[0].rows, rank, nan)}));
  t.dy = rig.in(beside(dy));
  rig.ops.linear_prepare(t.map);
  return t;
}

}  // namespace kava::test
