// The CUDA kernels, run by the emulator, against the cpu backend in f64.
#include <catch2/catch_test_macros.hpp>
#include <cmath>

#include "kernels/dropout.h"
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
  s.most_queries = l.most_queries, s.most_scores = s.most_keys * s.most_queries;
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
  const Rows<float> lse = device.out<float>(n, h.heads), delta = device.out<float>(n, h.heads);
  attention_fwd<T>(nullptr, o, lse, q, k, v, segments, dims);
  attention_bwd<T>(nullptr, dq, dk, dv, delta, dout, o, lse, q, k, v, segments, dims);
  return {without_last_row(read(o, n, width)), without_last_row(read(lse, n, h.heads)), without_last_row(read(dq, n, width)),
          read(dk, step_rows, kv_width), read(dv, step_rows, kv_width)};
}

template <class T>
void check_attention(const char* type) {
  Random random(31);
  double worst = 0;
  const AttentionCase cases[] = {{tree(), {1, 1, 8}},          {tree(), {6, 2, 16}},          {tree(), {4, 4, 6}},
                                 {tree(), {3, 1, 32}},         {tree(), {2, 1, 128}},         {tree(), {2, 2, 1}},
                                 {long_segments(), {2, 1, 8}}, {long_segments(), {3, 1, 64}}, {long_segments(), {1, 1, 100}},
                                 {tree(), {14, 2, 64}}};
  for (const AttentionCase& c : cases) {
    INFO("heads " << c.heads.heads << "/" << c.heads.kv_heads << " of " << c.heads.dim << ", step rows " << c.layout.step_rows);
    const int64_t width = c.heads.heads * c.heads.dim, kv_width = c.heads.kv_heads * c.heads.dim;
    Matrices in = {random.normal(c.layout.query_rows, width),        random.normal(c.layout.step_rows, kv_width),
                   random.normal(c.layout.step_rows, kv_width),      random.normal(c.layout.query_rows, width),
                   random.normal(c.layout.step_rows, kv_width, 0.1), random.normal(c.layout.step_rows, kv_width, 0.1)};
    for (std::size_t i = 0; i < 4; ++i) in[i] = stored<T>(in[i]);
    for (std::size_t i = 4; i < 6; ++i) in[i] = stored<float>(in[i]);
    const Matrices exact = attention_cpu(c, in);
    check_reference(attention_reference<double, double>(c, in), exact);
    worst = std::max(worst, check_kernel(exact, attention_reference<T, float>(c, in),
                                         [&](Device& device) { return attention_kernels<T>(c, in, device); }));
  }
  std::printf("attention kernels, %s: error at most %.2f of what is allowed\n", type, worst);
}

// ---- linear maps with LoRA

struct MapGroup {
  int64_t rows, in;
  std::vector<int64_t> outs, ranks;
  bool bias;
  double p;
  bool frozen = false;  // no dx, dW or dbias is wanted
  double scale = 0.7;
};

constexpr uint64_t kSeed = 0x300000009;
constexpr uint32_t kStep = 3, kSite = 5;
std::pair<int, int> row_key(int64_t n) { return {static_cast<int>(n / 7), static_cast<int>(n % 7)}; }

Matrices linear_inputs(const MapGroup& g, Random& random) {
  Matrices m = {random.normal(g.rows, g.in)};
  for (std::size_t j = 0; j < g.outs.size(); ++j) {
    m.push_back(random.normal(g.outs[j], g.in, 0.3));
    m.push_back(random.normal(1, g.outs[j]));
    m.push_back(random.normal(g.ranks[j], g.in, 0.3));
    m.push_back(random.normal(g.outs[j], g.ranks[j], 0.3));
    m.push_back(random.normal(g.rows, g.outs[j]));
  }
  return m;
}

int64_t total_rank(const MapGroup& g) {
  int64_t sum = 0;
  for (int64_t r : g.ranks) sum += r;
  return sum;
}

