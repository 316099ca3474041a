// Rotary embedding: with half = D/2, the pair (x[d], x[d + half]) of every head turns by the angle of the row's position:
//   y[d] = x[d] cos - x[d+half] sin,  y[d+half] = x[d+half] cos + x[d] sin;  the gradient turns back (sine negated).
// A thread owns four pairs of one head. Reads and writes may differ in type, so that a gradient summed in f32 is turned, rounded and packed
// in one pass.
#include "kernels/chunks.h"

namespace kava {

namespace {

constexpr int kRopeThreads = 256, kPairs = 4;

template <class Y, class X>
__global__ void __launch_bounds__(kRopeThreads)
    rope_kernel(Rows<Y> y, Rows<const X> x, const int32_t* positions, Rows<const float> cosine, Rows<const float> sine, uint32_t units,
                uint32_t per_head, uint32_t per_row, int half, float sign) {
  const uint32_t i = blockIdx.x * kRopeThreads + threadIdx.x;
  if (i >= units) return;
  const int64_t r = i / per_row;
  const uint32_t unit = i % per_row;
  const int first = static_cast<int>(unit % per_head) * kPairs, head = static_cast<int>(unit / per_head) * 2 * half;
  const int32_t position = positions[r];
  const float *c = cosine[position] + first, *s = sine[position] + first;
  const X* in = x[r] + head + first;
  Y* out = y[r] + head + first;
  float a[kPairs], b[kPairs];
#pragma unroll
  for (int p = 0; p < kPairs; ++p)
    if (first + p < half) a[p] = to_float(in[p]), b[p] = to_float(in[p + half]);
#pragma unroll
  for (int p = 0; p < kPairs; ++p)
    if (first + p < half) {
      const float turn = sign * s[p];
      out[p] = from_float<Y>(a[p] * c[p] - b[p] * turn);
      out[p + half] = from_float<Y>(b[p] * c[p] + a[p] * turn);
    }
}

}  // namespace

template <class Y, class X>
void rope(Stream stream, Rows<Y> y, Rows<const X> x, const int32_t* positions, Rows<const float> cosine, Rows<const float> sine,
          int64_t rows, int heads, int head_dim, bool inverse) {
  const int half = head_dim / 2;
  const int64_t per_head = div_up(half, kPairs), per_row = per_head * heads, units = rows * per_row;
  if (units == 0) return;
  if (units >= int64_t{1} << 31) throw std::invalid_argument("more pairs to turn than a launch counts");
  launch(stream, rope_kernel<Y, X>, static_cast<unsigned>(div_up(units, int64_t{kRopeThreads})), kRopeThreads, 0, y, x, positions, cosine,
         sine, static_cast<uint32_t>(units), static_cast<uint32_t>(per_head), static_cast<uint32_t>(per_row), half, inverse ? -1.f : 1.f);
}
template void rope(Stream, Rows<float>, Rows<const float>, const int32_t*, Rows<const float>, Rows<const float>, int64_t, int, int, bool);
template void rope(Stream, Rows<bf16>, Rows<const bf16>, const int32_t*, Rows<const float>, Rows<const float>, int64_t, int, int, bool);
template void rope(Stream, Rows<bf16>, Rows<const float>, const int32_t*, Rows<const float>, Rows<const float>, int64_t, int, int, bool);

}  // namespace kava
