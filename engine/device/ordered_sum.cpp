#include "engine/device/ordered_sum.h"

#include <algorithm>

#include "engine/error.h"

namespace kava {

namespace {
constexpr int64_t kPlaces = 8;               // pieces that may be under way
constexpr int64_t kRoom = int64_t{1} << 22;  // elements of all of them and all ranks
int64_t piece_elements(int64_t count, int ranks) { return std::clamp<int64_t>(kRoom / kPlaces / ranks, 1, std::max<int64_t>(1, count)); }
}  // namespace

Tensor OrderedSum::room(Arena& arena, DType dtype, int64_t count, int ranks) {
  return arena.alloc(dtype, kPlaces, piece_elements(count, ranks) * ranks);
}

OrderedSum::OrderedSum(Comm& comm, Ops& ops, Arena& arena, const Tensor& total, const Tensor& part, const char* what)
    : comm_(comm),
      ops_(ops),
      total_(total),
      part_(part),
      room_(comm.alone() ? Tensor() : room(arena, part.dtype, part.cols, comm.size())),
      what_(what) {
  KAVA_CHECK(total.rows == 1 && part.rows == 1 && total.cols == part.cols, "{} elements for {}", part.cols, total.cols);
  if (ops.name() != "cpu") host_.resize(static_cast<std::size_t>(room_.count() * size_of(room_.dtype)));
}

void OrderedSum::begin(int parts, bool fresh) {
  KAVA_CHECK(1 <= parts && parts <= comm_.size() && under_way_.empty(), "{} parts of {} ranks", parts, comm_.size());
  parts_ = parts, fresh_ = fresh;
}

void OrderedSum::send(const Tensor& elements) {
  const int64_t first = (static_cast<char*>(elements.data) - static_cast<char*>(part_.data)) / size_of(part_.dtype);
  KAVA_CHECK(0 <= first && first + elements.cols <= part_.cols && elements.rows == 1, "elements of another part");
  if (comm_.alone()) {
    const Tensor to = total_.col_range(first, first + elements.cols);
    return fresh_ ? ops_.copy(to, elements) : ops_.add(to, elements);
  }
  const int64_t most = room_.cols / comm_.size();
  for (int64_t at = 0; at < elements.cols; at += most) send(first + at, first + std::min(elements.cols, at + most));
}

void OrderedSum::send(int64_t begin, int64_t end) {
  if (std::ssize(under_way_) == room_.rows) {
    comm_.end_gather(true);
    add_first();
  }
  const int64_t place = next_++ % room_.rows, bytes = (end - begin) * size_of(part_.dtype);
  const Tensor all{room_.row_range(place, place + 1).data, part_.dtype, comm_.size(), end - begin, end - begin};
  char* host = host_.empty() ? static_cast<char*>(all.data) : host_.data() + place * room_.cols * size_of(room_.dtype);
  ops_.download(host + comm_.rank() * bytes, part_.col_range(begin, end));
  comm_.begin_gather(host, bytes, what_);
  under_way_.push_back({begin, end, all, host});
  advance();
}

void OrderedSum::advance() {
  while (!under_way_.empty() && comm_.end_gather(false)) add_first();
}

void OrderedSum::finish() {
  while (!under_way_.empty()) {
    comm_.end_gather(true);
    add_first();
  }
}

void OrderedSum::add_first() {
  const Piece p = under_way_.front();
  under_way_.pop_front();
  if (!host_.empty()) ops_.upload(p.all, p.host);
  const Tensor to = total_.col_range(p.begin, p.end);
  for (int r = 0; r < parts_; ++r) {
    const Tensor from = p.all.row_range(r, r + 1);
    r == 0 && fresh_ ? ops_.copy(to, from) : ops_.add(to, from);
  }
}

}  // namespace kava
