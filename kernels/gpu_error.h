// A failed call of a GPU's runtime. Kernels know neither the engine's errors nor exit codes; run_program (engine/cli.h) gives them.
#pragma once
#include <stdexcept>
#include <string>

namespace kava {

enum class GpuFailure { memory, no_device, fault };

/// What a status of the CUDA runtime (cudaError_t) means to the program. Most leave the device unusable to this process.
constexpr GpuFailure gpu_failure(int status) {
  switch (status) {
    case 2:  // cudaErrorMemoryAllocation
      return GpuFailure::memory;
    case 3:    // cudaErrorInitializationError
    case 35:   // cudaErrorInsufficientDriver
    case 46:   // cudaErrorDevicesUnavailable
    case 100:  // cudaErrorNoDevice
    case 101:  // cudaErrorInvalidDevice
    case 209:  // cudaErrorNoKernelImageForDevice
    case 803:  // cudaErrorSystemDriverMismatch
    case 804:  // cudaErrorCompatNotSupportedOnDevice
      return GpuFailure::no_device;
    default:
      return GpuFailure::fault;
  }
}

class GpuError : public std::runtime_error {
 public:
  GpuError(const std::string& call, int status, const std::string& text)
      : std::runtime_error(call + ": " + text), failure_(gpu_failure(status)) {}
  GpuFailure failure() const { return failure_; }

 private:
  GpuFailure failure_;
};

}  // namespace kava
