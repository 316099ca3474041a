// cpu backend: rotary embedding. A block of kRowBlock rows is a task.
#include "engine/device/cpu/ops_cpu.h"
#include "engine/device/cpu/row_loops.h"

namespace kava {

namespace {
template <class T>
void rope_row(T* x, const Sum<T>* cosine, const Sum<T>* sine, int64_t cols, int64_t half, Sum<T> sign) {
  for (int64_t begin = 0; begin < cols; begin += 2 * half) {
    T *first = x + begin, *second = first + half;
    each(half, [=](int64_t d) {
      Sum<T> a = load(first, d), b = load(second, d), c = cosine[d], s = sign * sine[d];
      store(first, d, a * c - b * s);
      store(second, d, b * c + a * s);
    });
  }
}
}  // namespace

void CpuOps::rope(const Tensor& x, const Tensor& positions, const Tensor& cosine, const Tensor& sine, int64_t head_dim, bool inverse) {
  const int64_t half = head_dim / 2;
  KAVA_CHECK(half > 0 && head_dim == 2 * half && x.cols % head_dim == 0, "{} columns in heads of {}", x.cols, head_dim);
  check_rows(positions, 1, x.rows);
  check_rows(sine, cosine.rows, half);
  KAVA_CHECK(cosine.cols == half, "{} angles for heads of {}", cosine.cols, head_dim);
  const int32_t* at = positions.as<int32_t>();
  dispatch(x.dtype, [&]<class T>() {
    using S = Sum<T>;
    cosine.as<S>(), sine.as<S>();
    threads_.blocks(x.rows, kRowBlock, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        KAVA_CHECK(at[n] >= 0 && at[n] < cosine.rows, "position {} of {}", at[n], cosine.rows);
        rope_row(x.row<T>(n), cosine.row<S>(at[n]), sine.row<S>(at[n]), x.cols, half, inverse ? S(-1) : S(1));
      }
    });
  });
}

}  // namespace kava
