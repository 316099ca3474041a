// The waist of the engine: everything a model may ask of a device. An op is called through a front that is written once (ops.cpp): it
// checks shapes, types and strides, tells the observers (op_observer.h), and hands over to do_OP of a backend. An op of the
// family F stands in cpu/ops_F.cpp, the readable specification and the oracle of the tests.
//
// Conventions. Outputs come first, then inputs, then scalars. "storage" is the model's type (bf16, f32, f64); "sum" is f32, or f64 for f64.
// An empty tensor stands for "not wanted" or "not there". Rows may lie apart (stride) but where an op says contiguous. Index tensors are
// i32 with one row; that their values are in range is checked by who makes the list on the host (indices.h), since a device cannot ask.
// Rounding: what an op sums from several terms or products (bias, LoRA, residual, a reduction) is summed in the sum type and rounded to
// storage once. Every reduction has a fixed order: the same inputs give the same bytes, whatever the number of threads.
// Ops that need room take it from the arena and give it back.
#pragma once
#include <array>
#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

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
  int64_t count = 0, groups = 0;
  int64_t most_keys = 0, most_queries = 0, fewest_queries = 0;  // of one segment
};

/// Dropout on the input of LoRA: element (n, c) is kept, and divided by 1 - p, when a 16-bit number drawn for (seed, step, site,
/// row_keys[n] = (sample in the optimiser batch, row within the sample), c) is at least p * 2^16.
struct Dropout {
  double p = 0;
  uint64_t seed = 0;
  uint32_t step = 0, site = 0;
  Tensor row_keys = {};  // i32 [rows, 2]
};

/// GELU by the error function, or by its approximation with tanh.
enum class Gelu { erf, tanh };

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
  double clip = 0;  // largest norm of the whole gradient; 0: no clipping
};

class OpObserver;

class Ops {
 public:
  /// A dry backend takes the memory that its ops take, in addresses that nobody may touch, and computes nothing: a real step run on it
  /// tells what the step needs. Downloads give zeros.
  explicit Ops(bool dry) : dry_(dry) {}
  virtual ~Ops() = default;
  Ops(const Ops&) = delete;
  Ops& operator=(const Ops&) = delete;
  virtual std::string name() const = 0;
  bool dry() const { return dry_; }
  /// Whether weights and activations may be of this type.
  virtual bool stores(DType) const { return true; }
  /// A dry backend of the same kind, which takes the same memory.
  virtual std::unique_ptr<Ops> dry_twin() const = 0;

  /// Observers are told of every call, in the order in which they were added. They must outlive their time here.
  void add_observer(OpObserver& observer) { observers_.push_back(&observer); }
  void remove_observer(OpObserver& observer) { std::erase(observers_, &observer); }
  /// Returns when everything asked for so far is done, for who measures time.
  virtual void finish() {}
  /// Whether calls return before they are done.
  virtual bool queues() const { return false; }
  /// Kernels launched so far; 0 where an op is a function of the host.
  virtual int64_t launches() const { return 0; }

  // ---- memory
  void* allocate(int64_t bytes);
  void release(void* data, int64_t bytes);
  /// Addresses for one arena, as many as the device could ever fill, with no memory behind them.
  AddressRange reserve();
  /// Puts memory behind `bytes` bytes of a range from `data` on; its parts are committed in order, without gaps.
  void commit(void* data, int64_t bytes);
  /// Gives a range back, with the memory of its first `committed` bytes.
  void unreserve(const AddressRange& range, int64_t committed);
  /// Told of committed memory that it holds a tensor from now on, or nothing: a backend may report what touches it in between.
  void in_use(void* data, int64_t bytes, bool used);
  /// Bytes given out by allocate and commit and not given back.
  int64_t held_bytes() const { return held_; }

  /// Runs body, which asks for ops and room of this arena and for nothing else of the backend. A device may record what it queues and
  /// launch it as a whole; where that fails, or memory has to be asked for, it runs body once more, so that must ask for the same again.
  /// Passes of one key ask for the same ops in the same order, as a rule. An observer is told of every op, and nothing is recorded then.
  void pass(Arena& arena, int64_t key, const std::function<void()>& body);

