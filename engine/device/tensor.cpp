#include "engine/device/tensor.h"

namespace kava {

void Tensor::wrong_type(DType used) const { KAVA_CHECK(false, "a {} tensor used as {}", name_of(dtype), name_of(used)); }

}  // namespace kava