/// Gradients of parameters before the op.
double before(int64_t r, int64_t c) { return 0.25 * static_cast<double>((r + 2 * c) % 5 - 2); }
Matrix before_matrix(int64_t rows, int64_t cols) {
  Matrix m(rows, cols);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) m(r, c) = before(r, c);
  return m;
}

/// c (+)= factor * op(a) op(b)
void product(Matrix& c, double factor, const Matrix& a, bool ta, const Matrix& b, bool tb) {
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t k = 0; k < (ta ? a.rows : a.cols); ++k) {
      const double x = factor * (ta ? a(k, i) : a(i, k));
      for (int64_t j = 0; j < c.cols; ++j) c(i, j) += x * (tb ? b(j, k) : b(k, j));
    }
}
void put_columns(Matrix& m, int64_t first, const Matrix& x) {
  for (int64_t r = 0; r < x.rows; ++r)
    for (int64_t c = 0; c < x.cols; ++c) m(r, first + c) = x(r, c);
}
void drop(Matrix& m, const MapGroup& g) {
  for (int64_t n = 0; n < m.rows && g.p > 0; ++n)
    for (int64_t c = 0; c < m.cols; ++c) {
      uint32_t bits[4];
      dropout_bits(bits, kSeed, kStep, kSite, row_key(n).first, row_key(n).second, static_cast<uint32_t>(c / 8));
      m(n, c) *=
          dropout_keep(bits, static_cast<uint32_t>(c), dropout_threshold(g.p)) ? static_cast<double>(static_cast<float>(1 / (1 - g.p))) : 0;
    }
}

// Outputs xa, dxa, dx, then y, dA, dB, dW and, with bias, dbias of each map, where they are wanted.
template <class T>
Matrices linear_reference(const MapGroup& g, const Matrices& m) {
  const Matrix& x = m[0];
  Matrix xd = x, xa(g.rows, total_rank(g)), dxa = xa, through_lora(g.rows, g.in), dx(g.rows, g.in);
  drop(xd, g);
  Matrices of_maps;
  int64_t first = 0;
  for (std::size_t j = 0; j < g.outs.size(); ++j) {
    const Matrix &w = m[1 + kMapParts * j], &bias = m[2 + kMapParts * j], &a = m[3 + kMapParts * j], &b = m[4 + kMapParts * j],
                 &dy = m[5 + kMapParts * j];
    Matrix xa_j(g.rows, g.ranks[j]), dxa_j = xa_j, y(g.rows, g.outs[j]);
    product(xa_j, 1, xd, false, a, true);
    product(dxa_j, g.scale, dy, false, b, false);
    xa_j = stored<T>(xa_j), dxa_j = stored<T>(dxa_j);
    put_columns(xa, first, xa_j), put_columns(dxa, first, dxa_j);
    product(y, 1, x, false, w, true);
    product(y, g.scale, xa_j, false, b, true);
    Matrix dw = before_matrix(w.rows, w.cols), da = before_matrix(a.rows, a.cols), db = before_matrix(b.rows, b.cols),
           dbias = before_matrix(1, y.cols);
    for (int64_t n = 0; n < g.rows; ++n)
      for (int64_t o = 0; o < y.cols; ++o) {
        if (g.bias) y(n, o) += bias(0, o);
        dbias(0, o) += dy(n, o);
      }
    product(dx, 1, dy, false, w, false);
    product(through_lora, 1, dxa_j, false, a, false);
    product(dw, 1, dy, true, x, false);
    product(da, 1, dxa_j, true, xd, false);
    product(db, g.scale, dy, true, xa_j, false);
    for (const Matrix& t : {stored<T>(y), da, db}) of_maps.push_back(t);
    if (!g.frozen) of_maps.push_back(dw);
    if (!g.frozen && g.bias) of_maps.push_back(dbias);
    first += g.ranks[j];
  }
  drop(through_lora, g);
  for (std::size_t i = 0; i < dx.at.size(); ++i) dx.at[i] += through_lora.at[i];
  Matrices out = {xa, dxa};
  if (!g.frozen) out.push_back(stored<T>(dx));
  out.insert(out.end(), of_maps.begin(), of_maps.end());
  return out;
}

