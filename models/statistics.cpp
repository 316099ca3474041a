#include "models/statistics.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "engine/rng.h"

namespace kava {

std::vector<Interval> bootstrap_means(const std::vector<std::vector<double>>& columns) {
  std::vector<Interval> intervals(columns.size());
  const std::size_t n = columns.empty() ? 0 : columns[0].size();
  if (n == 0) return intervals;
  std::vector<std::vector<double>> means(columns.size(), std::vector<double>(kResamples));
  const auto key = philox_key(Purpose::bootstrap, 0);
  for (uint32_t resample = 0; resample < kResamples; ++resample) {
    std::vector<double> sums(columns.size(), 0.0);
    for (std::size_t i = 0; i < n;) {
      const auto words = philox({static_cast<uint32_t>(i / 4), resample, 0, 0}, key);
      for (std::size_t w = 0; w < 4 && i < n; ++w, ++i) {
        const std::size_t drawn = static_cast<std::size_t>(uint64_t{words[w]} * n >> 32);
        for (std::size_t c = 0; c < columns.size(); ++c) sums[c] += columns[c][drawn];
      }
    }
    for (std::size_t c = 0; c < columns.size(); ++c) means[c][resample] = sums[c] / static_cast<double>(n);
  }
  constexpr std::size_t tail = kResamples / 40;
  for (std::size_t c = 0; c < columns.size(); ++c) {
    std::ranges::sort(means[c]);
    intervals[c] = {means[c][tail], means[c][kResamples - 1 - tail]};
  }
  return intervals;
}

namespace {

// Sum over k <= least of C(n, k), while 128 bits hold it.
std::optional<double> binomial_sum(int64_t n, int64_t least) {
  __extension__ using Wide = unsigned __int128;
  Wide term = 1, sum = 1;
  for (int64_t k = 1; k <= least; ++k) {
    if (__builtin_mul_overflow(term, static_cast<Wide>(n - k + 1), &term)) return std::nullopt;
    term /= static_cast<Wide>(k);
    if (__builtin_add_overflow(sum, term, &sum)) return std::nullopt;
  }
  return static_cast<double>(sum);
}

}  // namespace

double mcnemar_p(int64_t only_a, int64_t only_b) {
  const int64_t n = only_a + only_b, least = std::min(only_a, only_b);
  if (n - 2 * least <= 1) return 1;  // half of all splits, or more
  if (const std::optional<double> sum = binomial_sum(n, least))
    return std::max(kLeastP, std::ldexp(*sum, static_cast<int>(1 - std::min<int64_t>(n, 1 << 20))));
  const auto log_term = [n](int64_t k) {
    return std::lgamma(double(n) + 1) - std::lgamma(double(k) + 1) - std::lgamma(double(n - k) + 1) + double(n) * std::log(0.5);
  };
  // In units of the largest term, which may be too small for a double.
  const double largest = log_term(least);
  double tail = 0;
  for (int64_t k = 0; k <= least; ++k) tail += std::exp(log_term(k) - largest);
  const double log_p = std::log(2.0) + largest + std::log(tail);
  return log_p < std::log(kLeastP) ? kLeastP : std::min(1.0, std::exp(log_p));
}

std::string p_text(double p) { return p <= kLeastP ? "< 1e-300" : fmt::format("{:.4g}", p); }

}  // namespace kava
