// The cuda backend: each op hands rows, dimensions and a stream to the kernels of kernels/OP.cu. Its definitions stand in ops_*.cpp, by the
// op. Storage is bf16 or f32; f64 is the cpu's.
#pragma once
#include <memory>

#include "engine/device/cuda/lt_plans.h"
#include "engine/device/cuda/matmul_lt.h"
#include "engine/device/cuda/pass_graphs.h"
#include "engine/device/cuda/runtime.h"
#include "engine/device/ops.h"
#include "kernels/gemm.h"
#include "kernels/kernels.h"

namespace kava {

class Threads;

class CudaOps final : public Ops {
 public:
  /// A dry backend opens no device. threads: of on_host().
  CudaOps(int device, bool dry, int threads = 1);
  ~CudaOps() override;
  std::string name() const override { return gpu_backend_name(); }
  bool stores(DType t) const override { return t != DType::f64; }
  std::unique_ptr<Ops> dry_twin() const override { return std::make_unique<CudaOps>(device_, true); }
  void finish() override {
    if (runtime_) runtime_->finish();
  }
  const GpuRuntime& runtime() const { return *runtime_; }
  GpuRuntime& runtime() { return *runtime_; }
  bool has_lt() const { return lt_ != nullptr; }
  /// Why cuBLASLt, which is there, is not used; empty: it is, or it is not there.
  const std::string& lt_fault() const { return lt_fault_; }
  const PassGraphs& graphs() const { return *graphs_; }
  /// As taken_memory() of cuda_module.h.
  int64_t taken_bytes();
  bool queues() const override { return true; }
  int64_t launches() const override { return runtime_ ? runtime_->launches() : 0; }

