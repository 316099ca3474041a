// Linear maps with LoRA on the CPU. Each part of a group is tiles of one product,
//   y = [x | xa] [W | s B]^T + bias,
// over the columns up to its own rank columns, so that few zeros of [W | s B] are multiplied and the storage type rounds the result once.
#include <algorithm>
#include <cstring>
#include <vector>

#include "engine/device/cpu/ops_cpu.h"
#include "engine/device/cpu/streamed.h"
#include "kernels/dropout.h"

namespace kava {

namespace {

// The columns of [x | xa] that a part reads: up to its own rank columns. Those of parts before it meet zeros in [W | s B].
int64_t depth(const LinearGroup& g, const LinearPart& p) { return p.rank > 0 ? g.in + p.rank_begin + p.rank : g.in; }

// The keep factors (0 or 1 / (1 - p)) of columns first_col, a multiple of 8, and on of one row: eight columns a Philox block, sixteen
// blocks at a time so that the rounds become vector code.
template <class S>
class DropoutRow {
 public:
  DropoutRow(const Dropout& d, int64_t cols, int64_t first_col = 0)
      : d_(d),
        first_block_(static_cast<uint32_t>(first_col / 8)),
        threshold_(dropout_threshold(d.p)),
        keep_(static_cast<S>(1.0 / (1.0 - d.p))),
        factor_(static_cast<std::size_t>((cols + 127) / 128 * 128)) {}

  const S* row(int64_t n) {
    const int32_t* key = d_.row_keys.row<int32_t>(n);
    const auto k = philox_key(Purpose::dropout, d_.seed);
    constexpr int kLanes = 16;
    for (std::size_t first = 0; first < factor_.size(); first += 8 * kLanes) {
      uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes], k0 = k[0], k1 = k[1];
      for (int i = 0; i < kLanes; ++i) {
        c0[i] = (first_block_ + static_cast<uint32_t>(first / 8 + static_cast<std::size_t>(i))) | d_.site << 16;
        c1[i] = static_cast<uint32_t>(key[1]), c2[i] = static_cast<uint32_t>(key[0]), c3[i] = d_.step;
      }
      for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
        for (int i = 0; i < kLanes; ++i) {
          const uint64_t p0 = uint64_t{0xD2511F53} * c0[i], p1 = uint64_t{0xCD9E8D57} * c2[i];
          c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
          c1[i] = static_cast<uint32_t>(p1);
          c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
          c3[i] = static_cast<uint32_t>(p0);
        }
      }
      S* f = factor_.data() + first;
      for (int i = 0; i < kLanes; ++i) {
        const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
        for (int j = 0; j < 8; ++j) f[i * 8 + j] = (words[j / 2] >> (j % 2 * 16) & 0xffff) >= threshold_ ? keep_ : S{0};
      }
    }
    return factor_.data();
  }

 private:
  const Dropout& d_;
  uint32_t first_block_, threshold_;
  S keep_;
  std::vector<S> factor_;
};

// y = drop(x); x itself where nothing is dropped.
Tensor dropped(Threads& threads, Arena& arena, const Tensor& x, const Dropout& dropout, bool dry) {
  if (dropout.p == 0) return x;
  Tensor y = arena.alloc(x.dtype, x.rows, x.cols);
  if (dry) return y;
  dispatch(x.dtype, [&]<class T>() {
    threads.blocks(x.rows, kRowBlock, [&](int64_t begin, int64_t end) {
      DropoutRow<Sum<T>> mask(dropout, x.cols);
      for (int64_t n = begin; n < end; ++n) {
        const Sum<T>* f = mask.row(n);
        const T* in = x.row<T>(n);
        T* out = y.row<T>(n);
        for (int64_t c = 0; c < x.cols; ++c) out[c] = rounded<T>(to_float(in[c]) * f[c]);
      }
    });
  });
  return y;
}

}  // namespace

void CpuOps::do_linear_prepare(const LinearGroup& g) {
  if (g.ranks() == 0) return;
  dispatch(g.joined.dtype, [&]<class T>() {
    for (const LinearPart& p : g.parts)
      threads_.blocks(p.outs, kRowBlock, [&](int64_t begin, int64_t end) {
        for (int64_t o = begin; o < end; ++o) {
          T* y = g.joined.row<T>(p.out_begin + o) + g.in;
          std::fill(y, y + g.ranks(), T{});
          for (int64_t i = 0; i < p.rank; ++i) y[p.rank_begin + i] = rounded<T>(static_cast<Sum<T>>(p.scale) * to_float(p.b.row<T>(o)[i]));
        }
      });
  });
}

