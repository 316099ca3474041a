// cpu backend: the optimiser, over the flat parameter buffer.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/device/cpu/ops_cpu.h"
#include "engine/device/cpu/row_loops.h"

namespace kava {

namespace {
/// The step's constants, in the type of the parameters.
template <class S>
struct AdamwStep {
  S decay, scale, beta1, rest1, beta2, rest2, rate, root_correction, eps;  // rest: 1 - beta, rounded once
};

template <class S>
AdamwStep<S> adamw_step(const AdamwOptions& o, double grad_square, int32_t updates) {
  const double correction1 = 1 - std::pow(o.beta1, updates), correction2 = 1 - std::pow(o.beta2, updates);
  const double scale = o.clip > 0 ? std::min(1.0, o.clip / (std::sqrt(grad_square) + 1e-6)) : 1.0;
  return {.decay = S(1 - o.lr * o.weight_decay),
          .scale = S(scale),
          .beta1 = S(o.beta1),
          .rest1 = S(1 - o.beta1),
          .beta2 = S(o.beta2),
          .rest2 = S(1 - o.beta2),
          .rate = S(o.lr / correction1),
          .root_correction = S(1 / std::sqrt(correction2)),
          .eps = S(o.eps)};
}

template <class S>
void update(const AdamwStep<S>& step, S* value, S* m, S* v, const S* grad, int64_t n) {
  each(n, [=](int64_t i) {
    const S g = grad[i] * step.scale;
    const S first = step.beta1 * m[i] + step.rest1 * g;
    const S second = step.beta2 * v[i] + step.rest2 * g * g;
    m[i] = first;
    v[i] = second;
    value[i] = value[i] * step.decay - step.rate * first / (std::sqrt(second) * step.root_correction + step.eps);
  });
}
}  // namespace

void CpuOps::do_sum_squares(Arena& arena, const Tensor& out, const Tensor& x) {
  ArenaScope scope(arena);
  const Tensor parts = arena.alloc(DType::f64, 1, (x.count() + kPiece - 1) / kPiece);
  if (dry()) return;
  double* part = parts.as<double>();
  dispatch(x.dtype, [&]<class T>() {
    const T* in = x.as<T>();
    threads_.blocks(x.count(), kPiece, [&](int64_t begin, int64_t end) {
      part[begin / kPiece] = sum_over<double>(end - begin, [at = in + begin](int64_t i) {
        const double v = load(at, i);
        return v * v;
      });
    });
  });
  *out.as<double>() = std::accumulate(part, part + parts.cols, 0.0);
}

void CpuOps::do_count_update(const Tensor& updates, const Tensor& grad_square, const Tensor& losses) {
  double& square = *grad_square.as<double>();
  // 0 of a finite number, NaN of any other.
  for (int64_t i = 0; i < losses.cols; ++i) square += 0 * losses.as<double>()[i];
  if (std::isfinite(square)) ++*updates.as<int32_t>();
}

void CpuOps::do_adamw(const Tensor& value, const Tensor& m, const Tensor& v, const Tensor& half, const Tensor& grad,
                      const Tensor& grad_square, const Tensor& updates, const AdamwOptions& options) {
  const double square = *grad_square.as<double>();
  if (!std::isfinite(square)) return;
  dispatch(value.dtype, [&]<class S>() {
    if constexpr (!std::is_same_v<S, bf16>) {
      const AdamwStep<S> step = adamw_step<S>(options, square, *updates.as<int32_t>());
      S *values = value.as<S>(), *first = m.as<S>(), *second = v.as<S>();
      const S* grads = grad.as<S>();
      threads_.blocks(value.count(), kPiece, [&](int64_t begin, int64_t end) {
        update(step, values + begin, first + begin, second + begin, grads + begin, end - begin);
        if (half)
          dispatch(half.dtype, [&]<class T>() {
            each(end - begin, [to = half.as<T>() + begin, from = values + begin](int64_t i) { store(to, i, from[i]); });
          });
      });
    }
  });
}

}  // namespace kava