 private:
  void* do_allocate(int64_t bytes) override;
  void do_release(void* data, int64_t bytes) override;
  AddressRange do_reserve() override;
  void do_commit(void* data, int64_t bytes) override;
  void do_unreserve(const AddressRange& range, int64_t committed) override;
  void do_in_use(void* data, int64_t bytes, bool used) override {
    if (!used) runtime_->discard(data, bytes);
  }
  void do_pass(Arena& arena, int64_t key, const std::function<void()>& body) override { graphs_->run(arena, key, body); }
  void do_on_host(int64_t tasks, const std::function<void(int64_t)>& body) override;
  void do_upload(const Tensor& y, const void* host) override;
  void do_download(void* host, const Tensor& x) override;
  void do_begin_download(const Tensor& x) override { runtime_->begin_read(x.data, x.count() * size_of(x.dtype)); }
  void do_end_download(void* host, int64_t bytes) override { runtime_->end_read(host, bytes); }
  void do_fill(const Tensor& y, double value) override;
  void do_copy(const Tensor& y, const Tensor& x) override;
  void do_add(const Tensor& y, const Tensor& x) override;
  void do_gather_rows(const Tensor& y, const Tensor& x, const Tensor& rows) override;
  void do_scatter_rows(const Tensor& y, const Tensor& x, const Tensor& rows) override;
  void do_scatter_add_rows(const Tensor& y, const Tensor& x, const Tensor& rows) override;
  void do_embed_fwd(const Tensor& x, const Tensor& table, const Tensor& extra, const Tensor& ids) override;
  void do_embed_bwd(const Tensor& dtable, const Tensor& dextra, const Tensor& dx, const Tensor& ids) override;
  void do_add_rms_norm_fwd(const Tensor& y, const Tensor& sum, const Tensor& rstd, const Tensor& a, const Tensor& b, const Tensor& w,
                           double eps) override;
  void do_rms_norm_bwd(Arena& arena, const Tensor& dx, const Tensor& dw, const Tensor& dy, const Tensor& x, const Tensor& rstd,
                       const Tensor& w) override;
  void do_linear_prepare(const LinearGroup& group) override;
  void do_lora_fwd(Arena& arena, const Tensor& xx, const LinearGroup& group, const Dropout& dropout, Reads reads) override;
  void do_linear_group_fwd(Arena& arena, const Tensor& y, const Tensor& xx, const LinearGroup& group, Reads reads) override;
  void do_linear_group_bwd_input(Arena& arena, const Tensor& dx, const Tensor& dxa, const Tensor& dy, const LinearGroup& group,
                                 const Dropout& dropout) override;
  void do_linear_group_bwd_params(Arena& arena, const LinearGroupGrad& grad, const Tensor& dy, const Tensor& dxa, const Tensor& xx,
                                  const LinearGroup& group, const Dropout& dropout) override;
  void do_rope_fwd(const Tensor& x, const Tensor& positions, const Tensor& cosine, const Tensor& sine, int64_t head_dim,
                   bool inverse) override;
  void do_rope_bwd(const Tensor& dqkv, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& positions, const Tensor& cosine,
                   const Tensor& sine, int64_t head_dim) override;
  void do_norm_rope_fwd(const Tensor& y, const Tensor& rstd, const Tensor& x, const Tensor& w, const Tensor& positions,
                        const Tensor& cosine, const Tensor& sine, double eps) override;
  void do_norm_rope_bwd(Arena& arena, const Tensor& dx, const Tensor& dw, const Tensor& dy, const Tensor& x, const Tensor& rstd,
                        const Tensor& w, const Tensor& positions, const Tensor& cosine, const Tensor& sine) override;
  void do_attention_fwd(Arena& arena, const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Segments& segments, int64_t heads, int64_t kv_heads, double scale) override;
  void do_attention_bwd(Arena& arena, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dout, const Tensor& o,
                        const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments, int64_t heads,
                        int64_t kv_heads, double scale) override;
  void do_swiglu_fwd(const Tensor& y, const Tensor& gate, const Tensor& up) override;
  void do_swiglu_bwd(const Tensor& dgate, const Tensor& dup, const Tensor& dy, const Tensor& gate, const Tensor& up) override;
  void do_gelu_fwd(const Tensor& y, const Tensor& x, Gelu form) override;
  void do_gelu_bwd(const Tensor& dx, const Tensor& dy, const Tensor& x, Gelu form) override;
  void do_add_layer_norm_fwd(const Tensor& y, const Tensor& sum, const Tensor& mean, const Tensor& rstd, const Tensor& a, const Tensor& b,
                             const Tensor& w, const Tensor& bias, double eps) override;
  void do_layer_norm_bwd(Arena& arena, const Tensor& dx, const Tensor& dw, const Tensor& db, const Tensor& dy, const Tensor& x,
                         const Tensor& mean, const Tensor& rstd, const Tensor& w) override;
  void do_head_cross_entropy(Arena& arena, const Tensor& losses, const Tensor& dh, const Tensor& dw, const Tensor& correct,
                             const Tensor& logits, const Tensor& h, const Tensor& w, const Tensor& targets, const Tensor& classes,
                             const Tensor& owners, const std::array<double, 2>& weights) override;
  void do_head_argmax(Arena& arena, const Tensor& best, const Tensor& h, const Tensor& w) override;
  void do_head_draw(Arena& arena, const Tensor& drawn, const Tensor& h, const Tensor& w, const Tensor& numbers, double temperature,
                    double top_p) override;
  void do_rkv_select(Arena& arena, const Tensor& target_k, const Tensor& target_v, const Tensor& kept, const Tensor& importance,
                     const Tensor& redundancy, const Tensor& score, const Tensor& q, const Tensor& q_rows, const Tensor& q_offsets,
                     const Tensor& k, const Tensor& v, const Tensor& k_rows, const Tensor& k_offsets, const Tensor& match_k,
                     const RkvOptions& options) override;
  void do_moments(Arena& arena, const Tensor& moments, std::span<const Tensor> xs, const Tensor& valid) override;
  void do_inverse_std(const Tensor& inverse, const Tensor& moments, int power) override;
  void do_distill(Arena& arena, const Tensor& loss, const Tensor& dx, const Tensor& x, const Tensor& target, const Tensor& valid,
                  const Tensor& inverse, Distance distance, double factor, double weight) override;
  void do_sum_squares(Arena& arena, const Tensor& out, const Tensor& x) override;
  void do_count_update(const Tensor& updates, const Tensor& grad_square, const Tensor& losses) override;
  void do_adamw(const Tensor& value, const Tensor& m, const Tensor& v, const Tensor& half, const Tensor& grad, const Tensor& grad_square,
                const Tensor& updates, const AdamwOptions& options) override;

