// cpu backend: the ops that move or add rows.
#include <algorithm>
#include <cstring>

#include "engine/device/cpu/ops_cpu.h"
#include "engine/device/cpu/row_loops.h"

namespace kava {

namespace {
// Columns that one task of a sum over repeated ids takes: it owns them in every row, so that rows that meet are added in order.
constexpr int64_t kColBlock = 128;

template <class Y, class X>
void convert(Y* y, const X* x, int64_t n) {
  if constexpr (std::is_same_v<Y, X>) std::memmove(y, x, static_cast<std::size_t>(n) * sizeof(Y));
  else each(n, [=](int64_t i) { store(y, i, load(x, i)); });
}

template <class Y, class X>
void accumulate(Y* y, const X* x, int64_t n) {
  using S = std::common_type_t<Sum<Y>, Sum<X>>;
  each(n, [=](int64_t i) { store(y, i, static_cast<S>(load(y, i)) + static_cast<S>(load(x, i))); });
}
}  // namespace

void CpuOps::do_fill(const Tensor& y, double value) {
  auto run = [&]<class T>(T element) {
    for_pieces(threads_, y, y.contiguous(), kRowBlock,
               [&](int64_t r, int64_t begin, int64_t end) { std::fill(y.row<T>(r) + begin, y.row<T>(r) + end, element); });
  };
  if (y.dtype == DType::i32) return run(static_cast<int32_t>(value));
  dispatch(y.dtype, [&]<class T>() {
    T element;
    store(&element, 0, value);
    run(element);
  });
}

void CpuOps::do_copy(const Tensor& y, const Tensor& x) {
  dispatch_kin(y, x, [&]<class Y, class X>() {
    for_pieces(threads_, y, y.contiguous() && x.contiguous(), kRowBlock,
               [&](int64_t r, int64_t begin, int64_t end) { convert(y.row<Y>(r) + begin, x.row<X>(r) + begin, end - begin); });
  });
}

void CpuOps::do_add(const Tensor& y, const Tensor& x) {
  dispatch_kin(y, x, [&]<class Y, class X>() {
    for_pieces(threads_, y, y.contiguous() && x.contiguous(), kRowBlock,
               [&](int64_t r, int64_t begin, int64_t end) { accumulate(y.row<Y>(r) + begin, x.row<X>(r) + begin, end - begin); });
  });
}

void CpuOps::do_gather_rows(const Tensor& y, const Tensor& x, const Tensor& rows) {
  const int32_t* from = rows.as<int32_t>();
  dispatch_kin(y, x, [&]<class Y, class X>() {
    threads_.blocks(y.rows, kRowBlock, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) convert(y.row<Y>(i), x.row<X>(from[i]), y.cols);
    });
  });
}

void CpuOps::do_scatter_rows(const Tensor& y, const Tensor& x, const Tensor& rows) {
  const int32_t* to = rows.as<int32_t>();
  dispatch_kin(y, x, [&]<class Y, class X>() {
    threads_.blocks(x.rows, kRowBlock, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) convert(y.row<Y>(to[i]), x.row<X>(i), y.cols);
    });
  });
}

void CpuOps::do_scatter_add_rows(const Tensor& y, const Tensor& x, const Tensor& rows) {
  const int32_t* to = rows.as<int32_t>();
  dispatch_kin(y, x, [&]<class Y, class X>() {
    threads_.blocks(x.rows, kRowBlock, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) accumulate(y.row<Y>(to[i]), x.row<X>(i), y.cols);
    });
  });
}

void CpuOps::do_embed_fwd(const Tensor& x, const Tensor& table, const Tensor& extra, const Tensor& ids) {
  const int32_t* id = ids.as<int32_t>();
  dispatch(x.dtype, [&]<class T>() {
    threads_.blocks(x.rows, kRowBlock, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) convert(x.row<T>(n), id[n] < 0 ? extra.row<T>(-1 - id[n]) : table.row<T>(id[n]), x.cols);
    });
  });
}

void CpuOps::do_embed_bwd(const Tensor& dtable, const Tensor& dextra, const Tensor& dx, const Tensor& ids) {
  const int32_t* id = ids.as<int32_t>();
  dispatch(dx.dtype, [&]<class S>() {
    threads_.blocks(dx.cols, kColBlock, [&](int64_t begin, int64_t end) {
      for (int64_t n = 0; n < dx.rows; ++n) {
        const Tensor& to = id[n] < 0 ? dextra : dtable;
        if (to) accumulate(to.row<S>(id[n] < 0 ? -1 - id[n] : id[n]) + begin, dx.row<S>(n) + begin, end - begin);
      }
    });
  });
}

}  // namespace kava
