#include "models/params.h"

#include <algorithm>
#include <limits>

#include "engine/device/host.h"

namespace kava {

namespace {
constexpr int64_t kAlign = 16;  // elements: a parameter starts on a 64-byte boundary in f32
int64_t aligned(int64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }
}  // namespace

ParameterStore::~ParameterStore() {
  for (auto [data, bytes] : owned_) ops_.release(data, bytes);
}

void ParameterStore::add(std::string name, int64_t rows, int64_t cols, bool vector, bool decay, bool joined) {
  KAVA_CHECK(index_.emplace(name, parameters_.size()).second, "parameter {} is there twice", name);
  Parameter p;
  p.name = std::move(name), p.rows = rows, p.cols = cols, p.vector = vector, p.decay = decay, p.joined = joined;
  parameters_.push_back(std::move(p));
}

Tensor ParameterStore::allocate_flat(DType dtype) {
  const int64_t bytes = std::max<int64_t>(size_, 1) * size_of(dtype);
  Tensor t{ops_.allocate(bytes), dtype, 1, size_, size_};
  owned_.emplace_back(t.data, bytes);
  if (size_ > 0) ops_.fill(t, 0);
  return t;
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
  value_ = allocate_flat(sum), grad_ = allocate_flat(sum), m_ = allocate_flat(sum), v_ = allocate_flat(sum);
  if (storage_ != sum) half_ = allocate_flat(storage_);
  updates_ = Tensor{ops_.allocate(4), DType::i32, 1, 1, 1};
  owned_.emplace_back(updates_.data, 4);
  ops_.fill(updates_, 0);
  for (Parameter& p : parameters_) {
    p.value = part(value_, p), p.grad = part(grad_, p);
    p.compute = half_ ? part(half_, p) : p.value;
  }
}

Tensor ParameterStore::part(const Tensor& flat, const Parameter& p) const {
  return flat.col_range(p.offset, p.offset + p.rows * p.cols).row_range(0, 1).reshape(p.rows, p.cols);
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

void ParameterStore::refresh() {
  if (half_ && size_ > 0) ops_.copy(half_, value_);
  prepare_groups();
}

void ParameterStore::prepare_groups() {
  for (const LinearGroup& group : groups_)
    if (group.ranks() > 0) ops_.linear_prepare(group);
}

void ParameterStore::zero_grad() {
  if (size_ > 0) ops_.fill(grad_, 0);
}

void ParameterStore::set_updates(int64_t count) {
  KAVA_CHECK(count >= 0 && count < std::numeric_limits<int32_t>::max(), "{} updates", count);
  ops_.fill(updates_, static_cast<double>(count));
}

void ParameterStore::update(Arena& arena, AdamwOptions options, const Tensor& grad_square, const Tensor& losses) {
  ops_.sum_squares(arena, grad_square, grad_);
  ops_.count_update(updates_, grad_square, losses);
  for (bool decay : {true, false}) {
    const int64_t begin = decay ? 0 : decayed_, end = decay ? decayed_ : size_;
    if (begin == end) continue;
    auto cut = [&](const Tensor& t) { return t ? t.col_range(begin, end) : Tensor{}; };
    AdamwOptions o = options;
    if (!decay) o.weight_decay = 0;
    ops_.adamw(cut(value_), cut(m_), cut(v_), cut(half_), cut(grad_), grad_square, updates_, o);
  }
  prepare_groups();
}

}  // namespace kava
