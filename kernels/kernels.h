// Launchers of the kernels: raw pointers, dimensions and a stream. What an op computes is said in engine/device/ops.h; here stands what a
// kernel asks of its arguments. All pointers are device memory. T is the storage type, bf16 or float; sums are f32. bf16 products run on
// tensor cores (mma.sync), f32 ones as plain multiply-adds. Rows may begin anywhere; where base and stride are multiples of 16 bytes, loads
// are faster. A launch that fails throws GpuError.
#pragma once
#include <cstdint>
#include <span>
#include <type_traits>

#include "kernels/bf16.h"

struct CUstream_st;

namespace kava {

/// The most columns of a matrix that kernels take, which count them by int; longer rows come in pieces.
constexpr int64_t kLongestRow = int64_t{1} << 30;

using Stream = CUstream_st*;

/// Row r of a matrix begins at data + r * stride. A null pointer stands for "not there".
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;
  constexpr T* operator[](int64_t r) const { return data + r * stride; }
  template <class U>
  requires std::is_same_v<U, const T>
  constexpr operator Rows<U>() const { return {data, stride}; }
};

/// Whether every row begins at a multiple of 16 bytes.
template <class T>
bool rows_at_16(Rows<T> x) {
  return reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && x.stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

// ---- rows: matrices of rows x cols, and lists of rows

template <class Y>
void fill_rows(Stream stream, Rows<Y> y, Y value, int64_t rows, int64_t cols);
/// y = x, rounded to y's type.
template <class Y, class X>
void copy_rows(Stream stream, Rows<Y> y, Rows<const X> x, int64_t rows, int64_t cols);
/// y += x
template <class Y, class X>
void add_rows(Stream stream, Rows<Y> y, Rows<const X> x, int64_t rows, int64_t cols);
/// y = scale x
template <class T>
void scale_rows(Stream stream, Rows<T> y, Rows<const T> x, float scale, int64_t rows, int64_t cols);
/// y[i] = x[from[i]]
template <class Y, class X>
void gather_rows(Stream stream, Rows<Y> y, Rows<const X> x, const int32_t* from, int64_t rows, int64_t cols);
/// y[to[i]] = x[i]; the rows named are distinct.
template <class Y, class X>
void scatter_rows(Stream stream, Rows<Y> y, Rows<const X> x, const int32_t* to, int64_t rows, int64_t cols);
/// y[to[i]] += x[i]; the rows named are distinct.
template <class Y, class X>
void scatter_add_rows(Stream stream, Rows<Y> y, Rows<const X> x, const int32_t* to, int64_t rows, int64_t cols);
/// x[n] = table[ids[n]], or extra[-1 - ids[n]] where ids[n] < 0.
template <class X, class T>
void embed_fwd(Stream stream, Rows<X> x, Rows<const T> table, Rows<const T> extra, const int32_t* ids, int64_t rows, int64_t cols);
/// Adds dx[n] to the row it came from, rows of one id in order; dtable or dextra may be null.
void embed_bwd(Stream stream, Rows<float> dtable, Rows<float> dextra, Rows<const float> dx, const int32_t* ids, int64_t rows, int64_t cols);

// ---- norms

/// Of a block: what its warps keep of their rows lies there, and every GPU has as much.
constexpr std::size_t kNormShared = 96 << 10;
/// The columns that a row may have of which a warp keeps so many bytes each: sizeof(T), and sizeof(G) of its gradient.
constexpr int64_t longest_norm(std::size_t bytes) { return static_cast<int64_t>(kNormShared / bytes); }
/// sum = a + b, y = sum rstd w; b, sum and rstd may be null, sum may be a itself.
template <class T>
void add_rms_norm_fwd(Stream stream, Rows<T> y, Rows<T> sum, Rows<float> rstd, Rows<const T> a, Rows<const T> b, const T* w, float eps,
                      int64_t rows, int64_t cols);
/// Rows that one sum of the first stage of a gain's or a bias's gradient runs over.
constexpr int kGainRows = 64;
/// Floats of the workspace, at a multiple of 16 bytes, for the sums over rows of so many columns.
constexpr int64_t column_sums_workspace(int64_t rows, int64_t cols) { return (rows + kGainRows - 1) / kGainRows * cols; }
/// Of dw and db.
constexpr int64_t norm_workspace(int64_t rows, int64_t cols) { return column_sums_workspace(rows, 2 * cols); }
/// dx is added to. dw [cols] is added to and may be null; then no workspace is needed.
template <class T, class G>
void rms_norm_bwd(Stream stream, Rows<T> dx, float* dw, float* workspace, Rows<const G> dy, Rows<const T> x, Rows<const float> rstd,
                  const T* w, int64_t rows, int64_t cols);
/// b and sum as above.
template <class T>
void add_layer_norm_fwd(Stream stream, Rows<T> y, Rows<T> sum, Rows<float> mean, Rows<float> rstd, Rows<const T> a, Rows<const T> b,
                        const T* w, const T* bias, float eps, int64_t rows, int64_t cols);
/// dx, dw and db are added to; dw and db may be null.
template <class T, class G>
void layer_norm_bwd(Stream stream, Rows<T> dx, float* dw, float* db, float* workspace, Rows<const G> dy, Rows<const T> x,
                    Rows<const float> mean, Rows<const float> rstd, const T* w, int64_t rows, int64_t cols);

// ---- rotary embedding and activations

/// y[r] = x[r] turned by the angle of positions[r], or back; in place where y is x.
template <class Y, class X>
void rope(Stream stream, Rows<Y> y, Rows<const X> x, const int32_t* positions, Rows<const float> cosine, Rows<const float> sine,
          int64_t rows, int heads, int head_dim, bool inverse);

/// Where rows stand: positions[r], whose angles are those rows of cosine and sine.
struct RopeTables {
  const int32_t* positions;
  Rows<const float> cosine, sine;
};
/// y = heads of x, each normalised by itself and turned; rstd [rows, heads] may be null, y may be x. head_dim: even, up to 512, else
/// std::invalid_argument, as are more chunks of eight pairs than 2^31.
template <class T>
void norm_rope_fwd(Stream stream, Rows<T> y, Rows<float> rstd, Rows<const T> x, const T* w, const RopeTables& at, float eps, int64_t rows,
                   int heads, int head_dim);
/// Floats of the workspace for dw, likewise.
constexpr int64_t norm_rope_workspace(int64_t rows, int64_t heads, int64_t head_dim) {
  return column_sums_workspace(rows * heads, head_dim);
}
/// dx is set and may be dy. dw [head_dim] is added to and may be null; then no workspace is needed.
template <class T, class G>
void norm_rope_bwd(Stream stream, Rows<T> dx, float* dw, float* workspace, Rows<const G> dy, Rows<const T> x, Rows<const float> rstd,
                   const T* w, const RopeTables& at, int64_t rows, int heads, int head_dim);

template <class T>
void swiglu_fwd(Stream stream, Rows<T> y, Rows<const T> gate, Rows<const T> up, int64_t rows, int64_t cols);
template <class T>
void swiglu_bwd(Stream stream, Rows<T> dgate, Rows<T> dup, Rows<const T> dy, Rows<const T> gate, Rows<const T> up, int64_t rows,
                int64_t cols);
/// By the error function, or by the approximation with tanh.
template <class T>
void gelu_fwd(Stream stream, Rows<T> y, Rows<const T> x, int64_t rows, int64_t cols, bool by_tanh);
template <class T, class G>
void gelu_bwd(Stream stream, Rows<T> dx, Rows<const G> dy, Rows<const T> x, int64_t rows, int64_t cols, bool by_tanh);

// ---- the head's loss

/// Each may be null. best: the first index of the maximum; hit: whether that is the target; dz = weights[class] (softmax - onehot).
template <class T>
struct HeadOutputs {
  float* nll = nullptr;
  int32_t *best = nullptr, *hit = nullptr;
  Rows<T> dz = {};
};
/// From logits z [rows, V]. targets: null where only best is wanted; classes, 0 or 1, are read for dz, whose rows may begin where those of
/// z do.
template <class T>
void head_rows(Stream stream, const HeadOutputs<T>& out, Rows<const float> z, const int32_t* targets, const int32_t* classes,
               const float (&weights)[2], int64_t rows, int64_t vocabulary);
/// drawn[r] = a token from softmax(z[r] / temperature), of the fewest best ones that have the share top_p, by the 64 bits numbers[2r], low
/// word, and numbers[2r + 1] (kernels/draw.h); -1 where a logit is not finite. weights [rows, V]: workspace.
void head_draw(Stream stream, int32_t* drawn, Rows<const float> z, Rows<uint64_t> weights, const int32_t* numbers, double temperature,
               double top_p, int64_t rows, int64_t vocabulary);
/// loss[c] += sum of nll over the rows of class c.
void head_loss(Stream stream, double* loss, const float* nll, const int32_t* classes, int64_t rows);
/// correct[owners[r]] = 0 for every row r without a hit that has an owner.
void head_correct(Stream stream, int32_t* correct, const int32_t* hit, const int32_t* owners, int64_t rows);

// ---- eviction

enum class RkvPolicy { scored, crop, random, uniform };
enum class RkvGroup { max_logits, max_prob, mean_prob };
struct RkvDims {
  int samples = 0, heads = 0, kv_heads = 0, head_dim = 0, latents = 0, trace_tokens = 0;
  RkvPolicy policy = RkvPolicy::scored;
  RkvGroup group = RkvGroup::max_logits;
  bool by_score = false;
  double lambda = 0;
  uint64_t seed = 0;  // of policy random
  uint32_t step = 0, layer = 0;
};
/// k, v: step rows, taken by trace_rows; match_k: the keys to gather, by trace_rows too or packed like the trace.
template <class T>
struct RkvInputs {
  Rows<const T> q, k, match_k, v;
  const int32_t *query_rows = nullptr, *query_offsets = nullptr, *trace_rows = nullptr, *trace_offsets = nullptr, *samples = nullptr;
  bool match_by_rows = true;
};
/// targets [B*M, K*D], kept [B*M, K]; importance, redundancy, score [K, trace tokens] may be null.
template <class T>
struct RkvOutputs {
  Rows<T> target_k, target_v;
  Rows<int32_t> kept;
  Rows<float> importance, redundancy, score;
};
/// Doubles of the workspace.
int64_t rkv_workspace_words(const RkvDims& dims);
template <class T>
void rkv_select(Stream stream, const RkvOutputs<T>& out, double* workspace, const RkvInputs<T>& in, const RkvDims& dims);

// ---- distillation: rows in groups of per_group, of which the first valid[g] count

/// Matrices of one shape that a launch takes.
constexpr int kMostMoments = 64;
template <class T>
struct MomentsBatch {
  Rows<const T> x[kMostMoments];
  int count = 0;
};
/// out[i] [3] = count, mean, sum of squared deviations of matrix i. parts: workspace [matrices, groups, 3].
template <class T>
void moments(Stream stream, Rows<float> out, double* parts, const MomentsBatch<T>& batch, const int32_t* valid, int groups, int per_group,
             int cols);
/// inverse[i] = 1 / that power, 1 or 2, of the unbiased standard deviation of all that rows i * each and on, `each` of them, of moments
/// describe, 0 where it is zero or undefined.
void inverse_std(Stream stream, float* inverse, Rows<const float> moments, int count, int each, int power);
enum class GroupDistance { smooth_l1, mse, l1 };
/// loss += s sum distance(x - target), dx = weight s distance'(x - target) and 0 in other rows, s = factor * inverse (null: 1). dx may be
/// null. parts: workspace [groups].
template <class T>
void distill(Stream stream, double* loss, Rows<float> dx, double* parts, Rows<const T> x, Rows<const T> target, const int32_t* valid,
             const float* inverse, GroupDistance kind, double factor, double weight, int groups, int per_group, int cols);

// ---- the update

/// Doubles of the workspace for n elements.
int64_t sum_squares_partials(int64_t n);
template <class X>
void sum_squares(Stream stream, double* out, double* partials, const X* x, int64_t n);
struct AdamwRates {
  double lr = 0, beta1 = 0, beta2 = 0, eps = 0, weight_decay = 0, clip = 0;
};
/// Made on the device, for one update.
struct AdamwFactors {
  float scale, rate, root_correction;
  int32_t updates;
};
/// *grad_square becomes NaN where one of losses [count] is not finite; ++*updates where it is finite.
void count_update(Stream stream, int32_t* updates, double* grad_square, const double* losses, int count);
/// One AdamW step; nothing changes where *grad_square is not finite. *updates: number of this update, from 1. half: null, or gets the
/// values rounded. factors: workspace.
void adamw(Stream stream, float* value, float* m, float* v, bf16* half, const float* grad, AdamwFactors* factors, const double* grad_square,
           const int32_t* updates, const AdamwRates& rates, int64_t n);

// ---- attention

/// The lists of ops.h's Segments. The key rows of one segment are distinct; segments of different groups share none.
struct SegmentLists {
  const int32_t *key_offsets = nullptr, *keys = nullptr, *query_begin = nullptr, *query_count = nullptr, *group_offsets = nullptr;
  int count = 0, groups = 0;
  int most_queries = 0, fewest_queries = 0;  // at least the largest and at most the smallest query_count
  int most_keys = 0;                         // at least the most keys of a segment
};

/// head_dim: 1..128, heads a multiple of kv_heads; else std::invalid_argument. scale: above 0.
struct AttentionDims {
  int heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 0;
};

/// Floats of attention_fwd's workspace, at a multiple of 32 bytes; 0: none is needed.
template <class T>
int64_t attention_fwd_workspace(const SegmentLists& segments, const AttentionDims& dims);
/// o, lse of every query row of a segment; other rows are left alone. lse may be null. The bytes of a segment's rows depend on that segment
/// alone.
template <class T>
void attention_fwd(Stream stream, Rows<T> o, Rows<float> lse, float* workspace, Rows<const T> q, Rows<const T> k, Rows<const T> v,
                   const SegmentLists& segments, const AttentionDims& dims);

/// Floats of attention_bwd's workspace, likewise, for so many rows of q.
template <class T>
int64_t attention_bwd_workspace(int64_t rows, const SegmentLists& segments, const AttentionDims& dims);
/// dq of every query row of a segment is set; dk and dv are added to, each element by one thread in the order of the group's segments.
template <class T>
void attention_bwd(Stream stream, Rows<T> dq, Rows<float> dk, Rows<float> dv, float* workspace, Rows<const T> dout, Rows<const T> o,
                   Rows<const float> lse, Rows<const T> q, Rows<const T> k, Rows<const T> v, const SegmentLists& segments,
                   const AttentionDims& dims);

// ---- linear maps with LoRA

/// The mask of kernels/dropout.h on the columns of x. row_keys [rows, 2], null: no dropout.
struct DropoutMask {
  const int32_t* row_keys = nullptr;
  uint64_t seed = 0;
  uint32_t step = 0, site = 0, threshold = 0;
  float inverse_keep = 1;  // 1 / (1 - p)
};

/// dbias[c] += sum_n dy[n, c]. workspace: column_sums_workspace(rows, cols).
template <class T>
void bias_bwd(Stream stream, float* dbias, float* workspace, Rows<const T> dy, int rows, int cols);

}  // namespace kava
