#include "models/params.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/device/host.h"

namespace kava {

namespace {
constexpr int64_t kAlign = 16;  // elements: a parameter starts on a 64-byte boundary in f32
int64_t aligned(int64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }
}  // namespace

void ParameterStore::add(std::string name, int64_t rows, int64_t cols, bool vector, bool decay, bool joined, bool transposed) {
  KAVA_CHECK(index_.emplace(name, parameters_.size()).second, "parameter {} is there twice", name);
  Parameter p;
  p.name = std::move(name), p.rows = rows, p.cols = cols, p.vector = vector, p.decay = decay, p.joined = joined;
  p.transposed = transposed;
  parameters_.push_back(std::move(p));
}

Buffer ParameterStore::zeroed(DType dtype) {
  Buffer b(ops_, dtype, 1, size_);
  if (size_ > 0) ops_.fill(b.tensor(), 0);
  return b;
}

void ParameterStore::allocate() {
  for (bool decay : {true, false}) {
    for (Parameter& p : parameters_) {
      if (p.decay != decay) continue;
      if (!p.joined) size_ = aligned(size_);
      p.offset = size_;
      size_ += p.rows * p.cols;
    }
    size_ = aligned(size_);
    if (decay) decayed_ = size_;
  }
  const DType sum = sum_type(storage_);
  if (use_ == ModelUse::inference) {
    value_ = Buffer(ops_, storage_, 1, size_);
  } else {
    value_ = zeroed(sum), grad_ = zeroed(sum), m_ = zeroed(sum), v_ = zeroed(sum);
    if (storage_ != sum) half_ = zeroed(storage_);
    updates_ = Buffer(ops_, DType::i32, 1, 1);
    ops_.fill(updates_.tensor(), 0);
  }
  for (Parameter& p : parameters_) {
    p.value = part(value(), p);
    if (use_ == ModelUse::training) p.grad = part(grad(), p);
    p.compute = half_.tensor() ? part(half_.tensor(), p) : p.value;
  }
}

Tensor ParameterStore::part(const Tensor& flat, const Parameter& p) const {
  return flat.col_range(p.offset, p.offset + p.rows * p.cols).row_range(0, 1).reshape(p.rows, p.cols);
}

int64_t ParameterStore::bytes() const {
  int64_t sum = 0;
  for (const Buffer* b : {&value_, &grad_, &m_, &v_, &half_, &updates_}) sum += b->tensor().count() * size_of(b->tensor().dtype);
  return sum;
}

const Parameter* ParameterStore::find(const std::string& name) const {
  auto it = index_.find(name);
  return it == index_.end() ? nullptr : &parameters_[it->second];
}

const Parameter& ParameterStore::at(const std::string& name) const {
  const Parameter* p = find(name);
  KAVA_CHECK(p, "no parameter {}", name);
  return *p;
}

int64_t ParameterStore::count() const {
  int64_t n = 0;
  for (const Parameter& p : parameters_) n += p.rows * p.cols;
  return n;
}

void ParameterStore::set(const std::string& name, const std::vector<double>& host) {
  const Parameter& p = at(name);
  KAVA_CHECK(static_cast<int64_t>(host.size()) == p.rows * p.cols, "{} values for {}", host.size(), name);
  from_host(ops_, p.value, host);
}

std::vector<double> ParameterStore::get(const Tensor& x) const { return to_host(ops_, x); }

std::vector<double> ParameterStore::get_as_stored(const Parameter& p, const Tensor& x) const {
  std::vector<double> values(static_cast<std::size_t>(p.rows * p.cols));
  download_as_stored(p, x, values.data());
  return values;
}

template <class T>
void ParameterStore::download_as_stored(const Parameter& p, const Tensor& x, T* out) const {
  if (!p.transposed && x.dtype == DTypeOf<T>::value) return ops_.download(out, x);
  const int64_t at_once = std::max<int64_t>(1, (int64_t{1} << 16) / std::max<int64_t>(x.cols, 1));
  for (int64_t first = 0; first < x.rows; first += at_once) {
    const int64_t last = std::min(x.rows, first + at_once);
    const std::vector<double> some = get(x.row_range(first, last));
    for (int64_t r = first; r < last; ++r)
      for (int64_t c = 0; c < x.cols; ++c)
        out[p.transposed ? c * x.rows + r : r * x.cols + c] = static_cast<T>(some[static_cast<std::size_t>((r - first) * x.cols + c)]);
  }
}
template void ParameterStore::download_as_stored(const Parameter& p, const Tensor& x, float* out) const;
template void ParameterStore::download_as_stored(const Parameter& p, const Tensor& x, double* out) const;

void ParameterStore::refresh() {
  if (half_.tensor() && size_ > 0) ops_.copy(half_.tensor(), value());
  prepare_groups();
}

void ParameterStore::prepare_groups() {
  for (const LinearGroup& group : groups_)
    if (group.ranks() > 0) ops_.linear_prepare(group);
}

void ParameterStore::zero_grad() {
  if (size_ > 0) ops_.fill(grad(), 0);
}

void ParameterStore::set_updates(int64_t count) {
  KAVA_CHECK(count >= 0 && count < std::numeric_limits<int32_t>::max(), "{} updates", count);
  ops_.fill(updates_.tensor(), static_cast<double>(count));
}

std::string ParameterStore::find_not_finite(Arena& arena) {
  if (size_ == 0) return "";
  // Of nearly all checkpoints one sum on the device is all that is asked.
  const ArenaScope scope(arena);
  const Tensor sum = arena.alloc(DType::f64, 1, 1);
  ops_.sum_squares(arena, sum, value());
  double square = 0;
  ops_.download(&square, sum);
  if (std::isfinite(square)) return "";
  for (const Parameter& p : parameters_)
    for (double x : get(p.value))
      if (!std::isfinite(x)) return p.name;
  return "";
}

void ParameterStore::reset_moments() {
  if (size_ > 0) ops_.fill(m(), 0), ops_.fill(v(), 0);
  set_updates(0);
}

void ParameterStore::update(Arena& arena, AdamwOptions options, const Tensor& grad_square, const Tensor& losses) {
  KAVA_CHECK(use_ == ModelUse::training, "no gradients are kept");
  ops_.sum_squares(arena, grad_square, grad());
  ops_.count_update(updates_.tensor(), grad_square, losses);
  for (bool decay : {true, false}) {
    const int64_t begin = decay ? 0 : decayed_, end = decay ? decayed_ : size_;
    if (begin == end) continue;
    auto cut = [&](const Tensor& t) { return t ? t.col_range(begin, end) : Tensor{}; };
    AdamwOptions o = options;
    if (!decay) o.weight_decay = 0;
    ops_.adamw(cut(value()), cut(m()), cut(v()), cut(half_.tensor()), cut(grad()), grad_square, updates_.tensor(), o);
  }
  prepare_groups();
}

}  // namespace kava
