// What the fronts of ops*.cpp are made of: checks of arguments, and the call of a backend with its observers around it.
#pragma once
#include "engine/device/op_observer.h"

namespace kava {

/// The tensor itself: the map of a call on its own backend.
struct Here {
  template <class T>
  T& operator()(T& x) const {
    return x;
  }
};

inline std::string shape(const Tensor& t) { return fmt::format("{} [{}, {}]", name_of(t.dtype), t.rows, t.cols); }

inline void require(const char* what, const Tensor& t, int64_t rows, int64_t cols, DType type) {
  KAVA_CHECK(t && t.rows == rows && t.cols == cols && t.dtype == type && (t.stride >= cols || rows <= 1),
             "{} is {} where {} [{}, {}] is needed", what, shape(t), name_of(type), rows, cols);
}
inline void require_if(const char* what, const Tensor& t, int64_t rows, int64_t cols, DType type) {
  if (t) require(what, t, rows, cols, type);
}
inline void require_index(const char* what, const Tensor& t, int64_t count) { require(what, t, 1, count, DType::i32); }
inline void require_contiguous(const char* what, const Tensor& t) { KAVA_CHECK(t.contiguous(), "{} has gaps between rows", what); }

/// y and x in the storage or the sum type of one model.
inline void require_kin(const Tensor& y, const Tensor& x) {
  const bool kin = y.dtype == DType::i32 || x.dtype == DType::i32 ? y.dtype == x.dtype : sum_type(y.dtype) == sum_type(x.dtype);
  KAVA_CHECK(kin, "{} from {}", name_of(y.dtype), name_of(x.dtype));
}
inline void require_floating(const char* what, const Tensor& t) {
  KAVA_CHECK(t && t.dtype != DType::i32, "{} in {}", what, name_of(t.dtype));
}

/// A gradient in the storage type or its sum type.
inline void require_gradient(const char* what, const Tensor& t, int64_t rows, int64_t cols, DType storage) {
  require(what, t, rows, cols, t.dtype == storage ? storage : sum_type(storage));
}

/// Operations of a product [m, k] [k, n].
inline double product(int64_t m, int64_t n, int64_t k) {
  return 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
}

/// Bytes of what an op leaves alone of a tensor, of which it reads or writes so many rows, any of them.
inline double beyond(const Tensor& t, int64_t rows) { return bytes_of(t.rows > rows ? t.row_range(rows, t.rows) : Tensor{}); }

template <class Run>
void Ops::call(const char* name, std::span<const Tensor> outputs, std::span<const Tensor> inputs, double flops, const Run& run,
               double untouched) {
  if (observers_.empty()) return run(*this, Here{});
  const OpCall op{name, outputs, inputs, flops, untouched, [&](Ops& other, const TensorMap& map) { run(other, map); }};
  for (OpObserver* o : observers_) o->before(op);
  run(*this, Here{});
  for (OpObserver* o : observers_) o->after(op);
}

template <class Run>
void Ops::call(const char* name, Tensors outputs, Tensors inputs, double flops, const Run& run, double untouched) {
  call(name, std::span(outputs.begin(), outputs.size()), std::span(inputs.begin(), inputs.size()), flops, run, untouched);
}

template <class Run>
void Ops::compute(const char* name, Tensors outputs, Tensors inputs, const Run& run, double untouched) {
  call(
      name, outputs, inputs, 0,
      [&](Ops& ops, const auto& at) {
        if (!ops.dry()) run(ops, at);
      },
      untouched);
}

}  // namespace kava