  /// Runs body(task) for every task in 0..tasks-1 on the host, on the backend's threads where it has some.
  void on_host(int64_t tasks, const std::function<void(int64_t)>& body) {
    if (!dry_) do_on_host(tasks, body);
  }
  /// Host memory is contiguous and of the tensor's type.
  void upload(const Tensor& y, const void* host);
  void download(void* host, const Tensor& x);
  /// The same in two halves, one at a time: the first asks for x, contiguous, as it then is and does not wait; the second waits for it, and
  /// for nothing that was asked for since.
  void begin_download(const Tensor& x);
  void end_download(void* host);

  // ---- rows. y and x are both i32, or each in the storage or the sum type of one model (fill: any type).
  /// y = value
  void fill(const Tensor& y, double value);
  /// y = x, rounded to y's type
  void copy(const Tensor& y, const Tensor& x);
  /// y += x, rounded to y's type
  void add(const Tensor& y, const Tensor& x);
  /// y[i] = x[rows[i]], rounded to y's type
  void gather_rows(const Tensor& y, const Tensor& x, const Tensor& rows);
  /// y[rows[i]] = x[i]; the rows are distinct
  void scatter_rows(const Tensor& y, const Tensor& x, const Tensor& rows);
  /// y[rows[i]] += x[i]; the rows are distinct
  void scatter_add_rows(const Tensor& y, const Tensor& x, const Tensor& rows);
  /// x[n] = table[ids[n]], or extra[-1-ids[n]] where ids[n] < 0. table [V, C], extra [3, C], of x's type; extra may be empty
  void embed_fwd(const Tensor& x, const Tensor& table, const Tensor& extra, const Tensor& ids);
  /// Adds dx [n, C] (sum) to the rows it came from, in the order of n: dtable [V, C], dextra [3, C] in sum type, either may be empty. Ids
  /// may repeat
  void embed_bwd(const Tensor& dtable, const Tensor& dextra, const Tensor& dx, const Tensor& ids);

  // ---- layers
  /// sum = a + b;  y = sum * rstd * w,  rstd = (mean(sum^2) + eps)^-1/2.  y, sum, a, b [n, C]; rstd [n, 1] sum type; w [1, C].
  /// b may be empty (sum = a); sum may be empty then, or a itself. rstd may be empty
  void add_rms_norm_fwd(const Tensor& y, const Tensor& sum, const Tensor& rstd, const Tensor& a, const Tensor& b, const Tensor& w,
                        double eps);
  /// dx += gradient through y = x * rstd * w; dw += . dx [n, C] storage, dy [n, C] storage or sum, dw [1, C] sum or empty
  void rms_norm_bwd(Arena& arena, const Tensor& dx, const Tensor& dw, const Tensor& dy, const Tensor& x, const Tensor& rstd,
                    const Tensor& w);

  /// The rank columns of joined = scale * b in the rows of each part, zero elsewhere. Called after every change of a b.
  void linear_prepare(const LinearGroup& group);
  /// xa = drop(x) A^T. xx [n, in + ranks] = [x | xa] side by side: reads x, writes xa
  void lora_fwd(Arena& arena, const Tensor& xx, const LinearGroup& group, const Dropout& dropout, Reads reads = Reads::tiled);
  /// y = xx [W | s B]^T + bias, y [n, outs]
  void linear_group_fwd(Arena& arena, const Tensor& y, const Tensor& xx, const LinearGroup& group, Reads reads = Reads::tiled);
  /// [dx | dxa] = dy [W | s B]; dx += drop'(dxa A).  dx [n, in] and dxa [n, ranks] are set; dx may be empty; dxa empty without LoRA
  void linear_group_bwd_input(Arena& arena, const Tensor& dx, const Tensor& dxa, const Tensor& dy, const LinearGroup& group,
                              const Dropout& dropout);
  /// dA += dxa^T drop(x) in the rows of the group's parts, db += scale * dy^T xa, dW += dy^T x, dbias += column sums of dy, for the
  /// gradients that are there. A sum over several passes is the sum over each of them, added in the order of the calls; the parts of a
  /// pass are its backend's (docs/design.md section 2.6).
  void linear_group_bwd_params(Arena& arena, const LinearGroupGrad& grad, const Tensor& dy, const Tensor& dxa, const Tensor& xx,
                               const LinearGroup& group, const Dropout& dropout);

