#include "engine/device/cuda/ops_cuda.h"

namespace kava {

void CudaOps::do_rope_fwd(const Tensor& x, const Tensor& positions, const Tensor& cosine, const Tensor& sine, int64_t head_dim,
                          bool inverse) {
  on_storage(x.dtype, [&]<class T>() {
    kava::rope(stream(), rows_of<T>(x), rows_of<const T>(x), data_of<const int32_t>(positions), rows_of<const float>(cosine),
               rows_of<const float>(sine), x.rows, static_cast<int>(x.cols / head_dim), static_cast<int>(head_dim), inverse);
  });
}
void CudaOps::do_rope_bwd(const Tensor& dqkv, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& positions,
                          const Tensor& cosine, const Tensor& sine, int64_t head_dim) {
  const int64_t q_cols = dq ? dq.cols : 0, k_cols = dk ? dk.cols : 0;
  const int D = static_cast<int>(head_dim);
  on_storage(dqkv.dtype, [&]<class T>() {
    auto turn = [&](int64_t from, const auto& x, int64_t cols) {
      kava::rope(stream(), rows_of<T>(dqkv.col_range(from, from + cols)), x, data_of<const int32_t>(positions),
                 rows_of<const float>(cosine), rows_of<const float>(sine), dqkv.rows, static_cast<int>(cols / head_dim), D, true);
    };
    if (dq) turn(0, rows_of<const T>(dq), q_cols);
    if (!dk) return;
    turn(q_cols, rows_of<const float>(dk), k_cols);
    kava::copy_rows(stream(), rows_of<T>(dqkv.col_range(q_cols + k_cols, q_cols + 2 * k_cols)), rows_of<const float>(dv), dqkv.rows,
                    k_cols);
  });
}

}  // namespace kava
