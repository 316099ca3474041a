// cpu backend: the layers that work row by row. A block of kRowBlock rows is a task.
#include <cmath>

#include "engine/device/cpu/ops_cpu.h"
#include "engine/device/cpu/row_loops.h"

namespace kava {

namespace {
void check_rows(const Tensor& x, int64_t rows, int64_t cols) {
  KAVA_CHECK(x.rows == rows && x.cols == cols, "[{}, {}] where [{}, {}] is needed", x.rows, x.cols, rows, cols);
}

/// f.operator()<T, G>() for storage T and a gradient in storage or sum type.
template <class F>
void dispatch_gradient(const Tensor& x, const Tensor& dy, F f) {
  dispatch(x.dtype, [&]<class T>() {
    if (dy.dtype == x.dtype) f.template operator()<T, T>();
    else if constexpr (std::is_same_v<T, bf16>) f.template operator()<T, Sum<T>>();
    else KAVA_CHECK(false, "a gradient in {} of {}", name_of(dy.dtype), name_of(x.dtype));
  });
}

template <class S>
S sigmoid(S x) {
  return S(1) / (S(1) + fast_exp(-x));
}

// Distribution function and density of the standard normal.
template <class S>
S normal_cdf(S x) {
  return S(0.5) * (S(1) + std::erf(x * S(0.70710678118654752440)));
}
template <class S>
S normal_density(S x) {
  return S(0.39894228040143267794) * std::exp(S(-0.5) * x * x);
}

template <class T>
void rope_row(T* x, const Sum<T>* cosine, const Sum<T>* sine, int64_t cols, int64_t half, Sum<T> sign) {
  for (int64_t begin = 0; begin < cols; begin += 2 * half) {
    T *first = x + begin, *second = first + half;
    each(half, [=](int64_t d) {
      Sum<T> a = load(first, d), b = load(second, d), c = cosine[d], s = sign * sine[d];
      store(first, d, a * c - b * s);
      store(second, d, b * c + a * s);
    });
  }
}
}  // namespace

void CpuOps::add_rms_norm_fwd(const Tensor& y, const Tensor& sum, const Tensor& rstd, const Tensor& a, const Tensor& b, const Tensor& w,
                              double eps) {
  const int64_t cols = y.cols;
  check_rows(a, y.rows, cols);
  check_rows(w, 1, cols);
  if (b) check_rows(b, y.rows, cols);
  if (sum) check_rows(sum, y.rows, cols);
  if (rstd) check_rows(rstd, y.rows, 1);
  KAVA_CHECK(sum || !b, "a sum without a place for it");
  dispatch(y.dtype, [&]<class T>() {
    using S = Sum<T>;
    const T* gain = w.as<T>();
    S* scales = rstd ? rstd.as<S>() : nullptr;
    for (const Tensor& t : {a, b, sum}) KAVA_CHECK(!t || t.dtype == y.dtype, "{} and {}", name_of(t.dtype), name_of(y.dtype));
    threads_.blocks(y.rows, kRowBlock, [=, this](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const T* x = a.row<T>(n);
        if (sum && (b || sum.data != a.data)) {
          T* total = sum.row<T>(n);
          if (b) each(cols, [=, other = b.row<T>(n)](int64_t c) { store(total, c, load(x, c) + load(other, c)); });
          else each(cols, [=](int64_t c) { total[c] = x[c]; });
          x = total;
        }
        S square = sum_over<S>(cols, [=](int64_t c) { return load(x, c) * load(x, c); });
        S scale = S(1) / std::sqrt(square / static_cast<S>(cols) + static_cast<S>(eps));
        if (scales) scales[n * rstd.stride] = scale;
        each(cols, [=, out = y.row<T>(n)](int64_t c) { store(out, c, load(x, c) * scale * load(gain, c)); });
      }
    });
  });
}

