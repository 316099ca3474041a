// What the module exports (engine/device/cuda_module.h).
#include "engine/device/cuda/ops_cuda.h"
#include "engine/device/cuda_module.h"

extern "C" {
int kava_cuda_devices(std::string& why) { return kava::gpu_count(why); }
kava::Ops* kava_cuda_ops(int device) { return new kava::CudaOps(device, false); }
}