  Stream stream() const { return runtime_->stream(); }
  /// The product by cuBLASLt where that is there and suits it, else by the own kernel, which serves few rows better.
  template <GemmForm form, class T>
  void multiply(const Gemm<T>& g, Reads reads = Reads::tiled) {
    if (!multiplied_by_lt<form>(g, reads)) gemm<form>(stream(), g);
  }
  template <GemmForm form, class T>
  bool multiplied_by_lt(const Gemm<T>& g, Reads reads) {
    if constexpr (std::is_same_v<T, bf16>) {
      if (!lt_ || reads != Reads::tiled) return false;
      if constexpr (form != GemmForm::tn) return lt_->run(form, g);
      else return summed_by_lt(g);
    } else {
      return false;
    }
  }
  /// The product over rows, by cuBLASLt for all but the last of them where those are no whole step (LtKey::kDepthStep).
  bool summed_by_lt(const Gemm<bf16>& g) {
    const Product<bf16>& p = g.products[0];
    const int last = p.k % LtKey::kDepthStep, before = p.k - last;
    Gemm<bf16> most = g, rest = g;
    most.products[0].k = before;
    if ((last > 0 && !g.add.data) || !lt_->run(GemmForm::tn, most)) return false;
    rest.products[0] = {{&p.a[before][0], p.a.stride}, {&p.b[before][0], p.b.stride}, last};
    rest.partial = {}, rest.parts = 1;
    if (last > 0) gemm<GemmForm::tn>(stream(), rest);
    return true;
  }
  /// g onto first, which has the same output: by cuBLASLt where that takes g, after the own kernel made first; else by it as one sum.
  template <GemmForm form, class T>
  void multiply_onto(Gemm<T> first, const Gemm<T>& g) {
    if constexpr (std::is_same_v<T, bf16>) {
      LtKey key;
      if (lt_ && lt_takes(form, g, false, key, true)) {
        gemm<form>(stream(), first);
        if (lt_->run(form, g, false, true)) return;
      }
    }
    first.then(g.products[0].a, g.products[0].b, g.products[0].k);
    gemm<form>(stream(), first);
  }
  /// Compares products of cuBLASLt with the own kernel's, on numbers whose sums are exact in any order: why it is not to be used, which is
  /// also where it makes none of them. Empty: it may be.
  std::string fault_of_lt();
  /// c (set, or added to in f32) = op(a) op(b), op transposing.
  void product(const Tensor& c, const Tensor& a, bool transpose_a, const Tensor& b, bool transpose_b, bool add = false);

  int device_, threads_;
  std::unique_ptr<Threads> host_;        // from the first on_host()
  std::unique_ptr<GpuRuntime> runtime_;  // null in a dry backend
  std::unique_ptr<MatmulLt> lt_;         // null where there is no cuBLASLt
  std::string lt_fault_;
  std::unique_ptr<PassGraphs> graphs_;  // null in a dry backend
  struct Release {
    GpuRuntime* runtime;
    void operator()(void* data) const { runtime->release(data); }
  };
  std::unique_ptr<void, Release> factors_;   // an AdamwFactors
  int64_t first_free_ = 0, least_free_ = 0;  // bytes, by the device's count
};

/// The rows of a tensor as kernels take them; an empty tensor is a null pointer.
template <class T>
Rows<T> rows_of(const Tensor& t) {
  if (t)
    KAVA_CHECK(t.dtype == DTypeOf<std::remove_const_t<T>>::value, "a {} tensor used as {}", name_of(t.dtype),
               name_of(DTypeOf<std::remove_const_t<T>>::value));
  return {static_cast<T*>(t.data), t.stride};
}
/// The elements of a tensor of one row.
template <class T>
T* data_of(const Tensor& t) {
  return rows_of<T>(t).data;
}

/// Calls f.template operator()<T>() with the storage type.
template <class F>
void on_storage(DType t, F&& f) {
  if (t == DType::f32) return f.template operator()<float>();
  KAVA_CHECK(t == DType::bf16, "the cuda backend stores bf16 or f32, not {}", name_of(t));
  f.template operator()<bf16>();
}

}  // namespace kava
