// Linear maps with LoRA on the CPU. A map with bias and LoRA is one product with its operands put side by side,
//   y = [x | xa | 1] [W | scale B | bias]^T,
// so that the storage type rounds the result once.
#include <cstring>
#include <vector>

#include "engine/device/cpu/ops_cpu.h"
#include "kernels/dropout.h"

namespace kava {

namespace {

template <class T>
void copy_row(T* y, const T* x, int64_t n) {
  std::memcpy(y, x, static_cast<std::size_t>(n) * sizeof(T));
}

int64_t rank_of(const Linear& l) { return l.lora_a ? l.lora_a.rows : 0; }

int64_t total_rank(std::span<const Linear> linears) {
  int64_t r = 0;
  for (const Linear& l : linears) r += rank_of(l);
  return r;
}

void check_linear(const Linear& l, const Tensor& x) {
  KAVA_CHECK(l.w.cols == x.cols && l.w.dtype == x.dtype, "x [{}, {}] against W [{}, {}]", x.rows, x.cols, l.w.rows, l.w.cols);
  KAVA_CHECK(!l.bias || l.bias.cols == l.w.rows, "a bias of {} for {} outputs", l.bias.cols, l.w.rows);
  KAVA_CHECK(!l.lora_a || (l.lora_a.cols == x.cols && l.lora_b.rows == l.w.rows && l.lora_b.cols == l.lora_a.rows),
             "LoRA A [{}, {}], B [{}, {}]", l.lora_a.rows, l.lora_a.cols, l.lora_b.rows, l.lora_b.cols);
}

// The keep factors (0 or 1 / (1 - p)) of one row, eight columns a Philox block, sixteen blocks at a time so that the rounds become vector
// code.
template <class S>
class DropoutRow {
 public:
  DropoutRow(const Dropout& d, int64_t cols)
      : d_(d),
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
        c0[i] = static_cast<uint32_t>(first / 8 + static_cast<std::size_t>(i)) | d_.site << 16;
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
  uint32_t threshold_;
  S keep_;
  std::vector<S> factor_;
};

// y = drop(x); x itself where nothing is dropped.
Tensor dropped(Threads& threads, Arena& arena, const Tensor& x, const Dropout& dropout) {
  if (dropout.p == 0) return x;
  Tensor y = arena.alloc(x.dtype, x.rows, x.cols);
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

// [W | scale B | bias] of one linear map; W itself where it stands alone.
Tensor joined_weight(Threads& threads, Arena& arena, const Linear& l) {
  const int64_t in = l.w.cols, r = rank_of(l), extra = r + (l.bias ? 1 : 0);
  if (extra == 0) return l.w;
  Tensor joined = arena.alloc(l.w.dtype, l.w.rows, in + extra);
  dispatch(l.w.dtype, [&]<class T>() {
    threads.blocks(l.w.rows, kRowBlock, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        T* y = joined.row<T>(o);
        copy_row(y, l.w.row<T>(o), in);
        for (int64_t i = 0; i < r; ++i) y[in + i] = rounded<T>(static_cast<Sum<T>>(l.scale) * to_float(l.lora_b.row<T>(o)[i]));
        if (l.bias) y[in + r] = l.bias.row<T>(0)[o];
      }
    });
  });
  return joined;
}

// [x | xa | 1] to go with joined_weight.
Tensor joined_input(Threads& threads, Arena& arena, const Tensor& x, const Tensor& xa, const Linear& l) {
  const int64_t in = x.cols, r = rank_of(l), extra = r + (l.bias ? 1 : 0);
  if (extra == 0) return x;
  Tensor joined = arena.alloc(x.dtype, x.rows, in + extra);
  dispatch(x.dtype, [&]<class T>() {
    threads.blocks(x.rows, kRowBlock, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        T* y = joined.row<T>(n);
        copy_row(y, x.row<T>(n), in);
        if (r > 0) copy_row(y + in, xa.row<T>(n), r);
        if (l.bias) y[in + r] = rounded<T>(Sum<T>{1});
      }
    });
  });
  return joined;
}

// The A matrices of a group, one below the other.
Tensor joined_a(Arena& arena, std::span<const Linear> linears, int64_t in) {
  const Linear* only = nullptr;
  int with_lora = 0;
  for (const Linear& l : linears)
    if (l.lora_a) only = &l, ++with_lora;
  if (with_lora == 1) return only->lora_a;
  Tensor joined = arena.alloc(linears[0].w.dtype, total_rank(linears), in);
  int64_t at = 0;
  dispatch(joined.dtype, [&]<class T>() {
    for (const Linear& l : linears)
      for (int64_t r = 0; r < rank_of(l); ++r) copy_row(joined.row<T>(at++), l.lora_a.row<T>(r), in);
  });
  return joined;
}

}  // namespace

void CpuOps::linear_group_fwd(Arena& arena, std::span<const Tensor> y, const Tensor& xa, const Tensor& x, std::span<const Linear> linears,
                              const Dropout& dropout) {
  ArenaScope scope(arena);
  KAVA_CHECK(y.size() == linears.size(), "{} outputs of {} linear maps", y.size(), linears.size());
  for (const Linear& l : linears) check_linear(l, x);
  const int64_t ranks = total_rank(linears);
  if (ranks > 0) {
    KAVA_CHECK(xa.cols == ranks && xa.rows == x.rows, "xa [{}, {}]", xa.rows, xa.cols);
    ArenaScope inner(arena);
    matmul_.run(xa, dropped(threads_, arena, x, dropout), false, joined_a(arena, linears, x.cols), true);
  }
  int64_t at = 0;
  for (std::size_t j = 0; j < linears.size(); ++j) {
    ArenaScope inner(arena);
    const Linear& l = linears[j];
    const int64_t r = rank_of(l);
    const Tensor part = r > 0 ? xa.col_range(at, at + r) : Tensor{};
    matmul_.run(y[j], joined_input(threads_, arena, x, part, l), false, joined_weight(threads_, arena, l), true);
    at += r;
  }
}

