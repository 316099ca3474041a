// Attention over segments on the CPU. A task is one (sample, key/value head). The rows of its group of query heads are stacked query by
// query, so that neighbours see nearly the same keys, and taken some at a time against the keys that the last of them sees. Keys are turned
// once per segment into [units of D, keys]; all sums are kept in the sum type. A thread's room lies in the arena and holds the largest
// segment.
#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/device/cpu/ops_cpu.h"
#include "engine/device/cpu/register_tiles.h"
#include "engine/device/cpu/row_loops.h"

namespace kava {

namespace {

// Stacked rows whose weights are kept at a time in backward: a cache holds them beside their queries, and gradients of keys are summed over
// as many in registers.
constexpr int64_t kBlockRows = 8 * kHeldRows;

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
    next_ += padded<S>(n);
    KAVA_CHECK(next_ <= end_, "a segment of more than most_keys");
    return taken;
  }

 private:
  S *next_, *end_;
};

// Widths of a task's buffers, in elements of the sum type.
template <class T>
struct Widths {
  using S = Sum<T>;
  int64_t units, width, keys;
  Widths(const Shape& shape, int64_t key_count)
      : units((shape.D + Lanes<T>::kPack - 1) / Lanes<T>::kPack), width(padded<S>(shape.D)), keys(padded<S>(key_count)) {}
  int64_t turned() const { return units * keys; }
  int64_t forward() const { return turned() + keys * width + held(1); }
  int64_t single(const Shape& shape) const { return width + padded<S>(shape.group * width) * 2 + padded<S>(shape.group * keys); }
  int64_t backward() const { return 2 * turned() + 3 * keys * width + kBlockRows * 2 * (width + keys) + held(2); }

 private:
  // What a tile of rows takes: `packed` operands of scores, and sums.
  int64_t held(int64_t packed) const { return packed * padded<S>(kHeldRows * units) + kHeldRows * (keys + width); }
};

// One segment as a task sees it.
struct View {
  const int32_t* keys;
  int64_t key_count, query_begin, queries;
  int64_t seen(int64_t query) const { return key_count - (queries - 1 - query); }
  // The first query that sees key j.
  int64_t first_seeing(int64_t j) const { return std::max<int64_t>(0, j + queries - key_count); }
};

View view(const Segments& s, int64_t i) {
  const int32_t* offsets = s.key_offsets.row<int32_t>(0);
  return {s.keys.row<int32_t>(0) + offsets[i], offsets[i + 1] - offsets[i], s.query_begin.row<int32_t>(0)[i],
          s.query_count.row<int32_t>(0)[i]};
}

// Stacked row r of a segment: query r / group, head r % group of the group.
template <class T>
T* stacked(const Tensor& x, const View& s, int64_t kv_head, const Shape& shape, int64_t r) {
  return x.row<T>(s.query_begin + r / shape.group) + (kv_head * shape.group + r % shape.group) * shape.D;
}

// y [units, keys] = the segment's rows of one head of x, turned; the rest of both is zero.
template <class T>
void gather_turned(Sum<T>* y, const Tensor& x, const View& s, int64_t head, int64_t D, const Widths<T>& w) {
  using S = Sum<T>;
  constexpr int64_t L = kLanes<S>, kBlock = L * Lanes<T>::kPack;
  for (int64_t j = 0; j < w.keys; j += L)
    for (int64_t u = 0; u < w.units; u += L) {
      Vector<S> rows[L] = {};
      const int64_t first = u * Lanes<T>::kPack, some = std::min(kBlock, D - first);
      for (int64_t i = 0; i < std::min(L, s.key_count - j); ++i) {
        const T* in = x.row<T>(s.keys[j + i]) + head * D + first;
        if (some == kBlock) std::memcpy(&rows[i], in, sizeof rows[i]);
        else std::memcpy(static_cast<void*>(&rows[i]), in, static_cast<std::size_t>(some) * sizeof(T));
      }
      transpose<S>(rows);
      for (int64_t i = 0; i < std::min(L, w.units - u); ++i) *reinterpret_cast<Vector<S>*>(y + (u + i) * w.keys + j) = rows[i];
    }
}

