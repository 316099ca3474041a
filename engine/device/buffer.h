// Memory of a backend with one owner.
#pragma once
#include <utility>

#include "engine/device/ops.h"

namespace kava {

class Buffer {
 public:
  Buffer() = default;
  /// Uninitialised. The backend must outlive it.
  Buffer(Ops& ops, DType dtype, int64_t rows, int64_t cols)
      : ops_(&ops), tensor_{ops.allocate(rows * cols * size_of(dtype)), dtype, rows, cols, cols} {}
  ~Buffer() {
    if (ops_) ops_->release(tensor_.data, tensor_.count() * size_of(tensor_.dtype));
  }
  Buffer(Buffer&& from) noexcept : ops_(std::exchange(from.ops_, nullptr)), tensor_(std::exchange(from.tensor_, {})) {}
  Buffer& operator=(Buffer&& from) noexcept {
    std::swap(ops_, from.ops_), std::swap(tensor_, from.tensor_);
    return *this;
  }

  /// The whole of it; empty where nothing was allocated.
  const Tensor& tensor() const { return tensor_; }

 private:
  Ops* ops_ = nullptr;
  Tensor tensor_;
};

}  // namespace kava