void CpuOps::linear_group_bwd_input(Arena& arena, const Tensor& dx, const Tensor& dxa, std::span<const Tensor> dy,
                                    std::span<const Linear> linears, const Dropout& dropout) {
  ArenaScope scope(arena);
  const int64_t ranks = total_rank(linears), n = dy[0].rows, in = linears[0].w.cols;
  const DType type = dy[0].dtype;
  int64_t at = 0;
  for (std::size_t j = 0; j < linears.size(); ++j) {
    const Linear& l = linears[j];
    if (rank_of(l) == 0) continue;
    ArenaScope inner(arena);
    Tensor scaled = arena.alloc(type, l.lora_b.rows, l.lora_b.cols);
    dispatch(type, [&]<class T>() {
      for (int64_t o = 0; o < l.lora_b.rows; ++o)
        for (int64_t r = 0; r < l.lora_b.cols; ++r)
          scaled.row<T>(o)[r] = rounded<T>(static_cast<Sum<T>>(l.scale) * to_float(l.lora_b.row<T>(o)[r]));
    });
    matmul_.run(dxa.col_range(at, at + rank_of(l)), dy[j], false, scaled, false);
    at += rank_of(l);
  }
  if (!dx) return;

  if (linears.size() == 1 && ranks == 0) {
    matmul_.run(dx, dy[0], false, linears[0].w, false);
    return;
  }
  // Parts are summed in the sum type and rounded once.
  Tensor sum = arena.alloc(sum_type(type), n, in);
  for (std::size_t j = 0; j < linears.size(); ++j)
    matmul_.run(sum, dy[j], false, linears[j].w, false, j == 0 ? Matmul::Store::set : Matmul::Store::add);
  Tensor lora;
  if (ranks > 0) {
    const Tensor a = joined_a(arena, linears, in);
    if (dropout.p == 0) {
      matmul_.run(sum, dxa, false, a, false, Matmul::Store::add);
    } else {
      lora = arena.alloc(sum_type(type), n, in);
      matmul_.run(lora, dxa, false, a, false);
    }
  }
  dispatch(type, [&]<class T>() {
    threads_.blocks(n, kRowBlock, [&](int64_t begin, int64_t end) {
      DropoutRow<Sum<T>> mask(dropout, lora ? in : 0);
      for (int64_t i = begin; i < end; ++i) {
        const Sum<T>* s = sum.row<Sum<T>>(i);
        T* out = dx.row<T>(i);
        if (!lora) {
          for (int64_t c = 0; c < in; ++c) out[c] = rounded<T>(s[c]);
          continue;
        }
        const Sum<T>* f = mask.row(i);
        const Sum<T>* g = lora.row<Sum<T>>(i);
        for (int64_t c = 0; c < in; ++c) out[c] = rounded<T>(s[c] + f[c] * g[c]);
      }
    });
  });
}

void CpuOps::linear_group_bwd_params(Arena& arena, std::span<const LinearGrad> grads, std::span<const Tensor> dy, const Tensor& dxa,
                                     const Tensor& x, const Tensor& xa, std::span<const Linear> linears, const Dropout& dropout) {
  ArenaScope scope(arena);
  Tensor xd;
  int64_t at = 0;
  for (std::size_t j = 0; j < linears.size(); ++j) {
    const LinearGrad& g = grads[j];
    const Linear& l = linears[j];
    const int64_t r = rank_of(l);
    if (g.dw) matmul_.run(g.dw, dy[j], true, x, false, Matmul::Store::add);
    if (g.dbias)
      dispatch(dy[j].dtype, [&]<class T>() {
        threads_.blocks(l.w.rows, 64, [&](int64_t begin, int64_t end) {
          Sum<T>* sum = g.dbias.row<Sum<T>>(0);
          for (int64_t n = 0; n < dy[j].rows; ++n)
            for (int64_t o = begin; o < end; ++o) sum[o] += to_float(dy[j].row<T>(n)[o]);
        });
      });
    if (g.dlora_a) {
      if (!xd) xd = dropped(threads_, arena, x, dropout);
      matmul_.run(g.dlora_a, dxa.col_range(at, at + r), true, xd, false, Matmul::Store::add);
    }
    if (g.dlora_b) {
      ArenaScope inner(arena);
      Tensor product = arena.alloc(sum_type(x.dtype), l.w.rows, r);
      fill(product, 0);
      matmul_.run(product, dy[j], true, xa.col_range(at, at + r), false, Matmul::Store::add);
      dispatch(product.dtype, [&]<class S>() {
        for (int64_t o = 0; o < product.rows; ++o)
          for (int64_t i = 0; i < r; ++i) g.dlora_b.row<Sum<S>>(o)[i] += static_cast<Sum<S>>(l.scale) * to_float(product.row<S>(o)[i]);
      });
    }
    at += r;
  }
}

}  // namespace kava
