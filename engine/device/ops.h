// The waist of the engine: everything a model may ask of a device. The backend is cpu (cpu/ops_*.cpp, the readable specification and the
// oracle of the tests); NullOps does nothing, so that a real step run on it tells the memory it needs; TimedOps (ops_timed.h) measures.
//
// Conventions. Outputs come first, then inputs, then scalars. "storage" is the model's type (bf16, f32, f64); "sum" is f32, or f64 for f64.
// An empty tensor stands for "not wanted" or "not there". Index tensors are i32 with one row. Ops that need room take it from the arena and
// give it back. Every reduction has a fixed order: the same inputs give the same bytes, whatever the number of threads. What is summed from
// several products or terms is summed in the sum type and rounded to storage once.
#pragma once
#include <memory>
#include <span>
#include <string>

#include "engine/choice.h"
#include "engine/device/arena.h"
#include "engine/device/linear_group.h"
#include "engine/device/tensor.h"

namespace kava {

/// Attention segments of one pass. Segment s attends the rows keys[key_offsets[s] .. key_offsets[s+1]) of the step's K and V; the last
/// n = query_count[s] of them are the keys of its own queries, the rows query_begin[s] .. +n of q. Query i sees all keys but the last
/// n-1-i. Segments are grouped by sample: group g holds segments group_offsets[g] .. group_offsets[g+1]). The key rows of one segment are
/// distinct, and different groups share none. Rows that no segment queries are left as they are.
struct Segments {
  Tensor key_offsets, keys, query_begin, query_count, group_offsets;  // i32 [1, S+1], [1, sum], [1, S], [1, S], [1, groups+1]
  int64_t count = 0, groups = 0, most_keys = 0, most_queries = 0;     // most_*: of one segment
};

/// Dropout on the input of LoRA: element (n, c) is kept, and divided by 1 - p, when a 16-bit number drawn for (seed, step, site,
/// row_keys[n] = (sample in the optimiser batch, row within the sample), c) is at least p * 2^16.
struct Dropout {
  double p = 0;
  uint64_t seed = 0;
  uint32_t step = 0, site = 0;
  Tensor row_keys = {};  // i32 [rows, 2]
};

/// How a product of activations with weights runs. The two round differently, so the caller chooses by what its rows are, never by how
/// many they are; within each, a row's bytes depend on that row and on the weights alone.
enum class Reads {
  tiled,     // for many rows: at the rate of the multipliers
  streamed,  // for few: each weight is read once, at the rate of memory
};

struct RkvOptions {
  Policy policy = Policy::rkv;
  Group group = Group::max_logits;
  double lambda = 0.1;
  bool order_by_score = false;
  int64_t latents = 0;  // M
  int64_t heads = 0, kv_heads = 0;
  // Coordinates of the numbers that policy random draws.
  uint64_t seed = 0;
  uint32_t step = 0, layer = 0;
  Tensor samples = {};  // i32 [1, B]: index in the optimiser batch
};

struct AdamwOptions {
  double lr = 0, beta1 = 0, beta2 = 0, eps = 0, weight_decay = 0;
  double clip = 0;   // largest norm of the whole gradient; 0: no clipping
  int64_t step = 0;  // from 1, for the bias corrections
};

class Ops {
 public:
  virtual ~Ops() = default;
  virtual std::string name() const = 0;

  // ---- memory
  virtual void* allocate(int64_t bytes) = 0;
  virtual void release(void* data, int64_t bytes) = 0;
  /// Addresses for one arena, as many as the device could ever fill, with no memory behind them.
  virtual AddressRange reserve() = 0;
  /// Puts memory behind `bytes` bytes of a range from `data` on; its parts are committed in order, without gaps.
  virtual void commit(void* data, int64_t bytes) = 0;
  /// Gives a range back, with the memory of its first `committed` bytes.
  virtual void unreserve(const AddressRange& range, int64_t committed) = 0;
  /// Told of committed memory that it holds a tensor from now on, or nothing: a backend may report what touches it in between.
  virtual void in_use(void* data, int64_t bytes, bool used) {}
  /// Host memory is contiguous and of the tensor's type.
  virtual void upload(const Tensor& y, const void* host) = 0;
  virtual void download(void* host, const Tensor& x) = 0;

