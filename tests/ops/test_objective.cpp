#include <cmath>
#include <numeric>

#include "tests/ops/op_rig.h"

using namespace kava;
using namespace kava::test;

namespace {
using Grouping = Group;

struct Batch {
  std::vector<int> queries, traces;  // per sample
  int64_t heads = 6, kv_heads = 2, dim = 8;
  std::vector<int> samples() const {
    std::vector<int> s(traces.size());
    std::iota(s.begin(), s.end(), 0);
    return s;
  }
};

std::vector<int> offsets_of(const std::vector<int>& counts) {
  std::vector<int> o = {0};
  for (int c : counts) o.push_back(o.back() + c);
  return o;
}

// q, k, match_k, v
Matrices inputs_of(const Batch& b, Random& random) {
  const int64_t q = offsets_of(b.queries).back(), k = offsets_of(b.traces).back(), width = b.kv_heads * b.dim;
  return {random.normal(q, b.heads * b.dim), random.normal(k, width), random.normal(k, width), random.normal(k, width)};
}

// Outputs: target_k, target_v, kept, importance, redundancy, score
OpCall select(const Batch& b, RkvOptions o, std::vector<int> samples = {}) {
  o.heads = b.heads, o.kv_heads = b.kv_heads;
  return [=](Rig& rig, const Matrices& m) {
    RkvOptions options = o;
    options.samples = rig.in(row_of(samples.empty() ? b.samples() : samples), Kind::i32);
    Tensor q = rig.in(m[0]), k = rig.in(m[1]), match = rig.in(m[2]), v = rig.in(m[3]);
    Tensor q_offsets = rig.in(row_of(offsets_of(b.queries)), Kind::i32), k_offsets = rig.in(row_of(offsets_of(b.traces)), Kind::i32);
    const int64_t rows = int64_t(b.traces.size()) * o.latents, width = b.kv_heads * b.dim;
    Tensor tk = rig.out(rows, width), tv = rig.out(rows, width), kept = rig.out(rows, b.kv_heads, Kind::i32);
    Tensor i = rig.out(b.kv_heads, k.rows, Kind::sum), r = rig.out(b.kv_heads, k.rows, Kind::sum),
           s = rig.out(b.kv_heads, k.rows, Kind::sum);
    rig.ops.rkv_select(rig.arena, tk, tv, kept, i, r, s, q, q_offsets, k, k_offsets, match, v, options);
    return std::vector<Tensor>{tk, tv, kept, i, r, s};
  };
}

void softmax(std::vector<double>& x) {
  double sum = 0;
  for (double& v : x) sum += v = std::exp(v);
  for (double& v : x) v /= sum;
}

struct Scores {
  std::vector<double> importance, redundancy, score;
};

// The formulas of the method, pair by pair.
Scores naive_scores(const Matrices& m, const Batch& b, std::size_t sample, int64_t head, Grouping group, double lambda) {
  const int64_t q0 = offsets_of(b.queries)[sample], k0 = offsets_of(b.traces)[sample], n = b.traces[sample], D = b.dim;
  auto dot = [&](const Matrix& x, int64_t r, int64_t h, const Matrix& y, int64_t s) {
    double sum = 0;
    for (int64_t d = 0; d < D; ++d) sum += x(r, h * D + d) * y(s, head * D + d);
    return sum;
  };
  Scores out{std::vector<double>(std::size_t(n)), std::vector<double>(std::size_t(n)), {}};
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const double ni = std::sqrt(dot(m[1], k0 + i, head, m[1], k0 + i)) + 1e-8,
                   nj = std::sqrt(dot(m[1], k0 + j, head, m[1], k0 + j)) + 1e-8;
      if (i != j) out.redundancy[std::size_t(i)] -= dot(m[1], k0 + i, head, m[1], k0 + j) / ni / nj / double(n);
    }
  softmax(out.redundancy);
  const int64_t share = b.heads / b.kv_heads;
  for (int t = 0; t < b.queries[sample]; ++t) {
    std::vector<double> pooled(std::size_t(n), group == Grouping::mean_prob ? 0 : -1e300);
    for (int64_t g = 0; g < share; ++g) {
      std::vector<double> row;
      for (int64_t i = 0; i < n; ++i) row.push_back(dot(m[0], q0 + t, head * share + g, m[1], k0 + i) / std::sqrt(double(D)));
      if (group != Grouping::max_logits) softmax(row);
      for (std::size_t i = 0; i < row.size(); ++i)
        pooled[i] = group == Grouping::mean_prob ? pooled[i] + row[i] / double(share) : std::max(pooled[i], row[i]);
    }
    if (group == Grouping::max_logits) softmax(pooled);
    for (std::size_t i = 0; i < pooled.size(); ++i) out.importance[i] += pooled[i] / b.queries[sample];
  }
  for (std::size_t i = 0; i < out.importance.size(); ++i)
    out.score.push_back(lambda * out.importance[i] + (1 - lambda) * out.redundancy[i]);
  return out;
}

