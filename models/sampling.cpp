#include "models/sampling.h"

#include <algorithm>
#include <cmath>

#include "engine/rng.h"

namespace kava {

uint64_t draw_number(uint64_t seed, const DrawPlace& place) {
  const auto words = philox({static_cast<uint32_t>(place.question), static_cast<uint32_t>(place.question >> 32),
                             static_cast<uint32_t>(place.sample), static_cast<uint32_t>(place.position)},
                            philox_key(Purpose::sampling, seed));
  return uint64_t{words[1]} << 32 | words[0];
}

double negative_log_likelihood(std::span<const double> logits, int32_t target) {
  const double most = *std::ranges::max_element(logits);
  double sum = 0;
  for (double z : logits) sum += std::exp(z - most);
  return std::log(sum) + most - logits[static_cast<std::size_t>(target)];
}

}  // namespace kava
