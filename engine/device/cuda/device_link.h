// Sums among the devices of several ranks, by NCCL.
#pragma once
#include <memory>
#include <string>

#include "engine/device/comm.h"
#include "engine/device/cuda/ops_cuda.h"

namespace kava {

/// As link_devices of engine/device/cuda_module.h, for a backend of this module.
std::unique_ptr<DeviceLink> make_device_link(Comm& comm, CudaOps& ops, std::string& why);

}  // namespace kava