void CpuOps::rms_norm_bwd(const Tensor& dx, const Tensor& dw, const Tensor& dy, const Tensor& x, const Tensor& rstd, const Tensor& w) {
  const int64_t cols = x.cols;
  check_rows(dx, x.rows, cols);
  check_rows(dy, x.rows, cols);
  check_rows(rstd, x.rows, 1);
  check_rows(w, 1, cols);
  if (dw) check_rows(dw, 1, cols);
  KAVA_CHECK(dx.dtype == x.dtype, "dx in {}, x in {}", name_of(dx.dtype), name_of(x.dtype));
  dispatch_gradient(x, dy, [&]<class T, class G>() {
    using S = Sum<T>;
    const T* gain = w.as<T>();
    const S* scales = rstd.as<S>();
    BlockSums<S> gains(dw ? x.rows : 0, kRowBlock, cols);
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

void CpuOps::rope(const Tensor& x, const Tensor& positions, const Tensor& cosine, const Tensor& sine, int64_t head_dim, bool inverse) {
  const int64_t half = head_dim / 2;
  KAVA_CHECK(half > 0 && head_dim == 2 * half && x.cols % head_dim == 0, "{} columns in heads of {}", x.cols, head_dim);
  check_rows(positions, 1, x.rows);
  check_rows(sine, cosine.rows, half);
  KAVA_CHECK(cosine.cols == half, "{} angles for heads of {}", cosine.cols, head_dim);
  const int32_t* at = positions.as<int32_t>();
  dispatch(x.dtype, [&]<class T>() {
    using S = Sum<T>;
    cosine.as<S>(), sine.as<S>();
    threads_.blocks(x.rows, kRowBlock, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        KAVA_CHECK(at[n] >= 0 && at[n] < cosine.rows, "position {} of {}", at[n], cosine.rows);
        rope_row(x.row<T>(n), cosine.row<S>(at[n]), sine.row<S>(at[n]), x.cols, half, inverse ? S(-1) : S(1));
      }
    });
  });
}

void CpuOps::swiglu_fwd(const Tensor& y, const Tensor& gate, const Tensor& up) {
  check_rows(gate, y.rows, y.cols);
  check_rows(up, y.rows, y.cols);
  KAVA_CHECK(gate.dtype == y.dtype && up.dtype == y.dtype, "swiglu of {} and {}", name_of(gate.dtype), name_of(up.dtype));
  dispatch(y.dtype, [&]<class T>() {
    threads_.blocks(y.rows, kRowBlock, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        each(y.cols, [out = y.row<T>(n), g = gate.row<T>(n), u = up.row<T>(n)](int64_t c) {
          store(out, c, load(g, c) * sigmoid(load(g, c)) * load(u, c));
        });
    });
  });
}

void CpuOps::swiglu_bwd(const Tensor& dgate, const Tensor& dup, const Tensor& dy, const Tensor& gate, const Tensor& up) {
  for (const Tensor& t : {dgate, dup, gate, up}) {
    check_rows(t, dy.rows, dy.cols);
    KAVA_CHECK(t.dtype == dy.dtype, "swiglu of {} and {}", name_of(t.dtype), name_of(dy.dtype));
  }
  dispatch(dy.dtype, [&]<class T>() {
    threads_.blocks(dy.rows, kRowBlock, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        each(dy.cols, [dg = dgate.row<T>(n), du = dup.row<T>(n), d = dy.row<T>(n), g = gate.row<T>(n), u = up.row<T>(n)](int64_t c) {
          using S = Sum<T>;
          S x = load(g, c), dout = load(d, c), s = sigmoid(x), dsilu = dout * load(u, c);
          store(dg, c, dsilu * s * (S(1) + x * (S(1) - s)));
          store(du, c, dout * x * s);
        });
    });
  });
}

void CpuOps::gelu_fwd(const Tensor& y, const Tensor& x) {
  check_rows(x, y.rows, y.cols);
  KAVA_CHECK(x.dtype == y.dtype, "gelu of {} in {}", name_of(x.dtype), name_of(y.dtype));
  dispatch(y.dtype, [&]<class T>() {
    threads_.blocks(y.rows, kRowBlock, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        each(y.cols, [out = y.row<T>(n), in = x.row<T>(n)](int64_t c) { store(out, c, load(in, c) * normal_cdf(load(in, c))); });
    });
  });
}

void CpuOps::gelu_bwd(const Tensor& dx, const Tensor& dy, const Tensor& x) {
  check_rows(dx, x.rows, x.cols);
  check_rows(dy, x.rows, x.cols);
  KAVA_CHECK(dx.dtype == x.dtype, "dx in {}, x in {}", name_of(dx.dtype), name_of(x.dtype));
  dispatch_gradient(x, dy, [&]<class T, class G>() {
    threads_.blocks(x.rows, kRowBlock, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        each(x.cols, [out = dx.row<T>(n), dout = dy.row<G>(n), in = x.row<T>(n)](int64_t c) {
          Sum<T> value = load(in, c);
          store(out, c, load(dout, c) * (normal_cdf(value) + value * normal_density(value)));
        });
    });
  });
}

