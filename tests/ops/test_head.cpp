#include <algorithm>
#include <array>
#include <map>
#include <tuple>

#include "tests/ops/op_rig.h"

using namespace kava;
using namespace kava::test;

namespace {
// dh and dw where the gradient of the logits is stored in the storage type on the way.
void gradients_from_rounded_logits(Rig& rig, const Tensor& dh, const Tensor& dw, const Tensor& logits, const Tensor& h, const Tensor& w,
                                   const Matrices& m, const std::array<double, 2>& weights) {
  const int64_t n = h.rows, V = w.rows, C = h.cols;
  Tensor dz = rig.out(n, V);
  for (int64_t i = 0; i < n; ++i) {
    const double* z = logits.row<double>(i);
    double sum = 0;
    for (int64_t j = 0; j < V; ++j) sum += std::exp(z[j]);
    const double weight = weights[std::size_t(m[4](0, i))];
    for (int64_t j = 0; j < V; ++j) dz.row<double>(i)[j] = weight * (std::exp(z[j]) / sum - (j == int64_t(m[2](0, i)) ? 1 : 0));
  }
  rig.round(dz);
  rig.ops.fill(dh, 0);
  for (int64_t j = 0; j < V; ++j) std::copy_n(m[3].at.begin() + j * C, C, dw.row<double>(j));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < V; ++j)
      for (int64_t c = 0; c < C; ++c) {
        dh.row<double>(i)[c] += dz.row<double>(i)[j] * w.row<double>(j)[c];
        dw.row<double>(j)[c] += dz.row<double>(i)[j] * h.row<double>(i)[c];
      }
}

constexpr std::array kWeights{0.3, 0.05};

// in: h, w, targets, dw before, classes
OpRun head(std::array<double, 2> weights = kWeights) {
  return [=](Rig& rig, const Matrices& m) {
    const int64_t n = m[0].rows, V = m[1].rows;
    Tensor h = rig.in(m[0]), w = rig.in(m[1]), targets = rig.in(m[2], Kind::i32), dw = rig.in_out(m[3], Kind::sum);
    Tensor classes = rig.in(m[4], Kind::i32), losses = rig.in_out(Matrix(1, 2), Kind::f64);
    Tensor dh = rig.out(n, m[0].cols, Kind::sum), logits = rig.out(n, V, Kind::sum);
    rig.ops.head_cross_entropy(rig.arena, losses, dh, dw, {}, logits, h, w, targets, classes, {}, weights);
    if (rig.emulates()) gradients_from_rounded_logits(rig, dh, dw, logits, h, w, m, weights);
    return std::vector<Tensor>{losses, dh, dw, logits};
  };
}

// The same where nobody wants the logits.
OpRun head_without_logits() {
  return [](Rig& rig, const Matrices& m) {
    if (rig.emulates()) {
      std::vector<Tensor> outs = head()(rig, m);
      outs.pop_back();
      return outs;
    }
    Tensor h = rig.in(m[0]), w = rig.in(m[1]), targets = rig.in(m[2], Kind::i32), dw = rig.in_out(m[3], Kind::sum);
    Tensor classes = rig.in(m[4], Kind::i32), losses = rig.in_out(Matrix(1, 2), Kind::f64), dh = rig.out(m[0].rows, m[0].cols, Kind::sum);
    rig.ops.head_cross_entropy(rig.arena, losses, dh, dw, {}, {}, h, w, targets, classes, {}, kWeights);
    return std::vector<Tensor>{losses, dh, dw};
  };
}

Matrices head_inputs(Random& random, int64_t n, int64_t c, int64_t V) {
  return {random.normal(n, c), random.normal(V, c, 0.5), random.whole(1, n, 0, int(V) - 1), Matrix(V, c), random.whole(1, n, 0, 1)};
}
// Rows of draws from the logits z, which are storage's: head(1) of a model of one dimension.
Matrix draws(Ops& ops, DType type, const Matrix& z, const Matrix& numbers, double temperature, double top_p) {
  Rig rig(ops, type, type, 0);
  const int64_t n = numbers.cols / 2;
  const Tensor drawn = rig.out(1, n, Kind::i32);
  rig.ops.head_draw(rig.arena, drawn, rig.in(Matrix(n, 1, 1)), rig.in(z), rig.in(numbers, Kind::i32), temperature, top_p);
  REQUIRE(rig.guards_hold());
  return rig.read(drawn);
}

// The words of n numbers that are spread evenly, the first one `begin`.
Matrix even_numbers(int64_t n, uint64_t begin = uint64_t{1} << 50) {
  Matrix words(1, 2 * n);
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t bits = static_cast<uint64_t>(i) * (~uint64_t{0} / static_cast<uint64_t>(n) + 1) + begin;
    words(0, 2 * i) = static_cast<int32_t>(bits), words(0, 2 * i + 1) = static_cast<int32_t>(bits >> 32);
  }
  return words;
}