// Slots from the scores, by the words of the method.
std::vector<int> naive_slots(const std::vector<double>& score, Policy policy, int64_t m, bool by_score) {
  const int n = int(score.size());
  std::vector<int> all(score.size());
  std::iota(all.begin(), all.end(), 0);
  if (policy == Policy::crop || policy == Policy::uniform) {
    if (policy == Policy::uniform && n > m)
      for (int64_t i = 0; i < m; ++i) all[std::size_t(i)] = int(i * n / m);
    all.resize(std::size_t(std::min<int64_t>(n, m)));
    return all;
  }
  std::stable_sort(all.begin(), all.end(), [&](int a, int c) { return score[std::size_t(a)] > score[std::size_t(c)]; });
  all.resize(std::size_t(std::min<int64_t>(n, m)));
  if (!by_score) std::sort(all.begin(), all.end());
  return all;
}

const Batch kBatch{.queries = {5, 1, 0, 3, 4}, .traces = {9, 0, 3, 1, 30}};

Matrices rows_of_sample(const Matrices& m, const Batch& b, std::size_t s) {
  const std::vector<int> q = offsets_of(b.queries), k = offsets_of(b.traces);
  auto cut = [](const Matrix& x, int from, int to) {
    Matrix y(to - from, x.cols);
    std::copy(x.at.begin() + from * x.cols, x.at.begin() + to * x.cols, y.at.begin());
    return y;
  };
  return {cut(m[0], q[s], q[s + 1]), cut(m[1], k[s], k[s + 1]), cut(m[2], k[s], k[s + 1]), cut(m[3], k[s], k[s + 1])};
}

// ---- moments and distillation

OpCall moments_call(const std::vector<int>& valid) {
  return [=](Rig& rig, const Matrices& m) {
    Tensor x = rig.in(m[0]), v = rig.in(row_of(valid), Kind::i32), out = rig.out(1, 3, Kind::sum), inverse = rig.out(1, 1, Kind::sum);
    rig.ops.moments(out, x, v);
    rig.ops.inverse_std(inverse, out);
    return std::vector<Tensor>{out, inverse};
  };
}

// in: x, target, loss before; outputs: loss, dx
OpCall distill_call(const std::vector<int>& valid, Distance kind, double inverse, double factor, double weight) {
  return [=](Rig& rig, const Matrices& m) {
    Tensor x = rig.in(m[0]), target = rig.in(m[1]), v = rig.in(row_of(valid), Kind::i32), loss = rig.in_out(m[2], Kind::sum);
    Tensor dx = rig.out(m[0].rows, m[0].cols, Kind::sum), inv = inverse > 0 ? rig.in(Matrix(1, 1, inverse), Kind::sum) : Tensor{};
    rig.ops.distill(loss, dx, x, target, v, inv, kind, factor, weight);
    return std::vector<Tensor>{loss, dx};
  };
}

double naive_distance(Distance kind, double d) {
  d = std::fabs(d);
  return kind == Distance::mse ? d * d : kind == Distance::l1 ? d : d < 1 ? 0.5 * d * d : d - 0.5;
}

// in: value, m, v, grad; outputs: value, m, v, half
OpCall adamw_call(double grad_square, const AdamwOptions& o) {
  return [=](Rig& rig, const Matrices& m) {
    Tensor value = rig.packed().in_out(m[0], Kind::sum), first = rig.packed().in_out(m[1], Kind::sum),
           second = rig.packed().in_out(m[2], Kind::sum);
    Tensor grad = rig.packed().in(m[3], Kind::sum), half = rig.packed().in_out(Matrix(m[0].rows, m[0].cols, 7));
    rig.ops.adamw(value, first, second, half, grad, rig.in(Matrix(1, 1, grad_square), Kind::f64), o);
    return std::vector<Tensor>{value, first, second, half};
  };
}
}  // namespace

