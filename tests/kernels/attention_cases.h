// Cases of the attention kernels: segments with key lists, the outputs of the kernels, and what they should be. The last query row of a
// layout belongs to no segment.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <random>
#include <utility>
#include <vector>

#include "tests/kernels/kernel_rig.h"
#include "tests/ops/segment_layout.h"

namespace kava::test {

inline std::vector<int> range(int begin, int end) {
  std::vector<int> v;
  for (int i = begin; i < end; ++i) v.push_back(i);
  return v;
}
inline std::vector<int> joined(std::vector<int> a, const std::vector<int>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// A question, branches that see some of its rows in another order, a single latent; a sample of one row; one without queries.
inline Layout tree() {
  return {{{{0, 1, 2, 3}, 0, 4}, {{2, 0, 8, 4, 5}, 4, 2}, {{1, 9}, 6, 1}, {{12}, 7, 1}, {{}, 8, 0}, {{12, 19, 13, 14, 15}, 8, 3}},
          {0, 3, 6},
          20,
          12};
}
// Several tiles of keys and of rows, ends beside the tiles' ends: 130 keys of which 65 are own, then one query over all but every third.
inline Layout long_segments() {
  Layout l{{{range(0, 130), 0, 65}, {{}, 65, 1}, {joined(range(200, 263), range(264, 274)), 66, 10}}, {0, 2, 3}, 275, 77};
  for (int i = 0; i < 200; ++i)
    if (i % 3) l.segments[1].keys.push_back(199 - i);
  return l;
}

// Segments of one query, as decoding has, and of a few, on keys in random order: `counts` of them.
inline Layout few_queries(std::initializer_list<std::pair<int, int>> counts, unsigned seed) {
  Layout l{{}, {0}, 1, 1};
  std::mt19937 engine(seed);
  int64_t rows = 0, queries = 0;
  for (const auto& [keys, own] : counts) {
    const int first = static_cast<int>(rows);
    SegmentSpec s{range(first, first + keys), static_cast<int>(queries), own};
    std::shuffle(s.keys.begin(), s.keys.end() - own, engine);
    l.segments.push_back(std::move(s));
    l.group_offsets.push_back(static_cast<int>(l.segments.size()));
    rows += keys + 1, queries += own;
  }
  l.step_rows = rows, l.query_rows = queries + 1;
  return l;
}

// Sixteen rows of which the last sees 96 keys, the backward's tile, among others that see more; and 96 keys in all.
inline Layout tile_of_keys() { return {{{range(0, 120), 0, 104}, {range(120, 216), 104, 40}}, {0, 1, 2}, 217, 145}; }

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
  int most_queries = 0, fewest_queries = 1 << 30, most_keys = 0;
  explicit FlatLayout(const Layout& l) : group_offsets(l.group_offsets) {
    for (const SegmentSpec& s : l.segments) {
      keys.insert(keys.end(), s.keys.begin(), s.keys.end());
      offsets.push_back(static_cast<int>(keys.size()));
      begin.push_back(s.query_begin);
      count.push_back(s.queries);
      most_queries = std::max(most_queries, s.queries), fewest_queries = std::min(fewest_queries, s.queries);
      most_keys = std::max(most_keys, static_cast<int>(s.keys.size()));
    }
  }
};

inline Matrices attention_cpu(const AttentionCase& c, const Matrices& in) {
  Rig rig(2, DType::f64, DType::f64, 0);
  const FlatLayout l(c.layout);
  auto index = [&](const std::vector<int>& v) { return rig.in(row_of(v), Kind::i32); };
  Segments s;
  s.key_offsets = index(l.offsets), s.keys = index(l.keys), s.query_begin = index(l.begin), s.query_count = index(l.count);
  s.group_offsets = index(l.group_offsets);
  s.count = static_cast<int64_t>(l.begin.size()), s.groups = static_cast<int64_t>(l.group_offsets.size()) - 1, s.most_keys = l.most_keys;
  s.most_queries = l.most_queries, s.fewest_queries = l.fewest_queries;
  const Heads& h = c.heads;
  Tensor q = rig.in(in[0]), k = rig.in(in[1]), v = rig.in(in[2]), dout = rig.in(in[3]), dk = rig.in_out(in[4]), dv = rig.in_out(in[5]);
  Tensor o = rig.in_out(Matrix(in[0].rows, in[0].cols)), lse = rig.in_out(Matrix(in[0].rows, h.heads)),
         dq = rig.in_out(Matrix(in[0].rows, in[0].cols));
  rig.ops.attention_fwd(rig.arena, o, lse, q, k, v, s, h.heads, h.kv_heads, h.scale());
  rig.ops.attention_bwd(rig.arena, dq, dk, dv, dout, o, lse, q, k, v, s, h.heads, h.kv_heads, h.scale());
  return read_all(rig, {o, lse, dq, dk, dv});
}

/// The rows of segments; the last row must still be NaN and becomes zero, as in the reference.
inline Matrix without_last_row(Matrix m) {
  for (int64_t c = 0; c < m.cols; ++c) {
    REQUIRE(std::isnan(m(m.rows - 1, c)));
    m(m.rows - 1, c) = 0;
  }
  return m;
}

inline SegmentLists lists(Device& device, const FlatLayout& l) {
  return {device.index(l.offsets),
          device.index(l.keys),
          device.index(l.begin),
          device.index(l.count),
          device.index(l.group_offsets),
          static_cast<int>(l.begin.size()),
          static_cast<int>(l.group_offsets.size()) - 1,
          l.most_queries,
          l.fewest_queries,
          l.most_keys};
}

inline float* room(Device& device, int64_t floats) { return floats > 0 ? device.out<float>(1, floats).data : nullptr; }

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
  const Rows<float> lse = device.out<float>(n, h.heads);
  attention_fwd<T>(nullptr, o, lse, room(device, attention_fwd_workspace<T>(segments, dims)), q, k, v, segments, dims);
  attention_bwd<T>(nullptr, dq, dk, dv, room(device, attention_bwd_workspace<T>(n, segments, dims)), dout, o, lse, q, k, v, segments, dims);
  return {without_last_row(read(o, n, width)), without_last_row(read(lse, n, h.heads)), without_last_row(read(dq, n, width)),
          read(dk, step_rows, kv_width), read(dv, step_rows, kv_width)};
}