  /// Rotary embedding in place: with half = D/2, the pair (x[d], x[d+half]) of every head turns by the angle of the row's position.
  /// x [n, heads*D] storage or sum, of q and k side by side for instance; positions i32 [1, n]; cosine, sine [positions, half] in sum
  /// type. inverse turns back
  void rope_fwd(const Tensor& x, const Tensor& positions, const Tensor& cosine, const Tensor& sine, int64_t head_dim, bool inverse);
  /// dqkv [n, (H + 2K)*D] storage = [dq turned back | dk turned back | dv]. dq [n, H*D] storage, which may be those columns of dqkv itself;
  /// dk, dv [n, K*D] sum. dq may be empty, and so may dk with dv: dqkv has no columns for them then
  void rope_bwd(const Tensor& dqkv, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& positions, const Tensor& cosine,
                const Tensor& sine, int64_t head_dim);

  /// RMSNorm of each head by itself, then its rotary embedding: y = turned(x * rstd * w), rstd = (mean(x^2) + eps)^-1/2 over the head's D
  /// columns. y, x [n, heads*D] storage; rstd [n, heads] sum type; w [1, D]; the rest as in rope_fwd. y may be x itself, rstd empty
  void norm_rope_fwd(const Tensor& y, const Tensor& rstd, const Tensor& x, const Tensor& w, const Tensor& positions, const Tensor& cosine,
                     const Tensor& sine, double eps);
  /// dx = gradient through that; dw += . dx, x storage, dy storage or sum, which may be dx itself; dw [1, D] sum or empty
  void norm_rope_bwd(Arena& arena, const Tensor& dx, const Tensor& dw, const Tensor& dy, const Tensor& x, const Tensor& rstd,
                     const Tensor& w, const Tensor& positions, const Tensor& cosine, const Tensor& sine);

  /// o = softmax(scale q k^T) v over each segment.  q, o [n, H*D]; k, v [step rows, K*D]; lse [n, H] sum: log of the softmax's denominator,
  /// may be empty
  void attention_fwd(Arena& arena, const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                     const Segments& segments, int64_t heads, int64_t kv_heads, double scale);
  /// dq [n, H*D] storage (set); dk, dv [step rows, K*D] in sum type (added to)
  void attention_bwd(Arena& arena, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dout, const Tensor& o,
                     const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments, int64_t heads,
                     int64_t kv_heads, double scale);

  /// y = silu(gate) * up, [n, F]
  void swiglu_fwd(const Tensor& y, const Tensor& gate, const Tensor& up);
  void swiglu_bwd(const Tensor& dgate, const Tensor& dup, const Tensor& dy, const Tensor& gate, const Tensor& up);
  /// y = x Phi(x), with the error function; or y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
  void gelu_fwd(const Tensor& y, const Tensor& x, Gelu form);
  /// dx (set); dy storage or sum
  void gelu_bwd(const Tensor& dx, const Tensor& dy, const Tensor& x, Gelu form);
  /// sum = a + b;  y = (sum - mean) * rstd * w + bias;  mean, rstd [n, 1] sum; w, bias [1, C]. b and sum as in add_rms_norm_fwd
  void add_layer_norm_fwd(const Tensor& y, const Tensor& sum, const Tensor& mean, const Tensor& rstd, const Tensor& a, const Tensor& b,
                          const Tensor& w, const Tensor& bias, double eps);
  /// dx += gradient through y; dw, db (sum, added to), either may be empty; dy storage or sum
  void layer_norm_bwd(Arena& arena, const Tensor& dx, const Tensor& dw, const Tensor& db, const Tensor& dy, const Tensor& x,
                      const Tensor& mean, const Tensor& rstd, const Tensor& w);