// How many of n even numbers draw each token.
std::map<int, int> shares(Ops& ops, DType type, const Matrix& z, int64_t n, double temperature, double top_p,
                          uint64_t begin = uint64_t{1} << 50) {
  std::map<int, int> counts;
  for (double token : draws(ops, type, z, even_numbers(n, begin), temperature, top_p).at) ++counts[static_cast<int>(token)];
  return counts;
}
}  // namespace

TEST_CASE("head_draw draws tokens with the softmax's probability, at any temperature", "[device][ops]") {
  for (auto [ops, type] : every_backend()) {
    INFO(ops->name() << ", " << name_of(type));
    // Exact in bf16: shares 2, 4, 1, 1 of 8 where the temperature is 1 / ln 2.
    Matrix z(4, 1);
    z.at = {-1, 0, -2, -2};
    const double t = 1 / std::log(2.0);
    CHECK(shares(*ops, type, z, 8, t, 1) == std::map<int, int>{{0, 2}, {1, 4}, {2, 1}, {3, 1}});
    CHECK(shares(*ops, type, z, 8, t, 1, 0) == std::map<int, int>{{0, 2}, {1, 4}, {2, 1}, {3, 1}});  // at the very borders
    CHECK(shares(*ops, type, z, 22, t / 2, 1) == std::map<int, int>{{0, 4}, {1, 16}, {2, 1}, {3, 1}});
    CHECK(shares(*ops, type, z, 4, 1e-9, 1) == std::map<int, int>{{1, 4}});
    CHECK(shares(*ops, type, z, 4, 1e9, 1) == std::map<int, int>{{0, 1}, {1, 1}, {2, 1}, {3, 1}});
    // The fewest best ones that have the share, the first of equals.
    CHECK(shares(*ops, type, z, 4, t, 0.5) == std::map<int, int>{{1, 4}});
    CHECK(shares(*ops, type, z, 6, t, 0.51) == std::map<int, int>{{0, 2}, {1, 4}});
    CHECK(shares(*ops, type, z, 7, t, 0.76) == std::map<int, int>{{0, 2}, {1, 4}, {2, 1}});
    CHECK(shares(*ops, type, z, 8, t, 0.9999) == std::map<int, int>{{0, 2}, {1, 4}, {2, 1}, {3, 1}});
    CHECK(shares(*ops, type, z, 4, t, 1e-300) == std::map<int, int>{{1, 4}});
  }
}

TEST_CASE("head_draw goes through the tokens of a thread in their order", "[device][ops]") {
  const double t = 1 / std::log(2.0);
  // A row in which every 256th token, from the first one on, has one of these logits, and no other can be drawn.
  const auto row = [](const std::vector<double>& logits) {
    Matrix z(static_cast<int64_t>(logits.size()) * 256 + 1, 1, -1e4);
    for (std::size_t i = 0; i < logits.size(); ++i) z(static_cast<int64_t>(i) * 256, 0) = logits[i];
    return z;
  };
  for (auto [ops, type] : every_backend()) {
    INFO(ops->name() << ", " << name_of(type));
    CHECK(shares(*ops, type, row({-1, -1, 0}), 4, t, 1, 0) == std::map<int, int>{{0, 1}, {256, 1}, {512, 2}});
    CHECK(shares(*ops, type, row({0, -1, -1}), 3, t, 0.75) == std::map<int, int>{{0, 2}, {256, 1}});
    CHECK(shares(*ops, type, row({-1, -1, 0}), 3, t, 0.75) == std::map<int, int>{{0, 1}, {512, 2}});
    CHECK(shares(*ops, type, row({60, 0, 0}), 3, 0.5, 1) == std::map<int, int>{{0, 3}});
  }
}

