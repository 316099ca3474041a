#include "engine/device/cuda/ops_cuda.h"

namespace kava {

namespace {
/// f.operator()<T, G>() for storage T and a gradient in storage or sum type.
template <class F>
void on_gradient(const Tensor& x, const Tensor& dy, F&& f) {
  on_storage(x.dtype, [&]<class T>() {
    if (dy.dtype == x.dtype) f.template operator()<T, T>();
    else f.template operator()<T, float>();
  });
}
void check_columns(int64_t cols, std::size_t bytes) {
  if (cols > longest_norm(bytes))
    throw Error(Exit::preflight, "--device",
                fmt::format("the cuda backend has no norm of rows of {} numbers in these types, {} at most", cols, longest_norm(bytes)),
                "use --device cpu, or another model.dtype");
}
/// Room for the first stage of the gradients of gains; empty where there are none.
Tensor gain_room(Arena& arena, bool wanted, const Tensor& x) {
  return wanted ? arena.alloc(DType::f32, 1, norm_workspace(x.rows, x.cols)) : Tensor{};
}
}  // namespace

void CudaOps::do_add_rms_norm_fwd(const Tensor& y, const Tensor& sum, const Tensor& rstd, const Tensor& a, const Tensor& b, const Tensor& w,
                                  double eps) {
  on_storage(y.dtype, [&]<class T>() {
    check_columns(y.cols, sizeof(T));
    kava::add_rms_norm_fwd(stream(), rows_of<T>(y), rows_of<T>(sum), rows_of<float>(rstd), rows_of<const T>(a), rows_of<const T>(b),
                           data_of<const T>(w), static_cast<float>(eps), y.rows, y.cols);
  });
}
void CudaOps::do_rms_norm_bwd(Arena& arena, const Tensor& dx, const Tensor& dw, const Tensor& dy, const Tensor& x, const Tensor& rstd,
                              const Tensor& w) {
  ArenaScope scope(arena);
  const Tensor room = gain_room(arena, static_cast<bool>(dw), x);
  on_gradient(x, dy, [&]<class T, class G>() {
    check_columns(x.cols, sizeof(T) + sizeof(G));
    if (dry()) return;
    kava::rms_norm_bwd(stream(), rows_of<T>(dx), data_of<float>(dw), data_of<float>(room), rows_of<const G>(dy), rows_of<const T>(x),
                       rows_of<const float>(rstd), data_of<const T>(w), x.rows, x.cols);
  });
}
void CudaOps::do_add_layer_norm_fwd(const Tensor& y, const Tensor& sum, const Tensor& mean, const Tensor& rstd, const Tensor& a,
                                    const Tensor& b, const Tensor& w, const Tensor& bias, double eps) {
  on_storage(y.dtype, [&]<class T>() {
    check_columns(y.cols, sizeof(T));
    kava::add_layer_norm_fwd(stream(), rows_of<T>(y), rows_of<T>(sum), rows_of<float>(mean), rows_of<float>(rstd), rows_of<const T>(a),
                             rows_of<const T>(b), data_of<const T>(w), data_of<const T>(bias), static_cast<float>(eps), y.rows, y.cols);
  });
}
void CudaOps::do_layer_norm_bwd(Arena& arena, const Tensor& dx, const Tensor& dw, const Tensor& db, const Tensor& dy, const Tensor& x,
                                const Tensor& mean, const Tensor& rstd, const Tensor& w) {
  ArenaScope scope(arena);
  const Tensor room = gain_room(arena, dw || db, x);
  on_gradient(x, dy, [&]<class T, class G>() {
    check_columns(x.cols, sizeof(T) + sizeof(G));
    if (dry()) return;
    kava::layer_norm_bwd(stream(), rows_of<T>(dx), data_of<float>(dw), data_of<float>(db), data_of<float>(room), rows_of<const G>(dy),
                         rows_of<const T>(x), rows_of<const float>(mean), rows_of<const float>(rstd), data_of<const T>(w), x.rows, x.cols);
  });
}

}  // namespace kava
