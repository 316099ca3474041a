// cpu backend: rotary embedding. A block of kRowBlock rows is a task.
#include "engine/device/cpu/ops_cpu.h"
#include "engine/device/cpu/row_loops.h"

namespace kava {

namespace {
// y = x with every pair turned; y may be x itself.
template <class Y, class X>
void turn_row(Y* y, const X* x, const Sum<X>* cosine, const Sum<X>* sine, int64_t cols, int64_t half, Sum<X> sign) {
  for (int64_t begin = 0; begin < cols; begin += 2 * half)
    each(half, [=, in = x + begin, out = y + begin](int64_t d) {
      Sum<X> a = load(in, d), b = load(in, d + half), c = cosine[d], s = sign * sine[d];
      store(out, d, a * c - b * s);
      store(out, d + half, b * c + a * s);
    });
}
}  // namespace

void CpuOps::do_rope_fwd(const Tensor& x, const Tensor& positions, const Tensor& cosine, const Tensor& sine, int64_t head_dim,
                         bool inverse) {
  const int32_t* at = positions.as<int32_t>();
  dispatch(x.dtype, [&]<class T>() {
    using S = Sum<T>;
    threads_.blocks(x.rows, kRowBlock, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        turn_row(x.row<T>(n), x.row<T>(n), cosine.row<S>(at[n]), sine.row<S>(at[n]), x.cols, head_dim / 2, inverse ? S(-1) : S(1));
    });
  });
}

void CpuOps::do_rope_bwd(const Tensor& dqkv, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& positions,
                         const Tensor& cosine, const Tensor& sine, int64_t head_dim) {
  const int32_t* at = positions.as<int32_t>();
  const int64_t q_cols = dq ? dq.cols : 0, k_cols = dk ? dk.cols : 0, half = head_dim / 2;
  dispatch(dqkv.dtype, [&]<class T>() {
    using S = Sum<T>;
    threads_.blocks(dqkv.rows, kRowBlock, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        T* out = dqkv.row<T>(n);
        const S *c = cosine.row<S>(at[n]), *s = sine.row<S>(at[n]);
        if (dq) turn_row(out, dq.row<T>(n), c, s, q_cols, half, S(-1));
        if (!dk) continue;
        turn_row(out + q_cols, dk.row<S>(n), c, s, k_cols, half, S(-1));
        each(k_cols, [to = out + q_cols + k_cols, from = dv.row<S>(n)](int64_t i) { store(to, i, from[i]); });
      }
    });
  });
}

}  // namespace kava
