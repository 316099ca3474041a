#include "engine/device/host.h"

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

void from_host(Ops& ops, const Tensor& y, std::span<const double> values) {
  KAVA_CHECK(static_cast<int64_t>(values.size()) == y.count(), "{} values for {} elements", values.size(), y.count());
  dispatch(y.dtype, [&]<class T>() {
    std::vector<T> raw(values.size());
    for (std::size_t i = 0; i < raw.size(); ++i) raw[i] = rounded<T>(static_cast<Sum<T>>(values[i]));
    ops.upload(y, raw.data());
  });
}

}  // namespace kava
