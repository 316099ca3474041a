// Rotary embedding: with half = D/2, the pair (x[d], x[d + half]) of every head turns by the angle of the row's position:
//   y[d] = x[d] cos - x[d+half] sin,  y[d+half] = x[d+half] cos + x[d] sin;  the gradient turns back (sine negated).
// A thread owns four pairs of two neighbouring heads. Reads and writes may differ in type, so that a gradient summed in f32 is turned,
// rounded and packed in one pass.
#include "kernels/chunks.h"

namespace kava {

namespace {

constexpr int kRopeThreads = 256, kPairs = kHalfChunk, kHeads = 2;

template <class Y, class X, bool kAligned>
__global__ void __launch_bounds__(kRopeThreads)
    rope_kernel(Rows<Y> y, Rows<const X> x, const int32_t* positions, Rows<const float> cosine, Rows<const float> sine, uint32_t units,
                uint32_t per_head, uint32_t per_row, int heads, int half, float sign) {
  const uint32_t i = blockIdx.x * kRopeThreads + threadIdx.x;
  if (i >= units) return;
  const int64_t r = i / per_row;
  const uint32_t unit = i % per_row;
  const int first = static_cast<int>(unit % per_head) * kPairs, head = static_cast<int>(unit / per_head) * kHeads;
  const int32_t position = positions[r];
  const auto c = load_columns<float, kAligned, kPairs>(cosine[position], first, half),
             s = load_columns<float, kAligned, kPairs>(sine[position], first, half);
  ColumnsOf<kPairs> a[kHeads], b[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h)
    if (head + h < heads) {
      const X* in = x[r] + (head + h) * 2 * half;
      a[h] = load_columns<X, kAligned, kPairs>(in, first, half), b[h] = load_columns<X, kAligned, kPairs>(in + half, first, half);
    }
#pragma unroll
  for (int h = 0; h < kHeads; ++h)
    if (head + h < heads) {
      Y* out = y[r] + (head + h) * 2 * half;
      ColumnsOf<kPairs> low, high;
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const float turn = sign * s.at[p];
        low.at[p] = a[h].at[p] * c.at[p] - b[h].at[p] * turn;
        high.at[p] = b[h].at[p] * c.at[p] + a[h].at[p] * turn;
      }
      store_columns<Y, kAligned>(out, first, half, low);
      store_columns<Y, kAligned>(out + half, first, half, high);
    }
}

}  // namespace

template <class Y, class X>
void rope(Stream stream, Rows<Y> y, Rows<const X> x, const int32_t* positions, Rows<const float> cosine, Rows<const float> sine,
          int64_t rows, int heads, int head_dim, bool inverse) {
  const int half = head_dim / 2;
  const int64_t per_head = div_up(half, kPairs), per_row = per_head * div_up(heads, kHeads), units = rows * per_row;
  if (units == 0) return;
  if (units >= int64_t{1} << 31) throw std::invalid_argument("more pairs to turn than a launch counts");
  dispatch_aligned(chunked(y, half) && chunked(x, half) && chunked(cosine, half) && chunked(sine, half), [&]<bool kAligned>() {
    launch(stream, rope_kernel<Y, X, kAligned>, static_cast<unsigned>(div_up(units, int64_t{kRopeThreads})), kRopeThreads, 0, y, x,
           positions, cosine, sine, static_cast<uint32_t>(units), static_cast<uint32_t>(per_head), static_cast<uint32_t>(per_row), heads,
           half, inverse ? -1.f : 1.f);
  });
}
template void rope(Stream, Rows<float>, Rows<const float>, const int32_t*, Rows<const float>, Rows<const float>, int64_t, int, int, bool);
template void rope(Stream, Rows<bf16>, Rows<const bf16>, const int32_t*, Rows<const float>, Rows<const float>, int64_t, int, int, bool);
template void rope(Stream, Rows<bf16>, Rows<const float>, const int32_t*, Rows<const float>, Rows<const float>, int64_t, int, int, bool);

}  // namespace kava
