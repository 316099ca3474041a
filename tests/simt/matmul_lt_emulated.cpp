// There is no cuBLASLt for an emulated device: the own kernels make all products.
#include "engine/device/cuda/matmul_lt.h"

namespace kava {

struct MatmulLt::State {};
MatmulLt::~MatmulLt() = default;

std::unique_ptr<MatmulLt> MatmulLt::open(GpuRuntime&, std::string& why) {
  why = "the emulator has no cuBLASLt";
  return nullptr;
}
bool MatmulLt::run(GemmForm, const Gemm<bf16>&, bool) { return false; }

}  // namespace kava
