// cpu backend: norms. A block of kRowBlock rows is a task.
#include <cmath>

#include "engine/device/cpu/ops_cpu.h"
#include "engine/device/cpu/row_loops.h"

namespace kava {

namespace {
// The row that is normalised: a's own, or sum's after a (+ b) has been written there.
template <class T>
const T* summed_row(int64_t n, const Tensor& sum, const Tensor& a, const Tensor& b) {
  const T* x = a.row<T>(n);
  if (!sum || (!b && sum.data == a.data)) return x;
  T* total = sum.row<T>(n);
  if (b) each(a.cols, [=, other = b.row<T>(n)](int64_t c) { store(total, c, load(x, c) + load(other, c)); });
  else each(a.cols, [=](int64_t c) { total[c] = x[c]; });
  return total;
}
}  // namespace

void CpuOps::do_add_rms_norm_fwd(const Tensor& y, const Tensor& sum, const Tensor& rstd, const Tensor& a, const Tensor& b, const Tensor& w,
                                 double eps) {
  const int64_t cols = y.cols;
  dispatch(y.dtype, [&]<class T>() {
    using S = Sum<T>;
    const T* gain = w.as<T>();
    S* scales = rstd ? rstd.as<S>() : nullptr;
    threads_.blocks(y.rows, kRowBlock, [&, gain, scales](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const T* x = summed_row<T>(n, sum, a, b);
        S square = sum_over<S>(cols, [=](int64_t c) { return load(x, c) * load(x, c); });
        S scale = S(1) / std::sqrt(square / static_cast<S>(cols) + static_cast<S>(eps));
        if (scales) scales[n * rstd.stride] = scale;
        each(cols, [=, out = y.row<T>(n)](int64_t c) { store(out, c, load(x, c) * scale * load(gain, c)); });
      }
    });
  });
}

void CpuOps::do_rms_norm_bwd(Arena& arena, const Tensor& dx, const Tensor& dw, const Tensor& dy, const Tensor& x, const Tensor& rstd,
                             const Tensor& w) {
  const int64_t cols = x.cols;
  ArenaScope scope(arena);
  dispatch_gradient(x, dy, [&]<class T, class G>() {
    using S = Sum<T>;
    const T* gain = w.as<T>();
    const S* scales = rstd.as<S>();
    BlockSums<S> gains(arena, dw ? x.rows : 0, kRowBlock, cols);
    if (dry()) return;
    threads_.blocks(x.rows, kRowBlock, [&](int64_t begin, int64_t end) {
      S* dgain = dw ? gains.of(begin) : nullptr;
      for (int64_t n = begin; n < end; ++n) {
        const T* in = x.row<T>(n);
        const G* dout = dy.row<G>(n);
        const S scale = scales[n * rstd.stride];
        S dot = sum_over<S>(cols, [=](int64_t c) { return load(dout, c) * load(gain, c) * load(in, c); });
        const S pull = scale * scale * scale * dot / static_cast<S>(cols);
        if (dgain) each(cols, [=](int64_t c) { dgain[c] += load(dout, c) * load(in, c) * scale; });
        each(cols, [=, out = dx.row<T>(n)](int64_t c) {
          store(out, c, load(out, c) + (scale * load(dout, c) * load(gain, c) - pull * load(in, c)));
        });
      }
    });
    if (dw) gains.add_to(dw.as<S>());
  });
}

void CpuOps::do_add_layer_norm_fwd(const Tensor& y, const Tensor& sum, const Tensor& mean, const Tensor& rstd, const Tensor& a,
                                   const Tensor& b, const Tensor& w, const Tensor& bias, double eps) {
  const int64_t cols = y.cols;
  dispatch(y.dtype, [&]<class T>() {
    using S = Sum<T>;
    const T *gain = w.as<T>(), *shift = bias.as<T>();
    S *means = mean.as<S>(), *scales = rstd.as<S>();
    threads_.blocks(y.rows, kRowBlock, [&, gain, shift](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const T* in = summed_row<T>(n, sum, a, b);
        const S center = sum_over<S>(cols, [=](int64_t c) { return load(in, c); }) / static_cast<S>(cols);
        S square = sum_over<S>(cols, [=](int64_t c) { return (load(in, c) - center) * (load(in, c) - center); });
        const S scale = S(1) / std::sqrt(square / static_cast<S>(cols) + static_cast<S>(eps));
        means[n * mean.stride] = center;
        scales[n * rstd.stride] = scale;
        each(cols, [=, out = y.row<T>(n)](int64_t c) { store(out, c, (load(in, c) - center) * scale * load(gain, c) + load(shift, c)); });
      }
    });
  });
}

void CpuOps::do_layer_norm_bwd(Arena& arena, const Tensor& dx, const Tensor& dw, const Tensor& db, const Tensor& dy, const Tensor& x,
                               const Tensor& mean, const Tensor& rstd, const Tensor& w) {
  const int64_t cols = x.cols;
  ArenaScope scope(arena);
  dispatch_gradient(x, dy, [&]<class T, class G>() {
    using S = Sum<T>;
    const T* gain = w.as<T>();
    const S *means = mean.as<S>(), *scales = rstd.as<S>();
    BlockSums<S> gains(arena, dw ? x.rows : 0, kRowBlock, cols), biases(arena, db ? x.rows : 0, kRowBlock, cols);
    if (dry()) return;
    threads_.blocks(x.rows, kRowBlock, [&, gain](int64_t begin, int64_t end) {
      S *dgain = dw ? gains.of(begin) : nullptr, *dbias = db ? biases.of(begin) : nullptr;
      for (int64_t n = begin; n < end; ++n) {
        const T* in = x.row<T>(n);
        const G* dout = dy.row<G>(n);
        const S center = means[n * mean.stride], scale = scales[n * rstd.stride];
        // With g = dy w and z = (x - mean) rstd: dx += rstd (g - mean(g) - z mean(g z)).
        S g_sum = sum_over<S>(cols, [=](int64_t c) { return load(dout, c) * load(gain, c); });
        S gz_sum = sum_over<S>(cols, [=](int64_t c) { return load(dout, c) * load(gain, c) * ((load(in, c) - center) * scale); });
        const S g_mean = g_sum / static_cast<S>(cols), gz_mean = gz_sum / static_cast<S>(cols);
        if (dgain) each(cols, [=](int64_t c) { dgain[c] += load(dout, c) * ((load(in, c) - center) * scale); });
        if (dbias) each(cols, [=](int64_t c) { dbias[c] += load(dout, c); });
        each(cols, [=, out = dx.row<T>(n)](int64_t c) {
          store(out, c, load(out, c) + scale * (load(dout, c) * load(gain, c) - g_mean - (load(in, c) - center) * scale * gz_mean));
        });
      }
    });
    if (dw) gains.add_to(dw.as<S>());
    if (db) biases.add_to(db.as<S>());
  });
}

}  // namespace kava
