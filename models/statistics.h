// What a result says beyond a share of right answers: how far it may be off, and whether two results differ.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace kava {

struct Interval {
  double low = 0, high = 0;
};

/// Resamples of a bootstrap.
constexpr int64_t kResamples = 2000;

/// 95 % percentile bootstrap intervals of the means of some columns, each with one value for each question. All columns are resampled by
/// the same questions, which are drawn from fixed numbers: the same columns give the same intervals. Columns of no question give [0, 0].
std::vector<Interval> bootstrap_means(const std::vector<std::vector<double>>& columns);

/// Exact two-sided McNemar test on discordant pairs: twice the binomial(n, 1/2) tail of the smaller count, at most 1; rounded once
/// while 128 bits hold the tail's number of splits. Where it is below kLeastP, kLeastP, as a bound.
constexpr double kLeastP = 1e-300;
double mcnemar_p(int64_t only_a, int64_t only_b);

/// "0.0312", or "< 1e-300" for the bound.
std::string p_text(double p);

}  // namespace kava