void CpuOps::layer_norm_fwd(const Tensor& y, const Tensor& mean, const Tensor& rstd, const Tensor& x, const Tensor& w, const Tensor& b,
                            double eps) {
  const int64_t cols = x.cols;
  check_rows(y, x.rows, cols);
  for (const Tensor& t : {mean, rstd}) check_rows(t, x.rows, 1);
  for (const Tensor& t : {w, b}) check_rows(t, 1, cols);
  KAVA_CHECK(x.dtype == y.dtype, "layer norm of {} in {}", name_of(x.dtype), name_of(y.dtype));
  dispatch(x.dtype, [&]<class T>() {
    using S = Sum<T>;
    const T *gain = w.as<T>(), *bias = b.as<T>();
    S *means = mean.as<S>(), *scales = rstd.as<S>();
    threads_.blocks(x.rows, kRowBlock, [&, gain, bias](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const T* in = x.row<T>(n);
        const S center = sum_over<S>(cols, [=](int64_t c) { return load(in, c); }) / static_cast<S>(cols);
        S square = sum_over<S>(cols, [=](int64_t c) { return (load(in, c) - center) * (load(in, c) - center); });
        const S scale = S(1) / std::sqrt(square / static_cast<S>(cols) + static_cast<S>(eps));
        means[n * mean.stride] = center;
        scales[n * rstd.stride] = scale;
        each(cols, [=, out = y.row<T>(n)](int64_t c) { store(out, c, (load(in, c) - center) * scale * load(gain, c) + load(bias, c)); });
      }
    });
  });
}

void CpuOps::layer_norm_bwd(const Tensor& dx, const Tensor& dw, const Tensor& db, const Tensor& dy, const Tensor& x, const Tensor& mean,
                            const Tensor& rstd, const Tensor& w) {
  const int64_t cols = x.cols;
  check_rows(dx, x.rows, cols);
  check_rows(dy, x.rows, cols);
  for (const Tensor& t : {mean, rstd}) check_rows(t, x.rows, 1);
  check_rows(w, 1, cols);
  for (const Tensor& t : {dw, db})
    if (t) check_rows(t, 1, cols);
  KAVA_CHECK(dx.dtype == x.dtype, "dx in {}, x in {}", name_of(dx.dtype), name_of(x.dtype));
  dispatch_gradient(x, dy, [&]<class T, class G>() {
    using S = Sum<T>;
    const T* gain = w.as<T>();
    const S *means = mean.as<S>(), *scales = rstd.as<S>();
    BlockSums<S> gains(dw ? x.rows : 0, kRowBlock, cols), biases(db ? x.rows : 0, kRowBlock, cols);
    threads_.blocks(x.rows, kRowBlock, [&, gain](int64_t begin, int64_t end) {
      S *dgain = dw ? gains.of(begin) : nullptr, *dbias = db ? biases.of(begin) : nullptr;
      for (int64_t n = begin; n < end; ++n) {
        const T* in = x.row<T>(n);
        const G* dout = dy.row<G>(n);
        const S center = means[n * mean.stride], scale = scales[n * rstd.stride];
        // With g = dy w and z = (x - mean) rstd: dx = rstd (g - mean(g) - z mean(g z)).
        S g_sum = sum_over<S>(cols, [=](int64_t c) { return load(dout, c) * load(gain, c); });
        S gz_sum = sum_over<S>(cols, [=](int64_t c) { return load(dout, c) * load(gain, c) * ((load(in, c) - center) * scale); });
        const S g_mean = g_sum / static_cast<S>(cols), gz_mean = gz_sum / static_cast<S>(cols);
        if (dgain) each(cols, [=](int64_t c) { dgain[c] += load(dout, c) * ((load(in, c) - center) * scale); });
        if (dbias) each(cols, [=](int64_t c) { dbias[c] += load(dout, c); });
        each(cols, [=, out = dx.row<T>(n)](int64_t c) {
          store(out, c, scale * (load(dout, c) * load(gain, c) - g_mean - (load(in, c) - center) * scale * gz_mean));
        });
      }
    });
    if (dw) gains.add_to(dw.as<S>());
    if (db) biases.add_to(db.as<S>());
  });
}

}  // namespace kava
