#include "benchmarks/measuring.h"

#include "engine/rng.h"

namespace kava {

Tensor random_tensor(Ops& ops, Arena& arena, DType type, int64_t rows, int64_t cols, double scale) {
  const Tensor x = arena.alloc(type, rows, cols);
  std::vector<float> host(static_cast<std::size_t>(x.count()));
  const auto key = philox_key(Purpose::bench, 1);
  for (std::size_t i = 0; i < host.size(); ++i) {
    const auto w = philox({static_cast<uint32_t>(i / 2), static_cast<uint32_t>(i >> 33), 0, 0}, key);
    host[i] = static_cast<float>(scale * normal_pair(w[0], w[1])[i % 2]);
  }
  const Tensor wide = arena.alloc(DType::f32, rows, cols);
  ops.upload(wide, host.data());
  ops.copy(x, wide);
  return x;
}

}  // namespace kava