void CpuOps::do_lora_fwd(Arena& arena, const Tensor& xx, const LinearGroup& g, const Dropout& dropout, Reads reads) {
  ArenaScope scope(arena);
  const Matmul::Product xa{xx.col_range(g.in, xx.cols), dropped(threads_, arena, xx.col_range(0, g.in), dropout, dry()), g.a, true};
  if (dry()) return;
  if (reads == Reads::streamed) streamed_products(threads_, std::span(&xa, 1));
  else matmul_.run(xa);
}

void CpuOps::do_linear_group_fwd(Arena&, const Tensor& y, const Tensor& xx, const LinearGroup& g, Reads reads) {
  if (dry()) return;
  std::vector<Matmul::Product> products;
  for (const LinearPart& p : g.parts) {
    const int64_t begin = p.out_begin, end = begin + p.outs, k = depth(g, p);
    products.push_back({y.col_range(begin, end), xx.col_range(0, k), g.joined.row_range(begin, end).col_range(0, k), true,
                        g.bias ? g.bias.col_range(begin, end) : Tensor{}});
  }
  if (reads == Reads::streamed) streamed_products(threads_, products);
  else matmul_.run_all(products);
}

void CpuOps::do_linear_group_bwd_input(Arena&, const Tensor& dx, const Tensor& dxa, const Tensor& dy, const LinearGroup& g,
                                       const Dropout& dropout) {
  if (dry()) return;
  const Ranks ranks = g.used_ranks();
  std::vector<Matmul::Product> products;
  for (const LinearPart& p : g.parts) {
    if (p.rank == 0) continue;
    const int64_t begin = p.out_begin, end = begin + p.outs, from = p.rank_begin, to = from + p.rank;
    products.push_back(
        {dxa.col_range(from, to), dy.col_range(begin, end), g.joined.row_range(begin, end).col_range(g.in + from, g.in + to), false});
  }
  matmul_.run_all(products);
  for (const Ranks& other : {Ranks{0, ranks.begin}, Ranks{ranks.end, g.ranks()}})
    if (dxa && other.count() > 0) do_fill(dxa.col_range(other.begin, other.end), 0);
  if (!dx) return;
  if (ranks.count() == 0) return matmul_.run({dx, dy, g.w()});
  dispatch(dx.dtype, [&]<class T>() {
    const bool drops = dropout.p > 0;
    matmul_.sum_tiles({dy, g.w()}, {dxa.col_range(ranks.begin, ranks.end), g.a.row_range(ranks.begin, ranks.end)}, drops,
                      [&](const Matmul::SumTile& t) {
                        DropoutRow<Sum<T>> mask(dropout, drops ? t.cols : 0, t.col);
                        for (int64_t i = 0; i < t.rows; ++i) {
                          const Sum<T>* s = static_cast<const Sum<T>*>(t.sum) + i * Matmul::kTileCols;
                          T* out = dx.row<T>(t.row + i) + t.col;
                          if (!drops) {
                            for (int64_t c = 0; c < t.cols; ++c) out[c] = rounded<T>(s[c]);
                            continue;
                          }
                          const Sum<T>* f = mask.row(t.row + i);
                          const Sum<T>* lora = static_cast<const Sum<T>*>(t.second) + i * Matmul::kTileCols;
                          for (int64_t c = 0; c < t.cols; ++c) out[c] = rounded<T>(s[c] + f[c] * lora[c]);
                        }
                      });
  });
}

void CpuOps::do_linear_group_bwd_params(Arena& arena, const LinearGroupGrad& grad, const Tensor& dy, const Tensor& dxa, const Tensor& xx,
                                        const LinearGroup& g, const Dropout& dropout) {
  ArenaScope scope(arena);
  const Tensor x = xx.col_range(0, g.in);
  const Ranks ranks = g.used_ranks();
  std::vector<Matmul::RowSum> sums;
  if (grad.dw) sums.push_back({grad.dw, dy, x});
  if (grad.da && ranks.count() > 0)
    sums.push_back(
        {grad.da.row_range(ranks.begin, ranks.end), dxa.col_range(ranks.begin, ranks.end), dropped(threads_, arena, x, dropout, dry())});
  for (std::size_t j = 0; j < grad.db.size(); ++j) {
    const LinearPart& p = g.parts[j];
    const int64_t out = p.out_begin, rank = g.in + p.rank_begin;
    if (grad.db[j]) sums.push_back({grad.db[j], dy.col_range(out, out + p.outs), xx.col_range(rank, rank + p.rank), p.scale});
  }
  if (dry()) return;
  matmul_.add_all(sums);
  if (!grad.dbias) return;
  dispatch(dy.dtype, [&]<class T>() {
    threads_.blocks(g.outs(), 64, [&](int64_t begin, int64_t end) {
      Sum<T>* sum = grad.dbias.row<Sum<T>>(0);
      for (int64_t n = 0; n < dy.rows; ++n)
        for (int64_t o = begin; o < end; ++o) sum[o] += to_float(dy.row<T>(n)[o]);
    });
  });
}

}  // namespace kava
