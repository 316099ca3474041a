// Attention over segments on the CPU. A task is one (sample, key/value head): the rows of its group of query heads are stacked, so that
// every product of the task is [G*n queries, D] against the segment's keys. Keys and values are gathered once per segment as [keys, D] and
// transposed [D, keys]; all sums are kept in the sum type. A thread's room lies in the arena and holds the largest segment.
#include <algorithm>
#include <cmath>

#include "engine/device/cpu/ops_cpu.h"
#include "engine/device/cpu/row_loops.h"
#include "engine/device/cpu/vectors.h"

namespace kava {

namespace {

template <class S>
int64_t padded(int64_t n) {
  return (n + kLanes<S> - 1) / kLanes<S> * kLanes<S>;
}

// c[i, :] (+)= sum_k a(i, k) b[k, :] for Rows rows and Vectors vectors of columns held in registers.
template <class S, int Rows, int Vectors, bool Add>
void register_tile(S* c, int64_t ldc, const S* a, int64_t a_row, int64_t a_col, const S* b, int64_t ldb, int64_t k) {
  using V = Vector<S>;
  V acc[Rows][Vectors];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j) {
      if constexpr (Add) acc[i][j] = *reinterpret_cast<const V*>(c + i * ldc + j * kLanes<S>);
      else acc[i][j] = V{};
    }
  for (int64_t l = 0; l < k; ++l) {
    V row[Vectors];
    for (int j = 0; j < Vectors; ++j) row[j] = *reinterpret_cast<const V*>(b + l * ldb + j * kLanes<S>);
    for (int i = 0; i < Rows; ++i) {
      const S x = a[i * a_row + l * a_col];
      for (int j = 0; j < Vectors; ++j) acc[i][j] += x * row[j];
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j) *reinterpret_cast<V*>(c + i * ldc + j * kLanes<S>) = acc[i][j];
}

template <class S, int Rows, bool Add>
void row_tile(S* c, int64_t ldc, const S* a, int64_t a_row, int64_t a_col, const S* b, int64_t ldb, int64_t n, int64_t k) {
  int64_t j = 0;
  for (; j + 4 * kLanes<S> <= n; j += 4 * kLanes<S>) register_tile<S, Rows, 4, Add>(c + j, ldc, a, a_row, a_col, b + j, ldb, k);
  for (; j + 2 * kLanes<S> <= n; j += 2 * kLanes<S>) register_tile<S, Rows, 2, Add>(c + j, ldc, a, a_row, a_col, b + j, ldb, k);
  for (; j < n; j += kLanes<S>) register_tile<S, Rows, 1, Add>(c + j, ldc, a, a_row, a_col, b + j, ldb, k);
}

// c [m, n] (+)= a b; element (i, k) of a at a[i * a_row + k * a_col]; n a multiple of the vector's lanes.
template <class S, bool Add>
void small_product(S* c, int64_t ldc, const S* a, int64_t a_row, int64_t a_col, const S* b, int64_t ldb, int64_t m, int64_t n, int64_t k) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) row_tile<S, 4, Add>(c + i * ldc, ldc, a + i * a_row, a_row, a_col, b, ldb, n, k);
  for (; i < m; ++i) row_tile<S, 1, Add>(c + i * ldc, ldc, a + i * a_row, a_row, a_col, b, ldb, n, k);
}

struct Shape {
  int64_t heads, kv_heads, group, D;
  double scale;
};

// Room of one thread, one buffer behind the other.
template <class S>
class Scratch {
 public:
  Scratch(const Tensor& rooms, int worker) : next_(rooms.row<S>(worker)), end_(next_ + rooms.cols) {}
  S* take(int64_t n) {
    S* taken = next_;
    next_ += n;
    KAVA_CHECK(next_ <= end_, "a segment of more than most_keys, most_queries or most_scores");
    return taken;
  }

 private:
  S *next_, *end_;
};

// Elements of `rows_of_keys` matrices [keys, D] by rows or transposed, `rows_of_queries` of stacked queries, and `scores` of scores, for
// the largest segment.
template <class S>
int64_t scratch_size(const Segments& s, const Shape& shape, int64_t rows_of_keys, int64_t rows_of_queries, int64_t scores) {
  const int64_t width = padded<S>(shape.D), lanes = kLanes<S>;
  const int64_t keys = std::max(s.most_keys * width, shape.D * padded<S>(s.most_keys)), queries = shape.group * s.most_queries * width;
  const int64_t products = shape.group * (s.most_scores + s.most_queries * (lanes - 1));
  return padded<S>(rows_of_keys * keys + rows_of_queries * queries + scores * products);
}

