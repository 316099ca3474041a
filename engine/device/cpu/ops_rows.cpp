// cpu backend: the ops that move or add rows.
#include <algorithm>
#include <cstring>

#include "engine/device/cpu/ops_cpu.h"
#include "engine/device/cpu/row_loops.h"

namespace kava {

namespace {
// Columns that one task of a scatter takes: it owns them in every row, so that rows that meet are added in order.
constexpr int64_t kColBlock = 128;

void check_same_shape(const Tensor& y, const Tensor& x) {
  KAVA_CHECK(y.rows == x.rows && y.cols == x.cols, "[{}, {}] from [{}, {}]", y.rows, y.cols, x.rows, x.cols);
}

void check_index(const Tensor& index, int64_t count, int64_t least, int64_t most) {
  KAVA_CHECK(index.cols == count && index.rows == 1, "an index of [{}, {}] for {} rows", index.rows, index.cols, count);
  const int32_t* at = index.as<int32_t>();
  for (int64_t i = 0; i < count; ++i) KAVA_CHECK(at[i] >= least && at[i] < most, "index {} is outside {}..{}", at[i], least, most - 1);
}

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

/// f.operator()<Y, X>() for two floating types.
template <class F>
void dispatch_two(const Tensor& y, const Tensor& x, F f) {
  dispatch(y.dtype, [&]<class Y>() { dispatch(x.dtype, [&]<class X>() { f.template operator()<Y, X>(); }); });
}
}  // namespace

void CpuOps::fill(const Tensor& y, double value) {
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

void CpuOps::copy(const Tensor& y, const Tensor& x) {
  check_same_shape(y, x);
  auto run = [&]<class Y, class X>() {
    for_pieces(threads_, y, y.contiguous() && x.contiguous(), kRowBlock,
               [&](int64_t r, int64_t begin, int64_t end) { convert(y.row<Y>(r) + begin, x.row<X>(r) + begin, end - begin); });
  };
  if (y.dtype == DType::i32 && x.dtype == DType::i32) return run.operator()<int32_t, int32_t>();
  dispatch_two(y, x, run);
}

void CpuOps::add(const Tensor& y, const Tensor& x) {
  check_same_shape(y, x);
  dispatch_two(y, x, [&]<class Y, class X>() {
    for_pieces(threads_, y, y.contiguous() && x.contiguous(), kRowBlock,
               [&](int64_t r, int64_t begin, int64_t end) { accumulate(y.row<Y>(r) + begin, x.row<X>(r) + begin, end - begin); });
  });
}

void CpuOps::gather_rows(const Tensor& y, const Tensor& x, const Tensor& rows) {
  KAVA_CHECK(y.cols == x.cols, "rows of {} columns from rows of {}", y.cols, x.cols);
  check_index(rows, y.rows, 0, x.rows);
  const int32_t* from = rows.as<int32_t>();
  dispatch_two(y, x, [&]<class Y, class X>() {
    threads_.blocks(y.rows, kRowBlock, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) convert(y.row<Y>(i), x.row<X>(from[i]), y.cols);
    });
  });
}

void CpuOps::scatter_add_rows(const Tensor& y, const Tensor& x, const Tensor& rows) {
  KAVA_CHECK(y.cols == x.cols, "rows of {} columns to rows of {}", x.cols, y.cols);
  check_index(rows, x.rows, 0, y.rows);
  const int32_t* to = rows.as<int32_t>();
  dispatch_two(y, x, [&]<class Y, class X>() {
    threads_.blocks(y.cols, kColBlock, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < x.rows; ++i) accumulate(y.row<Y>(to[i]) + begin, x.row<X>(i) + begin, end - begin);
    });
  });
}

void CpuOps::embed_fwd(const Tensor& x, const Tensor& table, const Tensor& extra, const Tensor& ids) {
  KAVA_CHECK(x.cols == table.cols && (!extra || extra.cols == x.cols), "embedding of {} columns from {}", x.cols, table.cols);
  check_index(ids, x.rows, extra ? -extra.rows : 0, table.rows);
  const int32_t* id = ids.as<int32_t>();
  dispatch_two(x, table, [&]<class X, class T>() {
    KAVA_CHECK(!extra || extra.dtype == table.dtype, "extra rows of {}, table of {}", name_of(extra.dtype), name_of(table.dtype));
    threads_.blocks(x.rows, kRowBlock, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) convert(x.row<X>(n), id[n] < 0 ? extra.row<T>(-1 - id[n]) : table.row<T>(id[n]), x.cols);
    });
  });
}

void CpuOps::embed_bwd(const Tensor& dtable, const Tensor& dextra, const Tensor& dx, const Tensor& ids) {
  KAVA_CHECK((!dtable || dtable.cols == dx.cols) && (!dextra || dextra.cols == dx.cols), "embedding gradient of {} columns", dx.cols);
  KAVA_CHECK(ids.cols == dx.rows, "{} ids for {} rows", ids.cols, dx.rows);
  const int32_t* id = ids.as<int32_t>();
  for (int64_t n = 0; n < dx.rows; ++n)
    KAVA_CHECK(id[n] < 0 ? !dextra || -1 - id[n] < dextra.rows : !dtable || id[n] < dtable.rows, "id {} has no row", id[n]);
  dispatch(dx.dtype, [&]<class T>() {
    using S = Sum<T>;
    KAVA_CHECK((!dtable || dtable.dtype == DTypeOf<S>::value) && (!dextra || dextra.dtype == DTypeOf<S>::value), "gradients in sum type");
    threads_.blocks(dx.cols, kColBlock, [&](int64_t begin, int64_t end) {
      for (int64_t n = 0; n < dx.rows; ++n) {
        const Tensor& to = id[n] < 0 ? dextra : dtable;
        if (to) accumulate(to.row<S>(id[n] < 0 ? -1 - id[n] : id[n]) + begin, dx.row<T>(n) + begin, end - begin);
      }
    });
  });
}

}  // namespace kava
