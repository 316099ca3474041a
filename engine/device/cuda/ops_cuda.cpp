#include "engine/device/cuda/ops_cuda.h"

#include <algorithm>
#include <vector>

#include "engine/cli.h"
#include "engine/device/cpu/threads.h"
#include "kernels/gpu_error.h"

namespace kava {

CudaOps::CudaOps(int device, bool dry, int threads) : Ops(dry), device_(device), threads_(threads) {
  if (dry) return;
  runtime_ = std::make_unique<GpuRuntime>(device);
  require_capability(runtime_->info());
  first_free_ = least_free_ = runtime_->free_bytes();
  graphs_ = std::make_unique<PassGraphs>(*runtime_);
  factors_ = {runtime_->allocate(sizeof(AdamwFactors)), Release{runtime_.get()}};
  std::string why;
  lt_ = MatmulLt::open(*runtime_, why);
  try {
    if (lt_) lt_fault_ = fault_of_lt();
  } catch (const GpuError& e) {
    lt_fault_ = fmt::format("cuBLASLt's products fail: the own kernels make all products: {}", e.what());
  }
  if (!lt_fault_.empty()) lt_.reset();
  if (!lt_ && !gpu_is_emulated()) print_note(name() + ": " + (lt_fault_.empty() ? why : lt_fault_));
}
CudaOps::~CudaOps() = default;

int64_t CudaOps::taken_bytes() {
  if (runtime_) least_free_ = std::min(least_free_, runtime_->free_bytes());
  return first_free_ - least_free_;
}

void* CudaOps::do_allocate(int64_t bytes) { return runtime_->allocate(bytes); }
void CudaOps::do_release(void* data, int64_t) { runtime_->release(data); }
AddressRange CudaOps::do_reserve() { return runtime_->reserve(); }
void CudaOps::do_commit(void* data, int64_t bytes) {
  if (runtime_->capturing()) throw NotRecordable();
  runtime_->commit(data, bytes);
}
void CudaOps::do_unreserve(const AddressRange& range, int64_t committed) { runtime_->unreserve(range, committed); }
void CudaOps::do_on_host(int64_t tasks, const std::function<void(int64_t)>& body) {
  if (!host_) host_ = std::make_unique<Threads>(threads_);
  host_->run(tasks, body);
}
void CudaOps::do_upload(const Tensor& y, const void* host) {
  const int64_t row = y.cols * size_of(y.dtype);
  if (y.contiguous()) return runtime_->write(y.data, host, y.rows * row);
  for (int64_t r = 0; r < y.rows; ++r) runtime_->write(y.row_range(r, r + 1).data, static_cast<const char*>(host) + r * row, row);
}
void CudaOps::do_download(void* host, const Tensor& x) {
  const int64_t row = x.cols * size_of(x.dtype);
  if (x.contiguous()) return runtime_->read(host, x.data, x.rows * row);
  for (int64_t r = 0; r < x.rows; ++r) runtime_->read(static_cast<char*>(host) + r * row, x.row_range(r, r + 1).data, row);
}

void CudaOps::product(const Tensor& c, const Tensor& a, bool transpose_a, const Tensor& b, bool transpose_b, bool add) {
  KAVA_CHECK(!(transpose_a && transpose_b), "a product of two transposed operands");
  on_storage(a.dtype, [&]<class T>() {
    Gemm<T> g;
    if (add) g.add = rows_of<float>(c);
    else if (c.dtype == a.dtype) g.set = rows_of<T>(c);
    else g.set_sum = rows_of<float>(c);
    g.m = static_cast<int>(c.rows), g.n = static_cast<int>(c.cols);
    g.then(rows_of<const T>(a), rows_of<const T>(b), static_cast<int>(transpose_a ? a.rows : a.cols));
    if (transpose_a) multiply<GemmForm::tn>(g);
    else if (transpose_b) multiply<GemmForm::nt>(g);
    else multiply<GemmForm::nn>(g);
  });
}

std::string CudaOps::fault_of_lt() {
  constexpr int kM = 192, kN = 256, kK = 384, kMost = kN * kK;
  struct Memory {
    GpuRuntime& runtime;
    void* data = runtime.allocate(kMost * 4);
    ~Memory() { runtime.release(data); }
  } a{*runtime_}, b{*runtime_}, bias{*runtime_}, own{*runtime_}, other{*runtime_};
  std::vector<bf16> numbers(kMost);
  for (int i = 0; i < kMost; ++i) numbers[static_cast<std::size_t>(i)] = to_bf16(static_cast<float>((i * 7 + i / 11) % 5 - 2));
  for (const Memory* m : {&a, &b, &bias}) runtime_->write(m->data, numbers.data(), kMost * 2);
  constexpr const char* kOutputs[] = {"bf16", "f32", "add", "onto bf16"};
  int made = 0;
  std::string fault;
  auto compare = [&]<GemmForm form>(const char* name, int output) {
    constexpr int64_t lda = form == GemmForm::tn ? kM : kK, ldb = form == GemmForm::nt ? kK : kN;
    std::vector<char> bytes[2];
    for (const bool by_lt : {false, true}) {
      void* c = (by_lt ? other : own).data;
      kava::fill_rows(stream(), Rows<float>{static_cast<float*>(c), kN}, 0.f, kM, kN);
      Gemm<bf16> g;
      if (output == 0) g.set = {static_cast<bf16*>(c), kN}, g.bias = form == GemmForm::nt ? static_cast<const bf16*>(bias.data) : nullptr;
      if (output == 1) g.set_sum = {static_cast<float*>(c), kN};
      if (output == 2) g.add = {static_cast<float*>(c), kN}, g.scaled = 1, g.factor = 0.25f;
      // Onto its own bf16: twice the product, of so few terms that neither is rounded.
      if (output == 3) g.set = {static_cast<bf16*>(c), kN}, g.scaled = 1, g.factor = by_lt ? 1.f : 2.f;
      g.m = kM, g.n = kN;
      g.then({static_cast<const bf16*>(a.data), lda}, {static_cast<const bf16*>(b.data), ldb}, output == 3 ? kK / 6 : kK);
      for (int time = 0; time < (output == 2 || (output == 3 && by_lt) ? 2 : 1); ++time) {
        if (!by_lt) gemm<form>(stream(), g);
        else if (!lt_->run(form, g, true, output == 3)) return;  // as it may a product of a step, which the own kernel makes then
      }
      bytes[by_lt].resize(kM * kN * 4);
      runtime_->read(bytes[by_lt].data(), c, kM * kN * 4);
    }
    ++made;
    if (fault.empty() && bytes[0] != bytes[1])
      fault = fmt::format("cuBLASLt's product {} to {} is not the own kernel's: they make all products", name, kOutputs[output]);
  };
  for (int output = 0; output < 3; ++output) {
    compare.operator()<GemmForm::nt>("nt", output);
    compare.operator()<GemmForm::nn>("nn", output);
    compare.operator()<GemmForm::tn>("tn", output);
  }
  compare.operator()<GemmForm::nn>("nn", 3);  // multiply_onto asks for no other form
  return made > 0 ? fault : "cuBLASLt makes none of the products that are tried: the own kernels make all";
}

}  // namespace kava