// One segment as a task sees it.
struct View {
  const int32_t* keys;
  int64_t key_count, query_begin, queries;
};

View view(const Segments& s, int64_t i) {
  const int32_t* offsets = s.key_offsets.row<int32_t>(0);
  return {s.keys.row<int32_t>(0) + offsets[i], offsets[i + 1] - offsets[i], s.query_begin.row<int32_t>(0)[i],
          s.query_count.row<int32_t>(0)[i]};
}

// x[keys, head] as [keys, width] and, if wanted, its transpose [D, key_width]; the rest zero.
template <class T>
void gather(Sum<T>* y, Sum<T>* yt, const Tensor& x, const View& s, int64_t head, int64_t D, int64_t width, int64_t key_width) {
  if (yt) std::fill(yt, yt + D * key_width, Sum<T>{0});
  for (int64_t j = 0; j < s.key_count; ++j) {
    const T* in = x.row<T>(s.keys[j]) + head * D;
    if (y) {
      for (int64_t d = 0; d < D; ++d) y[j * width + d] = to_float(in[d]);
      for (int64_t d = D; d < width; ++d) y[j * width + d] = 0;
    }
    if (yt)
      for (int64_t d = 0; d < D; ++d) yt[d * key_width + j] = to_float(in[d]);
  }
}

// The segment's rows of one group of query heads, stacked head by head: [G*n, width], times a factor.
template <class T>
void gather_queries(Sum<T>* y, const Tensor& x, const View& s, int64_t kv_head, const Shape& shape, int64_t width, Sum<T> factor) {
  for (int64_t g = 0; g < shape.group; ++g)
    for (int64_t i = 0; i < s.queries; ++i) {
      const T* in = x.row<T>(s.query_begin + i) + (kv_head * shape.group + g) * shape.D;
      Sum<T>* out = y + (g * s.queries + i) * width;
      for (int64_t d = 0; d < shape.D; ++d) out[d] = to_float(in[d]) * factor;
      for (int64_t d = shape.D; d < width; ++d) out[d] = 0;
    }
}

template <class T>
void put_queries(const Tensor& y, const Sum<T>* x, const View& s, int64_t kv_head, const Shape& shape, int64_t width) {
  for (int64_t g = 0; g < shape.group; ++g)
    for (int64_t i = 0; i < s.queries; ++i) {
      const Sum<T>* in = x + (g * s.queries + i) * width;
      T* out = y.row<T>(s.query_begin + i) + (kv_head * shape.group + g) * shape.D;
      for (int64_t d = 0; d < shape.D; ++d) out[d] = rounded<T>(in[d]);
    }
}

// p[r, :] = exp(p[r, :] - shift) over the keys that query r sees, zero elsewhere; returns the sum.
template <class S>
S exponentials(S* p, int64_t seen, int64_t width, S shift) {
  S sums[kLanes<S>] = {};
  int64_t j = 0;
  for (; j + kLanes<S> <= seen; j += kLanes<S>)
    for (int64_t i = 0; i < kLanes<S>; ++i) {
      p[j + i] = fast_exp(p[j + i] - shift);
      sums[i] += p[j + i];
    }
  for (; j < seen; ++j) {
    p[j] = fast_exp(p[j] - shift);
    sums[0] += p[j];
  }
  for (; j < width; ++j) p[j] = 0;
  S sum = 0;
  for (S v : sums) sum += v;
  return sum;
}

template <class T>
void forward_task(Scratch<Sum<T>> scratch, const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                  const View& s, int64_t kv_head, const Shape& shape) {
  using S = Sum<T>;
  const int64_t D = shape.D, width = padded<S>(D), keys = padded<S>(s.key_count), rows = shape.group * s.queries;
  S* kt = scratch.take(D * keys);
  S* vv = scratch.take(s.key_count * width);
  S* qq = scratch.take(rows * width);
  S* p = scratch.take(rows * keys);
  S* out = scratch.take(rows * width);
  gather<T>(nullptr, kt, k, s, kv_head, D, width, keys);
  gather<T>(vv, nullptr, v, s, kv_head, D, width, keys);
  gather_queries<T>(qq, q, s, kv_head, shape, width, static_cast<S>(shape.scale));
  small_product<S, false>(p, keys, qq, width, 1, kt, keys, rows, keys, D);
  for (int64_t r = 0; r < rows; ++r) {
    S* row = p + r * keys;
    const int64_t seen = s.key_count - (s.queries - 1 - r % s.queries);
    const S most = *std::max_element(row, row + seen);
    const S sum = exponentials(row, seen, keys, most);
    const S inverse = 1 / sum;
    for (int64_t j = 0; j < keys; ++j) row[j] *= inverse;
    if (lse) lse.row<S>(s.query_begin + r % s.queries)[kv_head * shape.group + r / s.queries] = most + std::log(sum);
  }
  small_product<S, false>(out, width, p, keys, 1, vv, width, rows, width, s.key_count);
  put_queries<T>(o, out, s, kv_head, shape, width);
}