template <class T>
void widen(Sum<T>* y, const T* x, int64_t D, int64_t width) {
  each(D, [=](int64_t d) { y[d] = load(x, d); });
  std::fill(y + D, y + width, Sum<T>{0});
}

// The segment's rows of one head of x as [keys, width].
template <class T>
void gather(Sum<T>* y, const Tensor& x, const View& s, int64_t head, int64_t D, int64_t width) {
  for (int64_t j = 0; j < s.key_count; ++j) widen(y + j * width, x.row<T>(s.keys[j]) + head * D, D, width);
}

// Stacked rows first..first+count-1 as [count, width].
template <class T>
void gather_queries(Sum<T>* y, const Tensor& x, const View& s, int64_t kv_head, const Shape& shape, int64_t width, int64_t first,
                    int64_t count) {
  for (int64_t r = 0; r < count; ++r) widen<T>(y + r * width, stacked<T>(x, s, kv_head, shape, first + r), shape.D, width);
}

// The same as [count, units].
template <class T>
void pack_queries(Sum<T>* y, const Tensor& x, const View& s, int64_t kv_head, const Shape& shape, int64_t units, int64_t first,
                  int64_t count) {
  for (int64_t r = 0; r < count; ++r) {
    const Sum<T> zero = 0;
    std::memcpy(y + (r + 1) * units - 1, &zero, sizeof zero);
    std::memcpy(y + r * units, stacked<T>(x, s, kv_head, shape, first + r), static_cast<std::size_t>(shape.D) * sizeof(T));
  }
}

// Row r of y = x.
template <class T>
void put_query(const Tensor& y, const Sum<T>* x, const View& s, int64_t kv_head, const Shape& shape, int64_t r) {
  T* out = stacked<T>(y, s, kv_head, shape, r);
  each(shape.D, [=](int64_t d) { store(out, d, x[d]); });
}

// f of a vector's lanes, in pairs a half apart.
template <class S, class F>
S folded_lanes(Vector<S> v, F f) {
  LaneIndex<S> lane;
  for (int i = 0; i < kLanes<S>; ++i) lane[i] = i;
#pragma GCC unroll 8
  for (int half = kLanes<S> / 2; half > 0; half /= 2) v = f(v, shuffled<S>(v, v, lane ^ half));
  return v[0];
}
template <class S>
S lane_sum(const Vector<S>& v) {
  return folded_lanes<S>(v, [](const Vector<S>& a, const Vector<S>& b) { return a + b; });
}

// Products of a row with n keys, whole vectors, become logits: times scale, minus infinity where the query sees no key. Returns the
// largest.
template <class S>
S scale_logits(S* p, int64_t seen, int64_t n, S scale) {
  constexpr S kUnseen = -std::numeric_limits<S>::infinity();
  std::fill(p + seen, p + n, kUnseen);
  Vector<S> most = kUnseen - Vector<S>{};
  for (int64_t j = 0; j < n; j += kLanes<S>) {
    auto* x = reinterpret_cast<Vector<S>*>(p + j);
    *x *= scale;
    most = *x > most ? *x : most;
  }
  return folded_lanes<S>(most, [](const Vector<S>& a, const Vector<S>& b) { return a > b ? a : b; });
}

// p = exp(p - shift) of n logits; returns the sum.
template <class S>
S exponentials(S* p, int64_t n, S shift) {
  Vector<S> sums{};
  for (int64_t j = 0; j < n; j += kLanes<S>) {
    for (int64_t i = 0; i < kLanes<S>; ++i) p[j + i] = fast_exp(p[j + i] - shift);
    sums += *reinterpret_cast<const Vector<S>*>(p + j);
  }
  return lane_sum<S>(sums);
}

