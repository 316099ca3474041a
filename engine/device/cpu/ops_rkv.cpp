// cpu backend: eviction.
//   redundancy  R = softmax_i(-(1/n) sum_{j != i} cos(k_i, k_j))
//   importance  I = mean over the query tokens of softmax_i(q_j k_i / sqrt(D)), over the query heads of the group by options.group
//   score       S = lambda I + (1 - lambda) R
// One sample and K/V head is a task, so that nothing depends on what else is in the batch. Softmaxes and scores are kept in f64 for every
// storage type: what is kept should hang on the products alone.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "engine/device/cpu/ops_cpu.h"
#include "engine/device/cpu/row_loops.h"
#include "engine/rng.h"

namespace kava {

namespace {
constexpr double kNormEps = 1e-8;

/// Some rows of a step tensor, columns of one head or of a group of heads.
struct HeadRows {
  Tensor all;
  const int32_t* rows;
  int64_t count, begin, width;
  template <class T>
  const T* row(int64_t i) const {
    return all.row<T>(rows[i]) + begin;
  }
};

void softmax(std::vector<double>& x) {
  if (x.empty()) return;
  const double top = *std::max_element(x.begin(), x.end());
  double total = 0;
  for (double& v : x) total += v = std::exp(v - top);
  for (double& v : x) v /= total;
}

/// k: the sample's rows, columns of one head. The cosines of a key with all others add up to k^_i . sum_j k^_j - |k^_i|^2. Of a trace of
/// two there is one cosine, which both keys get: so they tie exactly, where rounding would part them.
template <class T>
std::vector<double> redundancy_of(const HeadRows& k) {
  const int64_t n = k.count, dim = k.width;
  std::vector<double> unit(static_cast<std::size_t>(n * dim)), score(static_cast<std::size_t>(n));
  std::vector<double> sum(static_cast<std::size_t>(dim));
  auto dot = [dim](const double* a, const double* b) { return sum_over<double>(dim, [=](int64_t d) { return a[d] * b[d]; }); };
  for (int64_t i = 0; i < n; ++i) {
    const T* key = k.template row<T>(i);
    const double norm = std::sqrt(sum_over<double>(dim, [=](int64_t d) { return double(load(key, d)) * double(load(key, d)); })) + kNormEps;
    each(dim, [=, u = unit.data() + i * dim](int64_t d) { u[d] = load(key, d) / norm; });
    each(dim, [=, u = unit.data() + i * dim, s = sum.data()](int64_t d) { s[d] += u[d]; });
  }
  for (int64_t i = 0; i < n; ++i) {
    const double* key = unit.data() + i * dim;
    const double cosines = n == 2 ? dot(unit.data(), unit.data() + dim) : dot(key, sum.data()) - dot(key, key);
    score[static_cast<std::size_t>(i)] = -cosines / static_cast<double>(n);
  }
  softmax(score);
  return score;
}

/// q: the sample's query rows, columns of the group's heads; k as above.
template <class T>
std::vector<double> importance_of(const HeadRows& q, const HeadRows& k, Group group) {
  const int64_t n = k.count, dim = k.width, heads = q.width / dim;
  const double scale = 1 / std::sqrt(static_cast<double>(dim));
  std::vector<double> mean(static_cast<std::size_t>(n)), row(mean.size()), pooled(mean.size());
  for (int64_t j = 0; j < q.count; ++j) {
    for (int64_t h = 0; h < heads; ++h) {
      const T* query = q.template row<T>(j) + h * dim;
      for (int64_t i = 0; i < n; ++i) {
        const T* key = k.template row<T>(i);
        row[static_cast<std::size_t>(i)] = scale * double(sum_over<Sum<T>>(dim, [=](int64_t d) { return load(query, d) * load(key, d); }));
      }
      if (group != Group::max_logits) softmax(row);
      for (std::size_t i = 0; i < row.size(); ++i) {
        if (h == 0) pooled[i] = row[i];
        else if (group == Group::mean_prob) pooled[i] += row[i];
        else pooled[i] = std::max(pooled[i], row[i]);
      }
    }
    if (group == Group::max_logits) softmax(pooled);
    const double weight = (group == Group::mean_prob ? 1.0 / static_cast<double>(heads) : 1.0) / static_cast<double>(q.count);
    for (std::size_t i = 0; i < mean.size(); ++i) mean[i] += weight * pooled[i];
  }
  return mean;
}

/// The first m indices of 0..n-1 by descending value, ties to the lower index.
template <class Value>
std::vector<int32_t> top(const std::vector<Value>& value, int64_t m) {
  std::vector<int32_t> index(value.size());
  std::iota(index.begin(), index.end(), 0);
  // stable_sort with a comparison that a NaN cannot upset: it counts as the least.
  auto key = [&](int32_t i) { return value[static_cast<std::size_t>(i)] == value[static_cast<std::size_t>(i)]; };
  std::stable_sort(index.begin(), index.end(), [&](int32_t a, int32_t b) {
    if (!key(a) || !key(b)) return key(a) && !key(b);
    return value[static_cast<std::size_t>(a)] > value[static_cast<std::size_t>(b)];
  });
  index.resize(static_cast<std::size_t>(std::min<int64_t>(m, static_cast<int64_t>(value.size()))));
  return index;
}

/// Indices in the sample's trace that fill the slots, in the order of the slots.
std::vector<int32_t> select(const std::vector<double>& score, const RkvOptions& o, int64_t sample, int64_t head) {
  const int64_t n = static_cast<int64_t>(score.size()), m = o.latents, kept = std::min(n, m);
  std::vector<int32_t> slots(static_cast<std::size_t>(kept));
  std::iota(slots.begin(), slots.end(), 0);
  switch (o.policy) {
    case Policy::crop:
      return slots;
    case Policy::uniform:
      if (n > m)
        for (int64_t i = 0; i < m; ++i) slots[static_cast<std::size_t>(i)] = static_cast<int32_t>(i * n / m);
      return slots;
    case Policy::random: {
      if (n <= m) return slots;
      std::vector<uint32_t> draw(score.size());
      for (uint32_t i = 0; i < draw.size(); ++i) {
        // Layer and head share a word: neither reaches 2^16.
        const uint32_t place = o.layer << 16 | static_cast<uint32_t>(head);
        const uint32_t index = static_cast<uint32_t>(o.samples.as<int32_t>()[sample]);
        draw[i] = philox({i, index, place, o.step}, philox_key(Purpose::eviction, o.seed))[0];
      }
      slots = top(draw, m);
      break;
    }
    default:
      slots = top(score, m);
      if (o.order_by_score) return slots;
  }
  std::sort(slots.begin(), slots.end());
  return slots;
}

double lambda_of(const RkvOptions& o) { return o.policy == Policy::cosine ? 0 : o.policy == Policy::attention ? 1 : o.lambda; }

/// to: the sample's M rows, columns of one head; from: its trace rows, the same columns.
template <class T>
void gather_slots(const Tensor& to, const HeadRows& from, const std::vector<int32_t>& slots) {
  for (int64_t i = 0; i < to.rows; ++i) {
    T* out = to.row<T>(i);
    if (i < static_cast<int64_t>(slots.size())) std::copy_n(from.template row<T>(slots[static_cast<std::size_t>(i)]), to.cols, out);
    else std::fill_n(out, to.cols, T{});
  }
}

}  // namespace

void CpuOps::do_rkv_select(Arena& arena, const Tensor& target_k, const Tensor& target_v, const Tensor& kept, const Tensor& importance,
                           const Tensor& redundancy, const Tensor& score, const Tensor& q, const Tensor& q_rows, const Tensor& q_offsets,
                           const Tensor& k, const Tensor& v, const Tensor& k_rows, const Tensor& k_offsets, const Tensor& match_k,
                           const RkvOptions& options) {
  ArenaScope scope(arena);
  const int64_t samples = k_offsets.cols - 1, m = options.latents, groups = options.kv_heads, share = options.heads / groups;
  const int64_t dim = k.cols / groups, tokens = k_rows.cols;
  const Tensor in_order = match_k ? arena.alloc(DType::i32, 1, tokens) : Tensor{};
  if (dry()) return;
  if (match_k) std::iota(in_order.as<int32_t>(), in_order.as<int32_t>() + tokens, 0);
  const int32_t *q_at = q_offsets.as<int32_t>(), *k_at = k_offsets.as<int32_t>();
  const double lambda = lambda_of(options);
  dispatch(k.dtype, [&]<class T>() {
    threads_.run(samples * groups, [&](int64_t task) {
      const int64_t b = task / groups, h = task % groups;
      auto head = [&](const Tensor& x, const Tensor& rows) {
        return HeadRows{x, rows.as<int32_t>() + k_at[b], k_at[b + 1] - k_at[b], h * dim, dim};
      };
      const HeadRows keys = head(k, k_rows),
                     queries{q, q_rows.as<int32_t>() + q_at[b], q_at[b + 1] - q_at[b], h * share * dim, share * dim};
      const std::vector<double> important = importance_of<T>(queries, keys, options.group), redundant = redundancy_of<T>(keys);
      std::vector<double> scores(important.size());
      for (std::size_t i = 0; i < scores.size(); ++i) scores[i] = lambda * important[i] + (1 - lambda) * redundant[i];
      auto report = [&](const Tensor& y, const std::vector<double>& x) {
        if (y) std::copy(x.begin(), x.end(), y.row<Sum<T>>(h) + k_at[b]);
      };
      report(importance, important);
      report(redundancy, redundant);
      report(score, scores);
      const std::vector<int32_t> slots = select(scores, options, b, h);
      for (int64_t i = 0; i < m; ++i)
        *(kept.row<int32_t>(b * m + i) + h) = i < static_cast<int64_t>(slots.size()) ? slots[static_cast<std::size_t>(i)] : -1;
      auto place = [&](const Tensor& y) { return y.row_range(b * m, (b + 1) * m).col_range(h * dim, (h + 1) * dim); };
      gather_slots<T>(place(target_k), match_k ? head(match_k, in_order) : keys, slots);
      gather_slots<T>(place(target_v), head(v, k_rows), slots);
    });
  });
}

}  // namespace kava
