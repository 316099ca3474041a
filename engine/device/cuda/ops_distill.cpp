#include "engine/device/cuda/ops_cuda.h"

namespace kava {

namespace {
GroupDistance kernel_distance(Distance d) {
  return d == Distance::mse ? GroupDistance::mse : d == Distance::l1 ? GroupDistance::l1 : GroupDistance::smooth_l1;
}
int rows_per_group(const Tensor& x, const Tensor& valid) { return valid.cols > 0 ? static_cast<int>(x.rows / valid.cols) : 0; }
}  // namespace

void CudaOps::do_moments(Arena& arena, const Tensor& out, const Tensor& x, const Tensor& valid) {
  ArenaScope scope(arena);
  const Tensor parts = arena.alloc(DType::f64, 1, 3 * valid.cols);
  if (dry()) return;
  on_storage(x.dtype, [&]<class T>() {
    kava::moments(stream(), data_of<float>(out), data_of<double>(parts), rows_of<const T>(x), data_of<const int32_t>(valid),
                  static_cast<int>(valid.cols), rows_per_group(x, valid), static_cast<int>(x.cols));
  });
}
void CudaOps::do_inverse_std(const Tensor& inverse, const Tensor& all, int power) {
  kava::inverse_std(stream(), data_of<float>(inverse), rows_of<const float>(all), static_cast<int>(all.rows), power);
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