// The sum of a vector's lanes, in pairs a half apart.
template <class S>
S lane_sum(Vector<S> v) {
  LaneIndex<S> lane;
  for (int i = 0; i < kLanes<S>; ++i) lane[i] = i;
#pragma GCC unroll 8
  for (int half = kLanes<S> / 2; half > 0; half /= 2) v += shuffled<S>(v, v, lane ^ half);
  return v[0];
}

// Row j of the segment's keys of one head, filled up with zeros. A cache's rows lie far apart, so later ones are fetched ahead.
template <class T>
void load_row(Sum<T>* y, const Tensor& x, const View& s, int64_t j, int64_t head, int64_t D, int64_t width) {
  constexpr int64_t kAhead = 16;
  if (j + kAhead < s.key_count) {
    const char* later = reinterpret_cast<const char*>(x.row<T>(s.keys[j + kAhead]) + head * D);
    for (int64_t byte = 0; byte < D * static_cast<int64_t>(sizeof(T)); byte += 64) __builtin_prefetch(later + byte);
  }
  const T* in = x.row<T>(s.keys[j]) + head * D;
  for (int64_t d = 0; d < D; ++d) y[d] = to_float(in[d]);
  for (int64_t d = D; d < width; ++d) y[d] = 0;
}

// One query row: keys and values are read where they lie, once for the whole group of heads, so that decoding moves its cache only once.
template <class T>
void single_query_task(Scratch<Sum<T>> scratch, const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                       const View& s, int64_t kv_head, const Shape& shape) {
  using S = Sum<T>;
  using V = Vector<S>;
  const int64_t D = shape.D, width = padded<S>(D), keys = padded<S>(s.key_count), G = shape.group, L = kLanes<S>;
  S* row = scratch.take(width);
  S* qq = scratch.take(G * width);
  S* p = scratch.take(G * keys);
  S* out = scratch.take(G * width);
  gather_queries<T>(qq, q, s, kv_head, shape, width, static_cast<S>(shape.scale));
  for (int64_t j = 0; j < s.key_count; ++j) {
    load_row<T>(row, k, s, j, kv_head, D, width);
    for (int64_t g = 0; g < G; ++g) {
      V dot{};
      for (int64_t d = 0; d < width; d += L) dot += *reinterpret_cast<const V*>(qq + g * width + d) * *reinterpret_cast<const V*>(row + d);
      p[g * keys + j] = lane_sum<S>(dot);
    }
  }
  for (int64_t g = 0; g < G; ++g) {
    S* weights = p + g * keys;
    const S most = *std::max_element(weights, weights + s.key_count);
    const S sum = exponentials(weights, s.key_count, keys, most), inverse = 1 / sum;
    for (int64_t j = 0; j < keys; ++j) weights[j] *= inverse;
    if (lse) lse.row<S>(s.query_begin)[kv_head * G + g] = most + std::log(sum);
  }
  std::fill(out, out + G * width, S{0});
  for (int64_t j = 0; j < s.key_count; ++j) {
    load_row<T>(row, v, s, j, kv_head, D, width);
    for (int64_t g = 0; g < G; ++g) {
      const S weight = p[g * keys + j];
      for (int64_t d = 0; d < width; d += L) *reinterpret_cast<V*>(out + g * width + d) += weight * *reinterpret_cast<const V*>(row + d);
    }
  }
  put_queries<T>(o, out, s, kv_head, shape, width);
}

