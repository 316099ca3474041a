#include "tests/ops/op_rig.h"

using namespace kava;
using namespace kava::test;

namespace {
constexpr int kParts = 5;  // matrices per linear map in the inputs: W, bias, A, B, dy

struct MapGroup {
  int64_t rows, in;
  std::vector<int64_t> outs, ranks;
  bool bias;
  double p;
  double scale = 0.5;  // a power of two, so that the op's scale * B is exact in every type
};

Matrices inputs_of(const MapGroup& g, Random& random) {
  Matrices m = {random.normal(g.rows, g.in)};
  for (std::size_t j = 0; j < g.outs.size(); ++j) {
    m.push_back(random.normal(g.outs[j], g.in, 0.3));
    m.push_back(random.normal(1, g.bias ? g.outs[j] : 0));
    m.push_back(random.normal(g.ranks[j], g.in, 0.3));
    m.push_back(random.normal(g.outs[j], g.ranks[j], 0.3));
    m.push_back(random.normal(g.rows, g.outs[j]));
  }
  return m;
}

struct Placed {
  Tensor x, xa;
  std::vector<Linear> linears;
  std::vector<Tensor> y, dy;
  Dropout dropout;
};

Placed place(Rig& rig, const MapGroup& g, const Matrices& m) {
  Placed t;
  t.x = rig.in(m[0]);
  int64_t ranks = 0;
  for (std::size_t j = 0; j < g.outs.size(); ++j) {
    const Matrix* part = &m[1 + kParts * j];
    Linear l{.w = rig.in(part[0]), .bias = {}, .lora_a = {}, .lora_b = {}, .scale = g.scale};
    if (g.bias) l.bias = rig.in(part[1]);
    if (g.ranks[j] > 0) l.lora_a = rig.in(part[2]), l.lora_b = rig.in(part[3]);
    t.linears.push_back(l);
    t.y.push_back(rig.out(m[0].rows, g.outs[j]));
    t.dy.push_back(rig.in(part[4]));
    ranks += g.ranks[j];
  }
  if (ranks > 0) t.xa = rig.out(m[0].rows, ranks);
  Matrix keys(m[0].rows, 2);
  for (int64_t n = 0; n < m[0].rows; ++n) keys(n, 0) = double(n / 7), keys(n, 1) = double(n % 7);
  t.dropout = {.p = g.p, .seed = 9, .step = 3, .site = 5, .row_keys = rig.packed().in(keys, Kind::i32)};
  return t;
}

OpCall linear_fwd(const MapGroup& g) {
  return [g](Rig& rig, const Matrices& m) {
    Placed t = place(rig, g, m);
    if (rig.emulates() && t.xa) {  // xa is stored before it is used
      rig.ops.linear_group_fwd(rig.arena, t.y, t.xa, t.x, t.linears, t.dropout);
      rig.round(t.xa);
    }
    rig.ops.linear_group_fwd(rig.arena, t.y, t.xa, t.x, t.linears, t.dropout);
    std::vector<Tensor> out = t.y;
    if (t.xa) out.push_back(t.xa);
    return out;
  };
}

// Outputs: dx, then dW, dbias, dA, dB of each map where they exist. All gradients of parameters start from zero.
OpCall linear_bwd(const MapGroup& g) {
  return [g](Rig& rig, const Matrices& m) {
    Placed t = place(rig, g, m);
    Tensor dx = rig.out(m[0].rows, g.in), dxa = t.xa ? rig.out(m[0].rows, t.xa.cols) : Tensor{};
    std::vector<LinearGrad> grads(g.outs.size());
    std::vector<Tensor> out = {dx};
    auto zero = [&](int64_t rows, int64_t cols) { return out.emplace_back(rig.in_out(Matrix(rows, cols), Kind::sum)); };
    for (std::size_t j = 0; j < grads.size(); ++j) {
      grads[j].dw = zero(g.outs[j], g.in);
      if (g.bias) grads[j].dbias = zero(1, g.outs[j]);
      if (g.ranks[j] > 0) grads[j].dlora_a = zero(g.ranks[j], g.in), grads[j].dlora_b = zero(g.outs[j], g.ranks[j]);
    }
    rig.ops.linear_group_fwd(rig.arena, t.y, t.xa, t.x, t.linears, t.dropout);
    if (t.xa) rig.round(t.xa);
    rig.ops.linear_group_bwd_input(rig.arena, dx, dxa, t.dy, t.linears, t.dropout);
    if (dxa) rig.round(dxa);
    rig.ops.linear_group_bwd_params(rig.arena, grads, t.dy, dxa, t.x, t.xa, t.linears, t.dropout);
    return out;
  };
}

const MapGroup kGroups[] = {
    {1, 8, {5}, {0}, false, 0},
    {1, 8, {3}, {2}, true, 0},
    {33, 19, {12, 4, 4}, {3, 0, 2}, true, 0},
    {70, 24, {24, 8, 8}, {4, 4, 4}, false, 0.3},
    {40, 64, {32}, {8}, false, 0.1},
    {300, 16, {10, 10}, {0, 0}, true, 0},
};

// ---- attention

struct SegmentSpec {
  std::vector<int> keys;
  int query_begin, queries;
};

struct Layout {
  std::vector<SegmentSpec> segments;
  std::vector<int> group_offsets;
  int64_t step_rows, query_rows;
};

// Two samples: a question with a branch that sees some of its rows in another order, a single latent, and a lone row.
const Layout kTree = {
    {{{0, 1, 2, 3}, 0, 4}, {{0, 2, 8, 4, 5}, 4, 2}, {{1, 9}, 6, 1}, {{12}, 7, 1}, {{12, 19, 13, 14, 15}, 8, 3}}, {0, 3, 5}, 20, 11};

Layout long_layout() {
  Layout l{{}, {0, 1, 2}, 90, 90};
  SegmentSpec a{{}, 0, 70}, b{{}, 70, 20};
  for (int i = 0; i < 70; ++i) a.keys.push_back(i);
  for (int i = 70; i < 90; ++i) b.keys.push_back(i);
  l.segments = {a, b};
  return l;
}

Segments place(Rig& rig, const Layout& l) {
  std::vector<int> offsets = {0}, keys, begin, count;
  Segments s;
  for (const SegmentSpec& spec : l.segments) {
    keys.insert(keys.end(), spec.keys.begin(), spec.keys.end());
    offsets.push_back(int(keys.size()));
    begin.push_back(spec.query_begin);
    count.push_back(spec.queries);
    s.most_keys = std::max<int64_t>(s.most_keys, int64_t(spec.keys.size()));
  }
  auto index = [&](const std::vector<int>& v) { return rig.in(row_of(v), Kind::i32); };
  s.key_offsets = index(offsets), s.keys = index(keys), s.query_begin = index(begin), s.query_count = index(count);
  s.group_offsets = index(l.group_offsets);
  s.count = int64_t(l.segments.size()), s.groups = int64_t(l.group_offsets.size()) - 1;
  return s;
}

struct Heads {
  int64_t heads, kv_heads, dim;
  double scale() const { return 1 / std::sqrt(double(dim)); }
};

OpCall attention_fwd(const Layout& l, Heads h) {
  return [=](Rig& rig, const Matrices& m) {
    Tensor q = rig.in(m[0]), k = rig.in(m[1]), v = rig.in(m[2]);
    Tensor o = rig.out(m[0].rows, m[0].cols), lse = rig.out(m[0].rows, h.heads, Kind::sum);
    rig.ops.attention_fwd(rig.arena, o, lse, q, k, v, place(rig, l), h.heads, h.kv_heads, h.scale());
    return std::vector<Tensor>{o, lse};
  };
}

// in: q, k, v, do, dk before, dv before
OpCall attention_bwd(const Layout& l, Heads h) {
  return [=](Rig& rig, const Matrices& m) {
    Tensor q = rig.in(m[0]), k = rig.in(m[1]), v = rig.in(m[2]), dout = rig.in(m[3]);
    Tensor dk = rig.in_out(m[4], Kind::sum), dv = rig.in_out(m[5], Kind::sum);
    Tensor o = rig.out(m[0].rows, m[0].cols), lse = rig.out(m[0].rows, h.heads, Kind::sum), dq = rig.out(m[0].rows, m[0].cols);
    const Segments s = place(rig, l);
    rig.ops.attention_fwd(rig.arena, o, lse, q, k, v, s, h.heads, h.kv_heads, h.scale());
    rig.round(o);
    rig.round(lse);
    rig.ops.attention_bwd(rig.arena, dq, dk, dv, dout, o, lse, q, k, v, s, h.heads, h.kv_heads, h.scale());
    return std::vector<Tensor>{dq, dk, dv};
  };
}

Matrix naive_attention(const Matrices& m, const Layout& l, Heads h) {
  Matrix o(m[0].rows, m[0].cols);
  for (const SegmentSpec& s : l.segments)
    for (int i = 0; i < s.queries; ++i)
      for (int64_t head = 0; head < h.heads; ++head) {
        const int64_t kv = head / (h.heads / h.kv_heads), row = s.query_begin + i;
        const std::size_t seen = s.keys.size() - std::size_t(s.queries - 1 - i);
        std::vector<double> p(seen);
        double sum = 0;
        for (std::size_t j = 0; j < seen; ++j) {
          for (int64_t d = 0; d < h.dim; ++d) p[j] += h.scale() * m[0](row, head * h.dim + d) * m[1](s.keys[j], kv * h.dim + d);
          sum += p[j] = std::exp(p[j]);
        }
        for (std::size_t j = 0; j < seen; ++j)
          for (int64_t d = 0; d < h.dim; ++d) o(row, head * h.dim + d) += p[j] / sum * m[2](s.keys[j], kv * h.dim + d);
      }
  return o;
}

// ---- head

// dh and dw where the gradient of the logits is stored in the storage type on the way.
void gradients_from_rounded_logits(Rig& rig, const Tensor& dh, const Tensor& dw, const Tensor& logits, const Tensor& h, const Tensor& w,
                                   const Matrices& m, double weight) {
  const int64_t n = h.rows, V = w.rows, C = h.cols;
  Tensor dz = rig.out(n, V);
  for (int64_t i = 0; i < n; ++i) {
    const double* z = logits.row<double>(i);
    double sum = 0;
    for (int64_t j = 0; j < V; ++j) sum += std::exp(z[j]);
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

// in: h, w, targets, dw before
OpCall head(double weight) {
  return [=](Rig& rig, const Matrices& m) {
    const int64_t n = m[0].rows, V = m[1].rows;
    Tensor h = rig.in(m[0]), w = rig.in(m[1]), targets = rig.in(m[2], Kind::i32), dw = rig.in_out(m[3], Kind::sum);
    Tensor nll = rig.out(n, 1, Kind::sum), dh = rig.out(n, m[0].cols, Kind::sum), logits = rig.out(n, V, Kind::sum);
    rig.ops.head_cross_entropy(rig.arena, nll, dh, dw, logits, {}, h, w, targets, weight);
    if (rig.emulates()) gradients_from_rounded_logits(rig, dh, dw, logits, h, w, m, weight);
    return std::vector<Tensor>{nll, dh, dw, logits};
  };
}
}  // namespace

TEST_CASE("linear_group computes its formula") {
  Random random(21);
  for (MapGroup g : kGroups) {
    g.p = 0, g.scale = 0.7;
    const Matrices m = inputs_of(g, random), out = run_f64(linear_fwd(g), m);
    for (std::size_t j = 0; j < g.outs.size(); ++j) {
      const Matrix *part = &m[1 + kParts * j], &y = out[j];
      for (int64_t n = 0; n < g.rows; ++n)
        for (int64_t o = 0; o < g.outs[j]; ++o) {
          double want = g.bias ? part[1](0, o) : 0;
          for (int64_t c = 0; c < g.in; ++c) {
            double weight = part[0](o, c);
            for (int64_t r = 0; r < g.ranks[j]; ++r) weight += g.scale * part[3](o, r) * part[2](r, c);
            want += m[0](n, c) * weight;
          }
          REQUIRE(std::fabs(y(n, o) - want) < 1e-11);
        }
    }
  }
}

TEST_CASE("linear_group is as exact as its storage and has the gradients of central differences") {
  Random random(22);
  for (const MapGroup& g : kGroups) {
    INFO("rows " << g.rows << ", in " << g.in << ", maps " << g.outs.size() << ", dropout " << g.p);
    const Matrices m = inputs_of(g, random);
    check_op("linear_group_fwd", m, linear_fwd(g));
    check_op("linear_group_bwd", m, linear_bwd(g));
    std::vector<std::size_t> which = {0};
    Matrices weights;
    for (std::size_t j = 0; j < g.outs.size(); ++j) {
      const std::size_t at = 1 + kParts * j;
      which.push_back(at);
      if (g.bias) which.push_back(at + 1);
      if (g.ranks[j] > 0) which.push_back(at + 2), which.push_back(at + 3);
      weights.push_back(m[at + 4]);
    }
    check_gradient(
        "linear_group", m, [&](const Matrices& moved) { return weighted(run_f64(linear_fwd(g), moved), weights); }, which,
        run_f64(linear_bwd(g), m));
  }
}

TEST_CASE("a row of linear_group has the same bytes whatever rows stand beside it") {
  Random random(23);
  const MapGroup g{600, 96, {80, 33}, {4, 0}, true, 0.2};
  const Matrices m = inputs_of(g, random);
  for (DType type : {DType::f32, DType::bf16, DType::f64}) {
    auto rows = [&](int64_t n) {
      Matrices some = m;
      for (Matrix* x : {&some[0], &some[kParts], &some[2 * kParts]}) x->rows = n, x->at.resize(std::size_t(n * x->cols));
      Rig rig(2, type, type, 0);
      Matrices out = read_all(rig, linear_fwd(g)(rig, some));
      for (Matrix& y : out) y.at.resize(std::size_t(y.cols));
      return out;
    };
    const Matrices all = rows(600);
    for (int64_t n : {1, 2, 31, 256, 257, 300}) {
      INFO(name_of(type) << ", " << n << " rows");
      const Matrices some = rows(n);
      for (std::size_t j = 0; j < all.size(); ++j) REQUIRE(some[j].at == all[j].at);
    }
  }
}

TEST_CASE("dropout keeps its share of elements, by the row's keys, site, step and seed alone") {
  const int64_t n = 40, c = 300;
  const double p = 0.3;
  Matrix identity(c, c);
  for (int64_t i = 0; i < c; ++i) identity(i, i) = 1;
  // With x all ones and A the identity, xa is the mask.
  auto mask = [&](const Matrix& keys, uint64_t seed, uint32_t step, uint32_t site) {
    Rig rig(2, DType::f32, DType::f32, 0);
    Linear l{.w = rig.in(Matrix(1, c)), .bias = {}, .lora_a = rig.in(identity), .lora_b = rig.in(Matrix(1, c)), .scale = 1};
    Tensor x = rig.in(Matrix(keys.rows, c, 1)), xa = rig.out(keys.rows, c), y = rig.out(keys.rows, 1);
    const Dropout d{.p = p, .seed = seed, .step = step, .site = site, .row_keys = rig.in(keys, Kind::i32)};
    rig.ops.linear_group_fwd(rig.arena, std::span(&y, 1), xa, x, std::span(&l, 1), d);
    return rig.read(xa);
  };
  Matrix keys(n, 2);
  for (int64_t i = 0; i < n; ++i) keys(i, 0) = double(i / 8), keys(i, 1) = double(i % 8);
  const Matrix first = mask(keys, 1, 1, 1);
  double kept = 0;
  for (double v : first.at) {
    REQUIRE((v == 0 || std::fabs(v - 1 / (1 - p)) < 1e-6));
    kept += v > 0;
  }
  const double count = double(n * c), spread = std::sqrt(count * p * (1 - p));
  REQUIRE(std::fabs(kept - count * (1 - p)) < 5 * spread);
  Matrix backwards(n, 2);
  for (int64_t i = 0; i < n; ++i) backwards(i, 0) = keys(n - 1 - i, 0), backwards(i, 1) = keys(n - 1 - i, 1);
  const Matrix turned = mask(backwards, 1, 1, 1);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < c; ++j) REQUIRE(turned(i, j) == first(n - 1 - i, j));
  for (const Matrix& other : {mask(keys, 2, 1, 1), mask(keys, 1, 2, 1), mask(keys, 1, 1, 2)}) {
    double equal = 0;
    for (std::size_t i = 0; i < first.at.size(); ++i) equal += other.at[i] == first.at[i];
    REQUIRE(std::fabs(equal / count - (p * p + (1 - p) * (1 - p))) < 0.03);
  }
  for (int64_t i = 1; i < n; ++i) REQUIRE(!std::equal(&first.at[0], &first.at[std::size_t(c)], &first.at[std::size_t(i * c)]));
}

TEST_CASE("what dropout keeps is divided by 1 - p in the type of the sums") {
  Rig rig(1, DType::f64, DType::f64, 0);
  const int64_t c = 64;
  const double p = 0.1;
  Linear l{.w = rig.in(Matrix(1, c)), .bias = {}, .lora_a = rig.in(Matrix(1, c, 1)), .lora_b = rig.in(Matrix(1, 1, 1)), .scale = 1};
  const Tensor x = rig.in(Matrix(1, c, 1)), xa = rig.out(1, 1), dx = rig.out(1, c), dxa = rig.out(1, 1), dy = rig.in(Matrix(1, 1, 1));
  Tensor y = rig.out(1, 1);
  const Dropout d{.p = p, .seed = 1, .step = 1, .site = 1, .row_keys = rig.in(Matrix(1, 2), Kind::i32)};
  rig.ops.linear_group_fwd(rig.arena, std::span(&y, 1), xa, x, std::span(&l, 1), d);
  rig.ops.linear_group_bwd_input(rig.arena, dx, dxa, std::span(&dy, 1), std::span(&l, 1), d);
  double kept = 0;
  for (double v : rig.read(dx).at) {
    REQUIRE((v == 0 || v == 1 / (1 - p)));
    kept += v;
  }
  REQUIRE(kept > 0);
  REQUIRE(std::fabs(rig.read(xa)(0, 0) - kept) < 1e-13);
}

TEST_CASE("attention over key lists is softmax attention and has the gradients of central differences") {
  Random random(24);
  for (const Layout& l : {kTree, long_layout()})
    for (Heads h : {Heads{1, 1, 5}, Heads{6, 2, 16}, Heads{4, 4, 3}, Heads{3, 1, 64}}) {
      INFO("heads " << h.heads << "/" << h.kv_heads << " of " << h.dim);
      const int64_t width = h.heads * h.dim, kv_width = h.kv_heads * h.dim;
      const Matrices in = {random.normal(l.query_rows, width), random.normal(l.step_rows, kv_width), random.normal(l.step_rows, kv_width)};
      check_op("attention_fwd", in, attention_fwd(l, h));
      const Matrix got = run_f64(attention_fwd(l, h), in)[0], want = naive_attention(in, l, h);
      for (std::size_t i = 0; i < want.at.size(); ++i) REQUIRE(std::fabs(got.at[i] - want.at[i]) < 1e-12);
      Matrices back = in;
      back.push_back(random.normal(l.query_rows, width));
      back.push_back(Matrix(l.step_rows, kv_width));
      back.push_back(Matrix(l.step_rows, kv_width));
      check_op("attention_bwd", back, attention_bwd(l, h));
      const Matrices gradient = run_f64(attention_bwd(l, h), back);
      if (l.step_rows < 50)
        check_gradient(
            "attention", back, [&](const Matrices& m) { return weighted({naive_attention(m, l, h)}, {back[3]}); }, {0, 1, 2}, gradient);
      Matrices twice = back;
      twice[4] = gradient[1], twice[5] = gradient[2];
      const Matrices added = run_f64(attention_bwd(l, h), twice);
      for (std::size_t i : {1u, 2u})
        for (std::size_t e = 0; e < added[i].at.size(); ++e) REQUIRE(std::fabs(added[i].at[e] - 2 * gradient[i].at[e]) < 1e-12);
    }
}

TEST_CASE("attention of a sample has the same bytes whatever samples stand beside it") {
  Random random(25);
  const Heads h{6, 2, 16};
  const Matrices in = {random.normal(11, 96), random.normal(20, 32), random.normal(20, 32)};
  Layout alone = kTree;
  alone.segments.erase(alone.segments.begin(), alone.segments.begin() + 3);
  for (SegmentSpec& s : alone.segments) s.query_begin -= 7;
  alone.group_offsets = {0, 2};
  Matrices part = in;
  part[0].rows = 4;
  part[0].at.erase(part[0].at.begin(), part[0].at.begin() + 7 * 96);
  for (DType type : {DType::f32, DType::bf16, DType::f64}) {
    Rig both(2, type, type, 0), one(2, type, type, 0);
    const Matrix all = both.read(attention_fwd(kTree, h)(both, in)[0]), some = one.read(attention_fwd(alone, h)(one, part)[0]);
    REQUIRE(std::vector<double>(all.at.begin() + 7 * 96, all.at.end()) == some.at);
  }
}

TEST_CASE("attention survives logits of any size") {
  for (DType type : {DType::f32, DType::bf16, DType::f64}) {
    Rig rig(1, type, type, 0);
    const Matrices in = {Matrix(11, 4, 100), Matrix(20, 4, 100), Matrix(20, 4, 3)};
    Matrices opposite = in;
    for (int64_t r = 0; r < 20; r += 2)
      for (int64_t c = 0; c < 4; ++c) opposite[1](r, c) = -100;
    for (const Matrices& m : {in, opposite})
      for (double v : rig.read(attention_fwd(kTree, {1, 1, 4})(rig, m)[0]).at) REQUIRE(std::fabs(v - 3) < 1e-5);
  }
}

TEST_CASE("attention that one key takes all of has no gradient to queries and keys") {
  Random random(42);
  const Heads h{2, 1, 16};
  const Layout l{{{{0, 1, 2, 3, 4, 5}, 0, 6}, {{7}, 6, 1}}, {0, 1, 2}, 8, 7};
  Matrices in = {random.normal(7, 32), random.normal(8, 16), random.normal(8, 16), random.normal(7, 32), Matrix(8, 16), Matrix(8, 16)};
  // Every query follows (1, 1, ..), and so does key 0, but no other key of its segment.
  for (double& v : in[0].at) v = 10 + v;
  for (int64_t r = 0; r < 8; ++r)
    for (int64_t c = 0; c < 16; ++c) in[1](r, c) += r == 0 ? 30 : -30;
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    INFO(name_of(type));
    Rig rig(1, type, type, 0);
    const Matrices out = read_all(rig, attention_bwd(l, h)(rig, in));
    for (std::size_t i : {0u, 1u})
      for (double v : out[i].at) REQUIRE(v == 0);
    for (int64_t c = 0; c < 16; ++c) REQUIRE(out[2](0, c) != 0);
  }
}