TEST_CASE("head_draw draws from long rows what a plain count draws", "[device][ops]") {
  Random random(30);
  constexpr int64_t kDraws = 8;
  for (int64_t V : {1, 255, 257, 700, 151936}) {
    const Matrix z = random.whole(V, 1, -9, 3), numbers = even_numbers(kDraws);  // with equals in several threads
    std::vector<int64_t> order;
    for (int64_t first = 0; first < std::min<int64_t>(V, 256); ++first)
      for (int64_t i = first; i < V; i += 256) order.push_back(i);
    const double most = *std::ranges::max_element(z.at);
    std::vector<std::pair<double, int64_t>> best;  // minus the weight, place in that order
    double all = 0;
    for (std::size_t i = 0; i < order.size(); ++i) {
      best.emplace_back(-std::exp((z(order[i], 0) - most) / 0.8), static_cast<int64_t>(i));
      all -= best.back().first;
    }
    std::ranges::sort(best);
    for (double top_p : {1.0, 0.9, 0.01}) {
      if (V > 1000 && top_p != 0.9) continue;
      std::vector<std::pair<int64_t, double>> kept;
      double sum = 0;
      for (std::size_t i = 0; i < best.size() && (top_p >= 1 || sum < top_p * all); ++i)
        kept.emplace_back(best[i].second, -best[i].first), sum -= best[i].first;
      std::ranges::sort(kept);
      for (auto [ops, type] : every_backend()) {
        if (V > 1000 && type != DType::f32) continue;
        INFO("V " << V << ", " << ops->name() << ", " << name_of(type) << ", top_p " << top_p);
        const Matrix got = draws(*ops, type, z, numbers, 0.8, top_p);
        for (int schedule : {1, 2, 0}) {
          if (ops != tested_cuda() || V > 1000) break;
          if (!every_schedule() && (schedule == 0) != (top_p == 1)) continue;
          take_schedule(schedule);
          search_races(schedule == 0);
          CHECK(draws(*ops, type, z, numbers, 0.8, top_p).at == got.at);
          search_races(false);
        }
        int64_t clear = 0;
        for (int64_t n = 0; n < kDraws; ++n) {
          double place = (static_cast<double>(n) / kDraws + 0x1p-14) * sum;
          std::size_t i = 0;
          for (; i + 1 < kept.size() && place >= kept[i].second; ++i) place -= kept[i].second;
          if (place < 1e-8 * sum || kept[i].second - place < 1e-8 * sum) continue;  // it may round to either neighbour
          ++clear;
          REQUIRE(got(0, n) == static_cast<double>(order[static_cast<std::size_t>(kept[i].first)]));
        }
        CHECK(clear > kDraws / 2);
      }
    }
  }
}

TEST_CASE("head_draw of logits that are not finite is -1", "[device][ops]") {
  for (auto [ops, type] : every_backend())
    for (double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL})
      for (int64_t at : {0, 299}) {
        Matrix z(300, 1, 1);
        z(at, 0) = bad;
        CHECK(draws(*ops, type, z, even_numbers(1), 1, 1)(0, 0) == -1);
      }
}

TEST_CASE("head_cross_entropy is the cross-entropy of the head's softmax and has the gradients of central differences", "[device][ops]") {
  Random random(26);
  for (auto [n, c, V] : {std::tuple{1, 3, 2}, {5, 16, 37}, {70, 24, 301}}) {
    const Matrices in = head_inputs(random, n, c, V);
    check_op("head_cross_entropy", in, head());
    const Matrices out = run_f64(head(), in);
    auto losses = [&](const Matrices& m) {
      Matrix loss(1, 2);
      for (int64_t i = 0; i < n; ++i) {
        std::vector<double> z(std::size_t(V), 0.0);
        double sum = 0;
        for (int64_t j = 0; j < V; ++j) {
          for (int64_t k = 0; k < c; ++k) z[std::size_t(j)] += m[0](i, k) * m[1](j, k);
          sum += std::exp(z[std::size_t(j)]);
        }
        loss(0, int64_t(m[4](0, i))) += std::log(sum) - z[std::size_t(m[2](0, i))];
      }
      return loss;
    };
    const Matrix want = losses(in);
    for (int64_t i : {0, 1}) REQUIRE(std::fabs(out[0](0, i) - want(0, i)) < 1e-11 * n);
    Matrix weights(1, 2);
    weights.at.assign(kWeights.begin(), kWeights.end());
    check_gradient("head_cross_entropy", in, [&](const Matrices& m) { return weighted({losses(m)}, {weights}); }, {0, 1}, {out[1], out[2]});
  }
}

TEST_CASE("head_cross_entropy without logits is as exact", "[device][ops]") {
  Random random(26);
  for (auto [n, c, V] : {std::tuple{1, 3, 2}, {5, 16, 37}, {70, 24, 301}})
    check_op("head_cross_entropy without logits", head_inputs(random, n, c, V), head_without_logits());
}