template <class T>
void backward_task(Scratch<Sum<T>> scratch, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dout, const Tensor& lse,
                   const Tensor& q, const Tensor& k, const Tensor& v, const View& s, int64_t kv_head, const Shape& shape) {
  using S = Sum<T>;
  const int64_t D = shape.D, width = padded<S>(D), keys = padded<S>(s.key_count), rows = shape.group * s.queries;
  S* kk = scratch.take(s.key_count * width);
  S* kt = scratch.take(D * keys);
  S* vt = scratch.take(D * keys);
  S* qq = scratch.take(rows * width);
  S* g = scratch.take(rows * width);
  S* oo = scratch.take(rows * width);
  S* p = scratch.take(rows * keys);
  S* dp = scratch.take(rows * keys);
  S* sum_k = scratch.take(s.key_count * width);
  S* sum_v = scratch.take(s.key_count * width);
  gather<T>(kk, kt, k, s, kv_head, D, width, keys);
  gather<T>(nullptr, vt, v, s, kv_head, D, width, keys);
  gather_queries<T>(qq, q, s, kv_head, shape, width, static_cast<S>(shape.scale));
  gather_queries<T>(g, dout, s, kv_head, shape, width, S{1});
  small_product<S, false>(p, keys, qq, width, 1, kt, keys, rows, keys, D);
  small_product<S, false>(dp, keys, g, width, 1, vt, keys, rows, keys, D);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t seen = s.key_count - (s.queries - 1 - r % s.queries);
    const S log_sum = lse.row<S>(s.query_begin + r % s.queries)[kv_head * shape.group + r / s.queries];
    S* pr = p + r * keys;
    S* dr = dp + r * keys;
    // Where one key takes nearly all weight, dp - delta cancels. It does so to rounding if delta, which is o . do, is summed from the same
    // dp and from p that add up to 1, which exp(logit - lse) alone do only to within the rounding of lse.
    const S sum = exponentials(pr, seen, keys, log_sum);
    each(keys, [=](int64_t j) { pr[j] /= sum; });
    const S delta = sum_over<S>(keys, [=](int64_t j) { return pr[j] * dr[j]; });
    each(keys, [=](int64_t j) { dr[j] = pr[j] * (dr[j] - delta); });
  }
  // dv = p^T do, dk = scale ds^T q (q carries the scale), dq = scale ds k
  small_product<S, false>(sum_v, width, p, 1, keys, g, width, s.key_count, width, rows);
  small_product<S, false>(sum_k, width, dp, 1, keys, qq, width, s.key_count, width, rows);
  small_product<S, false>(oo, width, dp, keys, 1, kk, width, rows, width, s.key_count);
  for (int64_t i = 0; i < rows * width; ++i) oo[i] *= static_cast<S>(shape.scale);
  put_queries<T>(dq, oo, s, kv_head, shape, width);
  for (int64_t j = 0; j < s.key_count; ++j) {
    S* to_k = dk.row<S>(s.keys[j]) + kv_head * D;
    S* to_v = dv.row<S>(s.keys[j]) + kv_head * D;
    for (int64_t d = 0; d < D; ++d) to_k[d] += sum_k[j * width + d];
    for (int64_t d = 0; d < D; ++d) to_v[d] += sum_v[j * width + d];
  }
}

Shape shape_of(const Tensor& q, int64_t heads, int64_t kv_heads, double scale) {
  return {heads, kv_heads, heads / kv_heads, q.cols / heads, scale};
}

}  // namespace

void CpuOps::do_attention_fwd(Arena& arena, const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                              const Segments& segments, int64_t heads, int64_t kv_heads, double scale) {
  ArenaScope scope(arena);
  const Shape shape = shape_of(q, heads, kv_heads, scale);
  dispatch(q.dtype, [&]<class T>() {
    using S = Sum<T>;
    const Tensor rooms = arena.alloc(DTypeOf<S>::value, workers_, scratch_size<S>(segments, shape, 2, 2, 1));
    if (dry()) return;
    threads_.run(segments.count * kv_heads, [&](int64_t task, int worker) {
      const View s = view(segments, task / kv_heads);
      if (s.queries == 1) single_query_task<T>({rooms, worker}, o, lse, q, k, v, s, task % kv_heads, shape);
      else forward_task<T>({rooms, worker}, o, lse, q, k, v, s, task % kv_heads, shape);
    });
  });
}

void CpuOps::do_attention_bwd(Arena& arena, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dout, const Tensor&,
                              const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments, int64_t heads,
                              int64_t kv_heads, double scale) {
  ArenaScope scope(arena);
  const Shape shape = shape_of(q, heads, kv_heads, scale);
  dispatch(q.dtype, [&]<class T>() {
    using S = Sum<T>;
    const Tensor rooms = arena.alloc(DTypeOf<S>::value, workers_, scratch_size<S>(segments, shape, 5, 3, 2));
    if (dry()) return;
    const int32_t* groups = segments.group_offsets.as<int32_t>();
    threads_.run(segments.groups * kv_heads, [&](int64_t task, int worker) {
      const int64_t group = task / kv_heads;
      for (int64_t s = groups[group]; s < groups[group + 1]; ++s)
        backward_task<T>({rooms, worker}, dq, dk, dv, dout, lse, q, k, v, view(segments, s), task % kv_heads, shape);
    });
  });
}

}  // namespace kava
