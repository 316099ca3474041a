// Large bf16 products by cuBLASLt, which is looked for and loaded at run time. Where it is absent, and in the emulator, whose twin of this
// is tests/simt/matmul_lt_emulated.cpp, the own kernels make all products.
#pragma once
#include <memory>
#include <string>

#include "engine/device/cuda/runtime.h"
#include "kernels/gemm.h"

namespace kava {

class MatmulLt {
 public:
  /// Null where there is no cuBLASLt that can be used; `why` says it in a line.
  static std::unique_ptr<MatmulLt> open(GpuRuntime& runtime, std::string& why);
  ~MatmulLt();

  /// Whether it made the product: one of a single term without mask, with rows and a bias that begin at multiples of 16 bytes, and, unless
  /// `any_size`, large enough to be worth it; forward (nt) the weights' size alone decides. Sums and bias are f32 within. `onto`: what
  /// g.set holds is added before the sum is rounded. A failure is a GpuError.
  bool run(GemmForm form, const Gemm<bf16>& g, bool any_size = false, bool onto = false);

 private:
  MatmulLt() = default;
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kava