  // ---- objective. Losses are f64 scalars on the device that ops add to.
  /// Cross-entropy of head(h) = h W^T on targets, some rows at a time. Row n is of class classes[n]: 0 a student's, 1 a teacher's.
  /// losses [1, 2] f64 += the sums over each class of -log softmax(head(h))[target], each term rounded to the sum type;
  /// dh [n, C] sum = weights[class] (softmax - onehot) W;  dw [V, C] sum += the same gradient of the logits by h;
  /// correct i32 [1, B] = whether in every row n with owners[n] = b the best token, the lowest of equals, is the target (1 where b owns
  /// none; owners[n] = -1: nobody's). logits [n, V] sum. h [n, C], w [V, C] storage; targets, classes, owners i32 [1, n]. Each of dh, dw,
  /// correct with owners, and logits may be empty
  void head_cross_entropy(Arena& arena, const Tensor& losses, const Tensor& dh, const Tensor& dw, const Tensor& correct,
                          const Tensor& logits, const Tensor& h, const Tensor& w, const Tensor& targets, const Tensor& classes,
                          const Tensor& owners, const std::array<double, 2>& weights);
  /// best i32 [1, n] = the best token of head(h), the lowest of equals
  void head_argmax(Arena& arena, const Tensor& best, const Tensor& h, const Tensor& w);
  /// drawn i32 [1, n] = for each row a token drawn from softmax(head(h) / temperature) by 64 random bits (kernels/draw.h): numbers i32
  /// [1, 2n] hold their low and high words; top_p < 1: of the fewest best tokens that have this share. -1 where a logit is not finite.
  /// temperature > 0, 0 < top_p <= 1, V at most 2^20
  void head_draw(Arena& arena, const Tensor& drawn, const Tensor& h, const Tensor& w, const Tensor& numbers, double temperature,
                 double top_p);

  /// R-KV eviction of one layer (docs/method.md section 4), per sample and K/V head.
  /// In: q, k, v, as the step holds them (after RoPE), of which q_rows are the answers' queries and k_rows the traces' keys, packed by
  /// samples with q_offsets, k_offsets i32 [1, B+1]; match_k [trace tokens, K*D]: the keys that are gathered, packed like k_rows; empty:
  /// k's own. Out: target_k, target_v [B*M, K*D] storage, zero in empty slots; kept i32 [B*M, K], index in the sample's trace, -1 in empty
  /// slots; importance, redundancy, score [K, trace tokens] sum, each may be empty
  void rkv_select(Arena& arena, const Tensor& target_k, const Tensor& target_v, const Tensor& kept, const Tensor& importance,
                  const Tensor& redundancy, const Tensor& score, const Tensor& q, const Tensor& q_rows, const Tensor& q_offsets,
                  const Tensor& k, const Tensor& v, const Tensor& k_rows, const Tensor& k_offsets, const Tensor& match_k,
                  const RkvOptions& options);

  /// Row i of moments [n, 3] sum = count, mean and sum of squared deviations of the valid rows of xs[i] [G*per_group, C], n tensors of one
  /// shape: in group g the first valid[g] of per_group rows (valid i32 [1, G])
  void moments(Arena& arena, const Tensor& moments, std::span<const Tensor> xs, const Tensor& valid);
  /// inverse [1, n] = 1 / that power, 1 or 2, of the unbiased standard deviations of all the elements that n equal parts of the rows of
  /// moments [n*m, 3] describe; 0 where one is zero or undefined
  void inverse_std(const Tensor& inverse, const Tensor& moments, int power = 1);
  /// With s = factor * inverse (inverse empty: s = factor):  loss [1, 1] f64 += s * sum over valid rows of distance(x - target);
  /// dx [.., C] sum = weight * s * distance'(x - target), zero in other rows. Rows are valid as in moments. smooth_l1 has beta 1
  void distill(Arena& arena, const Tensor& loss, const Tensor& dx, const Tensor& x, const Tensor& target, const Tensor& valid,
               const Tensor& inverse, Distance distance, double factor, double weight);

  // ---- update
  /// out [1, 1] f64 = sum of squares of x, contiguous
  void sum_squares(Arena& arena, const Tensor& out, const Tensor& x);
  /// Decides on the device whether a step is an update: where one of losses [1, n] f64 is not finite, grad_square [1, 1] f64 becomes NaN;
  /// where that is finite, updates i32 [1, 1] += 1
  void count_update(const Tensor& updates, const Tensor& grad_square, const Tensor& losses);
  /// AdamW with decoupled decay on contiguous sum-type tensors of one shape. The gradient is scaled by min(1, clip / (norm + 1e-6)), norm^2
  /// = grad_square [1, 1] f64; where that is not finite nothing is changed. The moments' bias is corrected for updates i32 [1, 1], this one
  /// counted. half, if there, gets the value rounded to its type
  void adamw(const Tensor& value, const Tensor& m, const Tensor& v, const Tensor& half, const Tensor& grad, const Tensor& grad_square,
             const Tensor& updates, const AdamwOptions& options);

