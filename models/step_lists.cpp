#include "models/step_lists.h"

namespace kava {

namespace {
constexpr int64_t kListAlign = 16;  // every list begins where a vector may be loaded
}

void IndexBlock::add(Tensor& to, std::span<const int32_t> list, int64_t rows, int64_t cols) {
  KAVA_CHECK(std::ssize(list) == rows * cols, "a list of {} as [{}, {}]", list.size(), rows, cols);
  places_.push_back({&to, std::ssize(all_), rows, cols});
  all_.insert(all_.end(), list.begin(), list.end());
  all_.resize((all_.size() + kListAlign - 1) / kListAlign * kListAlign);
}

void IndexBlock::send(Ops& ops, Arena& arena) {
  const Tensor block = arena.alloc(DType::i32, 1, std::ssize(all_));
  ops.upload(block, all_.data());
  for (const Place& p : places_) *p.to = block.col_range(p.begin, p.begin + p.rows * p.cols).reshape(p.rows, p.cols);
  places_.clear();
}

Tensor upload_indices(Ops& ops, Arena& arena, std::span<const int32_t> host) {
  Tensor t;
  IndexBlock block;
  block.add(t, host);
  block.send(ops, arena);
  return t;
}

}  // namespace kava