TEST_CASE("rkv_select scores as the method's formulas do, pair by pair, for every group rule and policy") {
  Random random(31);
  const Matrices in = inputs_of(kBatch, random);
  for (Grouping group : {Grouping::max_logits, Grouping::max_prob, Grouping::mean_prob})
    for (Policy policy : {Policy::rkv, Policy::cosine, Policy::attention, Policy::crop, Policy::uniform})
      for (bool by_score : {false, true})
        for (int64_t latents : {1, 4, 9, 40}) {
          INFO("group " << int(group) << ", policy " << int(policy) << ", by score " << by_score << ", M " << latents);
          const double lambda = policy == Policy::cosine ? 0 : policy == Policy::attention ? 1 : 0.3;
          const RkvOptions o{.policy = policy, .group = group, .lambda = 0.3, .order_by_score = by_score, .latents = latents};
          const Matrices out = run_f64(select(kBatch, o), in);
          for (std::size_t b = 0; b < kBatch.traces.size(); ++b)
            for (int64_t h = 0; h < kBatch.kv_heads; ++h) {
              const Scores want = naive_scores(in, kBatch, b, h, group, lambda);
              const int64_t k0 = offsets_of(kBatch.traces)[b];
              for (int64_t i = 0; i < kBatch.traces[b]; ++i) {
                REQUIRE(std::fabs(out[3](h, k0 + i) - want.importance[std::size_t(i)]) < 1e-12);
                REQUIRE(std::fabs(out[4](h, k0 + i) - want.redundancy[std::size_t(i)]) < 1e-12);
                REQUIRE(std::fabs(out[5](h, k0 + i) - want.score[std::size_t(i)]) < 1e-12);
              }
              const std::vector<int> slots = naive_slots(want.score, policy, latents, by_score);
              for (int64_t s = 0; s < latents; ++s) {
                const bool filled = s < int64_t(slots.size());
                const int64_t row = int64_t(b) * latents + s;
                REQUIRE(out[2](row, h) == (filled ? slots[std::size_t(s)] : -1));
                for (int64_t d = 0; d < kBatch.dim; ++d) {
                  const int64_t c = h * kBatch.dim + d;
                  REQUIRE(out[0](row, c) == (filled ? in[2](k0 + slots[std::size_t(s)], c) : 0));
                  REQUIRE(out[1](row, c) == (filled ? in[3](k0 + slots[std::size_t(s)], c) : 0));
                }
              }
            }
        }
}

TEST_CASE("rkv_select scores are as exact as their storage, and bytes do not depend on threads or gaps") {
  Random random(32);
  const Matrices in = inputs_of(kBatch, random);
  // Importance, redundancy and score alone: what is kept may differ by storage where scores nearly tie.
  for (Policy policy : {Policy::rkv, Policy::random})
    check_op("rkv_select", in, [=](Rig& rig, const Matrices& m) {
      const std::vector<Tensor> out = select(kBatch, {.policy = policy, .latents = 6})(rig, m);
      return std::vector<Tensor>(out.begin() + 3, out.end());
    });
}

TEST_CASE("rkv_select with lambda 0 is cosine and with lambda 1 is attention") {
  Random random(33);
  const Matrices in = inputs_of(kBatch, random);
  for (auto [lambda, policy] : {std::pair{0.0, Policy::cosine}, {1.0, Policy::attention}}) {
    const Matrices limit = run_f64(select(kBatch, {.lambda = lambda, .latents = 5}), in);
    const Matrices named = run_f64(select(kBatch, {.policy = policy, .lambda = 0.4, .latents = 5}), in);
    for (std::size_t i = 0; i < limit.size(); ++i) REQUIRE(limit[i].at == named[i].at);
    REQUIRE(limit[5].at == limit[lambda == 0 ? 4 : 3].at);
  }
}

