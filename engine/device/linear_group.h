// Linear maps that share their input, packed: one weight, one activation, one product in each direction.
#pragma once
#include <algorithm>
#include <vector>

#include "engine/device/tensor.h"

namespace kava {

/// One map of a group: which rows of W and columns of y are its own, which rows of A and columns of xa, and its B.
struct LinearPart {
  int64_t out_begin = 0, outs = 0;
  int64_t rank_begin = 0, rank = 0;  // rank 0: no LoRA
  double scale = 0;
  Tensor b = {};  // [outs, rank]
};

/// Rank columns of xa, begin .. end - 1.
struct Ranks {
  int64_t begin = 0, end = 0;
  int64_t count() const { return end - begin; }
};

/// y = x W^T + bias + xa [s B]^T with xa = drop(x) A^T. Part p of y takes xa's columns of p alone: [s B] holds scale * b in the part's rows
/// and rank columns and zeros elsewhere. All in storage type.
struct LinearGroup {
  Tensor joined = {};  // [outs, in + ranks] = [W | s B]; the rank columns are written by linear_prepare
  Tensor bias = {};    // [1, outs], or empty
  Tensor a = {};       // [ranks, in], or empty
  std::vector<LinearPart> parts = {};
  int64_t in = 0;

  /// A single map without LoRA.
  static LinearGroup plain(const Tensor& w, const Tensor& bias = {}) { return {w, bias, {}, {{.outs = w.rows}}, w.cols}; }

  int64_t outs() const { return joined.rows; }
  int64_t ranks() const { return joined.cols - in; }  // of all parts, those left out of a range too
  Tensor w() const { return joined.col_range(0, in); }
  /// Those of the parts that are there; a range of parts has its ranks side by side.
  Ranks used_ranks() const {
    Ranks r{ranks(), 0};
    for (const LinearPart& p : parts)
      if (p.rank > 0) r.begin = std::min(r.begin, p.rank_begin), r.end = std::max(r.end, p.rank_begin + p.rank);
    return r.end > r.begin ? r : Ranks{};
  }

  /// The maps to columns begin .. end - 1 of y: their rows of W and of each B; A and the columns of xa stay those of the whole group.
  LinearGroup out_range(int64_t begin, int64_t end) const {
    LinearGroup g{joined.row_range(begin, end), bias ? bias.col_range(begin, end) : Tensor{}, a, {}, in};
    for (LinearPart p : parts) {
      const int64_t first = p.out_begin, from = std::max(begin, first), to = std::min(end, first + p.outs);
      if (from >= to) continue;
      if (p.b) p.b = p.b.row_range(from - first, to - first);
      p.out_begin = from - begin, p.outs = to - from;
      g.parts.push_back(p);
    }
    return g;
  }
};

/// Gradients that are added to, in sum type; empty where the tensor is frozen or not there.
struct LinearGroupGrad {
  Tensor dw = {}, dbias = {}, da = {};  // [outs, in], [1, outs], [ranks, in]
  std::vector<Tensor> db = {};          // of each part: [outs, rank]

  bool any() const {
    return dw || dbias || da || std::ranges::any_of(db, [](const Tensor& t) { return static_cast<bool>(t); });
  }
  /// Of group.out_range(begin, end).
  LinearGroupGrad out_range(const LinearGroup& group, int64_t begin, int64_t end) const {
    LinearGroupGrad g;
    if (dw) g.dw = dw.row_range(begin, end);
    if (dbias) g.dbias = dbias.col_range(begin, end);
    g.da = da;
    for (std::size_t j = 0; j < db.size(); ++j) {
      const LinearPart& p = group.parts[j];
      const int64_t from = std::max(begin, p.out_begin), to = std::min(end, p.out_begin + p.outs);
      if (from < to) g.db.push_back(db[j] ? db[j].row_range(from - p.out_begin, to - p.out_begin) : Tensor{});
    }
    return g;
  }
};

}  // namespace kava
