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

  /// Some of the parts, with their rows of W; A and the columns of xa stay those of the whole group.
  LinearGroup part_range(std::size_t begin, std::size_t end) const {
    const int64_t first = parts[begin].out_begin, last = parts[end - 1].out_begin + parts[end - 1].outs;
    LinearGroup g{joined.row_range(first, last), bias ? bias.col_range(first, last) : Tensor{}, a, {}, in};
    for (std::size_t p = begin; p < end; ++p) {
      g.parts.push_back(parts[p]);
      g.parts.back().out_begin -= first;
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
  /// Of group.part_range(begin, end).
  LinearGroupGrad part_range(const LinearGroup& group, std::size_t begin, std::size_t end) const {
    const LinearPart &first = group.parts[begin], &last = group.parts[end - 1];
    const int64_t from = first.out_begin, to = last.out_begin + last.outs;
    LinearGroupGrad g;
    if (dw) g.dw = dw.row_range(from, to);
    if (dbias) g.dbias = dbias.col_range(from, to);
    g.da = da;
    if (!db.empty()) g.db.assign(db.begin() + static_cast<std::ptrdiff_t>(begin), db.begin() + static_cast<std::ptrdiff_t>(end));
    return g;
  }
};

}  // namespace kava
