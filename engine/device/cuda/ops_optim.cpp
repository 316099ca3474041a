#include "engine/device/cuda/ops_cuda.h"

namespace kava {

void CudaOps::do_sum_squares(Arena& arena, const Tensor& out, const Tensor& x) {
  ArenaScope scope(arena);
  const Tensor partials = arena.alloc(DType::f64, 1, sum_squares_partials(x.count()));
  if (dry()) return;
  on_storage(x.dtype, [&]<class T>() {
    kava::sum_squares(stream(), data_of<double>(out), data_of<double>(partials), data_of<const T>(x), x.count());
  });
}
void CudaOps::do_count_update(const Tensor& updates, const Tensor& grad_square, const Tensor& losses) {
  kava::count_update(stream(), data_of<int32_t>(updates), data_of<double>(grad_square), data_of<const double>(losses),
                     static_cast<int>(losses.cols));
}
void CudaOps::do_adamw(const Tensor& value, const Tensor& m, const Tensor& v, const Tensor& half, const Tensor& grad,
                       const Tensor& grad_square, const Tensor& updates, const AdamwOptions& o) {
  const bool rounds = half && half.dtype == DType::bf16;
  kava::adamw(stream(), data_of<float>(value), data_of<float>(m), data_of<float>(v), rounds ? data_of<bf16>(half) : nullptr,
              data_of<const float>(grad), static_cast<AdamwFactors*>(factors_.get()), data_of<const double>(grad_square),
              data_of<const int32_t>(updates), {o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, o.clip}, value.count());
  if (half && !rounds) do_copy(half, value);
}

}  // namespace kava
