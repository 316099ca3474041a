// The cpu backend: plain loops over rows, and matrix products by oneDNN. Its definitions stand in ops_*.cpp, by the op.
#pragma once
#include <bit>

#include "engine/device/cpu/matmul.h"
#include "engine/device/cpu/threads.h"
#include "engine/device/ops.h"

namespace kava {

class CpuOps final : public Ops {
 public:
  CpuOps(int threads, bool dry) : Ops(dry), threads_(dry ? 1 : threads), matmul_(threads_), workers_(threads) {}
  std::string name() const override { return "cpu"; }
  std::unique_ptr<Ops> dry_twin() const override { return make_cpu_ops(workers_, true); }

 private:
  void* do_allocate(int64_t bytes) override;
  void do_release(void* data, int64_t bytes) override;
  AddressRange do_reserve() override;
  void do_commit(void* data, int64_t bytes) override;
  void do_unreserve(const AddressRange& range, int64_t committed) override;
  void do_in_use(void* data, int64_t bytes, bool used) override;
  void do_on_host(int64_t tasks, const std::function<void(int64_t)>& body) override { threads_.run(tasks, body); }
  void do_upload(const Tensor& y, const void* host) override;
  void do_download(void* host, const Tensor& x) override;
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

  /// Refuses what the machine will not have when it is touched.
  void require_available(int64_t bytes);

  Threads threads_;
  Matmul matmul_;
  int64_t unchecked_ = 0;  // bytes given out since the machine was last asked
  int workers_;            // threads that a task may run on, also where a dry backend has not started them
};

/// Rows that one task of a row-wise loop takes.
constexpr int64_t kRowBlock = 32;

/// exp in single precision without branches, so that a loop over it becomes vector code: below 1.1 ulp for normal and subnormal
/// results, 0 below -104, infinity above the largest float, and a NaN stays a NaN.
inline float fast_exp(float x) {
  x = x < -104.f ? -104.f : x > 89.f ? 89.f : x;
  // Adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits.
  constexpr float kRound = 0x1.8p23f;
  const float shifted = x * 0x1.715476p0f + kRound;
  const int32_t e = static_cast<int32_t>(std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(kRound));
  const float n = shifted - kRound;
  // ln 2 in two parts, the first exact when multiplied by n.
  const float r = (x - n * 0x1.63p-1f) - n * -0x1.bd0106p-13f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  // Two steps keep the exponents in range: 2^e may be subnormal, or 2^128 with a p below 1.
  const int32_t half = e >> 1;
  const float s1 = std::bit_cast<float>((half + 127) << 23), s2 = std::bit_cast<float>((e - half + 127) << 23);
  return p * s1 * s2;
}
inline double fast_exp(double x) { return __builtin_exp(x); }

}  // namespace kava