template <class T>
void forward_task(Scratch<Sum<T>> scratch, const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                  const View& s, int64_t kv_head, const Shape& shape) {
  using S = Sum<T>;
  const Widths<T> w(shape, s.key_count);
  const int64_t rows = shape.group * s.queries;
  S* kt = scratch.take(w.turned());
  S* vv = scratch.take(s.key_count * w.width);
  S* p = scratch.take(kHeldRows * w.keys);
  S* out = scratch.take(kHeldRows * w.width);
  S* qq = scratch.take(kHeldRows * w.units);
  gather_turned<T>(kt, k, s, kv_head, shape.D, w);
  gather<T>(vv, v, s, kv_head, shape.D, w.width);
  for (int64_t first = 0; first < rows; first += kHeldRows) {
    const int64_t count = std::min(kHeldRows, rows - first), most_seen = s.seen((first + count - 1) / shape.group),
                  n = padded<S>(most_seen);
    pack_queries<T>(qq, q, s, kv_head, shape, w.units, first, count);
    tile_product<T, false>(p, w.keys, qq, w.units, 1, kt, w.keys, count, n, w.units);
    for (int64_t r = 0; r < count; ++r) {
      S* row = p + r * w.keys;
      const int64_t query = (first + r) / shape.group;
      const S most = scale_logits<S>(row, s.seen(query), n, static_cast<S>(shape.scale)), sum = exponentials<S>(row, n, most);
      each(n, [=](int64_t j) { row[j] /= sum; });
      if (lse) lse.row<S>(s.query_begin + query)[kv_head * shape.group + (first + r) % shape.group] = most + std::log(sum);
    }
    tile_product<S, false>(out, w.width, p, w.keys, 1, vv, w.width, count, w.width, most_seen);
    for (int64_t r = 0; r < count; ++r) put_query<T>(o, out + r * w.width, s, kv_head, shape, first + r);
  }
}

// Row j of the segment's keys of one head, filled up with zeros. A cache's rows lie far apart, so later ones are fetched ahead.
template <class T>
void load_row(Sum<T>* y, const Tensor& x, const View& s, int64_t j, int64_t head, int64_t D, int64_t width) {
  constexpr int64_t kAhead = 16;
  if (j + kAhead < s.key_count) {
    const char* later = reinterpret_cast<const char*>(x.row<T>(s.keys[j + kAhead]) + head * D);
    for (int64_t byte = 0; byte < D * static_cast<int64_t>(sizeof(T)); byte += 64) __builtin_prefetch(later + byte);
  }
  widen(y, x.row<T>(s.keys[j]) + head * D, D, width);
}

// One query row: keys and values are read where they lie, once for the whole group of heads, so that decoding moves its cache only once.
template <class T>
void single_query_task(Scratch<Sum<T>> scratch, const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                       const View& s, int64_t kv_head, const Shape& shape) {
  using S = Sum<T>;
  using V = Vector<S>;
  const Widths<T> w(shape, s.key_count);
  const int64_t D = shape.D, width = w.width, keys = w.keys, G = shape.group, L = kLanes<S>;
  S* row = scratch.take(width);
  S* qq = scratch.take(G * width);
  S* p = scratch.take(G * keys);
  S* out = scratch.take(G * width);
  gather_queries<T>(qq, q, s, kv_head, shape, width, 0, G);
  for (int64_t j = 0; j < s.key_count; ++j) {
    load_row<T>(row, k, s, j, kv_head, D, width);
    for (int64_t g = 0; g < G; ++g) {
      V dot{};
      for (int64_t d = 0; d < width; d += L) dot += *reinterpret_cast<const V*>(qq + g * width + d) * *reinterpret_cast<const V*>(row + d);
      p[g * keys + j] = lane_sum<S>(dot);
    }
  }
  std::fill(out, out + G * width, S{0});
  for (int64_t g = 0; g < G; ++g) {
    S* weights = p + g * keys;
    const S most = scale_logits<S>(weights, s.key_count, keys, static_cast<S>(shape.scale)), sum = exponentials<S>(weights, keys, most);
    each(keys, [=](int64_t j) { weights[j] /= sum; });
    if (lse) lse.row<S>(s.query_begin)[kv_head * G + g] = most + std::log(sum);
  }
  for (int64_t j = 0; j < s.key_count; ++j) {
    load_row<T>(row, v, s, j, kv_head, D, width);
    for (int64_t g = 0; g < G; ++g) {
      const S weight = p[g * keys + j];
      for (int64_t d = 0; d < width; d += L) *reinterpret_cast<V*>(out + g * width + d) += weight * *reinterpret_cast<const V*>(row + d);
    }
  }
  for (int64_t g = 0; g < G; ++g) put_query<T>(o, out + g * width, s, kv_head, shape, g);
}