 protected:
  // What the fronts hand over to: checked arguments. Only an op with an arena is called on a dry backend: it takes its memory and returns.
  virtual void* do_allocate(int64_t bytes) = 0;
  virtual void do_release(void* data, int64_t bytes) = 0;
  virtual AddressRange do_reserve() = 0;
  virtual void do_commit(void* data, int64_t bytes) = 0;
  virtual void do_unreserve(const AddressRange& range, int64_t committed) = 0;
  virtual void do_in_use(void*, int64_t, bool) {}
  virtual void do_on_host(int64_t tasks, const std::function<void(int64_t)>& body) {
    for (int64_t t = 0; t < tasks; ++t) body(t);
  }
  virtual void do_pass(Arena&, int64_t, const std::function<void()>& body) { body(); }
  virtual void do_upload(const Tensor& y, const void* host) = 0;
  virtual void do_download(void* host, const Tensor& x) = 0;
  virtual void do_begin_download(const Tensor& x) { do_download(downloaded_.data(), x); }
  virtual void do_end_download(void* host, int64_t bytes) { std::memcpy(host, downloaded_.data(), static_cast<std::size_t>(bytes)); }
  virtual void do_fill(const Tensor& y, double value) = 0;
  virtual void do_copy(const Tensor& y, const Tensor& x) = 0;
  virtual void do_add(const Tensor& y, const Tensor& x) = 0;
  virtual void do_gather_rows(const Tensor& y, const Tensor& x, const Tensor& rows) = 0;
  virtual void do_scatter_rows(const Tensor& y, const Tensor& x, const Tensor& rows) = 0;
  virtual void do_scatter_add_rows(const Tensor& y, const Tensor& x, const Tensor& rows) = 0;
  virtual void do_embed_fwd(const Tensor& x, const Tensor& table, const Tensor& extra, const Tensor& ids) = 0;
  virtual void do_embed_bwd(const Tensor& dtable, const Tensor& dextra, const Tensor& dx, const Tensor& ids) = 0;
  virtual void do_add_rms_norm_fwd(const Tensor& y, const Tensor& sum, const Tensor& rstd, const Tensor& a, const Tensor& b,
                                   const Tensor& w, double eps) = 0;
  virtual void do_rms_norm_bwd(Arena& arena, const Tensor& dx, const Tensor& dw, const Tensor& dy, const Tensor& x, const Tensor& rstd,
                               const Tensor& w) = 0;
  virtual void do_linear_prepare(const LinearGroup& group) = 0;
  virtual void do_lora_fwd(Arena& arena, const Tensor& xx, const LinearGroup& group, const Dropout& dropout, Reads reads) = 0;
  virtual void do_linear_group_fwd(Arena& arena, const Tensor& y, const Tensor& xx, const LinearGroup& group, Reads reads) = 0;
  virtual void do_linear_group_bwd_input(Arena& arena, const Tensor& dx, const Tensor& dxa, const Tensor& dy, const LinearGroup& group,
                                         const Dropout& dropout) = 0;
  virtual void do_linear_group_bwd_params(Arena& arena, const LinearGroupGrad& grad, const Tensor& dy, const Tensor& dxa, const Tensor& xx,
                                          const LinearGroup& group, const Dropout& dropout) = 0;
  virtual void do_rope_fwd(const Tensor& x, const Tensor& positions, const Tensor& cosine, const Tensor& sine, int64_t head_dim,
                           bool inverse) = 0;
  virtual void do_rope_bwd(const Tensor& dqkv, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& positions,
                           const Tensor& cosine, const Tensor& sine, int64_t head_dim) = 0;
  virtual void do_norm_rope_fwd(const Tensor& y, const Tensor& rstd, const Tensor& x, const Tensor& w, const Tensor& positions,
                                const Tensor& cosine, const Tensor& sine, double eps) = 0;
  virtual void do_norm_rope_bwd(Arena& arena, const Tensor& dx, const Tensor& dw, const Tensor& dy, const Tensor& x, const Tensor& rstd,
                                const Tensor& w, const Tensor& positions, const Tensor& cosine, const Tensor& sine) = 0;
  virtual void do_attention_fwd(Arena& arena, const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                                const Segments& segments, int64_t heads, int64_t kv_heads, double scale) = 0;
  virtual void do_attention_bwd(Arena& arena, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dout, const Tensor& o,
                                const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments,
                                int64_t heads, int64_t kv_heads, double scale) = 0;
  virtual void do_swiglu_fwd(const Tensor& y, const Tensor& gate, const Tensor& up) = 0;
  virtual void do_swiglu_bwd(const Tensor& dgate, const Tensor& dup, const Tensor& dy, const Tensor& gate, const Tensor& up) = 0;
  virtual void do_gelu_fwd(const Tensor& y, const Tensor& x, Gelu form) = 0;
  virtual void do_gelu_bwd(const Tensor& dx, const Tensor& dy, const Tensor& x, Gelu form) = 0;
  virtual void do_add_layer_norm_fwd(const Tensor& y, const Tensor& sum, const Tensor& mean, const Tensor& rstd, const Tensor& a,
                                     const Tensor& b, const Tensor& w, const Tensor& bias, double eps) = 0;
  virtual void do_layer_norm_bwd(Arena& arena, const Tensor& dx, const Tensor& dw, const Tensor& db, const Tensor& dy, const Tensor& x,
                                 const Tensor& mean, const Tensor& rstd, const Tensor& w) = 0;
  virtual void do_head_cross_entropy(Arena& arena, const Tensor& losses, const Tensor& dh, const Tensor& dw, const Tensor& correct,
                                     const Tensor& logits, const Tensor& h, const Tensor& w, const Tensor& targets, const Tensor& classes,
                                     const Tensor& owners, const std::array<double, 2>& weights) = 0;
  virtual void do_head_argmax(Arena& arena, const Tensor& best, const Tensor& h, const Tensor& w) = 0;
  virtual void do_head_draw(Arena& arena, const Tensor& drawn, const Tensor& h, const Tensor& w, const Tensor& numbers, double temperature,
                            double top_p) = 0;
  virtual void do_rkv_select(Arena& arena, const Tensor& target_k, const Tensor& target_v, const Tensor& kept, const Tensor& importance,
                             const Tensor& redundancy, const Tensor& score, const Tensor& q, const Tensor& q_rows, const Tensor& q_offsets,
                             const Tensor& k, const Tensor& v, const Tensor& k_rows, const Tensor& k_offsets, const Tensor& match_k,
                             const RkvOptions& options) = 0;
  virtual void do_moments(Arena& arena, const Tensor& moments, std::span<const Tensor> xs, const Tensor& valid) = 0;
  virtual void do_inverse_std(const Tensor& inverse, const Tensor& moments, int power) = 0;
  virtual void do_distill(Arena& arena, const Tensor& loss, const Tensor& dx, const Tensor& x, const Tensor& target, const Tensor& valid,
                          const Tensor& inverse, Distance distance, double factor, double weight) = 0;
  virtual void do_sum_squares(Arena& arena, const Tensor& out, const Tensor& x) = 0;
  virtual void do_count_update(const Tensor& updates, const Tensor& grad_square, const Tensor& losses) = 0;
  virtual void do_adamw(const Tensor& value, const Tensor& m, const Tensor& v, const Tensor& half, const Tensor& grad,
                        const Tensor& grad_square, const Tensor& updates, const AdamwOptions& options) = 0;

 private:
  // In op_front.h. call: for ops that take memory, also on a dry backend; compute: for the others.
  using Tensors = std::initializer_list<Tensor>;
  template <class Run>
  void call(const char* name, std::span<const Tensor> outputs, std::span<const Tensor> inputs, double flops, const Run& run,
            double untouched = 0);
  template <class Run>
  void call(const char* name, Tensors outputs, Tensors inputs, double flops, const Run& run, double untouched = 0);
  template <class Run>
  void compute(const char* name, Tensors outputs, Tensors inputs, const Run& run, double untouched = 0);

  void* dry_addresses(int64_t bytes);

  bool dry_;
  int64_t next_dry_ = int64_t{1} << 48;  // an address in a range that no process maps
  int64_t held_ = 0;
  bool downloading_ = false;
  std::vector<char> downloaded_;  // of begin_download; a backend that queues keeps its own
  std::vector<OpObserver*> observers_;
};

/// threads: how many the backend keeps, the caller's included.
std::unique_ptr<Ops> make_cpu_ops(int threads, bool dry = false);

}  // namespace kava
