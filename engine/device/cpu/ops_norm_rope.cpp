// cpu backend: the norm of heads with their rotary embedding. A block of kRowBlock rows is a task.
#include <cmath>
#include <vector>

#include "engine/device/cpu/ops_cpu.h"
#include "engine/device/cpu/row_loops.h"

namespace kava {

void CpuOps::do_norm_rope_fwd(const Tensor& y, const Tensor& rstd, const Tensor& x, const Tensor& w, const Tensor& positions,
                              const Tensor& cosine, const Tensor& sine, double eps) {
  const int64_t D = w.cols, half = D / 2, heads = x.cols / D;
  const int32_t* at = positions.as<int32_t>();
  dispatch(x.dtype, [&]<class T>() {
    using S = Sum<T>;
    const T* gain = w.as<T>();
    threads_.blocks(x.rows, kRowBlock, [&, gain, at](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const S *c = cosine.row<S>(at[n]), *s = sine.row<S>(at[n]);
        for (int64_t h = 0; h < heads; ++h) {
          const T* in = x.row<T>(n) + h * D;
          const S square = sum_over<S>(D, [=](int64_t d) { return load(in, d) * load(in, d); });
          const S scale = S(1) / std::sqrt(square / static_cast<S>(D) + static_cast<S>(eps));
          if (rstd) rstd.row<S>(n)[h] = scale;
          each(half, [=, out = y.row<T>(n) + h * D](int64_t d) {
            const S a = load(in, d) * scale * load(gain, d), b = load(in, d + half) * scale * load(gain, d + half);
            store(out, d, a * c[d] - b * s[d]);
            store(out, d + half, b * c[d] + a * s[d]);
          });
        }
      }
    });
  });
}

void CpuOps::do_norm_rope_bwd(Arena& arena, const Tensor& dx, const Tensor& dw, const Tensor& dy, const Tensor& x, const Tensor& rstd,
                              const Tensor& w, const Tensor& positions, const Tensor& cosine, const Tensor& sine) {
  const int64_t D = w.cols, half = D / 2, heads = x.cols / D;
  const int32_t* at = positions.as<int32_t>();
  ArenaScope scope(arena);
  dispatch_gradient(x, dy, [&]<class T, class G>() {
    using S = Sum<T>;
    const T* gain = w.as<T>();
    BlockSums<S> gains(arena, dw ? x.rows : 0, kRowBlock, D);
    if (dry()) return;
    threads_.blocks(x.rows, kRowBlock, [&, gain, at](int64_t begin, int64_t end) {
      S* dgain = dw ? gains.of(begin) : nullptr;
      std::vector<S> turned(static_cast<std::size_t>(D));
      for (int64_t n = begin; n < end; ++n) {
        const S *c = cosine.row<S>(at[n]), *s = sine.row<S>(at[n]);
        for (int64_t h = 0; h < heads; ++h) {
          // The gradient turned back, then that of the norm.
          S* g = turned.data();
          each(half, [=, out = dy.row<G>(n) + h * D](int64_t d) {
            const S a = load(out, d), b = load(out, d + half);
            g[d] = a * c[d] + b * s[d], g[d + half] = b * c[d] - a * s[d];
          });
          const T* in = x.row<T>(n) + h * D;
          const S scale = rstd.row<S>(n)[h];
          const S dot = sum_over<S>(D, [=](int64_t d) { return g[d] * load(gain, d) * load(in, d); });
          const S pull = scale * scale * scale * dot / static_cast<S>(D);
          if (dgain) each(D, [=](int64_t d) { dgain[d] += g[d] * load(in, d) * scale; });
          each(D, [=, out = dx.row<T>(n) + h * D](int64_t d) { store(out, d, scale * g[d] * load(gain, d) - pull * load(in, d)); });
        }
      }
    });
    if (dw) gains.add_to(dw.as<S>());
  });
}

}  // namespace kava