// The operands of attention_bwd.
struct Backward {
  const Tensor &dq, &dk, &dv, &dout, &lse, &q, &k, &v;
};

// Backward of one segment and key/value head.
template <class T>
class BackwardTask {
 public:
  using S = Sum<T>;
  BackwardTask(Scratch<S> scratch, const Backward& of, const View& s, int64_t kv_head, const Shape& shape)
      : of_(of), s_(s), kv_head_(kv_head), shape_(shape), w_(shape, s.key_count) {
    kt_ = scratch.take(w_.turned()), vt_ = scratch.take(w_.turned());
    for (S** x : {&kk_, &sum_k_, &sum_v_}) *x = scratch.take(s.key_count * w_.width);
    for (S** x : {&q_block_, &dout_block_}) *x = scratch.take(kBlockRows * w_.width);
    for (S** x : {&p_, &ds_}) *x = scratch.take(kBlockRows * w_.keys);
    dq_ = scratch.take(kHeldRows * w_.width);
    for (S** x : {&q_tile_, &dout_tile_}) *x = scratch.take(kHeldRows * w_.units);
  }

  void run() {
    gather_turned<T>(kt_, of_.k, s_, kv_head_, shape_.D, w_);
    gather_turned<T>(vt_, of_.v, s_, kv_head_, shape_.D, w_);
    gather<T>(kk_, of_.k, s_, kv_head_, shape_.D, w_.width);
    std::fill_n(sum_k_, s_.key_count * w_.width, S{0});
    std::fill_n(sum_v_, s_.key_count * w_.width, S{0});
    const int64_t rows = shape_.group * s_.queries;
    for (int64_t block = 0; block < rows; block += kBlockRows) {
      const int64_t end = std::min(rows, block + kBlockRows);
      for (int64_t first = block; first < end; first += kHeldRows) tile(block, first, std::min(kHeldRows, end - first));
      add_keys(block, end);
    }
    for (int64_t j = 0; j < s_.key_count; ++j) {
      S* to_k = of_.dk.row<S>(s_.keys[j]) + kv_head_ * shape_.D;
      S* to_v = of_.dv.row<S>(s_.keys[j]) + kv_head_ * shape_.D;
      each(shape_.D, [=, from = sum_k_ + j * w_.width](int64_t d) { to_k[d] += from[d]; });
      each(shape_.D, [=, from = sum_v_ + j * w_.width](int64_t d) { to_v[d] += from[d]; });
    }
  }

 private:
  // p, ds and dq = ds k of a few stacked rows.
  void tile(int64_t block, int64_t first, int64_t count) {
    const int64_t most_seen = s_.seen((first + count - 1) / shape_.group);
    // Gradients of keys take the weights of a few keys at a time, of which the last ones may be unseen: those are zero.
    const int64_t n = std::min(w_.keys, padded<S>(most_seen + kHeldRows - 1));
    S *p = p_ + (first - block) * w_.keys, *ds = ds_ + (first - block) * w_.keys;
    pack_queries<T>(q_tile_, of_.q, s_, kv_head_, shape_, w_.units, first, count);
    pack_queries<T>(dout_tile_, of_.dout, s_, kv_head_, shape_, w_.units, first, count);
    tile_product<T, false>(p, w_.keys, q_tile_, w_.units, 1, kt_, w_.keys, count, n, w_.units);
    tile_product<T, false>(ds, w_.keys, dout_tile_, w_.units, 1, vt_, w_.keys, count, n, w_.units);
    for (int64_t r = 0; r < count; ++r) softmax_backward(p + r * w_.keys, ds + r * w_.keys, n, first + r);
    tile_product<S, false>(dq_, w_.width, ds, w_.keys, 1, kk_, w_.width, count, w_.width, most_seen);
    for (int64_t r = 0; r < count; ++r) put_query<T>(of_.dq, dq_ + r * w_.width, s_, kv_head_, shape_, first + r);
  }