TEST_CASE("head_cross_entropy of long rows is exact, with logits of any size", "[device][ops]") {
  Random random(28);
  // Rows of more than one stretch of the cuda kernel, whole chunks long and not.
  for (int64_t V : {1504, 2600, 3501, 151936}) {
    Matrices in = head_inputs(random, 2, 4, V);
    if (V < 4000) check_op("head_cross_entropy", in, head());
    // Logits of some hundreds; those of the last row are below zero.
    for (double& v : in[0].at) v *= 100;
    for (int64_t c = 0; c < 4; ++c) in[0](1, c) = 100;
    for (int64_t j = 0; j < V; ++j)
      for (int64_t c = 0; c < 4; ++c) in[1](j, c) = -std::fabs(in[1](j, c)) - 0.1;
    // Equals, of which the thread with the lower columns has the later one.
    for (int64_t j : {int64_t{20}, V > 2048 ? int64_t{2048} : 21})
      for (int64_t c = 0; c < 4; ++c) in[1](j, c) = -0.05;
    for (auto [ops, type] : every_backend()) {
      if (type == DType::bf16) continue;
      INFO("V " << V << ", " << ops->name() << ", " << name_of(type));
      Rig rig(*ops, type, type, 0);
      const Matrices out = read_all(rig, head()(rig, in));
      Matrix losses(1, 2), best(1, 2);
      for (int64_t i = 0; i < 2; ++i) {
        int64_t most = 0;
        double sum = 0;
        for (int64_t j = 1; j < V; ++j)
          if (out[3](i, j) > out[3](i, most)) most = j;
        for (int64_t j = 0; j < V; ++j) sum += std::exp(out[3](i, j) - out[3](i, most));
        losses(0, int64_t(in[4](0, i))) += std::log(sum) + out[3](i, most) - out[3](i, int64_t(in[2](0, i)));
        best(0, i) = double(most);
      }
      require_close(out[0], losses, type == DType::f64 ? 1e-11 : 1e-5);
      Tensor got = rig.out(1, 2, Kind::i32);
      rig.ops.head_argmax(rig.arena, got, rig.in(in[0]), rig.in(in[1]));
      REQUIRE(rig.read(got).at == best.at);
    }
  }
}

TEST_CASE("head_cross_entropy of more rows than the cuda backend takes at a time is the cpu's in f64", "[device][ops]") {
  if (!tested_cuda()) SKIP(kNoTestedCuda);
  Random random(29);
  const Matrices in = head_inputs(random, 4200, 3, 5);
  const Matrices exact = run_f64(head_without_logits(), in);
  Rig rig(*tested_cuda(), DType::bf16, DType::bf16, 0);
  const Matrices got = read_all(rig, head_without_logits()(rig, in));
  REQUIRE(rig.guards_hold());
  for (std::size_t i = 0; i < exact.size(); ++i) {
    INFO("output " << i);
    CHECK(normalised_error(got[i], exact[i]) < 0.02);  // inputs and gradients of logits are rounded to bf16
  }
}

TEST_CASE("head_argmax gives the first best token, also of many rows, as head_cross_entropy judges it", "[device][ops]") {
  Random random(27);
  const int64_t samples = 40;
  for (auto [ops, type] : every_backend()) {
    const int64_t n = ops == tested_cuda() ? 300 : 4200;
    const Matrices in = head_inputs(random, n, 3, 5);
    INFO(ops->name() << ", " << name_of(type));
    Rig rig(*ops, type, type, 0);
    const Matrices out = read_all(rig, head()(rig, in));
    Tensor h = rig.in(in[0]), w = rig.in(in[1]), best = rig.out(1, n, Kind::i32);
    rig.ops.head_argmax(rig.arena, best, h, w);
    REQUIRE(rig.guards_hold());
    const Matrix got = rig.read(best);
    for (int64_t i = 0; i < n; ++i) {
      const auto row = out[3].at.begin() + i * 5;
      REQUIRE(got(0, i) == double(std::max_element(row, row + 5) - row));
    }
    // Every row but those of two samples has its best token as target; sample 7 owns no row, and the last rows belong to nobody.
    Matrix targets = got, owners(1, n);
    for (int64_t i = 0; i < n; ++i) owners(0, i) = i % samples == 7 || i > n - 50 ? -1 : double(i % samples);
    for (int64_t i : {int64_t{3}, int64_t{80}, int64_t{7}, n - 10}) targets(0, i) = double((int64_t(targets(0, i)) + 1) % 5);
    Tensor correct = rig.out(1, samples, Kind::i32), losses = rig.in_out(Matrix(1, 2), Kind::f64);
    rig.ops.head_cross_entropy(rig.arena, losses, {}, {}, correct, {}, h, w, rig.in(targets, Kind::i32), rig.in(in[4], Kind::i32),
                               rig.in(owners, Kind::i32), kWeights);
    const Matrix judged = rig.read(correct);
    for (int64_t b = 0; b < samples; ++b) REQUIRE(judged(0, b) == (b == 3 || b == 0 ? 0 : 1));
    REQUIRE(rig.guards_hold());
    Matrix same(40, 3, 1);
    Tensor tied = rig.in(same), first = rig.out(1, 1, Kind::i32), one = rig.in(Matrix(1, 3, 1));
    rig.ops.head_argmax(rig.arena, first, one, tied);
    REQUIRE(rig.read(first)(0, 0) == 0);
    rig.ops.head_argmax(rig.arena, first, rig.in(Matrix(1, 3, std::nan(""))), tied);
    REQUIRE((rig.read(first)(0, 0) >= 0 && rig.read(first)(0, 0) < 40));
  }
}