Matrices linear_cpu(const MapGroup& g, const Matrices& m) {
  Rig rig(2, DType::f64, DType::f64, 0);
  Matrix keys(g.rows, 2);
  for (int64_t n = 0; n < g.rows; ++n) keys(n, 0) = row_key(n).first, keys(n, 1) = row_key(n).second;
  const Dropout dropout{.p = g.p, .seed = kSeed, .step = kStep, .site = kSite, .row_keys = rig.packed().in(keys, Kind::i32)};
  Matrices placed = m;
  for (std::size_t j = 0; j < g.outs.size() && !g.bias; ++j) placed[2 + kMapParts * j] = Matrix(1, 0);
  const PlacedGroup t = place_group(rig, placed, g.ranks, g.scale);
  const int64_t ranks = total_rank(g), outs = t.map.outs();
  const Tensor y = rig.out(g.rows, outs), dxa = ranks > 0 ? rig.out(g.rows, ranks) : Tensor{};
  const Tensor dx = g.frozen ? Tensor{} : rig.out(g.rows, g.in);
  // Each map's gradients have their own numbers before, as they have for the kernels.
  Matrices dw, dbias, da;
  LinearGroupGrad grad;
  for (std::size_t j = 0; j < g.outs.size(); ++j) {
    dw.push_back(before_matrix(g.outs[j], g.in)), dbias.push_back(before_matrix(1, g.outs[j])),
        da.push_back(before_matrix(g.ranks[j], g.in));
    grad.db.push_back(g.ranks[j] > 0 ? rig.in_out(before_matrix(g.outs[j], g.ranks[j]), Kind::sum) : Tensor{});
  }
  if (!g.frozen) grad.dw = rig.in_out(stacked(dw), Kind::sum);
  if (!g.frozen && g.bias) grad.dbias = rig.in_out(beside(dbias), Kind::sum);
  if (ranks > 0) grad.da = rig.in_out(stacked(da), Kind::sum);
  if (ranks > 0) rig.ops.lora_fwd(rig.arena, t.xx, t.map, dropout);
  rig.ops.linear_group_fwd(rig.arena, y, t.xx, t.map);
  rig.ops.linear_group_bwd_input(rig.arena, dx, dxa, t.dy, t.map, dropout);
  rig.ops.linear_group_bwd_params(rig.arena, grad, t.dy, dxa, t.xx, t.map, dropout);
  std::vector<Tensor> out = {ranks > 0 ? t.xx.col_range(g.in, t.xx.cols) : Tensor{}, dxa};
  if (dx) out.push_back(dx);
  for (std::size_t j = 0; j < g.outs.size(); ++j) {
    const LinearPart& p = t.map.parts[j];
    const int64_t begin = p.out_begin, end = begin + p.outs;
    out.push_back(y.col_range(begin, end));
    out.push_back(p.rank > 0 ? grad.da.row_range(p.rank_begin, p.rank_begin + p.rank) : Tensor{});
    out.push_back(grad.db[j]);
    if (grad.dw) out.push_back(grad.dw.row_range(begin, end));
    if (grad.dbias) out.push_back(grad.dbias.col_range(begin, end));
  }
  return read_all(rig, out);
}

