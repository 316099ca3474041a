// cpu backend: moments of rows, and the distances to their targets. Moments are kept in f64 for every storage type; a group of rows is a
// task, so that nothing depends on what else is in the batch.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

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

/// Rows of a group in a tensor of groups of equal size; checks valid.
int64_t rows_per_group(const Tensor& x, const Tensor& valid) {
  KAVA_CHECK(valid.rows == 1 && (valid.cols > 0 ? x.rows % valid.cols == 0 : x.rows == 0), "{} rows in {} groups", x.rows, valid.cols);
  const int64_t per_group = valid.cols > 0 ? x.rows / valid.cols : 0;
  const int32_t* count = valid.as<int32_t>();
  for (int64_t g = 0; g < valid.cols; ++g)
    KAVA_CHECK(count[g] >= 0 && count[g] <= per_group, "{} valid rows in a group of {}", count[g], per_group);
  return per_group;
}
}  // namespace

void CpuOps::moments(const Tensor& moments, const Tensor& x, const Tensor& valid) {
  KAVA_CHECK(moments.count() == 3 && moments.rows == 1, "moments of [{}, {}]", moments.rows, moments.cols);
  const int64_t per_group = rows_per_group(x, valid);
  dispatch(x.dtype, [&]<class T>() {
    std::vector<Moments> part(static_cast<std::size_t>(valid.cols));
    threads_.run(valid.cols, [&](int64_t g) {
      part[static_cast<std::size_t>(g)] = moments_of<T>(x.row_range(g * per_group, g * per_group + valid.as<int32_t>()[g]));
    });
    Moments all;
    for (const Moments& m : part) all.merge(m);
    auto* out = moments.as<Sum<T>>();
    store(out, 0, all.count);
    store(out, 1, all.mean);
    store(out, 2, all.squares);
  });
}

void CpuOps::inverse_std(const Tensor& inverse, const Tensor& moments) {
  KAVA_CHECK(moments.cols == 3 && inverse.count() == 1, "moments of [{}, {}]", moments.rows, moments.cols);
  dispatch(moments.dtype, [&]<class S>() {
    Moments all;
    for (int64_t r = 0; r < moments.rows; ++r) {
      const S* m = moments.row<S>(r);
      all.merge({double(load(m, 0)), double(load(m, 1)), double(load(m, 2))});
    }
    const bool undefined = all.count < 2 || all.squares == 0;
    store(inverse.as<S>(), 0, undefined ? 0.0 : 1 / std::sqrt(all.squares / (all.count - 1)));
  });
}

void CpuOps::distill(const Tensor& loss, const Tensor& dx, const Tensor& x, const Tensor& target, const Tensor& valid,
                     const Tensor& inverse, Distance kind, double factor, double weight) {
  const int64_t per_group = rows_per_group(x, valid);
  KAVA_CHECK(target.rows == x.rows && target.cols == x.cols && target.dtype == x.dtype, "target of [{}, {}]", target.rows, target.cols);
  KAVA_CHECK(loss.count() == 1 && (!dx || (dx.rows == x.rows && dx.cols == x.cols)), "gradient of [{}, {}]", dx.rows, dx.cols);
  dispatch(x.dtype, [&]<class T>() {
    using S = Sum<T>;
    KAVA_CHECK(!dx || dx.dtype == DTypeOf<S>::value, "a gradient in {}", name_of(dx.dtype));
    const double s = factor * (inverse ? static_cast<double>(*inverse.as<S>()) : 1.0);
    const S slope = static_cast<S>(weight * s);
    std::vector<double> part(static_cast<std::size_t>(valid.cols));
    threads_.run(valid.cols, [&](int64_t g) {
      const int64_t begin = g * per_group, end = begin + per_group, count = valid.as<int32_t>()[g];
      const Tensor d = dx ? dx.row_range(begin, end) : Tensor{}, a = x.row_range(begin, end), b = target.row_range(begin, end);
      double& sum = part[static_cast<std::size_t>(g)];
      switch (kind) {
        case Distance::smooth_l1:
          sum = distill_group<T, Distance::smooth_l1>(d, a, b, count, slope);
          break;
        case Distance::mse:
          sum = distill_group<T, Distance::mse>(d, a, b, count, slope);
          break;
        case Distance::l1:
          sum = distill_group<T, Distance::l1>(d, a, b, count, slope);
          break;
      }
    });
    *loss.as<S>() += static_cast<S>(s * std::accumulate(part.begin(), part.end(), 0.0));
  });
}

}  // namespace kava
