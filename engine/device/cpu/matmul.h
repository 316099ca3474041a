// Matrix products of the cpu backend: C = A B (+ C), cut into tiles whose shape depends on the shapes of the operands alone, each run by
// one thread. By oneDNN where it has the type, else by a plain loop.
#pragma once
#include "engine/device/cpu/threads.h"
#include "engine/device/tensor.h"

namespace kava {

class Matmul {
 public:
  explicit Matmul(Threads& threads) : threads_(threads) {}

  enum class Store { set, add };
  /// c [m, n] = op(a) [m, k] op(b) [k, n]; op transposes. a and b of one type; c of that type or of its sum type (add: sum type only).
  /// Row i of c depends on row i of op(a) and on b alone, bit for bit, whatever m is.
  void run(const Tensor& c, const Tensor& a, bool transpose_a, const Tensor& b, bool transpose_b, Store store = Store::set);

 private:
  Threads& threads_;
};

}  // namespace kava
