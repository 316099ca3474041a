// Rows: fill, copies with rounding, gathers and scatters by lists of rows, the embedding and its gradient.
//
// All but the embedding's gradient are maps over chunks of eight columns. That gradient sums rows that may repeat, in their order: the
// block of the first row that holds an id owns the id's sum; the blocks of its later rows end at once.
#include <array>
#include <bit>

#include "kernels/chunks.h"

namespace kava {

namespace {

struct Nothing {};

template <class Y>
struct Fill {
  Rows<Y> y;
  Y value;
  int cols;
  __device__ Nothing load(int64_t, int) const { return {}; }
  __device__ void store(int64_t r, int first, Nothing) const {
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (first + i < cols) y[r][first + i] = value;
  }
};

/// Rows of whole 16 bytes of any type, as columns of two bytes.
struct FillBytes {
  Rows<bf16> y;
  Bytes16 value;
  __device__ Nothing load(int64_t, int) const { return {}; }
  __device__ void store(int64_t r, int first, Nothing) const { store_16(y[r] + first, value); }
};

template <class T, bool kAligned>
struct Scale {
  Rows<T> y;
  Rows<const T> x;
  float scale;
  int cols;
  __device__ Columns load(int64_t r, int first) const {
    Columns v = load_columns<T, kAligned>(x[r], first, cols);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v.at[i] *= scale;
    return v;
  }
  __device__ void store(int64_t r, int first, const Columns& v) const { store_columns<T, kAligned>(y[r], first, cols, v); }
};

enum class Into { set, add };

/// y[to[r]] = or += x[from[r]]; a null list is r itself.
template <class Y, class X, Into into, bool kAligned>
struct MoveRows {
  Rows<Y> y;
  Rows<const X> x;
  const int32_t *to, *from;
  int cols;
  __device__ Y* target(int64_t r) const { return y[to ? to[r] : r]; }
  __device__ Columns load(int64_t r, int first) const {
    Columns v = load_columns<X, kAligned>(x[from ? from[r] : r], first, cols);
    if constexpr (into == Into::add) {
      const Columns old = load_columns<Y, kAligned>(target(r), first, cols);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) v.at[i] += old.at[i];
    }
    return v;
  }
  __device__ void store(int64_t r, int first, const Columns& v) const { store_columns<Y, kAligned>(target(r), first, cols, v); }
};

template <Into into, class Y, class X>
void move_rows(Stream stream, Rows<Y> y, Rows<const X> x, const int32_t* to, const int32_t* from, int64_t rows, int64_t cols) {
  dispatch_aligned(chunked(y, cols) && chunked(x, cols), [&]<bool kAligned>() {
    map_chunks(stream, MoveRows<Y, X, into, kAligned>{y, x, to, from, static_cast<int>(cols)}, rows, cols);
  });
}

template <class X, class T, bool kAligned>
struct Embed {
  Rows<X> x;
  Rows<const T> table, extra;
  const int32_t* ids;
  int cols;
  __device__ Columns load(int64_t r, int first) const {
    const int32_t id = ids[r];
    return load_columns<T, kAligned>(id < 0 ? extra[-1 - id] : table[id], first, cols);
  }
  __device__ void store(int64_t r, int first, const Columns& v) const { store_columns<X, kAligned>(x[r], first, cols, v); }
};

constexpr int kEmbedThreads = 128;

constexpr int kEmbedAhead = 16;  // rows whose ids are compared, and which are read where these are equal, before the first is added

/// A block owns (row n, tile of kEmbedThreads columns). A token may have thousands of rows, which are added in order.
__global__ void __launch_bounds__(kEmbedThreads)
    embed_bwd_kernel(Rows<float> dtable, Rows<float> dextra, Rows<const float> dx, const int32_t* ids, int rows, int cols) {
  const int n = static_cast<int>(blockIdx.x), tid = static_cast<int>(threadIdx.x);
  const int col = static_cast<int>(blockIdx.y) * kEmbedThreads + tid;
  const int32_t id = ids[n];
  const Rows<float> to = id < 0 ? dextra : dtable;
  if (!to.data) return;
  int earlier = 0;
  for (int j = tid; j < n; j += kEmbedThreads) earlier |= ids[j] == id;
  if (__syncthreads_or(earlier)) return;
  if (col >= cols) return;
  float* out = to[id < 0 ? -1 - id : id] + col;
  float sum = *out;
  for (int j = n; j < rows; j += kEmbedAhead) {
    float x[kEmbedAhead];
#pragma unroll
    for (int i = 0; i < kEmbedAhead; ++i) x[i] = j + i < rows && ids[j + i] == id ? dx[j + i][col] : 0.f;
#pragma unroll
    for (int i = 0; i < kEmbedAhead; ++i) sum += x[i];
  }
  *out = sum;
}

}  // namespace