  // ---- rows
  /// y = value
  virtual void fill(const Tensor& y, double value) = 0;
  /// y = x, rounded to y's type
  virtual void copy(const Tensor& y, const Tensor& x) = 0;
  /// y += x, rounded to y's type; x any floating type
  virtual void add(const Tensor& y, const Tensor& x) = 0;
  /// y[i] = x[rows[i]], rounded to y's type
  virtual void gather_rows(const Tensor& y, const Tensor& x, const Tensor& rows) = 0;
  /// y[rows[i]] += x[i] in the order of i
  virtual void scatter_add_rows(const Tensor& y, const Tensor& x, const Tensor& rows) = 0;
  /// x[n] = table[ids[n]], or extra[-1-ids[n]] where ids[n] < 0. table [V, C], extra [3, C]
  virtual void embed_fwd(const Tensor& x, const Tensor& table, const Tensor& extra, const Tensor& ids) = 0;
  /// Adds dx [n, C] (sum) to the rows it came from: dtable [V, C], dextra [3, C] in sum type, either may be empty
  virtual void embed_bwd(const Tensor& dtable, const Tensor& dextra, const Tensor& dx, const Tensor& ids) = 0;

  // ---- layers
  /// sum = a + b;  y = sum * rstd * w,  rstd = (mean(sum^2) + eps)^-1/2.  y, sum, a, b [n, C]; rstd [n, 1] sum type; w [1, C].
  /// b may be empty (sum = a); sum may be empty then, or a itself.
  virtual void add_rms_norm_fwd(const Tensor& y, const Tensor& sum, const Tensor& rstd, const Tensor& a, const Tensor& b, const Tensor& w,
                                double eps) = 0;
  /// dx += gradient through y = x * rstd * w; dw += . dx [n, C] storage, dy [n, C] storage or sum, dw [1, C] sum or empty
  virtual void rms_norm_bwd(const Tensor& dx, const Tensor& dw, const Tensor& dy, const Tensor& x, const Tensor& rstd, const Tensor& w) = 0;

  /// The rank columns of joined = scale * b in the rows of each part, zero elsewhere. Called after every change of a b.
  virtual void linear_prepare(const LinearGroup& group) = 0;
  /// xa = drop(x) A^T. xx [n, in + ranks] = [x | xa] side by side: reads x, writes xa
  virtual void lora_fwd(Arena& arena, const Tensor& xx, const LinearGroup& group, const Dropout& dropout, Reads reads = Reads::tiled) = 0;
  /// y = xx [W | s B]^T + bias, y [n, outs]
  virtual void linear_group_fwd(Arena& arena, const Tensor& y, const Tensor& xx, const LinearGroup& group, Reads reads = Reads::tiled) = 0;
  /// [dx | dxa] = dy [W | s B]; dx += drop'(dxa A).  dx [n, in] and dxa [n, ranks] are set; dx may be empty; dxa empty without LoRA
  virtual void linear_group_bwd_input(Arena& arena, const Tensor& dx, const Tensor& dxa, const Tensor& dy, const LinearGroup& group,
                                      const Dropout& dropout) = 0;
  /// dA += dxa^T drop(x) in the rows of the group's parts, db += scale * dy^T xa, dW += dy^T x, dbias += column sums of dy, for the
  /// gradients that are there. The rows are summed in pieces of fixed length from the first row on, so a sum over several passes is the
  /// sum over each of them, added in the order of the calls.
  virtual void linear_group_bwd_params(Arena& arena, const LinearGroupGrad& grad, const Tensor& dy, const Tensor& dxa, const Tensor& xx,
                                       const LinearGroup& group, const Dropout& dropout) = 0;

  /// Rotary embedding in place: with half = D/2, the pair (x[d], x[d+half]) of every head turns by the angle of the row's position.
  /// x [n, heads*D] storage or sum; positions i32 [1, n]; cosine, sine [positions, half] in sum type. inverse turns back (also the
  /// gradient)
  virtual void rope(const Tensor& x, const Tensor& positions, const Tensor& cosine, const Tensor& sine, int64_t head_dim, bool inverse) = 0;

  /// o = softmax(scale q k^T) v over each segment.  q, o [n, H*D]; k, v [step rows, K*D]; lse [n, H] sum: log of the softmax's denominator
  virtual void attention_fwd(Arena& arena, const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                             const Segments& segments, int64_t heads, int64_t kv_heads, double scale) = 0;
  /// dq [n, H*D] storage (set); dk, dv [step rows, K*D] in sum type (added to)
  virtual void attention_bwd(Arena& arena, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dout, const Tensor& o,
                             const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments, int64_t heads,
                             int64_t kv_heads, double scale) = 0;