TEST_CASE("rkv_select of a sample has the same bytes alone as in a batch") {
  Random random(34);
  const Matrices in = inputs_of(kBatch, random);
  for (DType type : {DType::f64, DType::f32, DType::bf16})
    for (Policy policy : {Policy::rkv, Policy::random}) {
      Rig together(2, type, type, 0);
      const RkvOptions o{.policy = policy, .latents = 4, .seed = 5, .step = 2, .layer = 3};
      const Matrices all = read_all(together, select(kBatch, o)(together, in));
      for (std::size_t b = 0; b < kBatch.traces.size(); ++b) {
        Batch one = kBatch;
        one.queries = {kBatch.queries[b]}, one.traces = {kBatch.traces[b]};
        Rig alone(1, type, type, 2);
        const Matrices got = read_all(alone, select(one, o, {int(b)})(alone, rows_of_sample(in, kBatch, b)));
        for (std::size_t i : {0u, 1u, 2u}) {
          const auto begin = all[i].at.begin() + int64_t(b) * o.latents * all[i].cols;
          REQUIRE(std::vector<double>(begin, begin + o.latents * all[i].cols) == got[i].at);
        }
      }
    }
}

TEST_CASE("rkv_select gives ties to the lower index, and a zero key no NaN") {
  const Batch b{.queries = {2}, .traces = {6}, .heads = 1, .kv_heads = 1, .dim = 4};
  const Matrices equal = {Matrix(2, 4, 1), Matrix(6, 4, 2), Matrix(6, 4, 1), Matrix(6, 4, 1)};
  for (bool by_score : {false, true})
    REQUIRE(run_f64(select(b, {.order_by_score = by_score, .latents = 3}), equal)[2].at == std::vector<double>{0, 1, 2});
  Matrices zero = equal;
  zero[1] = Matrix(6, 4);
  const Matrices out = run_f64(select(b, {.latents = 3}), zero);
  for (double v : out[5].at) REQUIRE(std::fabs(v - 1.0 / 6) < 1e-12);
}

TEST_CASE("rkv_select finds the two keys of a trace of two equally redundant, so that the first is kept") {
  Random random(41);
  const Batch b{.queries = {1}, .traces = {2}, .heads = 1, .kv_heads = 1, .dim = 5};
  for (int trial = 0; trial < 200; ++trial) {
    const Matrices in = inputs_of(b, random);
    for (int64_t m : {1, 2}) {
      const Matrices out = run_f64(select(b, {.policy = Policy::cosine, .order_by_score = true, .latents = m}), in);
      REQUIRE(out[4].at == std::vector<double>{0.5, 0.5});
      REQUIRE(out[2].at == (m == 1 ? std::vector<double>{0} : std::vector<double>{0, 1}));
    }
  }
}

TEST_CASE("rkv_select at random keeps M different tokens in time order, every token as often, by its coordinates alone") {
  Random random(35);
  const Batch b{.queries = {1}, .traces = {12}, .heads = 2, .kv_heads = 2, .dim = 4};
  const Matrices in = inputs_of(b, random);
  std::vector<int> kept(12);
  std::vector<double> last;
  int repeats = 0;
  const int draws = 600;
  for (int step = 0; step < draws; ++step) {
    const RkvOptions o{.policy = Policy::random, .order_by_score = true, .latents = 5, .seed = 3, .step = uint32_t(step), .layer = 1};
    const Matrix slots = run_f64(select(b, o), in)[2];
    for (int64_t h = 0; h < 2; ++h)
      for (int64_t i = 0; i < 5; ++i) {
        REQUIRE((slots(i, h) >= 0 && slots(i, h) < 12));
        if (i > 0) REQUIRE(slots(i, h) > slots(i - 1, h));
        ++kept[std::size_t(slots(i, h))];
      }
    repeats += slots.at == last;
    last = slots.at;
  }
  const double mean = draws * 2 * 5 / 12.0, spread = std::sqrt(draws * 2 * (5 / 12.0) * (7 / 12.0));
  for (int n : kept) REQUIRE(std::fabs(n - mean) < 5 * spread);
  REQUIRE(repeats < 3);
  auto slots = [&](RkvOptions o, int sample) {
    o.policy = Policy::random, o.latents = 5;
    return run_f64(select(b, o, {sample}), in)[2].at;
  };
  const auto base = slots({}, 0);
  REQUIRE(base == slots({}, 0));
  REQUIRE(base != slots({.seed = 1}, 0));
  REQUIRE(base != slots({.layer = 1}, 0));
  REQUIRE(base != slots({}, 1));
}