TEST_CASE("head_cross_entropy is the cross-entropy of the head's softmax and has the gradients of central differences") {
  Random random(26);
  for (auto [n, c, V] : {std::tuple{1, 3, 2}, {5, 16, 37}, {70, 24, 301}}) {
    const Matrices in = {random.normal(n, c), random.normal(V, c, 0.5), random.whole(1, n, 0, V - 1), Matrix(V, c)};
    check_op("head_cross_entropy", in, head(0.3));
    const Matrices out = run_f64(head(0.3), in);
    auto nll = [&](const Matrices& m) {
      Matrix loss(n, 1);
      for (int64_t i = 0; i < n; ++i) {
        std::vector<double> z(std::size_t(V), 0.0);
        double sum = 0;
        for (int64_t j = 0; j < V; ++j) {
          for (int64_t k = 0; k < c; ++k) z[std::size_t(j)] += m[0](i, k) * m[1](j, k);
          sum += std::exp(z[std::size_t(j)]);
        }
        loss(i, 0) = std::log(sum) - z[std::size_t(m[2](0, i))];
      }
      return loss;
    };
    const Matrix want = nll(in);
    for (int64_t i = 0; i < n; ++i) REQUIRE(std::fabs(out[0](i, 0) - want(i, 0)) < 1e-11);
    check_gradient("head_cross_entropy", in, [&](const Matrices& m) { return weighted({nll(m)}, {Matrix(n, 1, 0.3)}); }, {0, 1},
                   {out[1], out[2]});
  }
}

