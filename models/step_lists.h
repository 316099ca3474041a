// The index lists of a forward, laid out on the host in one block before anything runs and sent to the device at once.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "engine/device/ops.h"

namespace kava {

class IndexBlock {
 public:
  /// `to` is the list on the device, i32 [rows, cols], once send() was called. It must not move until then.
  void add(Tensor& to, std::span<const int32_t> list, int64_t rows, int64_t cols);
  void add(Tensor& to, std::span<const int32_t> list) { add(to, list, 1, std::ssize(list)); }

  void send(Ops& ops, Arena& arena);

 private:
  struct Place {
    Tensor* to;
    int64_t begin, rows, cols;
  };
  std::vector<int32_t> all_;
  std::vector<Place> places_;
};

/// One list, i32 [1, n].
Tensor upload_indices(Ops& ops, Arena& arena, std::span<const int32_t> host);

}  // namespace kava
