// The numbers of draws, and the intervals and tests of results.
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_floating_point.hpp>
#include <cmath>

#include "models/sampling.h"
#include "models/statistics.h"

using namespace kava;
using Catch::Matchers::WithinAbs;

TEST_CASE("a draw's number depends on seed, question, sample and position, each for itself") {
  const uint64_t first = draw_number(42, {1, 2, 3});
  CHECK(draw_number(42, {1, 2, 3}) == first);
  CHECK(draw_number(42, {2, 2, 3}) != first);
  CHECK(draw_number(42, {1, 3, 3}) != first);
  CHECK(draw_number(42, {1, 2, 4}) != first);
  CHECK(draw_number(43, {1, 2, 3}) != first);
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
