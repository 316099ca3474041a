// What the module exports (engine/device/cuda_module.h).
#include "engine/device/cuda/device_link.h"
#include "engine/device/cuda/ops_cuda.h"
#include "engine/device/cuda_module.h"

namespace kava {
namespace {

std::string device_text(int device) {
  try {
    const GpuInfo d = gpu_info(device);
    std::string text = fmt::format("{}, {:.1f} GiB", d.name, static_cast<double>(d.memory_bytes) / 0x1p30);
    if (d.driver > 0)
      text += fmt::format(", compute capability {}.{}, driver for CUDA {}.{}", d.compute_capability / 10, d.compute_capability % 10,
                          d.driver / 1000, d.driver % 1000 / 10);
    return text;
  } catch (const std::exception& e) {
    return e.what();
  }
}

Ops* make_ops(int device, int threads) { return new CudaOps(device, false, threads); }
Ops* make_dry_ops() { return new CudaOps(0, true); }

DeviceLink* make_link(Comm& comm, Ops& ops, std::string& why) { return make_device_link(comm, static_cast<CudaOps&>(ops), why).release(); }

CudaInside inside(Ops& ops) {
  auto& cuda = static_cast<CudaOps&>(ops);
  const PassGraphs::Counts& graphs = cuda.graphs().counts();
  return {cuda.runtime().stream(), cuda.has_lt(), cuda.lt_fault(), graphs.launched, graphs.updated, graphs.fallbacks};
}

std::string address(const Ops& ops) { return static_cast<const CudaOps&>(ops).runtime().info().address; }
int64_t taken_bytes(Ops& ops) { return static_cast<CudaOps&>(ops).taken_bytes(); }
int64_t free_bytes(const Ops& ops) { return static_cast<const CudaOps&>(ops).runtime().free_bytes(); }

}  // namespace
}  // namespace kava

extern "C" {
extern const kava::CudaModule kava_cuda_module;
const kava::CudaModule kava_cuda_module = {.name = kava::gpu_backend_name(),
                                           .emulated = kava::gpu_is_emulated(),
                                           .devices = kava::gpu_count,
                                           .device_text = kava::device_text,
                                           .ops = kava::make_ops,
                                           .dry_ops = kava::make_dry_ops,
                                           .inside = kava::inside,
                                           .address = kava::address,
                                           .free_memory = kava::free_bytes,
                                           .taken_memory = kava::taken_bytes,
                                           .link = kava::make_link};
}
