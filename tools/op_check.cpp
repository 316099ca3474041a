#include "tools/op_check.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace kava {

namespace {

// All ones in the exponent of NaN and infinity.
template <class Bits>
int64_t first_with(const std::vector<char>& bytes, int64_t n, Bits exponent) {
  for (int64_t i = 0; i < n; ++i) {
    Bits value;
    std::memcpy(&value, bytes.data() + i * static_cast<int64_t>(sizeof(Bits)), sizeof(Bits));
    if ((value & exponent) == exponent) return i;
  }
  return -1;
}

}  // namespace

int64_t OpCheck::first_not_finite(const Tensor& x) {
  if (!x || x.dtype == DType::i32 || x.count() == 0) return -1;
  host_.resize(std::max(host_.size(), static_cast<std::size_t>(x.count() * size_of(x.dtype))));
  ops_.download(host_.data(), x);
  switch (x.dtype) {
    case DType::bf16:
      return first_with<uint16_t>(host_, x.count(), 0x7f80u);
    case DType::f64:
      return first_with<uint64_t>(host_, x.count(), 0x7ff0000000000000u);
    default:
      return first_with<uint32_t>(host_, x.count(), 0x7f800000u);
  }
}

void OpCheck::after(const OpCall& call) {
  if (looking_ || !found_.empty()) return;
  looking_ = true;
  ++calls_;
  for (const Tensor& y : call.outputs) {
    const int64_t at = first_not_finite(y);
    if (at < 0) continue;
    const bool given = std::ranges::any_of(call.inputs, [&](const Tensor& x) { return x.data != y.data && first_not_finite(x) >= 0; });
    found_ =
        fmt::format("{} (op {} of the step) wrote a value that is not finite, in row {}, column {} of {} [{}, {}]{}", call.name, calls_,
                    at / y.cols, at % y.cols, name_of(y.dtype), y.rows, y.cols, given ? ", from an operand that was not finite" : "");
    break;
  }
  looking_ = false;
}

std::string OpCheck::take() {
  calls_ = 0;
  return std::exchange(found_, "");
}

}  // namespace kava
