// cpu backend: activations. A block of kRowBlock rows is a task.
#include <cmath>

#include "engine/device/cpu/ops_cpu.h"
#include "engine/device/cpu/row_loops.h"

namespace kava {

namespace {
template <class S>
S sigmoid(S x) {
  return S(1) / (S(1) + fast_exp(-x));
}

// (1 + tanh u)/2 = sigmoid(2 u) with u = sqrt(2/pi) (x + 0.044715 x^3), and du/dx.
template <class S>
S tanh_cdf(S x) {
  return sigmoid(S(2) * S(0.79788456080286535588) * (x + S(0.044715) * x * x * x));
}
template <class S>
S tanh_slope(S x) {
  return S(0.79788456080286535588) * (S(1) + S(3) * S(0.044715) * x * x);
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
}  // namespace

void CpuOps::do_swiglu_fwd(const Tensor& y, const Tensor& gate, const Tensor& up) {
  dispatch(y.dtype, [&]<class T>() {
    threads_.blocks(y.rows, kRowBlock, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        each(y.cols, [out = y.row<T>(n), g = gate.row<T>(n), u = up.row<T>(n)](int64_t c) {
          store(out, c, load(g, c) * sigmoid(load(g, c)) * load(u, c));
        });
    });
  });
}

void CpuOps::do_swiglu_bwd(const Tensor& dgate, const Tensor& dup, const Tensor& dy, const Tensor& gate, const Tensor& up) {
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

void CpuOps::do_gelu_fwd(const Tensor& y, const Tensor& x, Gelu form) {
  dispatch(y.dtype, [&]<class T>() {
    using S = Sum<T>;
    auto rows = [&](auto cdf) {
      threads_.blocks(y.rows, kRowBlock, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n)
          each(y.cols, [cdf, out = y.row<T>(n), in = x.row<T>(n)](int64_t c) { store(out, c, load(in, c) * cdf(load(in, c))); });
      });
    };
    if (form == Gelu::erf) rows([](S v) { return normal_cdf(v); });
    else rows([](S v) { return tanh_cdf(v); });
  });
}

void CpuOps::do_gelu_bwd(const Tensor& dx, const Tensor& dy, const Tensor& x, Gelu form) {
  dispatch_gradient(x, dy, [&]<class T, class G>() {
    using S = Sum<T>;
    auto rows = [&](auto slope) {
      threads_.blocks(x.rows, kRowBlock, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n)
          each(x.cols, [slope, out = dx.row<T>(n), dout = dy.row<G>(n), in = x.row<T>(n)](int64_t c) {
            store(out, c, load(dout, c) * slope(load(in, c)));
          });
      });
    };
    if (form == Gelu::erf) rows([](S v) { return normal_cdf(v) + v * normal_density(v); });
    // With t the tanh: d/dv v (1 + t)/2 = (1 + t)/2 + v (1 - t^2)/2 u', and (1 - t^2)/2 = 2 p (1 - p) of p = (1 + t)/2.
    else
      rows([](S v) {
        const S p = tanh_cdf(v);
        return p + v * S(2) * p * (S(1) - p) * tanh_slope(v);
      });
  });
}

}  // namespace kava
