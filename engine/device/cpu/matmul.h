// Matrix products of the cpu backend: C = A B (+ C), cut into tiles whose shape depends on the shapes of the operands alone, each run by
// one thread. By oneDNN where it has the type, else by a plain loop.
#pragma once
#include <functional>
#include <span>

#include "engine/device/cpu/threads.h"
#include "engine/device/tensor.h"

namespace kava {

class Matmul {
 public:
  explicit Matmul(Threads& threads) : threads_(threads) {}

  /// c [m, n] = a [m, k] op(b) [k, n] + bias; op transposes. a and b of one type, c of that type or of its sum type; bias [1, n] of a's
  /// type, or empty, is added before c is rounded.
  struct Product {
    Tensor c, a, b;
    bool transpose_b = false;
    Tensor bias = {};
  };
  /// Products of one type and of as many rows each, whose tiles are handed out together. Row i of c depends on row i of a and on b alone,
  /// bit for bit, whatever m is.
  void run_all(std::span<const Product> products);
  void run(const Product& product) { run_all(std::span(&product, 1)); }

  /// c [m, n] += scale * a^T b, a [k, m] and b [k, n] of one type, c of its sum type: a sum over rows of the step.
  struct RowSum {
    Tensor c, a, b;
    double scale = 1;
  };
  /// Their tiles are handed out together. The rows are cut into pieces of fixed length; each piece's product is scaled and added in order.
  void add_all(std::span<const RowSum> sums);

  /// A tile of a sum of two products, in the sum type, rows kTileCols apart. second: the other product, where it is kept apart.
  struct SumTile {
    int64_t row, rows, col, cols;
    const void *sum, *second;
  };
  static constexpr int64_t kTileCols = 256;
  struct Term {
    Tensor a, b;  // [m, k], [k, n]
  };
  /// finish() for every tile of x.a x.b + y.a y.b. Rows are as independent as those of run_all(), in f32 up to 768 columns of a.
  void sum_tiles(const Term& x, const Term& y, bool apart, const std::function<void(const SumTile&)>& finish);

 private:
  Threads& threads_;
};

}  // namespace kava
