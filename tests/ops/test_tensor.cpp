#include "tests/ops/op_rig.h"

using namespace kava;
using namespace kava::test;

TEST_CASE("rows of a tensor are not read as another type") {
  Random random(3);
  Rig rig(1, DType::bf16, DType::bf16, 0);
  const Tensor t = rig.in(random.normal(4, 8)), sum = rig.in(random.normal(4, 8), Kind::sum);
  CHECK(t.row<bf16>(1) == t.as<bf16>() + t.stride);
  CHECK_THROWS_AS(t.row<float>(0), Error);
  CHECK_THROWS_AS(sum.row<bf16>(0), Error);
  CHECK(Tensor{}.row<double>(0) == nullptr);
}
