// The cpu backend: plain loops over rows, and matrix products by oneDNN. Its definitions stand in ops_*.cpp, by the op.
#pragma once
#include <bit>

#include "engine/device/cpu/matmul.h"
#include "engine/device/cpu/threads.h"
#include "engine/device/ops.h"

namespace kava {

class CpuOps final : public Ops {
 public:
  explicit CpuOps(int threads) : threads_(threads), matmul_(threads_) {}
  std::string name() const override { return "cpu"; }

  void* allocate(int64_t bytes) override;
  void release(void* data, int64_t bytes) override;
  AddressRange reserve() override;
  void commit(void* data, int64_t bytes) override;
  void unreserve(const AddressRange& range, int64_t committed) override;
  void in_use(void* data, int64_t bytes, bool used) override;
  void upload(const Tensor& y, const void* host) override;
  void download(void* host, const Tensor& x) override;

  void fill(const Tensor& y, double value) override;
  void copy(const Tensor& y, const Tensor& x) override;
  void add(const Tensor& y, const Tensor& x) override;
  void gather_rows(const Tensor& y, const Tensor& x, const Tensor& rows) override;
  void scatter_add_rows(const Tensor& y, const Tensor& x, const Tensor& rows) override;
  void embed_fwd(const Tensor& x, const Tensor& table, const Tensor& extra, const Tensor& ids) override;
  void embed_bwd(const Tensor& dtable, const Tensor& dextra, const Tensor& dx, const Tensor& ids) override;

  void add_rms_norm_fwd(const Tensor& y, const Tensor& sum, const Tensor& rstd, const Tensor& a, const Tensor& b, const Tensor& w,
                        double eps) override;
  void rms_norm_bwd(const Tensor& dx, const Tensor& dw, const Tensor& dy, const Tensor& x, const Tensor& rstd, const Tensor& w) override;
  void linear_prepare(const LinearGroup& group) override;
  void lora_fwd(Arena& arena, const Tensor& xx, const LinearGroup& group, const Dropout& dropout, Reads reads) override;
  void linear_group_fwd(Arena& arena, const Tensor& y, const Tensor& xx, const LinearGroup& group, Reads reads) override;
  void linear_group_bwd_input(Arena& arena, const Tensor& dx, const Tensor& dxa, const Tensor& dy, const LinearGroup& group,
                              const Dropout& dropout) override;
  void linear_group_bwd_params(Arena& arena, const LinearGroupGrad& grad, const Tensor& dy, const Tensor& dxa, const Tensor& xx,
                               const LinearGroup& group, const Dropout& dropout) override;
  void rope(const Tensor& x, const Tensor& positions, const Tensor& cosine, const Tensor& sine, int64_t head_dim, bool inverse) override;
  void attention_fwd(Arena& arena, const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                     const Segments& segments, int64_t heads, int64_t kv_heads, double scale) override;
  void attention_bwd(Arena& arena, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dout, const Tensor& o,
                     const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments, int64_t heads,
                     int64_t kv_heads, double scale) override;
  void swiglu_fwd(const Tensor& y, const Tensor& gate, const Tensor& up) override;
  void swiglu_bwd(const Tensor& dgate, const Tensor& dup, const Tensor& dy, const Tensor& gate, const Tensor& up) override;
  void gelu_fwd(const Tensor& y, const Tensor& x) override;
  void gelu_bwd(const Tensor& dx, const Tensor& dy, const Tensor& x) override;
  void layer_norm_fwd(const Tensor& y, const Tensor& mean, const Tensor& rstd, const Tensor& x, const Tensor& w, const Tensor& b,
                      double eps) override;
  void layer_norm_bwd(const Tensor& dx, const Tensor& dw, const Tensor& db, const Tensor& dy, const Tensor& x, const Tensor& mean,
                      const Tensor& rstd, const Tensor& w) override;

  void head_cross_entropy(Arena& arena, const Tensor& nll, const Tensor& dh, const Tensor& dw, const Tensor& logits, const Tensor& best,
                          const Tensor& h, const Tensor& w, const Tensor& targets, double weight) override;
  void rkv_select(Arena& arena, const Tensor& target_k, const Tensor& target_v, const Tensor& kept, const Tensor& importance,
                  const Tensor& redundancy, const Tensor& score, const Tensor& q, const Tensor& q_offsets, const Tensor& k,
                  const Tensor& k_offsets, const Tensor& match_k, const Tensor& v, const RkvOptions& options) override;
  void moments(const Tensor& moments, const Tensor& x, const Tensor& valid) override;
  void inverse_std(const Tensor& inverse, const Tensor& moments) override;
  void distill(const Tensor& loss, const Tensor& dx, const Tensor& x, const Tensor& target, const Tensor& valid, const Tensor& inverse,
               Distance distance, double factor, double weight) override;

  void sum_squares(const Tensor& out, const Tensor& x) override;
  void adamw(const Tensor& value, const Tensor& m, const Tensor& v, const Tensor& half, const Tensor& grad, const Tensor& grad_square,
             const AdamwOptions& options) override;

 private:
  void best_of_head(Arena& arena, const Tensor& best, const Tensor& h, const Tensor& w);
  /// Counts memory given out, and refuses what the machine will not have when it is touched.
  void account(int64_t bytes);

  Threads threads_;
  Matmul matmul_;
  int64_t held_ = 0;       // bytes given out
  int64_t unchecked_ = 0;  // of them, since the machine was last asked
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
