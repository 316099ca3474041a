#include "benchmarks/measuring.h"

#include <stdexcept>

#include "engine/error.h"
#include "engine/rng.h"

namespace kava {

bool finds(const SplitPattern& filter, const std::string& name) {
  std::vector<Stretch> stretches;
  filter.find_all(name, stretches);
  return std::ranges::any_of(stretches, &Stretch::matched);
}

SplitPattern filter_of(const std::string& pattern) {
  try {
    return SplitPattern::regex(pattern);
  } catch (const std::invalid_argument&) {
    throw Error(Exit::usage, "--filter", "\"" + escaped(pattern) + "\" is not a regular expression", "give one, such as attention");
  }
}

Tensor random_tensor(Ops& ops, Arena& arena, DType type, int64_t rows, int64_t cols, double scale) {
  constexpr int64_t kDrawn = 1 << 20;
  const Tensor x = arena.alloc(type, rows, cols);
  if (x.count() == 0) return x;
  const int64_t width = std::min(cols, kDrawn), height = std::clamp<int64_t>(kDrawn / width, 1, rows);
  std::vector<float> host(static_cast<std::size_t>(height * width));
  const auto key = philox_key(Purpose::bench, 1);
  for (std::size_t i = 0; i < host.size(); i += 2) {
    const auto w = philox({static_cast<uint32_t>(i / 2), 0, 0, 0}, key);
    const auto pair = normal_pair(w[0], w[1]);
    for (std::size_t j = i; j < std::min(i + 2, host.size()); ++j) host[j] = static_cast<float>(scale * pair[j - i]);
  }
  const Tensor drawn = arena.alloc(DType::f32, height, width);
  ops.upload(drawn, host.data());
  for (int64_t r = 0; r < rows; r += height)
    for (int64_t c = 0; c < cols; c += width) {
      const int64_t down = std::min(height, rows - r), across = std::min(width, cols - c);
      ops.copy(x.row_range(r, r + down).col_range(c, c + across), drawn.row_range(0, down).col_range(0, across));
    }
  return x;
}

}  // namespace kava
