#include <algorithm>

#include "engine/device/cuda/ops_cuda.h"

namespace kava {

namespace {
/// f.operator()<Y, X>() for the types of y and x.
template <class F>
void on_two(const Tensor& y, const Tensor& x, F&& f) {
  on_storage(y.dtype, [&]<class Y>() { on_storage(x.dtype, [&]<class X>() { f.template operator()<Y, X>(); }); });
}
/// f(begin, end) for pieces of a tensor's columns that the kernels take: buffers of a whole model are one long row.
template <class F>
void in_pieces(const Tensor& y, F&& f, int64_t longest = kLongestRow) {
  for (int64_t begin = 0; begin < y.cols; begin += longest) f(begin, std::min(y.cols, begin + longest));
}
/// In pieces that are filled 16 bytes at a time (kernels/rows.cu), whatever their type.
template <class T>
void fill_pieces(Stream stream, const Tensor& y, T value) {
  constexpr int64_t kLongest = kLongestRow * int64_t{sizeof(bf16)} / int64_t{sizeof(T)};
  in_pieces(
      y, [&](int64_t begin, int64_t end) { kava::fill_rows(stream, rows_of<T>(y.col_range(begin, end)), value, y.rows, end - begin); },
      kLongest);
}
/// Rows of i32 move as those of f32: no bit is looked at.
Tensor moved(Tensor t) {
  if (t.dtype == DType::i32) t.dtype = DType::f32;
  return t;
}
}  // namespace

void CudaOps::do_fill(const Tensor& y, double value) {
  if (y.dtype == DType::i32) return fill_pieces(stream(), y, static_cast<int32_t>(value));
  if (y.dtype == DType::f64) return fill_pieces(stream(), y, value);
  if (y.dtype == DType::bf16) return fill_pieces(stream(), y, to_bf16(static_cast<float>(value)));
  fill_pieces(stream(), y, static_cast<float>(value));
}
void CudaOps::do_copy(const Tensor& y, const Tensor& x) {
  on_two(moved(y), moved(x), [&]<class Y, class X>() {
    in_pieces(y, [&](int64_t begin, int64_t end) {
      kava::copy_rows(stream(), rows_of<Y>(moved(y).col_range(begin, end)), rows_of<const X>(moved(x).col_range(begin, end)), y.rows,
                      end - begin);
    });
  });
}
void CudaOps::do_add(const Tensor& y, const Tensor& x) {
  on_two(y, x, [&]<class Y, class X>() {
    in_pieces(y, [&](int64_t begin, int64_t end) {
      kava::add_rows(stream(), rows_of<Y>(y.col_range(begin, end)), rows_of<const X>(x.col_range(begin, end)), y.rows, end - begin);
    });
  });
}
void CudaOps::do_gather_rows(const Tensor& y, const Tensor& x, const Tensor& rows) {
  on_two(moved(y), moved(x), [&]<class Y, class X>() {
    kava::gather_rows(stream(), rows_of<Y>(moved(y)), rows_of<const X>(moved(x)), data_of<const int32_t>(rows), y.rows, y.cols);
  });
}
void CudaOps::do_scatter_rows(const Tensor& y, const Tensor& x, const Tensor& rows) {
  on_two(moved(y), moved(x), [&]<class Y, class X>() {
    kava::scatter_rows(stream(), rows_of<Y>(moved(y)), rows_of<const X>(moved(x)), data_of<const int32_t>(rows), x.rows, x.cols);
  });
}
void CudaOps::do_scatter_add_rows(const Tensor& y, const Tensor& x, const Tensor& rows) {
  on_two(y, x, [&]<class Y, class X>() {
    kava::scatter_add_rows(stream(), rows_of<Y>(y), rows_of<const X>(x), data_of<const int32_t>(rows), x.rows, x.cols);
  });
}
void CudaOps::do_embed_fwd(const Tensor& x, const Tensor& table, const Tensor& extra, const Tensor& ids) {
  on_storage(x.dtype, [&]<class T>() {
    kava::embed_fwd(stream(), rows_of<T>(x), rows_of<const T>(table), rows_of<const T>(extra), data_of<const int32_t>(ids), x.rows, x.cols);
  });
}
void CudaOps::do_embed_bwd(const Tensor& dtable, const Tensor& dextra, const Tensor& dx, const Tensor& ids) {
  kava::embed_bwd(stream(), rows_of<float>(dtable), rows_of<float>(dextra), rows_of<const float>(dx), data_of<const int32_t>(ids), dx.rows,
                  dx.cols);
}

}  // namespace kava
