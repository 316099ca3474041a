// A backend that computes nothing: a real step run on it touches no memory but its arena's books, which tell the memory the step needs.
#include <cstring>

#include "engine/device/ops.h"

namespace kava {

namespace {

class NullOps final : public Ops {
 public:
  std::string name() const override { return "null"; }
  void* allocate(int64_t bytes) override {
    // Distinct addresses in a range that no process maps.
    next_ += (bytes + 63) / 64 * 64;
    return reinterpret_cast<void*>(next_ - (bytes + 63) / 64 * 64);
  }
  void download(void* host, const Tensor& x) override { std::memset(host, 0, static_cast<std::size_t>(x.count() * size_of(x.dtype))); }
  void release(void*, int64_t) override {}
  AddressRange reserve() override {
    constexpr int64_t kRange = int64_t{1} << 52;
    return {static_cast<char*>(allocate(kRange)), kRange};
  }
  void commit(void*, int64_t) override {}
  void unreserve(const AddressRange& range, int64_t) override {
    // The next arena may have them, so that they never run out.
    if (reinterpret_cast<int64_t>(range.begin) + range.bytes == next_) next_ -= range.bytes;
  }
  void upload(const Tensor&, const void*) override {}
  void fill(const Tensor&, double) override {}
  void copy(const Tensor&, const Tensor&) override {}
  void add(const Tensor&, const Tensor&) override {}
  void gather_rows(const Tensor&, const Tensor&, const Tensor&) override {}
  void scatter_add_rows(const Tensor&, const Tensor&, const Tensor&) override {}
  void embed_fwd(const Tensor&, const Tensor&, const Tensor&, const Tensor&) override {}
  void embed_bwd(const Tensor&, const Tensor&, const Tensor&, const Tensor&) override {}
  void add_rms_norm_fwd(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double) override {}
  void rms_norm_bwd(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&) override {}
  void linear_prepare(const LinearGroup&) override {}
  void lora_fwd(Arena&, const Tensor&, const LinearGroup&, const Dropout&, Reads) override {}
  void linear_group_fwd(Arena&, const Tensor&, const Tensor&, const LinearGroup&, Reads) override {}
  void linear_group_bwd_input(Arena&, const Tensor&, const Tensor&, const Tensor&, const LinearGroup&, const Dropout&) override {}
  void linear_group_bwd_params(Arena&, const LinearGroupGrad&, const Tensor&, const Tensor&, const Tensor&, const LinearGroup&,
                               const Dropout&) override {}
  void rope(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, bool) override {}
  void attention_fwd(Arena&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Segments&, int64_t, int64_t,
                     double) override {}
  void attention_bwd(Arena&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                     const Tensor&, const Tensor&, const Segments&, int64_t, int64_t, double) override {}
  void swiglu_fwd(const Tensor&, const Tensor&, const Tensor&) override {}
  void swiglu_bwd(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&) override {}
  void gelu_fwd(const Tensor&, const Tensor&) override {}
  void gelu_bwd(const Tensor&, const Tensor&, const Tensor&) override {}
  void layer_norm_fwd(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double) override {}
  void layer_norm_bwd(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                      const Tensor&) override {}
  void head_cross_entropy(Arena&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                          const Tensor&, double) override {}
  void rkv_select(Arena&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                  const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const RkvOptions&) override {}
  void moments(const Tensor&, const Tensor&, const Tensor&) override {}
  void inverse_std(const Tensor&, const Tensor&) override {}
  void distill(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, Distance, double,
               double) override {}
  void sum_squares(const Tensor&, const Tensor&) override {}
  void adamw(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const AdamwOptions&) override {}

 private:
  int64_t next_ = int64_t{1} << 62;
};

}  // namespace

std::unique_ptr<Ops> make_null_ops() { return std::make_unique<NullOps>(); }

}  // namespace kava
