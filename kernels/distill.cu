// Distillation on rows in groups of which a leading part is valid: moments of the targets, the inverse of their standard deviation, and the
// loss with its gradient.
//   loss += s sum distance(x - target),  dx = weight s distance'(x - target),  s = factor * inverse
// A block owns a group. Sums are f32 within a chunk and f64 beyond; the groups' parts are added by one block in a fixed order.
#include <algorithm>

#include "kernels/chunks.h"

namespace kava {

namespace {

constexpr int kGroupThreads = 256;
constexpr std::size_t kGroupScratch = kGroupThreads / kWarpSize * sizeof(double);

/// Count, mean and sum of squared deviations of some numbers.
struct MomentSum {
  double count = 0, mean = 0, squares = 0;
};

/// Of all numbers that `parts` sets hold; part(i) is set i's, all zero where that is empty. Equal numbers have squares of exactly zero: in
/// f64 a sum of fewer than 2^29 equal numbers of f32 is exact. Of a block; scratch: a word for each warp.
template <class Part>
__device__ MomentSum pooled(int parts, double* scratch, const Part& part) {
  auto sum = [&](const auto& f) {
    double total = 0;
    for (int i = static_cast<int>(threadIdx.x); i < parts; i += kGroupThreads) total += f(part(i));
    return block_sum<double, kGroupThreads>(total, scratch);
  };
  MomentSum all;
  all.count = sum([](const MomentSum& m) { return m.count; });
  if (all.count == 0) return all;
  all.mean = sum([](const MomentSum& m) { return m.count * m.mean; }) / all.count;
  all.squares = sum([&](const MomentSum& m) { return m.squares + m.count * ((m.mean - all.mean) * (m.mean - all.mean)); });
  return all;
}

/// Two passes over the differences from the first element: equal numbers give exactly zero squares.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kGroupThreads)
    group_moments_kernel(double* parts, const __grid_constant__ MomentsBatch<T> batch, const int32_t* valid, int per_group, int cols) {
  const int64_t g = blockIdx.x, begin = g * per_group;
  const Rows<const T> x = batch.x[blockIdx.y];
  const int rows = valid[g], per_row = div_up(cols, kChunk);
  const double count = static_cast<double>(rows) * static_cast<double>(cols);
  const float first = rows > 0 ? to_float(x[begin][0]) : 0.f;
  auto sum = [&](const auto& f) {
    double total = 0;
    for (int i = static_cast<int>(threadIdx.x); i < rows * per_row; i += kGroupThreads) {
      const int c = i % per_row * kChunk;
      const Columns v = load_columns<T, kAligned>(x[begin + i / per_row], c, cols);
      float part = 0;
#pragma unroll
      for (int e = 0; e < kChunk; ++e)
        if (kAligned || c + e < cols) part += f(v.at[e] - first);
      total += static_cast<double>(part);
    }
    return block_sum<double, kGroupThreads>(total, dynamic_smem<double>());
  };
  const double shift = rows > 0 ? sum([](float d) { return d; }) / count : 0.0;
  const float centre = static_cast<float>(shift);
  const double squares = sum([&](float d) { return (d - centre) * (d - centre); });
  double* part = parts + 3 * (static_cast<int64_t>(blockIdx.y) * gridDim.x + g);
  if (threadIdx.x == 0) part[0] = count, part[1] = static_cast<double>(first) + shift, part[2] = squares;
}

/// A block for a matrix.
__global__ void __launch_bounds__(kGroupThreads) merge_moments_kernel(Rows<float> moments, const double* parts, int groups) {
  const double* own = parts + 3 * static_cast<int64_t>(blockIdx.x) * groups;
  const MomentSum all = pooled(groups, dynamic_smem<double>(), [&](int g) {
    return MomentSum{own[3 * g], own[3 * g + 1], own[3 * g + 2]};
  });
  float* out = moments[blockIdx.x];
  out[0] = static_cast<float>(all.count), out[1] = static_cast<float>(all.mean), out[2] = static_cast<float>(all.squares);
}

/// A block for a number.
__global__ void __launch_bounds__(kGroupThreads) inverse_std_kernel(float* inverse, Rows<const float> moments, int each, int power) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * each;
  const MomentSum all = pooled(each, dynamic_smem<double>(), [&](int i) {
    const float* m = moments[begin + i];
    return MomentSum{m[0], m[1], m[2]};
  });
  const bool undefined = all.squares == 0;  // as it is of fewer than two numbers
  const double variance = all.squares / (all.count - 1);
  inverse[blockIdx.x] = undefined ? 0.f : static_cast<float>(1 / (power == 2 ? variance : sqrt(variance)));
}

template <GroupDistance kind>
__device__ __forceinline__ float distance(float d) {
  const float size = fabsf(d);
  if constexpr (kind == GroupDistance::mse) return d * d;
  else if constexpr (kind == GroupDistance::l1) return size;
  else return size < 1 ? 0.5f * d * d : size - 0.5f;
}
template <GroupDistance kind>
__device__ __forceinline__ float distance_slope(float d) {
  const float sign = d > 0 ? 1.f : d < 0 ? -1.f : d;  // a NaN stays one
  if constexpr (kind == GroupDistance::mse) return 2 * d;
  else if constexpr (kind == GroupDistance::l1) return sign;
  else return d < 1 && d > -1 ? d : sign;
}

template <class T>
struct Distill {
  Rows<float> dx;
  Rows<const T> x, target;
  const int32_t* valid;
  const float* inverse;
  double factor, weight;
  int per_group, cols;
  __device__ double scale() const { return factor * (inverse ? static_cast<double>(*inverse) : 1.0); }
};

template <class T, GroupDistance kind, bool kAligned>
__global__ void __launch_bounds__(kGroupThreads) distill_kernel(double* parts, const __grid_constant__ Distill<T> p) {
  const int64_t g = blockIdx.x, begin = g * p.per_group;
  const float slope = static_cast<float>(p.weight * p.scale());
  const int per_row = div_up(p.cols, kHalfChunk);
  const int64_t chunks = static_cast<int64_t>(p.per_group) * per_row, valid = static_cast<int64_t>(p.valid[g]) * per_row;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += kGroupThreads) {
    const int64_t r = begin + i / per_row;
    const int first = static_cast<int>(i % per_row) * kHalfChunk;
    ColumnsOf<kHalfChunk> d = {};
    if (i < valid) {
      d = load_columns<T, kAligned, kHalfChunk>(p.x[r], first, p.cols);
      const auto target = load_columns<T, kAligned, kHalfChunk>(p.target[r], first, p.cols);
      float part = 0;
#pragma unroll
      for (int c = 0; c < kHalfChunk; ++c) {
        const float difference = d.at[c] - target.at[c];
        part += distance<kind>(difference);
        d.at[c] = slope * distance_slope<kind>(difference);
      }
      sum += static_cast<double>(part);
    }
    if (p.dx.data) store_columns<float, kAligned>(p.dx[r], first, p.cols, d);
  }
  sum = block_sum<double, kGroupThreads>(sum, dynamic_smem<double>());
  if (threadIdx.x == 0) parts[g] = sum;
}

