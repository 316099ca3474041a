// cpu backend: moments of rows, and the distances to their targets. Moments are kept in f64 for every storage type; a group of rows is a
// task, so that nothing depends on what else is in the batch.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/device/cpu/ops_cpu.h"
#include "engine/device/cpu/row_loops.h"

namespace kava {

namespace {
/// Count, mean and sum of squared deviations of a set of numbers.
struct Moments {
  double count = 0, mean = 0, squares = 0;
  void merge(const Moments& o) {
    if (o.count == 0) return;
    const double total = count + o.count, delta = o.mean - mean;
    squares += o.squares + delta * delta * (count * o.count / total);
    mean += delta * (o.count / total);
    count = total;
  }
};

/// Two passes over the differences from the first element: equal numbers give exactly zero squares.
template <class T>
Moments moments_of(const Tensor& x) {
  Moments m;
  m.count = static_cast<double>(x.count());
  if (x.count() == 0) return m;
  const double first = load(x.row<T>(0), 0);
  double shift = 0;
  for (int64_t r = 0; r < x.rows; ++r)
    shift += sum_over<double>(x.cols, [first, in = x.row<T>(r)](int64_t c) { return double(load(in, c)) - first; });
  shift /= m.count;
  for (int64_t r = 0; r < x.rows; ++r)
    m.squares += sum_over<double>(x.cols, [first, shift, in = x.row<T>(r)](int64_t c) {
      double d = (double(load(in, c)) - first) - shift;
      return d * d;
    });
  m.mean = first + shift;
  return m;
}

/// Of all numbers that the rows of moments describe.
template <class S>
Moments merged(const Tensor& moments) {
  Moments all;
  for (int64_t r = 0; r < moments.rows; ++r) {
    const S* m = moments.row<S>(r);
    all.merge({double(load(m, 0)), double(load(m, 1)), double(load(m, 2))});
  }
  return all;
}

template <class S>
S distance(Distance kind, S d) {
  const S size = d < 0 ? -d : d;
  switch (kind) {
    case Distance::mse:
      return d * d;
    case Distance::l1:
      return size;
    case Distance::smooth_l1:
      break;
  }
  return size < S(1) ? S(0.5) * d * d : size - S(0.5);
}

template <class S>
S distance_slope(Distance kind, S d) {
  const S sign = d > 0 ? S(1) : d < 0 ? S(-1) : d;
  switch (kind) {
    case Distance::mse:
      return 2 * d;
    case Distance::l1:
      return sign;
    case Distance::smooth_l1:
      break;
  }
  return d < S(1) && d > S(-1) ? d : sign;
}

/// Rows of one group: returns the sum of distances of the first `valid` rows; dx, if there, gets slope * distance', zero in the other rows.
template <class T, Distance kind>
double distill_group(const Tensor& dx, const Tensor& x, const Tensor& target, int64_t valid, Sum<T> slope) {
  using S = Sum<T>;
  double total = 0;
  for (int64_t r = 0; r < valid; ++r) {
    const T *a = x.row<T>(r), *b = target.row<T>(r);
    total += sum_over<S>(x.cols, [=](int64_t c) { return distance(kind, load(a, c) - load(b, c)); });
    if (dx) each(x.cols, [=, out = dx.row<S>(r)](int64_t c) { out[c] = slope * distance_slope(kind, load(a, c) - load(b, c)); });
  }
  if (dx)
    for (int64_t r = valid; r < x.rows; ++r) std::fill_n(dx.row<S>(r), x.cols, S(0));
  return total;
}
}  // namespace

void CpuOps::do_moments(Arena& arena, const Tensor& moments, std::span<const Tensor> xs, const Tensor& valid) {
  ArenaScope scope(arena);
  const int64_t groups = valid.cols, per_group = groups > 0 ? xs[0].rows / groups : 0, count = std::ssize(xs);
  const Tensor parts = arena.alloc(DType::f64, count * groups, 3);
  if (dry()) return;
  dispatch(xs[0].dtype, [&]<class T>() {
    threads_.run(count * groups, [&](int64_t task) {
      const int64_t g = task % groups;
      const Tensor& x = xs[static_cast<std::size_t>(task / groups)];
      const Moments m = moments_of<T>(x.row_range(g * per_group, g * per_group + valid.as<int32_t>()[g]));
      double* part = parts.row<double>(task);
      part[0] = m.count, part[1] = m.mean, part[2] = m.squares;
    });
    for (int64_t i = 0; i < count; ++i) {
      const Moments all = merged<double>(parts.row_range(i * groups, (i + 1) * groups));
      auto* out = moments.row<Sum<T>>(i);
      store(out, 0, all.count);
      store(out, 1, all.mean);
      store(out, 2, all.squares);
    }
  });
}

void CpuOps::do_inverse_std(const Tensor& inverse, const Tensor& moments, int power) {
  const int64_t each = moments.rows / inverse.cols;
  dispatch(moments.dtype, [&]<class S>() {
    for (int64_t i = 0; i < inverse.cols; ++i) {
      const Moments all = merged<S>(moments.row_range(i * each, (i + 1) * each));
      const bool undefined = all.count < 2 || all.squares == 0;
      const double variance = undefined ? 0.0 : all.squares / (all.count - 1);
      store(inverse.as<S>(), i, undefined ? 0.0 : 1 / (power == 2 ? variance : std::sqrt(variance)));
    }
  });
}

void CpuOps::do_distill(Arena& arena, const Tensor& loss, const Tensor& dx, const Tensor& x, const Tensor& target, const Tensor& valid,
                        const Tensor& inverse, Distance kind, double factor, double weight) {
  ArenaScope scope(arena);
  const int64_t groups = valid.cols, per_group = groups > 0 ? x.rows / groups : 0;
  const Tensor parts = arena.alloc(DType::f64, 1, groups);
  if (dry()) return;
  double* part = parts.as<double>();
  dispatch(x.dtype, [&]<class T>() {
    using S = Sum<T>;
    const double s = factor * (inverse ? static_cast<double>(*inverse.as<S>()) : 1.0);
    const S slope = static_cast<S>(weight * s);
    threads_.run(groups, [&](int64_t g) {
      const int64_t begin = g * per_group, end = begin + per_group, count = valid.as<int32_t>()[g];
      const Tensor d = dx ? dx.row_range(begin, end) : Tensor{}, a = x.row_range(begin, end), b = target.row_range(begin, end);
      switch (kind) {
        case Distance::smooth_l1:
          part[g] = distill_group<T, Distance::smooth_l1>(d, a, b, count, slope);
          break;
        case Distance::mse:
          part[g] = distill_group<T, Distance::mse>(d, a, b, count, slope);
          break;
        case Distance::l1:
          part[g] = distill_group<T, Distance::l1>(d, a, b, count, slope);
          break;
      }
    });
    *loss.as<double>() += s * std::accumulate(part, part + groups, 0.0);
  });
}

}  // namespace kava
