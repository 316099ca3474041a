#include <algorithm>

#include "engine/device/cuda/ops_cuda.h"

namespace kava {

namespace {
GroupDistance kernel_distance(Distance d) {
  return d == Distance::mse ? GroupDistance::mse : d == Distance::l1 ? GroupDistance::l1 : GroupDistance::smooth_l1;
}
int rows_per_group(const Tensor& x, const Tensor& valid) { return valid.cols > 0 ? static_cast<int>(x.rows / valid.cols) : 0; }
}  // namespace

void CudaOps::do_moments(Arena& arena, const Tensor& out, std::span<const Tensor> xs, const Tensor& valid) {
  ArenaScope scope(arena);
  const std::size_t most = std::min<std::size_t>(xs.size(), kMostMoments);
  const Tensor parts = arena.alloc(DType::f64, 1, 3 * valid.cols * static_cast<int64_t>(most));
  if (dry()) return;
  on_storage(xs[0].dtype, [&]<class T>() {
    for (std::size_t begin = 0; begin < xs.size(); begin += most) {
      MomentsBatch<T> batch;
      for (const Tensor& x : xs.subspan(begin, std::min(most, xs.size() - begin))) batch.x[batch.count++] = rows_of<const T>(x);
      const int64_t at = static_cast<int64_t>(begin);
      kava::moments(stream(), rows_of<float>(out.row_range(at, at + batch.count)), data_of<double>(parts), batch,
                    data_of<const int32_t>(valid), static_cast<int>(valid.cols), rows_per_group(xs[0], valid),
                    static_cast<int>(xs[0].cols));
    }
  });
}
void CudaOps::do_inverse_std(const Tensor& inverse, const Tensor& all, int power) {
  kava::inverse_std(stream(), data_of<float>(inverse), rows_of<const float>(all), static_cast<int>(inverse.cols),
                    static_cast<int>(all.rows / inverse.cols), power);
}
void CudaOps::do_distill(Arena& arena, const Tensor& loss, const Tensor& dx, const Tensor& x, const Tensor& target, const Tensor& valid,
                         const Tensor& inverse, Distance kind, double factor, double weight) {
  ArenaScope scope(arena);
  const Tensor parts = arena.alloc(DType::f64, 1, valid.cols);
  if (dry()) return;
  on_storage(x.dtype, [&]<class T>() {
    kava::distill(stream(), data_of<double>(loss), rows_of<float>(dx), data_of<double>(parts), rows_of<const T>(x),
                  rows_of<const T>(target), data_of<const int32_t>(valid), data_of<const float>(inverse), kernel_distance(kind), factor,
                  weight, static_cast<int>(valid.cols), rows_per_group(x, valid), static_cast<int>(x.cols));
  });
}

}  // namespace kava
