#include "engine/device/cpu/ops_cpu.h"

#include <cstring>

namespace kava {

std::unique_ptr<Ops> make_cpu_ops(int threads, bool dry) { return std::make_unique<CpuOps>(threads, dry); }

void CpuOps::do_upload(const Tensor& y, const void* host) {
  const int64_t width = y.cols * size_of(y.dtype);
  for (int64_t r = 0; width > 0 && r < y.rows; ++r)
    std::memcpy(static_cast<char*>(y.data) + r * y.stride * size_of(y.dtype), static_cast<const char*>(host) + r * width,
                static_cast<std::size_t>(width));
}

void CpuOps::do_download(void* host, const Tensor& x) {
  const int64_t width = x.cols * size_of(x.dtype);
  for (int64_t r = 0; width > 0 && r < x.rows; ++r)
    std::memcpy(static_cast<char*>(host) + r * width, static_cast<const char*>(x.data) + r * x.stride * size_of(x.dtype),
                static_cast<std::size_t>(width));
}

}  // namespace kava
