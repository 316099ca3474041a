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
OpRun select(const Batch& b, RkvOptions o, std::vector<int> samples = {}) {
  o.heads = b.heads, o.kv_heads = b.kv_heads;
  return [=](Rig& rig, const Matrices& m) {
    RkvOptions options = o;
    options.samples = rig.in(row_of(samples.empty() ? b.samples() : samples), Kind::i32);
    // The rows of the step lie in another order, with rows of others between them.
    auto spread = [](const Matrix& x) {
      Matrix y(2 * x.rows + 1, x.cols, 77);
      for (int64_t r = 0; r < x.rows; ++r) std::copy_n(x.at.begin() + r * x.cols, x.cols, y.at.begin() + (2 * (x.rows - r) - 1) * x.cols);
      return y;
    };
    auto rows_of = [&](const Matrix& x) {
      std::vector<int> rows;
      for (int64_t r = 0; r < x.rows; ++r) rows.push_back(int(2 * (x.rows - r) - 1));
      return rig.in(row_of(rows), Kind::i32);
    };
    Tensor q = rig.in(spread(m[0])), k = rig.in(spread(m[1])), match = rig.in(m[2]), v = rig.in(spread(m[3]));
    Tensor q_rows = rows_of(m[0]), k_rows = rows_of(m[1]);
    Tensor q_offsets = rig.in(row_of(offsets_of(b.queries)), Kind::i32), k_offsets = rig.in(row_of(offsets_of(b.traces)), Kind::i32);
    const int64_t rows = int64_t(b.traces.size()) * o.latents, width = b.kv_heads * b.dim;
    Tensor tk = rig.out(rows, width), tv = rig.out(rows, width), kept = rig.out(rows, b.kv_heads, Kind::i32);
    Tensor i = rig.out(b.kv_heads, m[1].rows, Kind::sum), r = rig.out(b.kv_heads, m[1].rows, Kind::sum),
           s = rig.out(b.kv_heads, m[1].rows, Kind::sum);
    rig.ops.rkv_select(rig.arena, tk, tv, kept, i, r, s, q, q_rows, q_offsets, k, v, k_rows, k_offsets, match, options);
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
  std::vector<double> norms;
  for (int64_t i = 0; i < n; ++i) norms.push_back(std::sqrt(dot(m[1], k0 + i, head, m[1], k0 + i)) + 1e-8);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j)
      if (i != j)
        out.redundancy[std::size_t(i)] -= dot(m[1], k0 + i, head, m[1], k0 + j) / norms[std::size_t(i)] / norms[std::size_t(j)] / double(n);
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

TEST_CASE("rkv_select scores are as exact as their storage, and bytes do not depend on threads or gaps", "[device][ops]") {
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

TEST_CASE("rkv_select gives ties to the lower index, and a zero key no NaN", "[device][ops]") {
  const Batch b{.queries = {2}, .traces = {6}, .heads = 1, .kv_heads = 1, .dim = 4};
  const Matrices equal = {Matrix(2, 4, 1), Matrix(6, 4, 2), Matrix(6, 4, 1), Matrix(6, 4, 1)};
  Matrices zero = equal, unknown = equal;
  zero[1] = Matrix(6, 4);
  unknown[1](3, 1) = std::nan("");
  for (auto [ops, type] : every_backend()) {
    INFO(ops->name() << ", " << name_of(type));
    Rig rig(*ops, type, type, 0);
    for (bool by_score : {false, true})
      for (const Matrices& m : {equal, unknown})
        REQUIRE(read_all(rig, select(b, {.order_by_score = by_score, .latents = 3})(rig, m))[2].at == std::vector<double>{0, 1, 2});
    const Matrices out = read_all(rig, select(b, {.latents = 3})(rig, zero));
    for (double v : out[5].at) REQUIRE(std::fabs(v - 1.0 / 6) < (type == DType::f64 ? 1e-12 : 1e-7));
  }
}

TEST_CASE("rkv_select survives logits of any size", "[device][ops]") {
  Random random(47);
  const Batch batch{.queries = {5, 1, 0, 3, 4}, .traces = {9, 0, 3, 1, 300}};
  Matrices in = inputs_of(batch, random);
  for (double& v : in[0].at) v *= 1000;
  for (double& v : in[1].at) v *= 1000;
  for (auto [ops, type] : every_backend())
    for (Grouping group : {Grouping::max_logits, Grouping::max_prob, Grouping::mean_prob}) {
      INFO(ops->name() << ", " << name_of(type) << ", group " << int(group));
      Rig rig(*ops, type, type, 0);
      const Matrix importance = rig.read(select(batch, {.group = group, .latents = 3})(rig, in)[3]);
      for (std::size_t b : {0u, 3u, 4u})
        for (int64_t h = 0; h < kBatch.kv_heads; ++h) {
          double sum = 0;
          for (int i = offsets_of(batch.traces)[b]; i < offsets_of(batch.traces)[b + 1]; ++i) sum += importance(h, i);
          if (group == Grouping::max_prob) REQUIRE((sum > 0.99 && sum < 3.01));
          else REQUIRE(std::fabs(sum - 1) < 1e-6);
        }
    }
}

TEST_CASE("rkv_select finds the two keys of a trace of two equally redundant, so that the first is kept", "[device][ops]") {
  Random random(41);
  const Batch b{.queries = {1}, .traces = {2}, .heads = 1, .kv_heads = 1, .dim = 5};
  const auto backends = every_backend();
  for (std::size_t trial = 0; trial < 200; ++trial) {
    const Matrices in = inputs_of(b, random);
    const auto [ops, type] = backends[trial % backends.size()];
    for (int64_t m : {1, 2}) {
      Rig rig(*ops, type, type, 0);
      const Matrices out = read_all(rig, select(b, {.policy = Policy::cosine, .order_by_score = true, .latents = m})(rig, in));
      REQUIRE(out[4].at == std::vector<double>{0.5, 0.5});
      REQUIRE(out[2].at == (m == 1 ? std::vector<double>{0} : std::vector<double>{0, 1}));
    }
  }
}

// Pair by pair it would take hours, past any limit of a test.
TEST_CASE("rkv_select scores a trace of a million keys as the mean cosines of some of them say") {
  Random random(42);
  const Batch b{.queries = {1}, .traces = {1000000}, .heads = 1, .kv_heads = 1, .dim = 2};
  const Matrices in = inputs_of(b, random);
  const Matrices out = run_f64(select(b, {.policy = Policy::cosine, .latents = 3}), in);
  // Scores differ as the mean cosines to the others do: of three keys against all.
  const auto dot = [&](int64_t i, int64_t j) { return in[1](i, 0) * in[1](j, 0) + in[1](i, 1) * in[1](j, 1); };
  const auto norm = [&](int64_t i) { return std::sqrt(dot(i, i)) + 1e-8; };
  const auto mean_cosine = [&](int64_t i) {
    double sum = 0;
    for (int64_t j = 0; j < in[1].rows; ++j)
      if (j != i) sum += dot(i, j) / norm(i) / norm(j);
    return sum / static_cast<double>(in[1].rows);
  };
  for (int64_t i : {1, 77777, 999999})
    REQUIRE(std::fabs(std::log(out[4](0, 0) / out[4](0, i)) - (mean_cosine(i) - mean_cosine(0))) < 1e-10);
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

TEST_CASE("rkv_select gathers the keys themselves where no others are given", "[device][ops]") {
  Random random(44);
  const Batch b{.queries = {2, 1}, .traces = {6, 3}};
  Matrices in = inputs_of(b, random);
  in[2] = in[1];
  const RkvOptions o{.latents = 4, .heads = b.heads, .kv_heads = b.kv_heads};
  for (auto [ops, type] : every_backend())
    for (int64_t gap : {0, 1}) {
      Rig rig(*ops, type, type, gap);
      const Matrices want = read_all(rig, select(b, o)(rig, in));
      std::vector<int> q_rows(3), k_rows(9);
      std::iota(q_rows.begin(), q_rows.end(), 0);
      std::iota(k_rows.begin(), k_rows.end(), 0);
      auto index = [&](const std::vector<int>& list) { return rig.in(row_of(list), Kind::i32); };
      Tensor tk = rig.out(8, 16), tv = rig.out(8, 16), kept = rig.out(8, 2, Kind::i32);
      rig.ops.rkv_select(rig.arena, tk, tv, kept, {}, {}, {}, rig.in(in[0]), index(q_rows), index(offsets_of(b.queries)), rig.in(in[1]),
                         rig.in(in[3]), index(k_rows), index(offsets_of(b.traces)), {}, o);
      REQUIRE(rig.guards_hold());
      REQUIRE(rig.read(tk).at == want[0].at);
      REQUIRE(rig.read(tv).at == want[1].at);
      REQUIRE(rig.read(kept).at == want[2].at);
    }
}

TEST_CASE("rkv_select on cuda keeps and gathers what its scores say, in every policy", "[device][ops]") {
  if (!tested_cuda()) SKIP(kNoTestedCuda);
  Random random(46);
  // More tokens and columns than the block has threads; more queries than it takes at once, of heads as long as a tile; more heads of a
  // group than that.
  for (const Batch& batch : {kBatch, Batch{.queries = {2}, .traces = {140}, .heads = 4, .kv_heads = 2, .dim = 130},
                             Batch{.queries = {14, 1}, .traces = {64, 3}, .heads = 6, .kv_heads = 2, .dim = 64},
                             Batch{.queries = {2}, .traces = {9}, .heads = 26, .kv_heads = 1, .dim = 8},
                             Batch{.queries = {1, 2}, .traces = {4096, 1021}, .heads = 2, .kv_heads = 1, .dim = 16}}) {
    const bool is_long = batch.traces[0] > 1000;
    Matrices in = inputs_of(batch, random);
    for (Matrix& m : in)
      for (double& v : m.at) v = static_cast<float>(v);
    for (Grouping group : {Grouping::max_logits, Grouping::max_prob, Grouping::mean_prob})
      for (Policy policy : {Policy::rkv, Policy::crop, Policy::uniform, Policy::random})
        for (bool by_score : {false, true})
          for (int64_t latents : {1, 8, 40}) {
            if (group != Grouping::mean_prob && policy != Policy::rkv) continue;
            if (is_long && !(group == Grouping::max_logits && policy == Policy::rkv && by_score && latents == 40)) continue;
            INFO("group " << int(group) << ", policy " << int(policy) << ", by score " << by_score << ", M " << latents);
            const RkvOptions o{
                .policy = policy, .group = group, .lambda = 0.3, .order_by_score = by_score, .latents = latents, .seed = 5, .layer = 3};
            take_schedule(latents % 3);
            search_races(latents == 8);
            Rig rig(*tested_cuda(), DType::f32, DType::f32, 0), drawn(2, DType::f32, DType::f32, 0);
            const Matrices out = read_all(rig, select(batch, o)(rig, in));
            search_races(false);
            REQUIRE(rig.guards_hold());
            const Matrix kept = drawn.read(select(batch, o)(drawn, in)[2]);
            for (std::size_t b = 0; b < batch.traces.size(); ++b)
              for (int64_t h = 0; h < batch.kv_heads; ++h) {
                const Scores want = naive_scores(in, batch, b, h, group, 0.3);
                const int64_t k0 = offsets_of(batch.traces)[b];
                for (int64_t i = 0; i < batch.traces[b]; ++i) {
                  REQUIRE(std::fabs(out[3](h, k0 + i) - want.importance[std::size_t(i)]) < 1e-6);
                  REQUIRE(std::fabs(out[4](h, k0 + i) - want.redundancy[std::size_t(i)]) < 1e-6);
                  REQUIRE(std::fabs(out[5](h, k0 + i) - want.score[std::size_t(i)]) < 1e-6);
                }
                const std::vector<int> slots = naive_slots(want.score, policy, latents, by_score);
                for (int64_t s = 0; s < latents; ++s) {
                  const int64_t row = int64_t(b) * latents + s;
                  const int slot = policy == Policy::random ? int(kept(row, h)) : s < int64_t(slots.size()) ? slots[std::size_t(s)] : -1;
                  REQUIRE(out[2](row, h) == slot);
                  for (int64_t d = 0; d < batch.dim; ++d) {
                    const int64_t c = h * batch.dim + d;
                    REQUIRE(out[0](row, c) == (slot >= 0 ? in[2](k0 + slot, c) : 0));
                    REQUIRE(out[1](row, c) == (slot >= 0 ? in[3](k0 + slot, c) : 0));
                  }
                }
              }
          }
  }
}