TEST_CASE("moments and inverse_std are those of the valid rows, also far from zero") {
  Random random(36);
  const std::vector<int> valid = {3, 0, 7, 1};
  const Matrices in = {random.normal(28, 19, 2, 50)};
  check_op("moments", in, moments_call(valid));
  const Matrices out = run_f64(moments_call(valid), in);
  std::vector<double> x;
  for (int64_t g = 0; g < 4; ++g)
    for (int64_t r = 0; r < valid[std::size_t(g)]; ++r)
      for (int64_t c = 0; c < 19; ++c) x.push_back(in[0](g * 7 + r, c));
  const double n = double(x.size()), mean = std::accumulate(x.begin(), x.end(), 0.0) / n;
  double squares = 0;
  for (double v : x) squares += (v - mean) * (v - mean);
  REQUIRE(out[0](0, 0) == n);
  REQUIRE(std::fabs(out[0](0, 1) - mean) < 1e-12);
  REQUIRE(std::fabs(out[0](0, 2) / squares - 1) < 1e-12);
  REQUIRE(std::fabs(out[1](0, 0) * std::sqrt(squares / (n - 1)) - 1) < 1e-12);

  // f32 numbers whose spread is far below their mean.
  Rig rig(2, DType::f32, DType::f32, 0);
  Matrix far(4, 64);
  for (std::size_t i = 0; i < far.at.size(); ++i) far.at[i] = 10000 + double(i % 4) / 64;
  const Matrices got = read_all(rig, moments_call({4})(rig, {far}));
  REQUIRE(std::fabs(got[0](0, 2) / (256 * 1.25 / 4096) - 1) < 1e-5);
}

TEST_CASE("inverse_std pools rows of moments, and is 0 where the spread is zero or undefined") {
  Random random(37);
  const Matrix x = random.normal(24, 9, 1, 3);
  Rig rig(1, DType::f64, DType::f64, 0);
  Tensor tx = rig.in(x), three = rig.out(3, 3, Kind::sum), one = rig.out(1, 3, Kind::sum), full = rig.in(row_of({8}), Kind::i32);
  Tensor whole = rig.in(row_of({24}), Kind::i32), pooled = rig.out(1, 1), direct = rig.out(1, 1);
  for (int64_t l = 0; l < 3; ++l) rig.ops.moments(three.row_range(l, l + 1), tx.row_range(8 * l, 8 * l + 8), full);
  rig.ops.moments(one, tx, whole);
  rig.ops.inverse_std(pooled, three);
  rig.ops.inverse_std(direct, one);
  REQUIRE(std::fabs(rig.read(pooled)(0, 0) / rig.read(direct)(0, 0) - 1) < 1e-13);
  for (const auto& [m, valid] :
       {std::pair{Matrix(4, 5, 0.1), std::vector<int>{2, 2}}, {random.normal(2, 1), {1, 0}}, {random.normal(2, 3), {0, 0}}})
    for (DType type : {DType::f64, DType::f32, DType::bf16}) {
      Rig flat(2, type, type, 0);
      REQUIRE(read_all(flat, moments_call(valid)(flat, {m}))[1](0, 0) == 0);
    }
}

TEST_CASE("distill adds its loss, sets the gradient of valid rows and zeroes the others") {
  Random random(38);
  const std::vector<int> valid = {3, 0, 5};
  for (Distance kind : {Distance::smooth_l1, Distance::mse, Distance::l1})
    for (double inverse : {0.0, 0.7}) {
      const Matrices in = {random.normal(15, 19, 1.5), random.normal(15, 19), Matrix(1, 1, 2.5)};
      const double s = 0.3 * (inverse > 0 ? inverse : 1);
      const OpCall call = distill_call(valid, kind, inverse, 0.3, 2);
      check_op("distill", in, call);
      const Matrices out = run_f64(call, in);
      double want = 2.5;
      for (int64_t r = 0; r < 15; ++r)
        for (int64_t c = 0; c < 19; ++c) {
          if (r % 5 < valid[std::size_t(r / 5)]) want += s * naive_distance(kind, in[0](r, c) - in[1](r, c));
          else REQUIRE(out[1](r, c) == 0);
        }
      REQUIRE(std::fabs(out[0](0, 0) - want) < 1e-11);
      // Near a kink the difference quotient of fourth order is good to some 1e-3; so the kinks are kept away from.
      Matrices smooth = in;
      for (std::size_t i = 0; i < smooth[0].at.size(); ++i) {
        const double d = std::fabs(smooth[0].at[i] - smooth[1].at[i]);
        if (d < 0.01 || std::fabs(d - 1) < 0.01) smooth[0].at[i] += 0.03;
      }
      check_gradient("distill", smooth, [&](const Matrices& m) { return 2 * run_f64(call, m)[0](0, 0); }, {0}, {run_f64(call, smooth)[1]});
    }
  // Equal rows: no loss, no gradient; a spread of zero: nothing.
  const Matrices same = {Matrix(2, 3, 1), Matrix(2, 3, 1), Matrix(1, 1)};
  for (Distance kind : {Distance::smooth_l1, Distance::mse, Distance::l1})
    for (const Matrix& m : run_f64(distill_call({2}, kind, 0, 1, 1), same))
      for (double v : m.at) REQUIRE(v == 0);
  Rig rig(1, DType::f32, DType::f32, 0);
  Tensor x = rig.in(Matrix(2, 3, 4)), y = rig.in(Matrix(2, 3, 1)), v = rig.in(row_of({2}), Kind::i32), loss = rig.in_out(Matrix(1, 1, 0.5));
  Tensor zero = rig.in(Matrix(1, 1)), dx = rig.out(2, 3), bad = rig.in(row_of({3}), Kind::i32);
  rig.ops.distill(loss, dx, x, y, v, zero, Distance::mse, 1, 1);
  REQUIRE(rig.read(loss)(0, 0) == 0.5);
  REQUIRE(rig.read(dx).at == std::vector<double>(6, 0.0));
  REQUIRE_THROWS_AS(rig.ops.distill(loss, dx, x, y, bad, zero, Distance::mse, 1, 1), Error);
}