template <class Y>
void fill_rows(Stream stream, Rows<Y> y, Y value, int64_t rows, int64_t cols) {
  constexpr int64_t kColumns = sizeof(Y) / sizeof(bf16);
  const Rows<bf16> as_bytes{reinterpret_cast<bf16*>(y.data), y.stride * kColumns};
  if (!chunked(as_bytes, cols * kColumns) || cols * kColumns > kLongestRow)
    return map_chunks(stream, Fill<Y>{y, value, static_cast<int>(cols)}, rows, cols);
  std::array<Y, sizeof(Bytes16) / sizeof(Y)> values;
  values.fill(value);
  map_chunks(stream, FillBytes{as_bytes, std::bit_cast<Bytes16>(values)}, rows, cols * kColumns);
}
template void fill_rows(Stream, Rows<float>, float, int64_t, int64_t);
template void fill_rows(Stream, Rows<bf16>, bf16, int64_t, int64_t);
template void fill_rows(Stream, Rows<int32_t>, int32_t, int64_t, int64_t);
template void fill_rows(Stream, Rows<double>, double, int64_t, int64_t);

template <class T>
void scale_rows(Stream stream, Rows<T> y, Rows<const T> x, float scale, int64_t rows, int64_t cols) {
  dispatch_aligned(chunked(y, cols) && chunked(x, cols), [&]<bool kAligned>() {
    map_chunks(stream, Scale<T, kAligned>{y, x, scale, static_cast<int>(cols)}, rows, cols);
  });
}
template void scale_rows(Stream, Rows<float>, Rows<const float>, float, int64_t, int64_t);
template void scale_rows(Stream, Rows<bf16>, Rows<const bf16>, float, int64_t, int64_t);

template <class Y, class X>
void copy_rows(Stream stream, Rows<Y> y, Rows<const X> x, int64_t rows, int64_t cols) {
  move_rows<Into::set>(stream, y, x, nullptr, nullptr, rows, cols);
}
template <class Y, class X>
void add_rows(Stream stream, Rows<Y> y, Rows<const X> x, int64_t rows, int64_t cols) {
  move_rows<Into::add>(stream, y, x, nullptr, nullptr, rows, cols);
}
template <class Y, class X>
void gather_rows(Stream stream, Rows<Y> y, Rows<const X> x, const int32_t* from, int64_t rows, int64_t cols) {
  move_rows<Into::set>(stream, y, x, nullptr, from, rows, cols);
}
template <class Y, class X>
void scatter_rows(Stream stream, Rows<Y> y, Rows<const X> x, const int32_t* to, int64_t rows, int64_t cols) {
  move_rows<Into::set>(stream, y, x, to, nullptr, rows, cols);
}
template <class Y, class X>
void scatter_add_rows(Stream stream, Rows<Y> y, Rows<const X> x, const int32_t* to, int64_t rows, int64_t cols) {
  move_rows<Into::add>(stream, y, x, to, nullptr, rows, cols);
}
#define KAVA_ROWS_OF(Y, X)                                                                      \
  template void copy_rows(Stream, Rows<Y>, Rows<const X>, int64_t, int64_t);                    \
  template void add_rows(Stream, Rows<Y>, Rows<const X>, int64_t, int64_t);                     \
  template void gather_rows(Stream, Rows<Y>, Rows<const X>, const int32_t*, int64_t, int64_t);  \
  template void scatter_rows(Stream, Rows<Y>, Rows<const X>, const int32_t*, int64_t, int64_t); \
  template void scatter_add_rows(Stream, Rows<Y>, Rows<const X>, const int32_t*, int64_t, int64_t);
KAVA_ROWS_OF(float, float)
KAVA_ROWS_OF(float, bf16)
KAVA_ROWS_OF(bf16, float)
KAVA_ROWS_OF(bf16, bf16)
#undef KAVA_ROWS_OF

template <class X, class T>
void embed_fwd(Stream stream, Rows<X> x, Rows<const T> table, Rows<const T> extra, const int32_t* ids, int64_t rows, int64_t cols) {
  dispatch_aligned(chunked(x, cols) && chunked(table, cols) && chunked(extra, cols), [&]<bool kAligned>() {
    map_chunks(stream, Embed<X, T, kAligned>{x, table, extra, ids, static_cast<int>(cols)}, rows, cols);
  });
}
template void embed_fwd(Stream, Rows<float>, Rows<const float>, Rows<const float>, const int32_t*, int64_t, int64_t);
template void embed_fwd(Stream, Rows<bf16>, Rows<const bf16>, Rows<const bf16>, const int32_t*, int64_t, int64_t);

void embed_bwd(Stream stream, Rows<float> dtable, Rows<float> dextra, Rows<const float> dx, const int32_t* ids, int64_t rows,
               int64_t cols) {
  if (rows == 0 || cols == 0) return;
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(div_up(cols, int64_t{kEmbedThreads})));
  launch(stream, embed_bwd_kernel, grid, kEmbedThreads, 0, dtable, dextra, dx, ids, static_cast<int>(rows), static_cast<int>(cols));
}

}  // namespace kava
