// The cuda backend, which lies in a module of its own beside the engine: libkava_cuda.so is loaded on the first call and never unloaded, so
// that programs run where no CUDA is installed.
#pragma once
#include <memory>
#include <string>

#include "engine/device/ops.h"

namespace kava {

/// How many CUDA devices this process could use; where there is none, `why` says it in a line.
int cuda_devices(std::string& why);

/// The backend on a device. Error(code preflight) where there is none.
std::unique_ptr<Ops> make_cuda_ops(int device = 0);

/// What the module exports under the names kava_cuda_devices and kava_cuda_ops.
using CudaDevices = int(std::string& why);
using CudaOpsFactory = Ops*(int device);

}  // namespace kava
