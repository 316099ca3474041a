#include "engine/device/host.h"

#include <algorithm>

namespace kava {

std::vector<double> to_host(Ops& ops, const Tensor& x) {
  std::vector<double> out(static_cast<std::size_t>(x.count()));
  dispatch(x.dtype, [&]<class T>() {
    std::vector<T> raw(out.size());
    ops.download(raw.data(), x);
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = to_float(raw[i]);
  });
  return out;
}

namespace {

template <class T>
T from_double(double x) {
  return rounded<T>(static_cast<Sum<T>>(x));
}

}  // namespace

void from_host(Ops& ops, const Tensor& y, std::span<const double> values) {
  KAVA_CHECK(static_cast<int64_t>(values.size()) == y.count(), "{} values for {} elements", values.size(), y.count());
  dispatch(y.dtype, [&]<class T>() {
    std::vector<T> raw(values.size());
    for (std::size_t i = 0; i < raw.size(); ++i) raw[i] = from_double<T>(values[i]);
    ops.upload(y, raw.data());
  });
}

void from_host(Ops& ops, const Tensor& y, const std::function<void(int64_t, std::span<double>)>& values) {
  // Rows of a piece, a multiple of four like its elements.
  constexpr int64_t kElements = int64_t{1} << 20, kTask = int64_t{1} << 14;
  const int64_t rows = std::max<int64_t>(4, kElements / std::max<int64_t>(y.cols, 1) / 4 * 4);
  dispatch(y.dtype, [&]<class T>() {
    std::vector<T> raw(static_cast<std::size_t>(std::min(rows, y.rows) * y.cols));
    for (int64_t row = 0; row < y.rows; row += rows) {
      const Tensor piece = y.row_range(row, std::min(y.rows, row + rows));
      const int64_t n = piece.count();
      ops.on_host((n + kTask - 1) / kTask, [&](int64_t task) {
        const int64_t begin = task * kTask, end = std::min(n, begin + kTask);
        std::vector<double> x(static_cast<std::size_t>(end - begin));
        values(row * y.cols + begin, x);
        std::ranges::transform(x, raw.begin() + begin, from_double<T>);
      });
      ops.upload(piece, raw.data());
    }
  });
}

}  // namespace kava