template <class T>
Matrices linear_kernels(const MapGroup& g, const Matrices& m, Device& device) {
  const int rows = static_cast<int>(g.rows), in = static_cast<int>(g.in), ranks = static_cast<int>(total_rank(g));
  std::vector<int> keys;
  for (int64_t n = 0; n < g.rows; ++n) keys.push_back(row_key(n).first), keys.push_back(row_key(n).second);
  DropoutMask mask;
  if (g.p > 0) mask = {device.index(keys), kSeed, kStep, kSite, dropout_threshold(g.p), static_cast<float>(1 / (1 - g.p))};
  const Rows<const T> x = device.in<T>(m[0]);
  Rows<T> dx, xa, dxa;
  if (!g.frozen) dx = device.out<T>(g.rows, g.in);
  if (ranks > 0) xa = device.out<T>(g.rows, ranks), dxa = device.out<T>(g.rows, ranks);
  std::vector<Rows<T>> y;
  std::vector<Rows<const T>> dy;
  std::vector<LinearMap<T>> maps;
  std::vector<LinearMapGrad> grads;
  auto gradient = [&](const Matrix& of) { return of.at.empty() ? Rows<float>{} : device.in_out<float>(before_matrix(of.rows, of.cols)); };
  for (std::size_t j = 0; j < g.outs.size(); ++j) {
    const Matrix* part = &m[1 + kMapParts * j];
    LinearMap<T> map{device.in<T>(part[0]),      {}, {}, nullptr, static_cast<int>(g.outs[j]), static_cast<int>(g.ranks[j]),
                     static_cast<float>(g.scale)};
    if (g.ranks[j] > 0) map.lora_a = device.in<T>(part[2]), map.lora_b = device.in<T>(part[3]);
    LinearMapGrad grad{{}, gradient(part[2]), gradient(part[3]), nullptr};
    if (g.bias) map.bias = device.in<T>(part[1]).data;
    if (!g.frozen) grad.dw = gradient(part[0]);
    if (!g.frozen && g.bias) grad.dbias = gradient(part[1]).data;
    maps.push_back(map);
    grads.push_back(grad);
    dy.push_back(device.in<T>(part[4]));
    y.push_back(device.out<T>(g.rows, g.outs[j]));
  }
  linear_group_fwd<T>(nullptr, y, xa, x, maps, mask, rows, in);
  linear_group_bwd_input<T>(nullptr, dx, dxa, dy, maps, mask, rows, in);
  linear_group_bwd_params<T>(nullptr, grads, dy, dxa, x, xa, maps, mask, rows, in);
  Matrices out = {read(xa, ranks ? g.rows : 0, ranks), read(dxa, ranks ? g.rows : 0, ranks)};
  if (dx.data) out.push_back(read(dx, g.rows, g.in));
  for (std::size_t j = 0; j < g.outs.size(); ++j) {
    out.push_back(read(y[j], g.rows, g.outs[j]));
    out.push_back(read(grads[j].dlora_a, g.ranks[j], g.in));
    out.push_back(read(grads[j].dlora_b, g.outs[j], g.ranks[j]));
    if (grads[j].dw.data) out.push_back(read(grads[j].dw, g.outs[j], g.in));
    if (grads[j].dbias) out.push_back(read(Rows<float>{grads[j].dbias, 0}, 1, g.outs[j]));
  }
  return out;
}

template <class T>
void check_linear(const char* type) {
  Random random(32);
  double worst = 0;
  const MapGroup groups[] = {
      {1, 8, {5}, {0}, false, 0},
      {1, 8, {3}, {2}, true, 0},
      {33, 19, {12, 4, 4}, {3, 0, 2}, true, 0.25},
      {70, 100, {64, 32, 32}, {16, 16, 16}, false, 0.1},
      {65, 64, {65}, {8}, true, 0.1, true},
      {130, 172, {70, 33}, {0, 0}, true, 0},
      {64, 32, {32, 32, 32, 32}, {4, 4, 4, 4}, true, 0.5},
  };
  for (const MapGroup& g : groups) {
    INFO("rows " << g.rows << ", in " << g.in << ", maps " << g.outs.size() << ", dropout " << g.p);
    Matrices m = linear_inputs(g, random);
    for (Matrix& x : m) x = stored<T>(x);
    const Matrices exact = linear_cpu(g, m);
    check_reference(linear_reference<double>(g, m), exact);
    worst =
        std::max(worst, check_kernel(exact, linear_reference<T>(g, m), [&](Device& device) { return linear_kernels<T>(g, m, device); }));
  }
  std::printf("linear_group kernels, %s: error at most %.2f of what is allowed\n", type, worst);
}

}  // namespace

