#include "engine/device/arena.h"

#include <algorithm>

#include "engine/device/ops.h"

namespace kava {

namespace {
constexpr int64_t kAlign = 64;
constexpr int64_t kChunk = int64_t{64} << 20;
}  // namespace

Arena::~Arena() {
  for (Chunk& c : chunks_) ops_.release(c.data, c.bytes);
}

Tensor Arena::alloc(DType dtype, int64_t rows, int64_t cols) {
  KAVA_CHECK(rows >= 0 && cols >= 0, "a tensor of [{}, {}]", rows, cols);
  int64_t bytes = (std::max<int64_t>(rows * cols * size_of(dtype), 1) + kAlign - 1) / kAlign * kAlign;
  while (chunk_ < chunks_.size() && used_ + bytes > chunks_[chunk_].bytes) ++chunk_, used_ = 0;
  if (chunk_ == chunks_.size()) {
    int64_t size = std::max(bytes, kChunk);
    chunks_.push_back({ops_.allocate(size), size});
    used_ = 0;
  }
  void* data = static_cast<char*>(chunks_[chunk_].data) + used_;
  used_ += bytes;
  total_ += bytes;
  peak_ = std::max(peak_, total_);
  return {data, dtype, rows, cols, cols};
}

}  // namespace kava
