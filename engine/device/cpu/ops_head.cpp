// cpu backend: the head's product with its cross-entropy, some rows at a time.
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "engine/device/cpu/ops_cpu.h"
#include "engine/device/cpu/streamed.h"
#include "kernels/draw.h"

namespace kava {

namespace {

// Statistics of one row of logits.
template <class S>
struct RowStats {
  S most;
  double sum;  // of exp(logit - most)
  int64_t best;
};

constexpr int kLanes = 32;

// The first of the largest elements; the first of all where none is larger.
template <class S>
int64_t best_of(const S* z, int64_t n) {
  S most[kLanes];
  std::fill(most, most + kLanes, z[0]);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int i = 0; i < kLanes; ++i) most[i] = z[j + i] > most[i] ? z[j + i] : most[i];
  for (; j < n; ++j) most[0] = std::max(most[0], z[j]);
  const S largest = *std::max_element(most, most + kLanes);
  int64_t best = 0;
  while (z[best] != largest && best + 1 < n) ++best;
  return best;
}

template <class S>
RowStats<S> row_stats(const S* z, int64_t n) {
  const int64_t best = best_of(z, n);
  RowStats<S> s{z[best], 0, best};
  S sums[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int i = 0; i < kLanes; ++i) sums[i] += fast_exp(z[j + i] - s.most);
  for (; j < n; ++j) sums[0] += fast_exp(z[j] - s.most);
  for (S v : sums) s.sum += v;
  return s;
}

// What a row of logits draws. Weights lie in the order in which tokens follow each other.
template <class S>
int32_t drawn_of(const S* z, int64_t n, uint64_t bits, double temperature, double top_p) {
  const double most = static_cast<double>(*std::max_element(z, z + n));
  std::vector<int32_t> tokens;
  std::vector<uint64_t> weights;
  uint64_t all = 0;
  for (int64_t first = 0; first < std::min<int64_t>(n, kDrawStride); ++first)
    for (int64_t i = first; i < n; i += kDrawStride) {
      if (!std::isfinite(z[i])) return -1;
      tokens.push_back(static_cast<int32_t>(i));
      weights.push_back(draw_weight(static_cast<double>(z[i]), most, temperature));
      all += weights.back();
    }
  // Of the fewest best tokens: those heavier than the last one of them, and as many as light as that.
  const uint64_t need = draw_need(top_p, all);
  uint64_t limit = 0, left = 0, kept = all;
  if (need < all) {
    std::vector<uint64_t> best = weights;
    std::ranges::make_heap(best);
    for (kept = 0; kept < need; best.pop_back()) {
      std::ranges::pop_heap(best);
      left = best.back() == limit ? left + 1 : 1;
      limit = best.back(), kept += limit;
    }
  }
  uint64_t place = draw_place(bits, kept);
  for (std::size_t i = 0;; ++i) {
    if (weights[i] < limit || (weights[i] == limit && left == 0)) continue;
    if (weights[i] == limit) --left;
    if (place < weights[i]) return tokens[i];
    place -= weights[i];
  }
}

constexpr int64_t kHeadBytes = int64_t{96} << 20;  // of logits at a time

// Rows whose logits are taken at a time.
int64_t chunk_rows(int64_t vocab, DType sum) { return std::clamp<int64_t>(kHeadBytes / (vocab * size_of(sum)) / 64 * 64, 64, 4096); }

// body(row, logits) for every row, on the threads. A row's logits do not depend on how many rows stand beside it.
template <class Body>
void each_logits(Threads& threads, bool dry, Arena& arena, const Tensor& h, const Tensor& w, const Body& body) {
  const DType sum = sum_type(h.dtype);
  const int64_t n = h.rows, V = w.rows, chunk = std::clamp<int64_t>(kHeadBytes / (V * size_of(sum)), 1, 4096);
  for (int64_t first = 0; first < n; first += chunk) {
    ArenaScope scope(arena);
    const Tensor hc = h.row_range(first, std::min(n, first + chunk));
    const Matmul::Product z{arena.alloc(sum, hc.rows, V), hc, w, true};
    if (dry) continue;
    streamed_products(threads, std::span(&z, 1));
    dispatch(h.dtype, [&]<class T>() { threads.blocks(hc.rows, 1, [&](int64_t r, int64_t) { body(first + r, z.c.row<Sum<T>>(r)); }); });
  }
}

}  // namespace