TEST_CASE("attention kernels are as exact as bf16 tensor cores allow and the same under every schedule") {
  SKIP_IF_UNSUPPORTED();
  check_attention<bf16>("bf16");
}

TEST_CASE("attention kernels in f32 are exact and the same under every schedule") {
  SKIP_IF_UNSUPPORTED();
  check_attention<float>("f32");
}

TEST_CASE("linear_group kernels are as exact as bf16 tensor cores allow and the same under every schedule") {
  SKIP_IF_UNSUPPORTED();
  check_linear<bf16>("bf16");
}

TEST_CASE("linear_group kernels in f32 are exact and the same under every schedule") {
  SKIP_IF_UNSUPPORTED();
  check_linear<float>("f32");
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

TEST_CASE("a launch that fails throws to the caller, whatever was still to be launched") {
  SKIP_IF_UNSUPPORTED();
  // More blocks in y than a GPU takes, in two launches.
  float memory[1] = {};
  const Rows<const float> one{memory, 1};
  const std::vector<LinearMap<float>> maps(2, {one, one, one, nullptr, 1 << 22, 1, 1.f});
  const std::vector<LinearMapGrad> grads(2, {{memory, 1}, {memory, 1}, {memory, 1}, nullptr});
  const std::vector<Rows<const float>> dy(2, one);
  CHECK_THROWS_AS(linear_group_bwd_params<float>(nullptr, grads, dy, one, one, one, maps, {}, 1, 1), std::runtime_error);
}

TEST_CASE("kernels refuse dimensions that they do not take and have nothing to do without rows") {
  for (const AttentionDims& dims :
       {AttentionDims{2, 1, 129, 1.f}, AttentionDims{2, 1, 0, 1.f}, AttentionDims{3, 2, 64, 1.f}, AttentionDims{0, 1, 64, 1.f}}) {
    CHECK_THROWS_AS(attention_fwd<bf16>(nullptr, {}, {}, {}, {}, {}, {}, dims), std::invalid_argument);
    CHECK_THROWS_AS(attention_bwd<float>(nullptr, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, dims), std::invalid_argument);
  }
  CHECK_NOTHROW(attention_fwd<bf16>(nullptr, {}, {}, {}, {}, {}, {}, {2, 1, 64, 1.f}));
  CHECK_NOTHROW(attention_bwd<float>(nullptr, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {2, 1, 64, 1.f}));
  const std::vector<LinearMap<bf16>> one_map(1, {{}, {}, {}, nullptr, 8, 2, 1.f});
  const std::vector<Rows<bf16>> one_y(1);
  const std::vector<Rows<const bf16>> one_dy(1);
  float gradient[1] = {};
  const std::vector<LinearMapGrad> one_grad(1, {{gradient, 1}, {gradient, 1}, {gradient, 1}, gradient});
  CHECK_NOTHROW(linear_group_fwd<bf16>(nullptr, one_y, {}, {}, one_map, {}, 0, 8));
  CHECK_NOTHROW(linear_group_bwd_input<bf16>(nullptr, {}, {}, one_dy, one_map, {}, 0, 8));
  CHECK_NOTHROW(linear_group_bwd_params<bf16>(nullptr, one_grad, one_dy, {}, {}, {}, one_map, {}, 0, 8));
  const std::vector<LinearMap<float>> maps(kMostMaps + 1);
  const std::vector<Rows<float>> y(maps.size());
  CHECK_THROWS_AS(linear_group_fwd<float>(nullptr, y, {}, {}, maps, {}, 1, 1), std::invalid_argument);
}
