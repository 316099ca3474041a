#include "engine/device/cuda/ops_cuda.h"

namespace kava {

void CudaOps::do_norm_rope_fwd(const Tensor& y, const Tensor& rstd, const Tensor& x, const Tensor& w, const Tensor& positions,
                               const Tensor& cosine, const Tensor& sine, double eps) {
  const RopeTables at{data_of<const int32_t>(positions), rows_of<const float>(cosine), rows_of<const float>(sine)};
  on_storage(y.dtype, [&]<class T>() {
    kava::norm_rope_fwd(stream(), rows_of<T>(y), rows_of<float>(rstd), rows_of<const T>(x), data_of<const T>(w), at,
                        static_cast<float>(eps), y.rows, static_cast<int>(y.cols / w.cols), static_cast<int>(w.cols));
  });
}
void CudaOps::do_norm_rope_bwd(Arena& arena, const Tensor& dx, const Tensor& dw, const Tensor& dy, const Tensor& x, const Tensor& rstd,
                               const Tensor& w, const Tensor& positions, const Tensor& cosine, const Tensor& sine) {
  ArenaScope scope(arena);
  const int heads = static_cast<int>(x.cols / w.cols), D = static_cast<int>(w.cols);
  const Tensor room = dw ? arena.alloc(DType::f32, 1, norm_rope_workspace(x.rows, heads, D)) : Tensor{};
  if (dry()) return;
  const RopeTables at{data_of<const int32_t>(positions), rows_of<const float>(cosine), rows_of<const float>(sine)};
  on_storage(x.dtype, [&]<class T>() {
    auto run = [&](auto gradient) {
      kava::norm_rope_bwd(stream(), rows_of<T>(dx), data_of<float>(dw), data_of<float>(room), gradient, rows_of<const T>(x),
                          rows_of<const float>(rstd), data_of<const T>(w), at, x.rows, heads, D);
    };
    if (dy.dtype == x.dtype) run(rows_of<const T>(dy));
    else run(rows_of<const float>(dy));
  });
}

}  // namespace kava
