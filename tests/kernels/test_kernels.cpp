// The CUDA kernels, run by the emulator, against the cpu backend in f64.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <random>
#include <tuple>
#include <utility>

#include "kernels/dropout.h"
#include "kernels/gemm.h"
#include "kernels/gpu.h"
#include "tests/kernels/kernel_rig.h"
#include "tests/ops/group_rig.h"

using namespace kava;
using namespace kava::test;

namespace {

#define SKIP_IF_UNSUPPORTED() \
  if (!simt::supported()) SKIP("ThreadSanitizer does not know the emulator's fibers")

// ---- attention

struct SegmentSpec {
  std::vector<int> keys;
  int query_begin, queries;
};

/// The last query row belongs to no segment.
struct Layout {
  std::vector<SegmentSpec> segments;
  std::vector<int> group_offsets;
  int64_t step_rows, query_rows;
};

std::vector<int> range(int begin, int end) {
  std::vector<int> v;
  for (int i = begin; i < end; ++i) v.push_back(i);
  return v;
}
std::vector<int> joined(std::vector<int> a, const std::vector<int>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// A question, branches that see some of its rows in another order, a single latent; a sample of one row; one without queries.
Layout tree() {
  return {{{{0, 1, 2, 3}, 0, 4}, {{2, 0, 8, 4, 5}, 4, 2}, {{1, 9}, 6, 1}, {{12}, 7, 1}, {{}, 8, 0}, {{12, 19, 13, 14, 15}, 8, 3}},
          {0, 3, 6},
          20,
          12};
}
// Several tiles of keys and of rows, ends beside the tiles' ends: 130 keys of which 65 are own, then one query over all but every third.
Layout long_segments() {
  Layout l{{{range(0, 130), 0, 65}, {{}, 65, 1}, {joined(range(200, 263), range(264, 274)), 66, 10}}, {0, 2, 3}, 275, 77};
  for (int i = 0; i < 200; ++i)
    if (i % 3) l.segments[1].keys.push_back(199 - i);
  return l;
}

struct Heads {
  int heads, kv_heads, dim;
  double scale() const { return 1 / std::sqrt(static_cast<double>(dim)); }
};

struct AttentionCase {
  Layout layout;
  Heads heads;
};

// Outputs o, lse, dq, dk, dv. in: q, k, v, do, dk before, dv before. T: what stored tensors, and p and ds, are rounded to: products of the
// tensor cores take nothing else. S: likewise for sums.
template <class T, class S>
Matrices attention_reference(const AttentionCase& c, const Matrices& in) {
  const Heads& h = c.heads;
  const Matrix &q = in[0], &k = in[1], &v = in[2], &dout = in[3];
  Matrix o(q.rows, q.cols), lse(q.rows, h.heads), dq(q.rows, q.cols), dk = in[4], dv = in[5];
  auto dot = [&](const Matrix& a, int64_t i, int64_t a_head, const Matrix& b, int64_t j, int64_t b_head) {
    double sum = 0;
    for (int64_t d = 0; d < h.dim; ++d) sum += a(i, a_head * h.dim + d) * b(j, b_head * h.dim + d);
    return sum;
  };
  auto add = [&](Matrix& y, int64_t i, int64_t y_head, double factor, const Matrix& x, int64_t j, int64_t x_head) {
    for (int64_t d = 0; d < h.dim; ++d) y(i, y_head * h.dim + d) += factor * x(j, x_head * h.dim + d);
  };
  for (const SegmentSpec& s : c.layout.segments)
    for (int i = 0; i < s.queries; ++i)
      for (int64_t head = 0; head < h.heads; ++head) {
        const int64_t kv = head / (h.heads / h.kv_heads), row = s.query_begin + i;
        const std::size_t seen = s.keys.size() - static_cast<std::size_t>(s.queries - 1 - i);
        std::vector<double> p(seen);
        double sum = 0;
        for (std::size_t j = 0; j < seen; ++j) sum += p[j] = std::exp(h.scale() * dot(q, row, head, k, s.keys[j], kv));
        lse(row, head) = stored<S>(std::log(sum));
        for (std::size_t j = 0; j < seen; ++j) add(o, row, head, stored<T>(p[j] / sum), v, s.keys[j], kv);
        for (int64_t d = head * h.dim; d < (head + 1) * h.dim; ++d) o(row, d) = stored<T>(o(row, d));
        const double delta = stored<S>(dot(o, row, head, dout, row, head));
        for (std::size_t j = 0; j < seen; ++j) {
          const int64_t key = s.keys[j];
          const double weight = std::exp(h.scale() * dot(q, row, head, k, key, kv) - lse(row, head));
          const double ds = stored<T>(weight * (dot(dout, row, head, v, key, kv) - delta));
          add(dq, row, head, h.scale() * ds, k, key, kv);
          add(dk, key, kv, h.scale() * ds, q, row, head);
          add(dv, key, kv, stored<T>(weight), dout, row, head);
        }
      }
  return {o, lse, stored<T>(dq), stored<S>(dk), stored<S>(dv)};
}

struct FlatLayout {
  std::vector<int> offsets = {0}, keys, begin, count, group_offsets;
  int most_queries = 0, most_keys = 0;
  explicit FlatLayout(const Layout& l) : group_offsets(l.group_offsets) {
    for (const SegmentSpec& s : l.segments) {
      keys.insert(keys.end(), s.keys.begin(), s.keys.end());
      offsets.push_back(static_cast<int>(keys.size()));
      begin.push_back(s.query_begin);
      count.push_back(s.queries);
      most_queries = std::max(most_queries, s.queries);
      most_keys = std::max(most_keys, static_cast<int>(s.keys.size()));
    }
  }
};

Matrices attention_cpu(const AttentionCase& c, const Matrices& in) {
  Rig rig(2, DType::f64, DType::f64, 0);
  const FlatLayout l(c.layout);
  auto index = [&](const std::vector<int>& v) { return rig.in(row_of(v), Kind::i32); };
  Segments s;
  s.key_offsets = index(l.offsets), s.keys = index(l.keys), s.query_begin = index(l.begin), s.query_count = index(l.count);
  s.group_offsets = index(l.group_offsets);
  s.count = static_cast<int64_t>(l.begin.size()), s.groups = static_cast<int64_t>(l.group_offsets.size()) - 1, s.most_keys = l.most_keys;
  s.most_queries = l.most_queries;
  const Heads& h = c.heads;
  Tensor q = rig.in(in[0]), k = rig.in(in[1]), v = rig.in(in[2]), dout = rig.in(in[3]), dk = rig.in_out(in[4]), dv = rig.in_out(in[5]);
  Tensor o = rig.in_out(Matrix(in[0].rows, in[0].cols)), lse = rig.in_out(Matrix(in[0].rows, h.heads)),
         dq = rig.in_out(Matrix(in[0].rows, in[0].cols));
  rig.ops.attention_fwd(rig.arena, o, lse, q, k, v, s, h.heads, h.kv_heads, h.scale());
  rig.ops.attention_bwd(rig.arena, dq, dk, dv, dout, o, lse, q, k, v, s, h.heads, h.kv_heads, h.scale());
  return read_all(rig, {o, lse, dq, dk, dv});
}

/// The rows of segments; the last row must still be NaN and becomes zero, as in the reference.
Matrix without_last_row(Matrix m) {
  for (int64_t c = 0; c < m.cols; ++c) {
    REQUIRE(std::isnan(m(m.rows - 1, c)));
    m(m.rows - 1, c) = 0;
  }
  return m;
}

SegmentLists lists(Device& device, const FlatLayout& l) {
  return {device.index(l.offsets),
          device.index(l.keys),
          device.index(l.begin),
          device.index(l.count),
          device.index(l.group_offsets),
          static_cast<int>(l.begin.size()),
          static_cast<int>(l.group_offsets.size()) - 1,
          l.most_queries};
}

template <class T>
Matrices attention_kernels(const AttentionCase& c, const Matrices& in, Device& device) {
  const FlatLayout l(c.layout);
  const Heads& h = c.heads;
  const SegmentLists segments = lists(device, l);
  const AttentionDims dims{h.heads, h.kv_heads, h.dim, static_cast<float>(h.scale())};
  const int64_t n = in[0].rows, width = in[0].cols, step_rows = in[1].rows, kv_width = in[1].cols;
  const Rows<const T> q = device.in<T>(in[0]), k = device.in<T>(in[1]), v = device.in<T>(in[2]), dout = device.in<T>(in[3]);
  const Rows<float> dk = device.in_out<float>(in[4]), dv = device.in_out<float>(in[5]);
  const Rows<T> o = device.out<T>(n, width), dq = device.out<T>(n, width);
  const Rows<float> lse = device.out<float>(n, h.heads), delta = device.out<float>(n, std::is_same_v<T, float> ? 2 * h.heads : h.heads);
  attention_fwd<T>(nullptr, o, lse, q, k, v, segments, dims);
  attention_bwd<T>(nullptr, dq, dk, dv, delta, dout, o, lse, q, k, v, segments, dims);
  return {without_last_row(read(o, n, width)), without_last_row(read(lse, n, h.heads)), without_last_row(read(dq, n, width)),
          read(dk, step_rows, kv_width), read(dv, step_rows, kv_width)};
}

/// The share of what is allowed. size: of q, of which the scores have the size.
template <class T>
double check_attention_case(const AttentionCase& c, unsigned seed, double size) {
  Random random(seed);
  const int64_t width = c.heads.heads * c.heads.dim, kv_width = c.heads.kv_heads * c.heads.dim;
  Matrices in = {random.normal(c.layout.query_rows, width, size),  random.normal(c.layout.step_rows, kv_width),
                 random.normal(c.layout.step_rows, kv_width),      random.normal(c.layout.query_rows, width),
                 random.normal(c.layout.step_rows, kv_width, 0.1), random.normal(c.layout.step_rows, kv_width, 0.1)};
  for (std::size_t i = 0; i < 4; ++i) in[i] = stored<T>(in[i]);
  for (std::size_t i = 4; i < 6; ++i) in[i] = stored<float>(in[i]);
  const Matrices exact = attention_cpu(c, in);
  check_reference(attention_reference<double, double>(c, in), exact);
  return check_kernel(exact, attention_reference<T, float>(c, in), [&](Device& device) { return attention_kernels<T>(c, in, device); });
}

template <class T>
void check_attention(const char* type) {
  unsigned seed = 31;
  double worst = 0;
  const AttentionCase cases[] = {{tree(), {1, 1, 8}},          {tree(), {6, 2, 16}},          {tree(), {4, 4, 6}},
                                 {tree(), {3, 1, 32}},         {tree(), {2, 1, 128}},         {tree(), {2, 2, 1}},
                                 {long_segments(), {2, 1, 8}}, {long_segments(), {3, 1, 64}}, {long_segments(), {1, 1, 100}},
                                 {tree(), {14, 2, 64}}};
  for (const AttentionCase& c : cases) {
    INFO("heads " << c.heads.heads << "/" << c.heads.kv_heads << " of " << c.heads.dim << ", step rows " << c.layout.step_rows);
    worst = std::max(worst, check_attention_case<T>(c, seed++, 1));
  }
  std::printf("attention kernels, %s: error at most %.2f of what is allowed\n", type, worst);
}

// ---- sums of products

struct GemmCase {
  GemmForm form;
  int64_t m, n, k, k2;  // k2: of a second product; 0: none. The mask on an operand is for one product
  bool masked, bias;
  std::vector<Band> bands = {};  // of the last product; b is zero outside them
  int scaled = 1;                // products
  uint32_t threshold = dropout_threshold(0.3);
};

// Output C. in: a, b, a2, b2, bias; rows of x, the masked operand, are those of c (nn), a (nt) or b (tn).
template <class T>
Matrix gemm_reference(const GemmCase& c, const Matrices& in, const std::vector<int>& keys, double factor) {
  Matrix out(c.m, c.n);
  auto kept = [&](int64_t row, int64_t col) {
    if (!c.masked) return true;
    uint32_t bits[4];
    dropout_bits(bits, 7, 3, 2, keys[static_cast<std::size_t>(2 * row)], keys[static_cast<std::size_t>(2 * row + 1)],
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
      out(i, j) = stored<T>(sum + (c.bias ? in[4](0, j) : 0));
    }
  return out;
}

template <class T>
Matrix gemm_kernel(Device& device, const GemmCase& c, const Matrices& in, const std::vector<int>& keys, double factor) {
  GemmBatch<T> batch;
  batch.mask = {device.index(keys), 7, 3, 2, c.threshold, 1};
  Gemm<T>& g = batch.gemms[batch.count++];
  g.set = device.out<T>(c.m, c.n);
  g.m = static_cast<int>(c.m), g.n = static_cast<int>(c.n), g.scaled = c.scaled, g.factor = static_cast<float>(factor), g.masked = c.masked;
  g.then(device.in<T>(in[0]), device.in<T>(in[1]), static_cast<int>(c.k));
  if (c.k2 > 0) g.then(device.in<T>(in[2]), device.in<T>(in[3]), static_cast<int>(c.k2));
  if (c.bias) g.bias = device.in<T>(in[4]).data;
  for (const Band& band : c.bands) g.bands[g.band_count++] = band;
  if (c.form == GemmForm::nt) gemm<GemmForm::nt>(nullptr, batch);
  else if (c.form == GemmForm::nn) gemm<GemmForm::nn>(nullptr, batch);
  else gemm<GemmForm::tn>(nullptr, batch);
  return read(g.set, c.m, c.n);
}

template <class T>
Matrices gemm_inputs(const GemmCase& c, unsigned seed) {
  Random random(seed);
  auto operand = [&](bool by_k, int64_t outer, int64_t k) { return stored<T>(by_k ? random.normal(k, outer) : random.normal(outer, k)); };
  const bool a_by_k = c.form == GemmForm::tn, b_by_k = c.form != GemmForm::nt;
  const int64_t k2 = std::max<int64_t>(c.k2, 1);
  return {operand(a_by_k, c.m, c.k), operand(b_by_k, c.n, c.k), operand(a_by_k, c.m, k2), operand(b_by_k, c.n, k2),
          stored<T>(random.normal(1, c.n))};
}

std::vector<int> mask_keys(int64_t rows) {
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

/// Counts what is launched on it and runs none of it.
struct Unrun : CUstream_st {
  int launches = 0;
  void queue(std::function<void()>) override { ++launches; }
  void queue_until(std::function<bool()>) override {}
};

}  // namespace

TEST_CASE("attention kernels are as exact as bf16 tensor cores allow and the same under every schedule") {
  SKIP_IF_UNSUPPORTED();
  check_attention<bf16>("bf16");
}

TEST_CASE("attention kernels in f32 are exact and the same under every schedule") {
  SKIP_IF_UNSUPPORTED();
  check_attention<float>("f32");
}

TEST_CASE("attention kernels give the same output where no lse is wanted") {
  SKIP_IF_UNSUPPORTED();
  simt::set_schedule({});
  Random random(33);
  const Heads heads{4, 2, 16};
  const FlatLayout l(tree());
  const Matrix q = random.normal(12, 64), k = random.normal(20, 32), v = random.normal(20, 32);
  auto output = [&]<class T>(bool with_lse) {
    Device device(true);
    const Rows<T> o = device.out<T>(12, 64);
    attention_fwd<T>(nullptr, o, with_lse ? device.out<float>(12, heads.heads) : Rows<float>{}, device.in<T>(q), device.in<T>(k),
                     device.in<T>(v), lists(device, l), {heads.heads, heads.kv_heads, heads.dim, static_cast<float>(heads.scale())});
    return without_last_row(read(o, 12, 64)).at;
  };
  CHECK(output.operator()<bf16>(true) == output.operator()<bf16>(false));
  CHECK(output.operator()<float>(true) == output.operator()<float>(false));
}

TEST_CASE("attention gives queries and keys no gradient where all values are equal, whatever the size of scores") {
  SKIP_IF_UNSUPPORTED();
  simt::set_schedule({});
  Random random(34);
  // The sum of a row's weights is then as far from 1 as the rounding of lse, some 1e-4, makes it.
  const AttentionCase c{long_segments(), {2, 1, 16}};
  const Matrices in = {random.normal(77, 32, 400), random.normal(275, 16), Matrix(275, 16, 1),
                       random.normal(77, 32),      Matrix(275, 16),        Matrix(275, 16)};
  Device device(true);
  const Matrices out = attention_kernels<float>(c, in, device);
  // At most a few roundings (2^-24) of dp, some 12, times queries of some 1,400 and the scale of a quarter; by that sum it were 0.1 and
  // more.
  for (std::size_t i : {2u, 3u})
    for (double v : out[i].at) REQUIRE(std::fabs(v) < 1e-3);
  // Weights are divided by their sum: of n equal scores each is 1/n, though lse is rounded. Queries have no last column, keys differ there.
  Matrices equal = in;
  for (int64_t r = 0; r < 77; ++r)
    for (int64_t d = 0; d < 32; ++d) equal[0](r, d) = d % 16 == 0 ? stored<float>(in[0](r, d) * 10) : 0;
  for (int64_t r = 0; r < 275; ++r)
    for (int64_t d = 0; d < 16; ++d) equal[1](r, d) = d == 0 ? 1 : d == 15 ? in[1](r, d) : 0;
  equal[2] = stored<float>(random.normal(275, 16));
  Device other(true);
  const Matrices got = attention_kernels<float>(c, equal, other);
  for (const SegmentSpec& s : c.layout.segments)
    for (int i = 0; i < s.queries; ++i)
      for (int64_t head = 0; head < 2; ++head) {
        const std::size_t seen = s.keys.size() - static_cast<std::size_t>(s.queries - 1 - i);
        const int64_t row = s.query_begin + i;
        double mean = 0, want = 0, size = 0;
        std::vector<double> dp;
        for (std::size_t j = 0; j < seen; ++j) {
          double sum = 0;
          for (int64_t d = 0; d < 16; ++d) sum += equal[3](row, head * 16 + d) * equal[2](s.keys[j], d);
          dp.push_back(sum), mean += sum / static_cast<double>(seen);
        }
        for (std::size_t j = 0; j < seen; ++j) {
          const double term = c.heads.scale() / static_cast<double>(seen) * (dp[j] - mean) * equal[1](s.keys[j], 15);
          want += term, size += std::fabs(term);
        }
        REQUIRE(std::fabs(got[2](row, head * 16 + 15) - want) <= 3e-6 * size);
      }
  // Each row adds its dout to the keys' dv, by weights whose sum is 1.
  for (int64_t col = 0; col < 16; ++col) {
    double sum = 0, want = 0;
    for (int64_t r = 0; r < 275; ++r) sum += out[4](r, col);
    for (int64_t r = 0; r < 76; ++r) want += in[3](r, col) + in[3](r, 16 + col);
    REQUIRE(std::fabs(sum - want) < 1e-4);
  }
}

TEST_CASE("kernels take any one matrix whose rows, or whose begin, are not aligned") {
  SKIP_IF_UNSUPPORTED();
  simt::set_schedule({});
  auto check = [](const Matrices& exact, const Matrices& rounded, const std::function<Matrices(Device&)>& kernel) {
    Device even(true);
    kernel(even);
    for (std::size_t number = 0; number < even.matrices(); ++number)
      for (Device::Odd how : {Device::Odd::rows, Device::Odd::begin}) {
        INFO("matrix " << number << (how == Device::Odd::rows ? ", rows" : ", begin"));
        Device device(number, how);
        const Matrices got = kernel(device);
        REQUIRE(device.guards_hold());
        check_errors(got, exact, rounded, 1e-12);
      }
  };
  Random random(35);
  const AttentionCase c{tree(), {3, 1, 32}};
  Matrices in = {random.normal(12, 96), random.normal(20, 32), random.normal(20, 32),
                 random.normal(12, 96), random.normal(20, 32), random.normal(20, 32)};
  for (Matrix& m : in) m = stored<bf16>(m);
  check(attention_cpu(c, in), attention_reference<bf16, float>(c, in), [&](Device& d) { return attention_kernels<bf16>(c, in, d); });
  for (GemmForm form : {GemmForm::nt, GemmForm::nn, GemmForm::tn}) {
    INFO("form " << static_cast<int>(form));
    const GemmCase product{form, 40, 72, 48, 24, false, true};
    const Matrices operands = gemm_inputs<bf16>(product, 36);
    check({gemm_reference<double>(product, operands, {}, 0.75)}, {gemm_reference<bf16>(product, operands, {}, 0.75)}, [&](Device& d) {
      return Matrices{gemm_kernel<bf16>(d, product, operands, {0, 0}, 0.75)};
    });
  }
  const Matrix z = stored<float>(random.normal(3, 40));
  Matrix gradient(3, 40);
  for (int64_t r = 0; r < 3; ++r) {
    double sum = 0;
    for (int64_t c = 0; c < 40; ++c) sum += std::exp(z(r, c));
    for (int64_t c = 0; c < 40; ++c) gradient(r, c) = std::exp(z(r, c)) / sum - (c == 7 ? 1 : 0);
  }
  check({gradient}, {stored<bf16>(gradient)}, [&](Device& d) {
    HeadOutputs<bf16> out;
    out.dz = d.out<bf16>(3, 40);
    head_rows<bf16>(nullptr, out, d.in<float>(z), d.index({7, 7, 7}), d.index({0, 0, 0}), {1, 1}, 3, 40);
    return Matrices{read(out.dz, 3, 40)};
  });
}

TEST_CASE("a gradient takes the place of its logits under every schedule") {
  SKIP_IF_UNSUPPORTED();
  constexpr int64_t kVocabulary = 5000;  // three stretches of a block, the last one not whole
  Random random(37);
  const Matrix logits = stored<float>(random.normal(2, kVocabulary));
  Matrix gradient(2, kVocabulary);
  for (int64_t r = 0; r < 2; ++r) {
    double sum = 0;
    for (int64_t c = 0; c < kVocabulary; ++c) sum += std::exp(logits(r, c));
    for (int64_t c = 0; c < kVocabulary; ++c) gradient(r, c) = std::exp(logits(r, c)) / sum - (c == 4999 ? 1 : 0);
  }
  check_kernel({gradient}, {stored<bf16>(gradient)}, [&](Device& d) {
    const Rows<float> z = d.out<float>(2, kVocabulary);
    for (int64_t r = 0; r < 2; ++r)
      for (int64_t c = 0; c < kVocabulary; ++c) z[r][c] = static_cast<float>(logits(r, c));
    HeadOutputs<bf16> out;
    out.dz = {reinterpret_cast<bf16*>(z.data), 2 * z.stride};
    head_rows<bf16>(nullptr, out, {z.data, z.stride}, d.index({4999, 4999}), d.index({0, 0}), {1, 1}, 2, kVocabulary);
    return Matrices{read(out.dz, 2, kVocabulary)};
  });
}

TEST_CASE("rows at multiples of 16 bytes are moved 16 bytes at a time") {
  if (!simt::supported() || !simt::watchable()) SKIP("kernels tell their accesses in builds without a sanitizer alone");
  simt::set_schedule({});
  Random random(38);
  const Matrix x = stored<bf16>(random.normal(32, 64));
  auto requests = [&](bool aligned) {
    Device device(aligned);
    const Rows<bf16> y = device.out<bf16>(32, 64);
    simt::take_counts();
    simt::set_watched({.counts = true});
    copy_rows<bf16, bf16>(nullptr, y, device.in<bf16>(x), 32, 64);
    simt::set_watched({});
    CHECK(read(y, 32, 64).at == x.at);
    return simt::take_counts().at(0).total.requests;
  };
  CHECK(requests(true) == 2 * 32 * 64 / 8 / 32);
  CHECK(requests(false) == 2 * 32 * 64 / 32);
}

TEST_CASE("products copy, meet and multiply no more than what is not zero by their bands") {
  if (!simt::supported() || !simt::watchable()) SKIP("kernels tell their accesses in builds without a sanitizer alone");
  simt::set_schedule({});
  struct Stretch {
    int64_t begin, end;
  };
  // Bands of the second product, and what of its k they need, in whole sixteens, for each tile of 64 columns.
  struct Case {
    int64_t m, n, k, k2;
    std::vector<Band> bands;
    std::vector<Stretch> stretches;
  };
  const Case cases[] = {{40, 72, 48, 0, {}, {}},
                        {64, 128, 32, 0, {}, {}},
                        {32, 192, 32, 128, {{0, 64, 0, 40}, {64, 160, 40, 96}}, {{0, 48}, {32, 96}, {32, 96}}},
                        {97, 160, 16, 120, {{0, 100, 8, 56}, {100, 128, 64, 120}, {128, 160, 100, 120}}, {{0, 64}, {0, 120}, {96, 120}}},
                        {16, 64, 16, 120, {{0, 32, 64, 120}, {32, 64, 8, 40}}, {{0, 120}}},
                        {16, 192, 32, 64, {{64, 128, 0, 64}}, {{0, 0}, {0, 64}, {0, 0}}}};
  for (const Case& c : cases)
    for (bool aligned : {true, false}) {
      INFO(c.m << " x " << c.n << " x " << c.k << " + " << c.k2 << (aligned ? "" : ", odd"));
      GemmCase product{GemmForm::nt, c.m, c.n, c.k, c.k2, false, false};
      Matrices in = gemm_inputs<bf16>(product, 39);
      auto in_band = [&](int64_t n, int64_t k) {
        return std::any_of(c.bands.begin(), c.bands.end(),
                           [&](const Band& b) { return n >= b.n_begin && n < b.n_end && k >= b.k_begin && k < b.k_end; });
      };
      for (int64_t n = 0; n < c.n && !c.bands.empty(); ++n)
        for (int64_t k = 0; k < c.k2; ++k)
          if (!in_band(n, k)) in[3](n, k) = 0;
      int64_t copies = 0, barriers = 0, mma = 0;
      for (int64_t row = 0; row < c.m; row += 64)
        for (int64_t col = 0; col < c.n; col += 64) {
          const int64_t warps = (std::min<int64_t>(64, c.m - row) + 31) / 32 * ((std::min<int64_t>(64, c.n - col) + 31) / 32);
          auto add = [&](int64_t k) {
            const int64_t steps = (k + 31) / 32;
            copies += (steps + 2) * 2 * 64 * 32 / 8, barriers += steps + 1, mma += warps * steps * 2 * 2 * 4;
          };
          add(c.k);
          if (c.k2 == 0) continue;
          const Stretch s = c.bands.empty() ? Stretch{0, c.k2} : c.stretches[static_cast<std::size_t>(col / 64)];
          add(s.end - s.begin);
        }
      product.bands = c.bands;
      simt::take_counts();
      simt::set_watched({.counts = true});
      Device device(aligned);
      const Matrix got = gemm_kernel<bf16>(device, product, in, {0, 0}, 1);
      simt::set_watched({});
      const simt::LaunchCounts counts = simt::take_counts().at(0);
      CHECK(counts.copies == (aligned ? copies : 0));
      CHECK(counts.barriers == barriers);
      CHECK(counts.mma == mma);
      CHECK(normalised_error(got, gemm_reference<bf16>(product, in, {}, 1)) < 1e-4);
    }
}

TEST_CASE("products scale as many of their parts as they are told, and keep what lies at the threshold") {
  SKIP_IF_UNSUPPORTED();
  auto check = [](const GemmCase& c) {
    INFO("form " << static_cast<int>(c.form) << ", scaled " << c.scaled << ", threshold " << c.threshold);
    check_gemm<bf16>(c, 40);
    check_gemm<float>(c, 40);
  };
  for (int scaled : {0, 1, 2}) check({GemmForm::nn, 40, 24, 16, 40, false, false, {}, scaled});
  // Half-words of the mask at even and odd columns of rows that each form has; row 1 has the keys (0, 99).
  uint32_t bits[4];
  dropout_bits(bits, 7, 3, 2, 0, 99, 0);
  for (GemmForm form : {GemmForm::nt, GemmForm::nn, GemmForm::tn})
    for (const uint32_t threshold : {bits[1] & 0xffff, bits[2] >> 16}) check({form, 3, 8, 8, 0, true, false, {}, 1, threshold});
}

TEST_CASE("a product reads no problem beyond those of its batch") {
  Unrun none;
  const simt::GuardedBytes memory(sizeof(GemmBatch<bf16>));
  for (int m : {0, 3}) {
    auto* batch = new (memory.data()) GemmBatch<bf16>;
    Gemm<bf16>& g = batch->gemms[batch->count++];
    g.m = m, g.n = 3;
    g.then({nullptr, 8}, {nullptr, 8}, 8);
    gemm<GemmForm::nt>(&none, *batch);
    CHECK(none.launches == (m == 0 ? 0 : 1));
  }
}

TEST_CASE("tiles of 128 are taken from 2048 x 2048 on") {
  if (!simt::supported() || !simt::watchable()) SKIP("kernels tell their accesses in builds without a sanitizer alone");
  simt::set_schedule({});
  for (int64_t n : {2040, 2048}) {
    GemmBatch<bf16> batch;
    Device device(true);
    Gemm<bf16>& g = batch.gemms[batch.count++];
    g.m = 2048, g.n = static_cast<int>(n), g.set = device.out<bf16>(2048, n);
    g.then(device.in<bf16>(Matrix(2048, 16)), device.in<bf16>(Matrix(n, 16)), 16);
    simt::take_counts();
    simt::set_watched({.counts = true, .most_blocks = 1});
    gemm<GemmForm::nt>(nullptr, batch);
    simt::set_watched({});
    CHECK(simt::take_counts().at(0).blocks == (n == 2048 ? 16 * 16 : 32 * 32));
  }
}

TEST_CASE("attention copies, meets and multiplies no more than what its tiles see") {
  if (!simt::supported() || !simt::watchable()) SKIP("kernels tell their accesses in builds without a sanitizer alone");
  simt::set_schedule({});
  Random random(37);
  // Ends at and beside those of sixteens and of tiles; keys without queries; queries without keys before them.
  Layout l{{{range(0, 64), 0, 64},
            {range(64, 129), 64, 3},
            {range(130, 162), 67, 16},
            {range(0, 20), 83, 0},
            {range(163, 291), 83, 33},
            {range(300, 332), 116, 15}},
           {0, 1, 4, 5, 6},
           332,
           132};
  for (const Heads heads : {Heads{1, 1, 16}, Heads{4, 2, 32}, Heads{3, 1, 64}, Heads{2, 1, 128}}) {
    INFO("heads " << heads.heads << "/" << heads.kv_heads << " of " << heads.dim);
    struct Work {
      int64_t copies = 0, barriers = 0, mma = 0;
      bool operator==(const Work&) const = default;
    } forward, queries, keys;
    const int64_t D = heads.dim, group = heads.heads / heads.kv_heads, steps = D / 16, parts = D > 64 ? 2 : 1;
    auto sixteens = [](int64_t n) { return (n + 15) / 16; };
    for (const SegmentSpec& s : l.segments) {
      const int64_t n = s.queries * group, all = std::ssize(s.keys);
      auto seen = [&](int64_t row) { return all - s.queries + 1 + std::min(row, n - 1) / group; };
      for (int64_t first = 0; first < n; first += 64) {
        const int64_t tiles = (seen(first + 63) + 63) / 64;
        forward.copies += (64 + tiles * 2 * 64) * D / 8, queries.copies += (2 * 64 + tiles * 2 * 64) * D / 8;
        forward.barriers += 2 * tiles, queries.barriers += 2 * tiles;
        for (int64_t row = first; row < std::min(first + 64, n); row += 16)
          forward.mma += 4 * steps * sixteens(seen(row + 15)), queries.mma += 6 * steps * sixteens(seen(row + 15));
      }
      for (int64_t first_key = 0; n > 0 && first_key < all; first_key += 64) {
        int64_t row = 0;
        while (seen(row) <= first_key) ++row;
        const int64_t tiles = (n + 31) / 32 - row / 32;
        keys.copies += (2 * 64 + tiles * 2 * 32) * D / 8;
        keys.barriers += (parts == 2 ? 3 : 2) * tiles;
        for (int64_t key = first_key; key < std::min(first_key + 64, all); key += 16)
          for (int64_t r = row / 32 * 32; r < n; r += 16)
            if (seen(r + 15) > key) keys.mma += 8 * steps;
      }
    }
    for (Work* w : {&forward, &queries, &keys})
      for (int64_t* x : {&w->copies, &w->barriers, &w->mma}) *x *= heads.kv_heads;
    const int64_t width = heads.heads * D, kv = heads.kv_heads * D;
    const Matrices in = {random.normal(132, width), random.normal(332, kv), random.normal(332, kv),
                         random.normal(132, width), Matrix(332, kv),        Matrix(332, kv)};
    simt::take_counts();
    simt::set_watched({.counts = true});
    Device device(true);
    attention_kernels<bf16>({l, heads}, in, device);
    simt::set_watched({});
    const std::vector<simt::LaunchCounts> counts = simt::take_counts();
    REQUIRE(counts.size() == 4);
    auto check = [](const simt::LaunchCounts& c, const Work& want) {
      INFO(c.kernel);
      CHECK(c.copies == want.copies);
      CHECK(c.barriers == want.barriers);
      CHECK(c.mma == want.mma);
    };
    check(counts[0], forward), check(counts[2], queries), check(counts[3], keys);
  }
}

TEST_CASE("kernels launch nothing where there is nothing to do") {
  Unrun none;
  const Rows<float> x{nullptr, 8};
  const Rows<const float> cx = x;
  const float weights[2] = {1, 1};
  const RopeTables at{nullptr, cx, cx};
  fill_rows<float>(&none, x, 0, 0, 8), fill_rows<float>(&none, x, 0, 3, 0), copy_rows<float, float>(&none, x, cx, 0, 8);
  embed_bwd(&none, x, x, cx, nullptr, 0, 8), embed_bwd(&none, x, x, cx, nullptr, 3, 0);
  add_rms_norm_fwd<float>(&none, x, {}, {}, cx, {}, nullptr, 0, 0, 8);
  rms_norm_bwd<float, float>(&none, x, nullptr, nullptr, cx, cx, cx, nullptr, 0, 8);
  add_layer_norm_fwd<float>(&none, x, {}, x, x, cx, {}, nullptr, nullptr, 0, 0, 8);
  layer_norm_bwd<float, float>(&none, x, nullptr, nullptr, nullptr, cx, cx, cx, cx, nullptr, 0, 8);
  rope<float, float>(&none, x, cx, nullptr, cx, cx, 0, 2, 8, false);
  norm_rope_fwd<float>(&none, x, {}, cx, nullptr, at, 0, 0, 2, 8);
  norm_rope_bwd<float, float>(&none, x, nullptr, nullptr, cx, cx, cx, nullptr, at, 0, 2, 8);
  head_rows<float>(&none, {}, cx, nullptr, nullptr, weights, 0, 8);
  head_loss(&none, nullptr, nullptr, nullptr, 0), head_correct(&none, nullptr, nullptr, nullptr, 0);
  distill<float>(&none, nullptr, {}, nullptr, cx, cx, nullptr, nullptr, GroupDistance::mse, 1, 1, 0, 4, 8);
  bias_bwd<float>(&none, nullptr, cx, 0, 8), bias_bwd<float>(&none, nullptr, cx, 3, 0);
  for (const auto& [samples, kv_heads] : {std::pair{0, 2}, {3, 0}}) {
    RkvDims dims{.samples = samples, .heads = 2, .kv_heads = kv_heads, .head_dim = 8, .latents = 2, .trace_tokens = 4};
    rkv_select<float>(&none, {}, nullptr, {}, dims);
  }
  for (const auto& [count, groups, queries] : {std::tuple{0, 1, 1}, {1, 0, 1}, {1, 1, 0}}) {
    SegmentLists lists;
    lists.count = count, lists.groups = groups, lists.most_queries = queries;
    attention_fwd<bf16>(&none, {}, {}, {}, {}, {}, lists, {2, 1, 64, 1.f});
    attention_fwd<float>(&none, {}, {}, {}, {}, {}, lists, {2, 1, 64, 1.f});
    attention_bwd<bf16>(&none, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, lists, {2, 1, 64, 1.f});
    attention_bwd<float>(&none, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, lists, {2, 1, 64, 1.f});
  }
  for (const auto& [m, n] : {std::pair{0, 3}, {3, 0}}) {
    GemmBatch<float> batch;
    batch.gemms[batch.count++].m = m, batch.gemms[0].n = n;
    gemm<GemmForm::nt>(&none, batch);
    gemm<GemmForm::nt>(&none, GemmBatch<float>{});
  }
  CHECK(none.launches == 0);
  // What is left of a launcher's work.
  auto launched = [&] { return std::exchange(none.launches, 0); };
  moments<float>(&none, nullptr, nullptr, cx, nullptr, 0, 4, 8);
  CHECK(launched() == 1);
  sum_squares<float>(&none, nullptr, nullptr, static_cast<const float*>(nullptr), 0);
  CHECK(launched() == 1);
  adamw(&none, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, {}, 0);
  CHECK(launched() == 1);
  rms_norm_bwd<float, float>(&none, x, nullptr, nullptr, cx, cx, cx, nullptr, 3, 8);
  CHECK(launched() == 1);
  for (const auto& [w, b] : {std::pair{true, false}, {false, true}}) {
    float gain;
    layer_norm_bwd<float, float>(&none, x, w ? &gain : nullptr, b ? &gain : nullptr, nullptr, cx, cx, cx, cx, nullptr, 3, 8);
    CHECK(launched() == 3);
  }
}

TEST_CASE("kernels take the largest counts that they say, and refuse the next") {
  Unrun none;
  const Rows<float> x{nullptr, 8};
  const Rows<const float> cx = x;
  const int64_t most = int64_t{1} << 31;
  CHECK_NOTHROW(copy_rows<float, float>(&none, x, cx, most - 1, 8));
  CHECK_THROWS_AS((copy_rows<float, float>(&none, x, cx, most, 8)), std::invalid_argument);
  CHECK_NOTHROW(copy_rows<float, float>(&none, x, cx, 1, kLongestRow));
  CHECK_THROWS_AS((copy_rows<float, float>(&none, x, cx, 1, kLongestRow + 1)), std::invalid_argument);
  // Of two bytes as many columns are filled in whole chunks; of four element by element.
  CHECK_NOTHROW(fill_rows<bf16>(&none, {nullptr, 8}, {}, 1, kLongestRow));
  CHECK_NOTHROW(fill_rows<float>(&none, x, 0, 1, kLongestRow));
  CHECK_NOTHROW((rope<float, float>(&none, x, cx, nullptr, cx, cx, most - 1, 2, 8, false)));
  CHECK_THROWS_AS((rope<float, float>(&none, x, cx, nullptr, cx, cx, most, 2, 8, false)), std::invalid_argument);
  const RopeTables at{nullptr, cx, cx};
  CHECK_NOTHROW(norm_rope_fwd<float>(&none, x, {}, cx, nullptr, at, 0, most - 1, 8, 8));
  CHECK_THROWS_AS(norm_rope_fwd<float>(&none, x, {}, cx, nullptr, at, 0, most, 8, 8), std::invalid_argument);
  for (const AttentionDims& dims : {AttentionDims{2, 2, 1, 1.f}, AttentionDims{1, 1, 128, 1.f}, AttentionDims{6, 3, 64, 1.f}})
    CHECK_NOTHROW(attention_fwd<bf16>(&none, {}, {}, {}, {}, {}, {}, dims));
}

TEST_CASE("kernels refuse dimensions that they do not take and have nothing to do without rows") {
  for (const AttentionDims& dims : {AttentionDims{2, 1, 129, 1.f}, AttentionDims{2, 1, 0, 1.f}, AttentionDims{3, 2, 64, 1.f},
                                    AttentionDims{0, 1, 64, 1.f}, AttentionDims{2, 0, 64, 1.f}, AttentionDims{0, 0, 64, 1.f}}) {
    CHECK_THROWS_AS(attention_fwd<bf16>(nullptr, {}, {}, {}, {}, {}, {}, dims), std::invalid_argument);
    CHECK_THROWS_AS(attention_bwd<float>(nullptr, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, dims), std::invalid_argument);
  }
  CHECK_THROWS_AS(fill_rows(nullptr, Rows<float>{}, 0.f, int64_t{1} << 31, 1), std::invalid_argument);
  CHECK_THROWS_AS(fill_rows(nullptr, Rows<float>{}, 0.f, 1, kLongestRow + 1), std::invalid_argument);
  CHECK_NOTHROW(attention_fwd<bf16>(nullptr, {}, {}, {}, {}, {}, {}, {2, 1, 64, 1.f}));
  CHECK_NOTHROW(attention_bwd<float>(nullptr, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {2, 1, 64, 1.f}));
}

TEST_CASE("product kernels are as exact as bf16 tensor cores allow and the same under every schedule") {
  SKIP_IF_UNSUPPORTED();
  check_gemms<bf16>("bf16");
}

TEST_CASE("product kernels in f32 are exact and the same under every schedule") {
  SKIP_IF_UNSUPPORTED();
  check_gemms<float>("f32");
}

TEST_CASE("kernels are exact at sizes drawn around the edges of tiles (KAVA_SEED draws others)") {
  SKIP_IF_UNSUPPORTED();
  const char* text = std::getenv("KAVA_SEED");
  const unsigned seed = text ? static_cast<unsigned>(std::strtoul(text, nullptr, 10)) : 1;
  std::printf("kernels at drawn sizes: KAVA_SEED=%u\n", seed);
  std::mt19937 engine(seed);
  auto below = [&](int n) { return static_cast<int>(engine() % static_cast<unsigned>(n)); };
  auto at_edge = [&](std::initializer_list<int> tiles) { return tiles.begin()[below(static_cast<int>(tiles.size()))] + below(3) - 1; };
  for (const GemmForm form : {GemmForm::nt, GemmForm::nn, GemmForm::tn}) {
    const bool masked = below(2) == 1;
    const GemmCase c{form,
                     at_edge({16, 32, 64, 128}),
                     at_edge({8, 32, 64, 128}),
                     at_edge({16, 32, 96}),
                     masked && form != GemmForm::nn ? 0 : below(2) * 33,
                     masked,
                     below(2) == 1};
    INFO("KAVA_SEED " << seed << ", form " << static_cast<int>(form) << ", " << c.m << " x " << c.n << " x " << c.k << " + " << c.k2);
    check_gemm<bf16>(c, seed);
  }
  for (int draw = 0; draw < 2; ++draw) {
    // A segment of drawn queries and keys behind them, and one on keys of the first; scores of size 1, or so large that one key has all
    // weight.
    const Heads heads{1 + below(4), 1, at_edge({16, 32, 64, 127})};
    const int own = at_edge({16, 32, 64}), before = below(2) * at_edge({16, 48, 64}), more = at_edge({2, 16}), all = before + own;
    Layout l{
        {{range(0, all), 0, own}, {joined(range(0, all / 2), range(all, all + more)), own, more}}, {0, 2}, all + more + 1, own + more + 1};
    INFO("KAVA_SEED " << seed << ", draw " << draw << ": " << before << " + " << own << " and " << more << " rows, " << heads.heads
                      << " heads of " << heads.dim);
    check_attention_case<bf16>({l, heads}, seed, draw == 0 ? 1 : 8);
  }
}

TEST_CASE("a large product takes large tiles and gives what small ones give") {
  SKIP_IF_UNSUPPORTED();
  simt::set_schedule({});
  GemmCase large{GemmForm::nt, 2048, 2048, 40, 0, false, false};
  // Those of parts that end within a large tile, of ranks that are no whole steps of the tensor cores.
  if (GENERATE(false, true)) large.bands = {{0, 576, 0, 24}, {576, 2048, 24, 40}};
  GemmCase small = large;
  small.m = 40;
  Matrices in = gemm_inputs<bf16>(large, 5);
  for (int64_t n = 0; n < large.n && !large.bands.empty(); ++n)
    for (int64_t k = 0; k < large.k; ++k)
      if ((n < 576) != (k < 24)) in[1].at[static_cast<std::size_t>(n * large.k + k)] = 0;
  Matrices few = in;
  few[0] = Matrix(40, 40);
  std::copy_n(in[0].at.begin(), few[0].at.size(), few[0].at.begin());
  Device device(true), other(true);
  const Matrix all = gemm_kernel<bf16>(device, large, in, {0, 0}, 1), part = gemm_kernel<bf16>(other, small, few, {0, 0}, 1);
  CHECK(std::equal(part.at.begin(), part.at.end(), all.at.begin()));
  CHECK(normalised_error(part, gemm_reference<bf16>(small, few, {}, 1)) < 1e-5);
}

TEST_CASE("a launch that no GPU takes throws to the caller") {
  SKIP_IF_UNSUPPORTED();
  float memory[1] = {};
  // More blocks in y than a GPU takes.
  GemmBatch<float> batch;
  Gemm<float>& g = batch.gemms[batch.count++];
  g.add = {memory, 1}, g.m = 1 << 22, g.n = 1;
  g.then({memory, 1}, {memory, 1}, 1);
  CHECK_THROWS_AS(gemm<GemmForm::nt>(nullptr, batch), std::runtime_error);
}
