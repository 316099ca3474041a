// Draws from logits, and the intervals and tests of results.
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_floating_point.hpp>
#include <cmath>
#include <map>

#include "models/sampling.h"
#include "models/statistics.h"

using namespace kava;
using Catch::Matchers::WithinAbs;

namespace {

// How often each token comes in `n` draws.
std::map<int32_t, double> shares(const std::vector<double>& logits, const Sampling& sampling, int64_t n) {
  std::map<int32_t, double> shares;
  for (int64_t i = 0; i < n; ++i) shares[drawn_token(logits, sampling, {i, 0, 0})] += 1.0 / static_cast<double>(n);
  return shares;
}

}  // namespace

TEST_CASE("tokens are drawn with the softmax's probability, at any temperature") {
  const std::vector<double> logits{std::log(0.5), std::log(0.3), std::log(0.2)};
  Sampling sampling;
  sampling.temperature = 1;
  constexpr int64_t kDraws = 40000;
  const double five_sigma = 5 * std::sqrt(0.25 / kDraws);
  auto once = shares(logits, sampling, kDraws);
  CHECK_THAT(once[0], WithinAbs(0.5, five_sigma));
  CHECK_THAT(once[1], WithinAbs(0.3, five_sigma));
  CHECK_THAT(once[2], WithinAbs(0.2, five_sigma));
  sampling.temperature = 0.5;  // squares: 25, 9, 4
  auto cooler = shares(logits, sampling, kDraws);
  CHECK_THAT(cooler[0], WithinAbs(25.0 / 38, five_sigma));
  CHECK_THAT(cooler[2], WithinAbs(4.0 / 38, five_sigma));
  sampling.temperature = 1e-9;
  CHECK(shares(logits, sampling, 100)[0] > 0.999);
}

TEST_CASE("top-p draws from the fewest best tokens that have the share") {
  const std::vector<double> logits{std::log(0.2), std::log(0.5), std::log(0.3)};
  Sampling sampling;
  sampling.temperature = 1, sampling.top_p = 0.5;
  CHECK(shares(logits, sampling, 1000).size() == 1);
  sampling.top_p = 0.51;
  auto two = shares(logits, sampling, 40000);
  CHECK(two.size() == 2);
  CHECK_THAT(two[1], WithinAbs(5.0 / 8, 5 * std::sqrt(0.25 / 40000)));
  sampling.top_p = 1;
  CHECK(shares(logits, sampling, 1000).size() == 3);
}

TEST_CASE("a draw depends on seed, question, sample and position, each for itself") {
  const std::vector<double> logits(1000, 0.0);
  Sampling sampling;
  sampling.temperature = 1;
  const int32_t first = drawn_token(logits, sampling, {1, 2, 3});
  CHECK(drawn_token(logits, sampling, {1, 2, 3}) == first);
  CHECK(drawn_token(logits, sampling, {2, 2, 3}) != first);
  CHECK(drawn_token(logits, sampling, {1, 3, 3}) != first);
  CHECK(drawn_token(logits, sampling, {1, 2, 4}) != first);
  sampling.seed = 43;
  CHECK(drawn_token(logits, sampling, {1, 2, 3}) != first);
}

TEST_CASE("a bootstrap interval has the width that the number of questions gives it") {
  std::vector<double> column(1000, 0.0);
  std::fill_n(column.begin(), 300, 1.0);
  const Interval i = bootstrap_means({column})[0];
  const double sigma = std::sqrt(0.3 * 0.7 / 1000);
  // The percentiles of 2,000 resamples are themselves known to some 0.1 sigma.
  CHECK_THAT(i.low, WithinAbs(0.3 - 1.96 * sigma, 0.3 * sigma));
  CHECK_THAT(i.high, WithinAbs(0.3 + 1.96 * sigma, 0.3 * sigma));
  const std::vector<Interval> both = bootstrap_means({column, std::vector<double>(1000, 1.0)});
  CHECK(both[0].low == i.low);
  CHECK(both[1].low == 1);
  CHECK(both[1].high == 1);
  CHECK(bootstrap_means({std::vector<double>{}})[0].high == 0);
}
