// Cases of the product kernels: sums of products with bands, bias and dropout masks, and what they should be.
#pragma once
#include <algorithm>
#include <array>
#include <cstdio>
#include <vector>

#include "kernels/dropout.h"
#include "kernels/gemm.h"
#include "tests/kernels/kernel_rig.h"
#include "tests/ops/group_rig.h"

namespace kava::test {

struct GemmCase {
  GemmForm form;
  int64_t m, n, k, k2;  // k2: of a second product; 0: none. The mask on an operand is for one product
  bool masked, bias;
  std::vector<Band> bands = {};  // of the last product; b is zero outside them
  int scaled = 1;                // products
  uint32_t threshold = dropout_threshold(0.3);
  int parts = 0;  // 0: in one go
  bool add = false;
};

// Output C. in: a, b, a2, b2, bias, what C is added to; rows of x, the masked operand, are those of c (nn), a (nt) or b (tn).
template <class T>
Matrix gemm_reference(const GemmCase& c, const Matrices& in, const std::vector<int>& keys, double factor) {
  Matrix out(c.m, c.n);
  auto kept = [&](int64_t row, int64_t col) {
    if (!c.masked) return true;
    uint32_t bits[4];
    dropout_bits(bits, dropout_keys(7), 3, 2, keys[static_cast<std::size_t>(2 * row)], keys[static_cast<std::size_t>(2 * row + 1)],
                 static_cast<uint32_t>(col / 8));
    return dropout_keep(bits, static_cast<uint32_t>(col), c.threshold);
  };
  const bool a_by_k = c.form == GemmForm::tn, b_by_k = c.form != GemmForm::nt;
  auto at = [](const Matrix& x, bool by_k, int64_t outer, int64_t k) { return by_k ? x(k, outer) : x(outer, k); };
  for (int64_t i = 0; i < c.m; ++i)
    for (int64_t j = 0; j < c.n; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < c.k; ++k) {
        if (c.form == GemmForm::nt && !kept(i, k)) continue;
        if (c.form == GemmForm::tn && !kept(k, j)) continue;
        sum += at(in[0], a_by_k, i, k) * at(in[1], b_by_k, j, k);
      }
      double second = 0;
      for (int64_t k = 0; k < c.k2; ++k) second += at(in[2], a_by_k, i, k) * at(in[3], b_by_k, j, k);
      for (int scaled = 0; double* x : {&sum, &second}) {
        if (scaled++ == c.scaled) break;
        *x *= c.form == GemmForm::nn && !kept(i, j) ? 0 : factor;
      }
      sum += second;
      out(i, j) = c.add ? stored<float>(in[5](i, j) + sum) : stored<T>(sum + (c.bias ? in[4](0, j) : 0));
    }
  return out;
}

template <class T>
Matrix gemm_kernel(Device& device, const GemmCase& c, const Matrices& in, const std::vector<int>& keys, double factor) {
  Gemm<T> g;
  g.mask = {device.index(keys), 7, 3, 2, c.threshold, 1};
  if (c.add) g.add = device.in_out<float>(in[5]);
  else g.set = device.out<T>(c.m, c.n);
  if (c.parts > 0) g.parts = c.parts, g.partial = device.out<float>(c.parts * c.m, (c.n + 7) / 8 * 8);
  g.m = static_cast<int>(c.m), g.n = static_cast<int>(c.n), g.scaled = c.scaled, g.factor = static_cast<float>(factor), g.masked = c.masked;
  g.then(device.in<T>(in[0]), device.in<T>(in[1]), static_cast<int>(c.k));
  if (c.k2 > 0) g.then(device.in<T>(in[2]), device.in<T>(in[3]), static_cast<int>(c.k2));
  if (c.bias) g.bias = device.in<T>(in[4]).data;
  for (const Band& band : c.bands) g.bands[g.band_count++] = band;
  if (c.form == GemmForm::nt) gemm<GemmForm::nt>(nullptr, g);
  else if (c.form == GemmForm::nn) gemm<GemmForm::nn>(nullptr, g);
  else gemm<GemmForm::tn>(nullptr, g);
  return c.add ? read(g.add, c.m, c.n) : read(g.set, c.m, c.n);
}

template <class T>
Matrices gemm_inputs(const GemmCase& c, unsigned seed) {
  Random random(seed);
  auto operand = [&](bool by_k, int64_t outer, int64_t k) { return stored<T>(by_k ? random.normal(k, outer) : random.normal(outer, k)); };
  const bool a_by_k = c.form == GemmForm::tn, b_by_k = c.form != GemmForm::nt;
  const int64_t k2 = std::max<int64_t>(c.k2, 1);
  return {operand(a_by_k, c.m, c.k), operand(b_by_k, c.n, c.k),        operand(a_by_k, c.m, k2),
          operand(b_by_k, c.n, k2),  stored<T>(random.normal(1, c.n)), stored<float>(random.normal(c.m, c.n))};
}

inline std::vector<int> mask_keys(int64_t rows) {
  std::vector<int> keys;
  for (int64_t r = 0; r < rows; ++r) keys.push_back(static_cast<int>(r / 3)), keys.push_back(static_cast<int>(100 - r));
  return keys;
}

/// The share of what is allowed.
template <class T>
double check_gemm(const GemmCase& c, unsigned seed) {
  const Matrices in = gemm_inputs<T>(c, seed);
  const std::vector<int> keys = mask_keys(std::max({c.m, c.n, c.k}));
  return check_kernel({gemm_reference<double>(c, in, keys, 0.75)}, {gemm_reference<T>(c, in, keys, 0.75)},
                      [&](Device& device) { return Matrices{gemm_kernel<T>(device, c, in, keys, 0.75)}; });
}

template <class T>
void check_gemms(const char* type) {
  double worst = 0;
  for (GemmForm form : {GemmForm::nt, GemmForm::nn, GemmForm::tn})
    for (const auto& [m, n, k, k2] : std::vector<std::array<int64_t, 4>>{{1, 1, 1, 0}, {3, 8, 40, 5}, {64, 64, 64, 0}, {70, 72, 136, 33}})
      for (bool masked : {false, true}) {
        const GemmCase c{form, m, n, k, masked && form != GemmForm::nn ? 0 : k2, masked, k2 > 0};
        INFO("form " << static_cast<int>(form) << ", " << m << " x " << n << " x " << k << " + " << k2 << (masked ? ", masked" : ""));
        worst = std::max(worst, check_gemm<T>(c, static_cast<unsigned>(m + n)));
      }
  std::printf("products, %s: error at most %.2f of what is allowed\n", type, worst);
}

}  // namespace kava::test