  // From products to p, and from dp to ds = scale p (dp - delta).
  void softmax_backward(S* p, S* ds, int64_t n, int64_t r) {
    const auto scale = static_cast<S>(shape_.scale);
    const int64_t query = r / shape_.group;
    const S log_sum = of_.lse.row<S>(s_.query_begin + query)[kv_head_ * shape_.group + r % shape_.group];
    scale_logits<S>(p, s_.seen(query), n, scale);
    // Where one key takes nearly all weight, dp - delta cancels. It does so to rounding if delta, which is o . do, is summed from the same
    // dp and from p that add up to 1, which exp(logit - lse) alone do only to within the rounding of lse.
    const S sum = exponentials<S>(p, n, log_sum);
    each(n, [=](int64_t j) { p[j] /= sum; });
    const S delta = sum_over<S>(n, [=](int64_t j) { return p[j] * ds[j]; });
    each(n, [=](int64_t j) { ds[j] = scale * p[j] * (ds[j] - delta); });
  }

  // dv += p^T do and dk += ds^T q of a block's rows, from the first one that sees each few keys.
  void add_keys(int64_t block, int64_t end) {
    gather_queries<T>(q_block_, of_.q, s_, kv_head_, shape_, w_.width, block, end - block);
    gather_queries<T>(dout_block_, of_.dout, s_, kv_head_, shape_, w_.width, block, end - block);
    for (int64_t j = 0; j < s_.key_count; j += kHeldRows) {
      const int64_t begin = std::max<int64_t>(0, s_.first_seeing(j) * shape_.group - block), count = std::min(kHeldRows, s_.key_count - j),
                    some = end - block - begin;
      if (some <= 0) break;
      const int64_t weights = begin * w_.keys + j, rows = begin * w_.width, to = j * w_.width;
      tile_product<S, true>(sum_v_ + to, w_.width, p_ + weights, 1, w_.keys, dout_block_ + rows, w_.width, count, w_.width, some);
      tile_product<S, true>(sum_k_ + to, w_.width, ds_ + weights, 1, w_.keys, q_block_ + rows, w_.width, count, w_.width, some);
    }
  }

  const Backward& of_;
  const View& s_;
  int64_t kv_head_;
  const Shape& shape_;
  const Widths<T> w_;
  S *kt_, *vt_, *kk_, *sum_k_, *sum_v_;  // [units, keys] twice, [keys, width]
  S *q_block_, *dout_block_, *p_, *ds_;  // of a block: [rows, width] twice, [rows, keys] twice
  S *dq_, *q_tile_, *dout_tile_;         // of a few rows
};

Shape shape_of(const Tensor& q, int64_t heads, int64_t kv_heads, double scale) {
  return {heads, kv_heads, heads / kv_heads, q.cols / heads, scale};
}

}  // namespace

void CpuOps::do_attention_fwd(Arena& arena, const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                              const Segments& segments, int64_t heads, int64_t kv_heads, double scale) {
  ArenaScope scope(arena);
  const Shape shape = shape_of(q, heads, kv_heads, scale);
  dispatch(q.dtype, [&]<class T>() {
    const Widths<T> most(shape, segments.most_keys);
    const Tensor rooms = arena.alloc(DTypeOf<Sum<T>>::value, workers_, std::max(most.forward(), most.single(shape)));
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
    const Tensor rooms = arena.alloc(DTypeOf<Sum<T>>::value, workers_, Widths<T>(shape, segments.most_keys).backward());
    if (dry()) return;
    const int32_t* groups = segments.group_offsets.as<int32_t>();
    const Backward of{dq, dk, dv, dout, lse, q, k, v};
    threads_.run(segments.groups * kv_heads, [&](int64_t task, int worker) {
      const int64_t group = task / kv_heads;
      for (int64_t i = groups[group]; i < groups[group + 1]; ++i) {
        const View s = view(segments, i);
        BackwardTask<T>({rooms, worker}, of, s, task % kv_heads, shape).run();
      }
    });
  });
}

}  // namespace kava
