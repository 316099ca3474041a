#include "engine/device/cpu/ops_cpu.h"

#include <cstring>

namespace kava {

std::unique_ptr<Ops> make_cpu_ops(int threads) { return std::make_unique<CpuOps>(threads); }

void CpuOps::upload(const Tensor& y, const void* host) {
  KAVA_CHECK(y.contiguous(), "upload to a tensor with gaps");
  if (y.count() > 0) std::memcpy(y.data, host, static_cast<std::size_t>(y.count() * size_of(y.dtype)));
}

void CpuOps::download(void* host, const Tensor& x) {
  KAVA_CHECK(x.contiguous(), "download of a tensor with gaps");
  if (x.count() > 0) std::memcpy(host, x.data, static_cast<std::size_t>(x.count() * size_of(x.dtype)));
}

}  // namespace kava
