// Tensors: row-strided two-dimensional views that own nothing.
//
// Dimension letters, fixed for the whole project:
//   B samples  T Jacobi iterations  S segments  C hidden size  H query heads  K key/value heads  D head size  F MLP width
//   V vocabulary  R LoRA rank  L layers  M latents
// Heads lie in columns: a query tensor is [rows, H*D], head h in columns h*D .. h*D+D-1. A vector is one row.
#pragma once
#include <cstdint>
#include <type_traits>

#include "engine/error.h"
#include "kernels/bf16.h"

namespace kava {

enum class DType : uint8_t { f32, bf16, f64, i32 };

constexpr int64_t size_of(DType t) { return t == DType::bf16 ? 2 : t == DType::f64 ? 8 : 4; }
constexpr const char* name_of(DType t) {
  switch (t) {
    case DType::f32:
      return "f32";
    case DType::bf16:
      return "bf16";
    case DType::f64:
      return "f64";
    case DType::i32:
      return "i32";
  }
  return "?";
}

template <DType D, class S>
struct ElementType {
  static constexpr DType value = D;
  using Sum = S;
};
template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> : ElementType<DType::f32, float> {};
template <>
struct DTypeOf<bf16> : ElementType<DType::bf16, float> {};
template <>
struct DTypeOf<double> : ElementType<DType::f64, double> {};
template <>
struct DTypeOf<int32_t> : ElementType<DType::i32, int32_t> {};
/// The type that sums over elements of T are kept in: f32, f64 for f64.
template <class T>
using Sum = typename DTypeOf<T>::Sum;
constexpr DType sum_type(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }
/// A sum in the type that it is stored in.
template <class T>
constexpr T rounded(Sum<T> sum) {
  if constexpr (std::is_same_v<T, bf16>) return to_bf16(sum);
  else return sum;
}

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 0, cols = 0;
  int64_t stride = 0;  // elements from a row to the next, >= cols

  /// An empty tensor stands for "not there".
  explicit operator bool() const { return data != nullptr; }
  int64_t count() const { return rows * cols; }
  bool contiguous() const { return stride == cols || rows <= 1; }

  template <class T>
  T* as() const {
    if (dtype != DTypeOf<T>::value) [[unlikely]]
      wrong_type(DTypeOf<T>::value);
    return static_cast<T*>(data);
  }
  template <class T>
  T* row(int64_t r) const {
    if (dtype != DTypeOf<T>::value && data) [[unlikely]]
      wrong_type(DTypeOf<T>::value);
    return static_cast<T*>(data) + r * stride;
  }

  Tensor row_range(int64_t begin, int64_t end) const {
    KAVA_CHECK(0 <= begin && begin <= end && end <= rows, "rows {}..{} of {}", begin, end, rows);
    return {static_cast<char*>(data) + begin * stride * size_of(dtype), dtype, end - begin, cols, stride};
  }
  Tensor col_range(int64_t begin, int64_t end) const {
    KAVA_CHECK(0 <= begin && begin <= end && end <= cols, "columns {}..{} of {}", begin, end, cols);
    return {static_cast<char*>(data) + begin * size_of(dtype), dtype, rows, end - begin, stride};
  }
  /// The same elements in another shape; only for a contiguous tensor.
  Tensor reshape(int64_t new_rows, int64_t new_cols) const {
    KAVA_CHECK(contiguous() && new_rows * new_cols == count(), "[{}, {}] as [{}, {}]", rows, cols, new_rows, new_cols);
    return {data, dtype, new_rows, new_cols, new_cols};
  }

 private:
  [[noreturn]] void wrong_type(DType used) const;
};

/// Calls f.template operator()<T>() with the element type of a floating dtype.
template <class F>
decltype(auto) dispatch(DType t, F&& f) {
  switch (t) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::bf16:
      return f.template operator()<bf16>();
    case DType::f64:
      return f.template operator()<double>();
    default:
      break;
  }
  KAVA_CHECK(false, "no floating type: {}", name_of(t));
}

}  // namespace kava