/// loss += s sum of the groups' parts.
template <class T>
__global__ void __launch_bounds__(kGroupThreads)
    distill_loss_kernel(double* loss, const double* parts, const __grid_constant__ Distill<T> p, int groups) {
  double sum = 0;
  for (int g = static_cast<int>(threadIdx.x); g < groups; g += kGroupThreads) sum += parts[g];
  sum = block_sum<double, kGroupThreads>(sum, dynamic_smem<double>());
  if (threadIdx.x == 0) *loss += p.scale() * sum;
}

}  // namespace

template <class T>
void moments(Stream stream, Rows<float> out, double* parts, const MomentsBatch<T>& batch, const int32_t* valid, int groups, int per_group,
             int cols) {
  const unsigned count = static_cast<unsigned>(batch.count);
  const bool aligned = std::all_of(batch.x, batch.x + batch.count, [&](Rows<const T> x) { return chunked(x, cols); });
  dispatch_aligned(aligned, [&]<bool kAligned>() {
    if (groups > 0)
      launch(stream, group_moments_kernel<T, kAligned>, dim3(static_cast<unsigned>(groups), count), kGroupThreads, kGroupScratch, parts,
             batch, valid, per_group, cols);
  });
  launch(stream, merge_moments_kernel, count, kGroupThreads, kGroupScratch, out, parts, groups);
}
template void moments(Stream, Rows<float>, double*, const MomentsBatch<float>&, const int32_t*, int, int, int);
template void moments(Stream, Rows<float>, double*, const MomentsBatch<bf16>&, const int32_t*, int, int, int);

void inverse_std(Stream stream, float* inverse, Rows<const float> moments, int count, int each, int power) {
  launch(stream, inverse_std_kernel, static_cast<unsigned>(count), kGroupThreads, kGroupScratch, inverse, moments, each, power);
}

template <class T>
void distill(Stream stream, double* loss, Rows<float> dx, double* parts, Rows<const T> x, Rows<const T> target, const int32_t* valid,
             const float* inverse, GroupDistance kind, double factor, double weight, int groups, int per_group, int cols) {
  if (groups == 0) return;
  const Distill<T> p{dx, x, target, valid, inverse, factor, weight, per_group, cols};
  dispatch_aligned(chunked(dx, cols) && chunked(x, cols) && chunked(target, cols), [&]<bool kAligned>() {
    auto run = [&]<GroupDistance k>() {
      launch(stream, distill_kernel<T, k, kAligned>, static_cast<unsigned>(groups), kGroupThreads, kGroupScratch, parts, p);
    };
    if (kind == GroupDistance::mse) run.template operator()<GroupDistance::mse>();
    else if (kind == GroupDistance::l1) run.template operator()<GroupDistance::l1>();
    else run.template operator()<GroupDistance::smooth_l1>();
  });
  launch(stream, distill_loss_kernel<T>, 1, kGroupThreads, kGroupScratch, loss, parts, p, groups);
}
template void distill(Stream, double*, Rows<float>, double*, Rows<const float>, Rows<const float>, const int32_t*, const float*,
                      GroupDistance, double, double, int, int, int);
template void distill(Stream, double*, Rows<float>, double*, Rows<const bf16>, Rows<const bf16>, const int32_t*, const float*,
                      GroupDistance, double, double, int, int, int);

}  // namespace kava