TEST_CASE("sum_squares sums in f64 in a fixed order") {
  Random random(39);
  for (int64_t n : {1, 100, 40001}) {
    const Matrices in = {random.normal(1, n)};
    check_op("sum_squares", in, [](Rig& rig, const Matrices& m) {
      Tensor x = rig.packed().in(m[0]), out = rig.out(1, 1, Kind::f64);
      rig.ops.sum_squares(out, x);
      double want = 0;
      for (double v : rig.read(x).at) want += v * v;
      REQUIRE(std::fabs(rig.read(out)(0, 0) / want - 1) < 1e-13);
      return std::vector<Tensor>{out};
    });
  }
}

TEST_CASE("adamw follows the scalar formula over many steps, with and without clipping and decay") {
  Random random(40);
  for (double clip : {0.0, 0.5, 1e9})
    for (double decay : {0.0, 0.1}) {
      Matrices state = {random.normal(3, 19), Matrix(3, 19), Matrix(3, 19), {}};
      std::vector<double> value = state[0].at, first(57), second(57);
      for (int64_t step = 1; step <= 20; ++step) {
        state[3] = random.normal(3, 19);
        double square = 0;
        for (double g : state[3].at) square += g * g;
        const AdamwOptions o{.lr = 0.01, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = decay, .clip = clip, .step = step};
        check_op("adamw", state, adamw_call(square, o));
        const Matrices out = run_f64(adamw_call(square, o), state);
        const double scale = clip > 0 ? std::min(1.0, clip / (std::sqrt(square) + 1e-6)) : 1;
        for (std::size_t i = 0; i < value.size(); ++i) {
          const double g = state[3].at[i] * scale;
          value[i] *= 1 - o.lr * decay;
          first[i] += (g - first[i]) * (1 - 0.9);
          second[i] = second[i] * 0.999 + (1 - 0.999) * g * g;
          value[i] -= o.lr / (1 - std::pow(0.9, step)) * first[i] / (std::sqrt(second[i]) / std::sqrt(1 - std::pow(0.999, step)) + 1e-8);
          REQUIRE(std::fabs(out[0].at[i] - value[i]) < 1e-13);
          REQUIRE(out[3].at[i] == out[0].at[i]);
        }
        for (std::size_t i : {0u, 1u, 2u}) state[i] = out[i];
      }
    }
}

TEST_CASE("adamw changes nothing where the gradient is not finite") {
  Random random(41);
  const Matrices in = {random.normal(1, 40), random.normal(1, 40), Matrix(1, 40, 1), random.normal(1, 40)};
  for (double square : {std::nan(""), std::numeric_limits<double>::infinity()}) {
    const Matrices out =
        run_f64(adamw_call(square, {.lr = 1, .beta1 = 0.9, .beta2 = 0.9, .eps = 1e-8, .weight_decay = 1, .clip = 1, .step = 1}), in);
    for (std::size_t i : {0u, 1u, 2u}) REQUIRE(out[i].at == in[i].at);
    REQUIRE(out[3].at == std::vector<double>(40, 7.0));
  }
}