/// size: of q, of which the scores have the size.
template <class T>
Matrices attention_inputs(const AttentionCase& c, unsigned seed, double size) {
  Random random(seed);
  const int64_t width = c.heads.heads * c.heads.dim, kv_width = c.heads.kv_heads * c.heads.dim;
  Matrices in = {random.normal(c.layout.query_rows, width, size),  random.normal(c.layout.step_rows, kv_width),
                 random.normal(c.layout.step_rows, kv_width),      random.normal(c.layout.query_rows, width),
                 random.normal(c.layout.step_rows, kv_width, 0.1), random.normal(c.layout.step_rows, kv_width, 0.1)};
  for (std::size_t i = 0; i < 4; ++i) in[i] = stored<T>(in[i]);
  for (std::size_t i = 4; i < 6; ++i) in[i] = stored<float>(in[i]);
  return in;
}

/// The share of what is allowed.
template <class T>
double check_attention_case(const AttentionCase& c, unsigned seed, double size) {
  const Matrices in = attention_inputs<T>(c, seed, size), exact = attention_cpu(c, in);
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
                                 {tree(), {14, 2, 64}},        {tile_of_keys(), {1, 1, 64}},  {tile_of_keys(), {2, 1, 128}}};
  for (const AttentionCase& c : cases) {
    INFO("heads " << c.heads.heads << "/" << c.heads.kv_heads << " of " << c.heads.dim << ", step rows " << c.layout.step_rows);
    worst = std::max(worst, check_attention_case<T>(c, seed++, 1));
  }
  std::printf("attention kernels, %s: error at most %.2f of what is allowed\n", type, worst);
}

}  // namespace kava::test