  /// y = silu(gate) * up, [n, F]
  virtual void swiglu_fwd(const Tensor& y, const Tensor& gate, const Tensor& up) = 0;
  virtual void swiglu_bwd(const Tensor& dgate, const Tensor& dup, const Tensor& dy, const Tensor& gate, const Tensor& up) = 0;
  /// y = x Phi(x), with the error function
  virtual void gelu_fwd(const Tensor& y, const Tensor& x) = 0;
  virtual void gelu_bwd(const Tensor& dx, const Tensor& dy, const Tensor& x) = 0;
  /// y = (x - mean) * rstd * w + b;  mean, rstd [n, 1] sum; w, b [1, C]
  virtual void layer_norm_fwd(const Tensor& y, const Tensor& mean, const Tensor& rstd, const Tensor& x, const Tensor& w, const Tensor& b,
                              double eps) = 0;
  /// dx (set); dw, db (sum, added to)
  virtual void layer_norm_bwd(const Tensor& dx, const Tensor& dw, const Tensor& db, const Tensor& dy, const Tensor& x, const Tensor& mean,
                              const Tensor& rstd, const Tensor& w) = 0;

  // ---- objective
  /// Cross-entropy of head(h) = h W^T on targets i32 [1, n]: nll [n, 1] sum; dh [n, C] sum = weight * (softmax - onehot) W;
  /// dw [V, C] sum += . h [n, C], w [V, C] storage. logits [n, V] sum, best (argmax, lowest index on ties) i32 [1, n]; each of nll, dh, dw,
  /// logits and best may be empty. Reads::streamed where best alone is wanted, else tiled.
  virtual void head_cross_entropy(Arena& arena, const Tensor& nll, const Tensor& dh, const Tensor& dw, const Tensor& logits,
                                  const Tensor& best, const Tensor& h, const Tensor& w, const Tensor& targets, double weight) = 0;

  /// R-KV eviction of one layer (docs/method.md section 4), per sample and K/V head.
  /// In: q [answer tokens, H*D], k [trace tokens, K*D] (both after RoPE), packed by samples with q_offsets, k_offsets i32 [1, B+1];
  /// match_k, v [trace tokens, K*D]: what is gathered. Out: target_k, target_v [B*M, K*D] storage, zero in empty slots; kept i32 [B*M, K],
  /// index in the sample's trace, -1 in empty slots; importance, redundancy, score [K, trace tokens] sum, each may be empty.
  virtual void rkv_select(Arena& arena, const Tensor& target_k, const Tensor& target_v, const Tensor& kept, const Tensor& importance,
                          const Tensor& redundancy, const Tensor& score, const Tensor& q, const Tensor& q_offsets, const Tensor& k,
                          const Tensor& k_offsets, const Tensor& match_k, const Tensor& v, const RkvOptions& options) = 0;

  /// moments [1, 3] sum = count, mean and sum of squared deviations of the valid rows of x [G*per_group, C]: in group g the first
  /// valid[g] of per_group rows (valid i32 [1, G])
  virtual void moments(const Tensor& moments, const Tensor& x, const Tensor& valid) = 0;
  /// inverse [1, 1] = 1 / unbiased standard deviation of all the elements that moments [n, 3] describe; 0 where it is zero or undefined
  virtual void inverse_std(const Tensor& inverse, const Tensor& moments) = 0;
  /// With s = factor * inverse (inverse empty: s = factor):  loss [1, 1] sum += s * sum over valid rows of distance(x - target);
  /// dx [.., C] sum = weight * s * distance'(x - target), zero in other rows. Rows are valid as in moments. smooth_l1 has beta 1.
  virtual void distill(const Tensor& loss, const Tensor& dx, const Tensor& x, const Tensor& target, const Tensor& valid,
                       const Tensor& inverse, Distance distance, double factor, double weight) = 0;

  // ---- update
  /// out [1, 1] f64 = sum of squares of x
  virtual void sum_squares(const Tensor& out, const Tensor& x) = 0;
  /// AdamW with decoupled decay on contiguous sum-type tensors of one shape. The gradient is scaled by min(1, clip / (norm + 1e-6)), norm^2
  /// = grad_square [1, 1] f64; where that is not finite nothing is changed. half, if there, gets the value rounded to its type.
  virtual void adamw(const Tensor& value, const Tensor& m, const Tensor& v, const Tensor& half, const Tensor& grad,
                     const Tensor& grad_square, const AdamwOptions& options) = 0;
};

/// threads: how many the backend keeps, the caller's included.
std::unique_ptr<Ops> make_cpu_ops(int threads);
/// Computes nothing; allocate() hands out addresses that nobody may touch, download() gives zeros.
std::unique_ptr<Ops> make_null_ops();

}  // namespace kava
