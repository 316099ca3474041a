#include "engine/device/cuda/ops_cuda.h"

namespace kava {

CudaOps::CudaOps(int device, bool dry) : Ops(dry), device_(device) {
  if (dry) return;
  runtime_ = std::make_unique<GpuRuntime>(device);
  factors_ = runtime_->allocate(sizeof(AdamwFactors));
}
CudaOps::~CudaOps() {
  if (factors_) runtime_->release(factors_);
}

void* CudaOps::do_allocate(int64_t bytes) { return runtime_->allocate(bytes); }
void CudaOps::do_release(void* data, int64_t) { runtime_->release(data); }
AddressRange CudaOps::do_reserve() { return runtime_->reserve(); }
void CudaOps::do_commit(void* data, int64_t bytes) { runtime_->commit(data, bytes); }
void CudaOps::do_unreserve(const AddressRange& range, int64_t committed) { runtime_->unreserve(range, committed); }
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
    GemmBatch<T> batch;
    Gemm<T>& g = batch.gemms[batch.count++];
    if (add) g.add = rows_of<float>(c);
    else if (c.dtype == a.dtype) g.set = rows_of<T>(c);
    else g.set_sum = rows_of<float>(c);
    g.m = static_cast<int>(c.rows), g.n = static_cast<int>(c.cols);
    g.then(rows_of<const T>(a), rows_of<const T>(b), static_cast<int>(transpose_a ? a.rows : a.cols));
    if (transpose_a) gemm<GemmForm::tn>(stream(), batch);
    else if (transpose_b) gemm<GemmForm::nt>(stream(), batch);
    else gemm<GemmForm::nn>(stream(), batch);
  });
}

}  // namespace kava
