#include "engine/device/cuda/ops_cuda.h"

namespace kava {

void CudaOps::do_swiglu_fwd(const Tensor& y, const Tensor& gate, const Tensor& up) {
  on_storage(y.dtype,
             [&]<class T>() { kava::swiglu_fwd(stream(), rows_of<T>(y), rows_of<const T>(gate), rows_of<const T>(up), y.rows, y.cols); });
}
void CudaOps::do_swiglu_bwd(const Tensor& dgate, const Tensor& dup, const Tensor& dy, const Tensor& gate, const Tensor& up) {
  on_storage(dy.dtype, [&]<class T>() {
    kava::swiglu_bwd(stream(), rows_of<T>(dgate), rows_of<T>(dup), rows_of<const T>(dy), rows_of<const T>(gate), rows_of<const T>(up),
                     dy.rows, dy.cols);
  });
}
void CudaOps::do_gelu_fwd(const Tensor& y, const Tensor& x, Gelu form) {
  on_storage(y.dtype, [&]<class T>() { kava::gelu_fwd(stream(), rows_of<T>(y), rows_of<const T>(x), y.rows, y.cols, form == Gelu::tanh); });
}
void CudaOps::do_gelu_bwd(const Tensor& dx, const Tensor& dy, const Tensor& x, Gelu form) {
  const bool by_tanh = form == Gelu::tanh;
  on_storage(x.dtype, [&]<class T>() {
    if (dy.dtype == x.dtype) kava::gelu_bwd(stream(), rows_of<T>(dx), rows_of<const T>(dy), rows_of<const T>(x), x.rows, x.cols, by_tanh);
    else kava::gelu_bwd(stream(), rows_of<T>(dx), rows_of<const float>(dy), rows_of<const T>(x), x.rows, x.cols, by_tanh);
  });
}

}  // namespace kava
