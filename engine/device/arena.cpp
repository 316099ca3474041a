#include "engine/device/arena.h"

#include <algorithm>

#include "engine/device/ops.h"

namespace kava {

namespace {

constexpr int64_t kAlign = 64;

int64_t rounded_up(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

[[noreturn]] void too_large(double bytes, int64_t most) {
  throw Error(Exit::preflight, "memory", fmt::format("a step takes {:.0f} MiB, the device has {}", bytes / 0x1p20, most >> 20),
              "use a smaller batch or train.micro_batch, or a smaller model");
}

}  // namespace

Arena::~Arena() {
  if (range_.begin) ops_.unreserve(range_, committed_);
}

Tensor Arena::alloc(DType dtype, int64_t rows, int64_t cols) {
  KAVA_CHECK(rows >= 0 && cols >= 0, "a tensor of [{}, {}]", rows, cols);
  if (!range_.begin) range_ = ops_.reserve();
  const double asked = static_cast<double>(rows) * static_cast<double>(cols) * static_cast<double>(size_of(dtype));
  if (asked > static_cast<double>(range_.bytes)) too_large(static_cast<double>(used_) + asked, range_.bytes);
  const int64_t bytes = std::max<int64_t>(rows * cols * size_of(dtype), 1), end = used_ + rounded_up(bytes, kAlign);
  if (end > committed_) grow(end);
  char* data = range_.begin + used_;
  ops_.in_use(data, bytes, true);
  used_ = end;
  peak_ = std::max(peak_, used_);
  return {data, dtype, rows, cols, cols};
}

void Arena::grow(int64_t bytes) {
  const int64_t end = rounded_up(bytes, kPiece);
  if (end > range_.bytes) too_large(static_cast<double>(bytes), range_.bytes);
  ops_.commit(range_.begin + committed_, end - committed_);
  ops_.in_use(range_.begin + committed_, end - committed_, false);
  committed_ = end;
}

void Arena::release(Mark m) {
  KAVA_CHECK(m.used <= used_, "a mark at {} of {} bytes", m.used, used_);
  if (used_ > m.used) ops_.in_use(range_.begin + m.used, used_ - m.used, false);
  used_ = m.used;
}

}  // namespace kava