void CpuOps::do_head_cross_entropy(Arena& arena, const Tensor& losses, const Tensor& dh, const Tensor& dw, const Tensor& correct,
                                   const Tensor& logits, const Tensor& h, const Tensor& w, const Tensor& targets, const Tensor& classes,
                                   const Tensor& owners, const std::array<double, 2>& weights) {
  ArenaScope all(arena);
  const int64_t V = w.rows, n = h.rows;
  const DType type = h.dtype, sum = sum_type(type);
  const bool backward = dh || dw;
  const Tensor nll = arena.alloc(sum, 1, n), hit = correct ? arena.alloc(DType::i32, 1, n) : Tensor{};
  const int64_t chunk = chunk_rows(V, sum);
  for (int64_t first = 0; first < n; first += chunk) {
    ArenaScope scope(arena);
    const int64_t last = std::min(n, first + chunk);
    const Tensor hc = h.row_range(first, last);
    const Tensor z = logits ? logits.row_range(first, last) : arena.alloc(sum, hc.rows, V);
    const Tensor dz = backward ? arena.alloc(type, hc.rows, V) : Tensor{};
    if (dry()) continue;
    matmul_.run({z, hc, w, true});
    dispatch(type, [&]<class T>() {
      using S = Sum<T>;
      threads_.blocks(hc.rows, 1, [&](int64_t r, int64_t) {
        const S* row = z.row<S>(r);
        const RowStats<S> s = row_stats(row, V);
        const int64_t target = targets.as<int32_t>()[first + r];
        if (hit) hit.as<int32_t>()[first + r] = s.best == target;
        nll.as<S>()[first + r] = static_cast<S>(std::log(s.sum) + static_cast<double>(s.most) - static_cast<double>(row[target]));
        if (!backward) return;
        T* d = dz.row<T>(r);
        const double weight = weights[static_cast<std::size_t>(classes.as<int32_t>()[first + r])];
        const S scale = static_cast<S>(weight / s.sum), w1 = static_cast<S>(weight);
        for (int64_t j = 0; j < V; ++j) d[j] = rounded<T>(fast_exp(row[j] - s.most) * scale);
        d[target] = rounded<T>(fast_exp(row[target] - s.most) * scale - w1);
      });
    });
    if (dh) matmul_.run({dh.row_range(first, last), dz, w});
    if (dw) matmul_.add_all(std::array{Matmul::RowSum{dw, dz, hc}});
  }
  if (dry()) return;
  dispatch(sum, [&]<class S>() {
    for (int64_t i = 0; i < n; ++i) losses.as<double>()[classes.as<int32_t>()[i]] += to_float(nll.as<S>()[i]);
  });
  if (!correct) return;
  std::fill_n(correct.as<int32_t>(), correct.cols, 1);
  for (int64_t i = 0; i < n; ++i)
    if (const int32_t b = owners.as<int32_t>()[i]; b >= 0) correct.as<int32_t>()[b] &= hit.as<int32_t>()[i];
}

void CpuOps::do_head_argmax(Arena& arena, const Tensor& best, const Tensor& h, const Tensor& w) {
  each_logits(threads_, dry(), arena, h, w,
              [&](int64_t row, const auto* z) { best.as<int32_t>()[row] = static_cast<int32_t>(best_of(z, w.rows)); });
}

void CpuOps::do_head_draw(Arena& arena, const Tensor& drawn, const Tensor& h, const Tensor& w, const Tensor& numbers, double temperature,
                          double top_p) {
  each_logits(threads_, dry(), arena, h, w, [&](int64_t row, const auto* z) {
    drawn.as<int32_t>()[row] = drawn_of(z, w.rows, draw_bits(numbers.as<int32_t>() + 2 * row), temperature, top_p);
  });
}

}  // namespace kava
