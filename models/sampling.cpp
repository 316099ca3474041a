#include "models/sampling.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "engine/rng.h"

namespace kava {

namespace {

// In [0, 1), by 53 bits: a vocabulary has tokens rarer than 2^-24.
double uniform(const Sampling& sampling, const DrawPlace& place) {
  const auto words = philox({static_cast<uint32_t>(place.question), static_cast<uint32_t>(place.question >> 32),
                             static_cast<uint32_t>(place.sample), static_cast<uint32_t>(place.position)},
                            philox_key(Purpose::sampling, sampling.seed));
  return static_cast<double>((uint64_t{words[0]} << 32 | words[1]) >> 11) * 0x1p-53;
}

struct Candidate {
  double weight;
  int32_t id;
  bool operator<(const Candidate& o) const { return weight != o.weight ? weight < o.weight : id > o.id; }
};

// The token at which the running sum passes `at`.
int32_t token_at(const std::vector<Candidate>& candidates, double at) {
  for (const Candidate& c : candidates)
    if ((at -= c.weight) < 0) return c.id;
  // Rounding has left a rest: the last one that can be drawn at all.
  for (auto c = candidates.rbegin(); c != candidates.rend(); ++c)
    if (c->weight > 0) return c->id;
  return candidates.front().id;
}

}  // namespace

int32_t drawn_token(std::span<const double> logits, const Sampling& sampling, const DrawPlace& place) {
  const double most = *std::ranges::max_element(logits);
  std::vector<Candidate> all(logits.size());
  double sum = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    all[i] = {std::exp((logits[i] - most) / sampling.temperature), static_cast<int32_t>(i)};
    sum += all[i].weight;
  }
  const double u = uniform(sampling, place);
  if (sampling.top_p >= 1) return token_at(all, u * sum);
  std::make_heap(all.begin(), all.end());
  std::vector<Candidate> best;
  double kept = 0;
  while (!all.empty() && (best.empty() || kept < sampling.top_p * sum)) {
    std::pop_heap(all.begin(), all.end());
    best.push_back(all.back());
    kept += best.back().weight;
    all.pop_back();
  }
  return token_at(best, u * kept);
}

double negative_log_likelihood(std::span<const double> logits, int32_t target) {
  const double most = *std::ranges::max_element(logits);
  double sum = 0;
  for (double z : logits) sum += std::exp(z - most);
  return std::log(sum) + most - logits[static_cast<std::size_t>(target)];
}

}  // namespace kava