TEST_CASE("head_cross_entropy gives the first best token, works in chunks, and refuses a target outside") {
  Random random(27);
  const int64_t n = 4200;
  const Matrices in = {random.normal(n, 3), random.normal(5, 3), random.whole(1, n, 0, 4), Matrix(5, 3)};
  const Matrices out = run_f64(head(1), in);
  Rig rig(2, DType::f64, DType::f64, 0);
  Tensor h = rig.in(in[0]), w = rig.in(in[1]), best = rig.out(1, n, Kind::i32);
  rig.ops.head_cross_entropy(rig.arena, {}, {}, {}, {}, best, h, w, {}, 1);
  REQUIRE(rig.guards_hold());
  const Matrix got = rig.read(best);
  for (int64_t i = 0; i < n; ++i) {
    const auto row = out[3].at.begin() + i * 5;
    REQUIRE(got(0, i) == double(std::max_element(row, row + 5) - row));
  }
  Matrix same(40, 3, 1);
  Tensor tied = rig.in(same), first = rig.out(1, 1, Kind::i32), one = rig.in(Matrix(1, 3, 1)), bad = rig.in(row_of({40}), Kind::i32);
  rig.ops.head_cross_entropy(rig.arena, {}, {}, {}, {}, first, one, tied, {}, 1);
  REQUIRE(rig.read(first)(0, 0) == 0);
  Tensor nll = rig.out(1, 1, Kind::sum);
  REQUIRE_THROWS_AS(rig.ops.head_cross_entropy(rig.arena, nll, {}, {}, {}, {}, one, tied, bad, 1), Error);
}
