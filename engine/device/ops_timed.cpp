// A decorator that measures: every op runs on another backend, and its time is added to that of its name.
#include "engine/device/ops_timed.h"

#include <chrono>

namespace kava {

namespace {

class TimedOps final : public Ops {
 public:
  TimedOps(Ops& ops, OpTimes& times) : ops_(ops), times_(times) {}
  std::string name() const override { return ops_.name(); }
  void* allocate(int64_t bytes) override { return ops_.allocate(bytes); }
  void release(void* data, int64_t bytes) override { ops_.release(data, bytes); }
  AddressRange reserve() override { return ops_.reserve(); }
  void commit(void* data, int64_t bytes) override { ops_.commit(data, bytes); }
  void unreserve(const AddressRange& range, int64_t committed) override { ops_.unreserve(range, committed); }
  void in_use(void* data, int64_t bytes, bool used) override { ops_.in_use(data, bytes, used); }
  void upload(const Tensor& y, const void* host) override {
    timed("upload", [&] { ops_.upload(y, host); });
  }
  void download(void* host, const Tensor& x) override {
    timed("download", [&] { ops_.download(host, x); });
  }
  void fill(const Tensor& y, double value) override {
    timed("fill", [&] { ops_.fill(y, value); });
  }
  void copy(const Tensor& y, const Tensor& x) override {
    timed("copy", [&] { ops_.copy(y, x); });
  }
  void add(const Tensor& y, const Tensor& x) override {
    timed("add", [&] { ops_.add(y, x); });
  }
  void gather_rows(const Tensor& y, const Tensor& x, const Tensor& rows) override {
    timed("gather_rows", [&] { ops_.gather_rows(y, x, rows); });
  }
  void scatter_add_rows(const Tensor& y, const Tensor& x, const Tensor& rows) override {
    timed("scatter_add_rows", [&] { ops_.scatter_add_rows(y, x, rows); });
  }
  void embed_fwd(const Tensor& x, const Tensor& table, const Tensor& extra, const Tensor& ids) override {
    timed("embed_fwd", [&] { ops_.embed_fwd(x, table, extra, ids); });
  }
  void embed_bwd(const Tensor& dtable, const Tensor& dextra, const Tensor& dx, const Tensor& ids) override {
    timed("embed_bwd", [&] { ops_.embed_bwd(dtable, dextra, dx, ids); });
  }
  void add_rms_norm_fwd(const Tensor& y, const Tensor& sum, const Tensor& rstd, const Tensor& a, const Tensor& b, const Tensor& w,
                        double eps) override {
    timed("add_rms_norm_fwd", [&] { ops_.add_rms_norm_fwd(y, sum, rstd, a, b, w, eps); });
  }
  void rms_norm_bwd(const Tensor& dx, const Tensor& dw, const Tensor& dy, const Tensor& x, const Tensor& rstd, const Tensor& w) override {
    timed("rms_norm_bwd", [&] { ops_.rms_norm_bwd(dx, dw, dy, x, rstd, w); });
  }
  void linear_prepare(const LinearGroup& group) override {
    timed("linear_prepare", [&] { ops_.linear_prepare(group); });
  }
  void lora_fwd(Arena& arena, const Tensor& xx, const LinearGroup& group, const Dropout& dropout, Reads reads) override {
    timed("lora_fwd", [&] { ops_.lora_fwd(arena, xx, group, dropout, reads); });
  }
  void linear_group_fwd(Arena& arena, const Tensor& y, const Tensor& xx, const LinearGroup& group, Reads reads) override {
    timed("linear_group_fwd", [&] { ops_.linear_group_fwd(arena, y, xx, group, reads); });
  }
  void linear_group_bwd_input(Arena& arena, const Tensor& dx, const Tensor& dxa, const Tensor& dy, const LinearGroup& group,
                              const Dropout& dropout) override {
    timed("linear_group_bwd_input", [&] { ops_.linear_group_bwd_input(arena, dx, dxa, dy, group, dropout); });
  }
  void linear_group_bwd_params(Arena& arena, const LinearGroupGrad& grad, const Tensor& dy, const Tensor& dxa, const Tensor& xx,
                               const LinearGroup& group, const Dropout& dropout) override {
    timed("linear_group_bwd_params", [&] { ops_.linear_group_bwd_params(arena, grad, dy, dxa, xx, group, dropout); });
  }
  void rope(const Tensor& x, const Tensor& positions, const Tensor& cosine, const Tensor& sine, int64_t head_dim, bool inverse) override {
    timed("rope", [&] { ops_.rope(x, positions, cosine, sine, head_dim, inverse); });
  }
  void attention_fwd(Arena& arena, const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                     const Segments& segments, int64_t heads, int64_t kv_heads, double scale) override {
    timed("attention_fwd", [&] { ops_.attention_fwd(arena, o, lse, q, k, v, segments, heads, kv_heads, scale); });
  }
  void attention_bwd(Arena& arena, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dout, const Tensor& o,
                     const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments, int64_t heads,
                     int64_t kv_heads, double scale) override {
    timed("attention_bwd", [&] { ops_.attention_bwd(arena, dq, dk, dv, dout, o, lse, q, k, v, segments, heads, kv_heads, scale); });
  }
  void swiglu_fwd(const Tensor& y, const Tensor& gate, const Tensor& up) override {
    timed("swiglu_fwd", [&] { ops_.swiglu_fwd(y, gate, up); });
  }
  void swiglu_bwd(const Tensor& dgate, const Tensor& dup, const Tensor& dy, const Tensor& gate, const Tensor& up) override {
    timed("swiglu_bwd", [&] { ops_.swiglu_bwd(dgate, dup, dy, gate, up); });
  }
  void gelu_fwd(const Tensor& y, const Tensor& x) override {
    timed("gelu_fwd", [&] { ops_.gelu_fwd(y, x); });
  }
  void gelu_bwd(const Tensor& dx, const Tensor& dy, const Tensor& x) override {
    timed("gelu_bwd", [&] { ops_.gelu_bwd(dx, dy, x); });
  }
  void layer_norm_fwd(const Tensor& y, const Tensor& mean, const Tensor& rstd, const Tensor& x, const Tensor& w, const Tensor& b,
                      double eps) override {
    timed("layer_norm_fwd", [&] { ops_.layer_norm_fwd(y, mean, rstd, x, w, b, eps); });
  }
  void layer_norm_bwd(const Tensor& dx, const Tensor& dw, const Tensor& db, const Tensor& dy, const Tensor& x, const Tensor& mean,
                      const Tensor& rstd, const Tensor& w) override {
    timed("layer_norm_bwd", [&] { ops_.layer_norm_bwd(dx, dw, db, dy, x, mean, rstd, w); });
  }
  void head_cross_entropy(Arena& arena, const Tensor& nll, const Tensor& dh, const Tensor& dw, const Tensor& logits, const Tensor& best,
                          const Tensor& h, const Tensor& w, const Tensor& targets, double weight) override {
    timed("head_cross_entropy", [&] { ops_.head_cross_entropy(arena, nll, dh, dw, logits, best, h, w, targets, weight); });
  }
  void rkv_select(Arena& arena, const Tensor& target_k, const Tensor& target_v, const Tensor& kept, const Tensor& importance,
                  const Tensor& redundancy, const Tensor& score, const Tensor& q, const Tensor& q_offsets, const Tensor& k,
                  const Tensor& k_offsets, const Tensor& match_k, const Tensor& v, const RkvOptions& options) override {
    timed("rkv_select", [&] {
      ops_.rkv_select(arena, target_k, target_v, kept, importance, redundancy, score, q, q_offsets, k, k_offsets, match_k, v, options);
    });
  }
  void moments(const Tensor& moments, const Tensor& x, const Tensor& valid) override {
    timed("moments", [&] { ops_.moments(moments, x, valid); });
  }
  void inverse_std(const Tensor& inverse, const Tensor& moments) override {
    timed("inverse_std", [&] { ops_.inverse_std(inverse, moments); });
  }
  void distill(const Tensor& loss, const Tensor& dx, const Tensor& x, const Tensor& target, const Tensor& valid, const Tensor& inverse,
               Distance distance, double factor, double weight) override {
    timed("distill", [&] { ops_.distill(loss, dx, x, target, valid, inverse, distance, factor, weight); });
  }
  void sum_squares(const Tensor& out, const Tensor& x) override {
    timed("sum_squares", [&] { ops_.sum_squares(out, x); });
  }
  void adamw(const Tensor& value, const Tensor& m, const Tensor& v, const Tensor& half, const Tensor& grad, const Tensor& grad_square,
             const AdamwOptions& options) override {
    timed("adamw", [&] { ops_.adamw(value, m, v, half, grad, grad_square, options); });
  }

 private:
  template <class F>
  void timed(const char* op, F&& run) {
    const auto start = std::chrono::steady_clock::now();
    run();
    OpTime& t = times_[op];
    t.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    ++t.calls;
  }
  Ops& ops_;
  OpTimes& times_;
};

}  // namespace

std::unique_ptr<Ops> make_timed_ops(Ops& ops, OpTimes& times) { return std::make_unique<TimedOps>(ops, times); }

}  // namespace kava
