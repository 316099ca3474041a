#include <algorithm>

#include "engine/device/cuda/ops_cuda.h"
#include "kernels/dropout.h"

namespace kava {

namespace {
DropoutMask mask_of(const Dropout& d) {
  if (d.p == 0) return {};
  return {data_of<const int32_t>(d.row_keys), d.seed, d.step, d.site, dropout_threshold(d.p), static_cast<float>(1 / (1 - d.p))};
}
template <class T>
void set_size(Gemm<T>& g, const Tensor& c) {
  g.m = static_cast<int>(c.rows), g.n = static_cast<int>(c.cols);
}
int to_int(int64_t n) { return static_cast<int>(n); }

/// The ranks' columns of the joined matrix [W | sB], which g's last product has for B, are zero where a part's outs meet another's ranks.
/// It sums over them, or, over_outs, over its rows.
template <class T>
void name_bands(Gemm<T>& g, const LinearGroup& group, bool over_outs) {
  if (std::ssize(group.parts) > Gemm<T>::kMostBands) return;
  for (const LinearPart& p : group.parts) {
    const int out = to_int(p.out_begin), out_end = to_int(p.out_begin + p.outs), rank = to_int(p.rank_begin),
              rank_end = to_int(p.rank_begin + p.rank);
    if (p.rank > 0) g.bands[g.band_count++] = over_outs ? Band{rank, rank_end, out, out_end} : Band{out, out_end, rank, rank_end};
  }
}

/// Sums g in parts, 0: in one go, with room for them from the arena, which a dry run takes too. f32 is never cut.
template <class T>
void sum_in_parts(Gemm<T>& g, int parts, Arena& arena) {
  if (parts == 0 || !std::is_same_v<T, bf16>) return;
  g.parts = parts;
  g.partial = rows_of<float>(arena.alloc(DType::f32, int64_t{parts} * g.m, (int64_t{g.n} + 7) / 8 * 8));
}

/// Parts of xa. A row's bytes must not depend on the rows beside it, so the form, k and ranks alone decide: streamed rows are few, and
/// tiled ones fill a device but where k is long beside the ranks.
int parts_of_xa(int k, int ranks, Reads reads) {
  const int length = reads == Reads::streamed ? 256 : 2048 * ((ranks + 127) / 128);
  return k < 2 * length ? 0 : k / length;
}
}  // namespace

void CudaOps::do_linear_prepare(const LinearGroup& g) {
  if (g.ranks() == 0) return;
  on_storage(g.joined.dtype, [&]<class T>() {
    const Tensor columns = g.joined.col_range(g.in, g.joined.cols);
    kava::fill_rows(stream(), rows_of<T>(columns), T{}, columns.rows, columns.cols);
    for (const LinearPart& p : g.parts) {
      if (p.rank == 0) continue;
      const Tensor to = columns.row_range(p.out_begin, p.out_begin + p.outs).col_range(p.rank_begin, p.rank_begin + p.rank);
      kava::scale_rows(stream(), rows_of<T>(to), rows_of<const T>(p.b), static_cast<float>(p.scale), to.rows, to.cols);
    }
  });
}

void CudaOps::do_lora_fwd(Arena& arena, const Tensor& xx, const LinearGroup& g, const Dropout& dropout, Reads reads) {
  ArenaScope scope(arena);
  on_storage(xx.dtype, [&]<class T>() {
    Gemm<T> gemm_;
    gemm_.mask = mask_of(dropout);
    const Tensor xa = xx.col_range(g.in, xx.cols);
    gemm_.set = rows_of<T>(xa);
    set_size(gemm_, xa);
    gemm_.then(rows_of<const T>(xx), rows_of<const T>(g.a), to_int(g.in));
    gemm_.scaled = 1, gemm_.factor = gemm_.mask.inverse_keep, gemm_.masked = dropout.p > 0;
    sum_in_parts(gemm_, parts_of_xa(to_int(g.in), to_int(xa.cols), reads), arena);
    if (!dry()) multiply<GemmForm::nt>(gemm_, reads);
  });
}

void CudaOps::do_linear_group_fwd(Arena&, const Tensor& y, const Tensor& xx, const LinearGroup& g, Reads reads) {
  if (dry()) return;
  on_storage(y.dtype, [&]<class T>() {
    Gemm<T> gemm_;
    gemm_.set = rows_of<T>(y);
    set_size(gemm_, y);
    gemm_.bias = data_of<const T>(g.bias);
    // Without a rank among the parts nobody has written xa.
    const int ranks = to_int(g.used_ranks().end);
    gemm_.then(rows_of<const T>(xx), rows_of<const T>(g.joined), to_int(g.in) + ranks);
    if (multiplied_by_lt<GemmForm::nt>(gemm_, reads)) return;
    if (ranks > 0) {
      gemm_.products[0].k = to_int(g.in);
      gemm_.then(rows_of<const T>(xx.col_range(g.in, g.in + ranks)), rows_of<const T>(g.joined.col_range(g.in, g.in + ranks)), ranks);
      name_bands(gemm_, g, false);
    }
    kava::gemm<GemmForm::nt>(stream(), gemm_);
  });
}

void CudaOps::do_linear_group_bwd_input(Arena&, const Tensor& dx, const Tensor& dxa, const Tensor& dy, const LinearGroup& g,
                                        const Dropout& dropout) {
  if (dry()) return;
  const Ranks ranks = g.used_ranks();
  if (dxa)
    on_storage(dxa.dtype, [&]<class T>() {
      Gemm<T> gemm_;
      gemm_.set = rows_of<T>(dxa);
      set_size(gemm_, dxa);
      gemm_.then(rows_of<const T>(dy), rows_of<const T>(g.joined.col_range(g.in, g.joined.cols)), to_int(dy.cols));
      name_bands(gemm_, g, true);
      multiply<GemmForm::nn>(gemm_);
    });
  if (!dx) return;
  on_storage(dx.dtype, [&]<class T>() {
    Gemm<T> base;
    base.set = rows_of<T>(dx);
    set_size(base, dx);
    Gemm<T> low = base;
    base.then(rows_of<const T>(dy), rows_of<const T>(g.joined), to_int(g.outs()));
    if (ranks.count() == 0) return multiply<GemmForm::nn>(base);
    low.then(rows_of<const T>(dxa.col_range(ranks.begin, ranks.end)), rows_of<const T>(g.a.row_range(ranks.begin, ranks.end)),
             to_int(ranks.count()));
    low.mask = mask_of(dropout);
    low.scaled = 1, low.factor = low.mask.inverse_keep, low.masked = dropout.p > 0;
    multiply_onto<GemmForm::nn>(low, base);
  });
}

void CudaOps::do_linear_group_bwd_params(Arena& arena, const LinearGroupGrad& grad, const Tensor& dy, const Tensor& dxa, const Tensor& xx,
                                         const LinearGroup& g, const Dropout& dropout) {
  const Tensor x = xx.col_range(0, g.in);
  const Ranks ranks = g.used_ranks();
  on_storage(dy.dtype, [&]<class T>() {
    auto add = [&](const Tensor& c, const Tensor& a, const Tensor& b, double factor, bool masked) {
      ArenaScope scope(arena);
      Gemm<T> gemm_;
      gemm_.mask = mask_of(dropout);
      gemm_.add = rows_of<float>(c);
      set_size(gemm_, c);
      gemm_.then(rows_of<const T>(a), rows_of<const T>(b), to_int(a.rows));
      gemm_.scaled = 1, gemm_.factor = static_cast<float>(factor), gemm_.masked = masked;
      sum_in_parts(gemm_, row_parts(c.rows, c.cols, a.rows), arena);
      if (!dry()) multiply<GemmForm::tn>(gemm_);
    };
    if (dy.rows == 0) return;
    if (grad.dw) add(grad.dw, dy, x, 1, false);
    if (grad.da && ranks.count() > 0)
      add(grad.da.row_range(ranks.begin, ranks.end), dxa.col_range(ranks.begin, ranks.end), x,
          static_cast<double>(mask_of(dropout).inverse_keep), dropout.p > 0);
    for (std::size_t j = 0; j < grad.db.size(); ++j) {
      const LinearPart& p = g.parts[j];
      const int64_t rank = g.in + p.rank_begin;
      if (grad.db[j]) add(grad.db[j], dy.col_range(p.out_begin, p.out_begin + p.outs), xx.col_range(rank, rank + p.rank), p.scale, false);
    }
    if (grad.dbias) {
      ArenaScope scope(arena);
      const Tensor room = arena.alloc(DType::f32, 1, column_sums_workspace(dy.rows, dy.cols));
      if (!dry())
        kava::bias_bwd(stream(), data_of<float>(grad.dbias), data_of<float>(room), rows_of<const T>(dy), to_int(dy.rows), to_int(dy.cols));
    }
  });
}

}  // namespace kava
