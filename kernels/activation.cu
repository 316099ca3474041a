// SwiGLU and GELU (with the error function, or tanh), forward and backward: maps over chunks of eight columns.
//   swiglu: y = silu(g) u,  du = dy silu(g),  dg = dy u sigmoid(g) (1 + g (1 - sigmoid(g)))
//   gelu:   y = x Phi(x),   dx = dy (Phi(x) + x phi(x))
//   tanh:   y = x p,  p = (1 + tanh u)/2 = sigmoid(2 u),  u = sqrt(2/pi) (x + 0.044715 x^3),  dx = dy (p + 2 x p (1 - p) du/dx)
#include "kernels/chunks.h"

namespace kava {

namespace {

__device__ __forceinline__ float sigmoid(float x) { return 1 / (1 + expf(-x)); }
__device__ __forceinline__ float normal_cdf(float x) { return 0.5f * (1 + erff(x * 0.70710678118654752440f)); }
__device__ __forceinline__ float normal_density(float x) { return 0.39894228040143267794f * expf(-0.5f * x * x); }

__device__ __forceinline__ float tanh_cdf(float x) { return sigmoid(2 * 0.79788456080286535588f * (x + 0.044715f * x * x * x)); }
__device__ __forceinline__ float tanh_slope(float x) { return 0.79788456080286535588f * (1 + 3 * 0.044715f * x * x); }

template <class T, bool kAligned>
struct Swiglu {
  Rows<T> y;
  Rows<const T> gate, up;
  int cols;
  __device__ Columns load(int64_t r, int first) const {
    Columns g = load_columns<T, kAligned>(gate[r], first, cols);
    const Columns u = load_columns<T, kAligned>(up[r], first, cols);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) g.at[i] = g.at[i] * sigmoid(g.at[i]) * u.at[i];
    return g;
  }
  __device__ void store(int64_t r, int first, const Columns& v) const { store_columns<T, kAligned>(y[r], first, cols, v); }
};

struct ColumnPair {
  Columns a, b;
};

template <class T, bool kAligned>
struct SwigluGradient {
  Rows<T> dgate, dup;
  Rows<const T> dy, gate, up;
  int cols;
  __device__ ColumnPair load(int64_t r, int first) const {
    ColumnPair d{load_columns<T, kAligned>(gate[r], first, cols), load_columns<T, kAligned>(up[r], first, cols)};
    const Columns dout = load_columns<T, kAligned>(dy[r], first, cols);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float x = d.a.at[i], s = sigmoid(x);
      d.a.at[i] = dout.at[i] * d.b.at[i] * s * (1 + x * (1 - s));
      d.b.at[i] = dout.at[i] * x * s;
    }
    return d;
  }
  __device__ void store(int64_t r, int first, const ColumnPair& v) const {
    store_columns<T, kAligned>(dgate[r], first, cols, v.a);
    store_columns<T, kAligned>(dup[r], first, cols, v.b);
  }
};

template <class T, bool kAligned, bool kTanh>
struct GeluMap {
  Rows<T> y;
  Rows<const T> x;
  int cols;
  __device__ Columns load(int64_t r, int first) const {
    Columns v = load_columns<T, kAligned>(x[r], first, cols);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v.at[i] *= kTanh ? tanh_cdf(v.at[i]) : normal_cdf(v.at[i]);
    return v;
  }
  __device__ void store(int64_t r, int first, const Columns& v) const { store_columns<T, kAligned>(y[r], first, cols, v); }
};

template <class T, class G, bool kAligned, bool kTanh>
struct GeluGradient {
  static constexpr int kLoads = 2;
  Rows<T> dx;
  Rows<const G> dy;
  Rows<const T> x;
  int cols;
  __device__ Columns load(int64_t r, int first) const {
    Columns v = load_columns<T, kAligned>(x[r], first, cols);
    const Columns dout = load_columns<G, kAligned>(dy[r], first, cols);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float z = v.at[i], p = kTanh ? tanh_cdf(z) : normal_cdf(z);
      v.at[i] = dout.at[i] * (p + z * (kTanh ? 2 * p * (1 - p) * tanh_slope(z) : normal_density(z)));
    }
    return v;
  }
  __device__ void store(int64_t r, int first, const Columns& v) const { store_columns<T, kAligned>(dx[r], first, cols, v); }
};

}  // namespace

template <class T>
void swiglu_fwd(Stream stream, Rows<T> y, Rows<const T> gate, Rows<const T> up, int64_t rows, int64_t cols) {
  dispatch_aligned(chunked(y, cols) && chunked(gate, cols) && chunked(up, cols), [&]<bool kAligned>() {
    map_chunks(stream, Swiglu<T, kAligned>{y, gate, up, static_cast<int>(cols)}, rows, cols);
  });
}

template <class T>
void swiglu_bwd(Stream stream, Rows<T> dgate, Rows<T> dup, Rows<const T> dy, Rows<const T> gate, Rows<const T> up, int64_t rows,
                int64_t cols) {
  const bool aligned = chunked(dgate, cols) && chunked(dup, cols) && chunked(dy, cols) && chunked(gate, cols) && chunked(up, cols);
  dispatch_aligned(aligned, [&]<bool kAligned>() {
    map_chunks(stream, SwigluGradient<T, kAligned>{dgate, dup, dy, gate, up, static_cast<int>(cols)}, rows, cols);
  });
}

template <class T>
void gelu_fwd(Stream stream, Rows<T> y, Rows<const T> x, int64_t rows, int64_t cols, bool by_tanh) {
  dispatch_aligned(chunked(y, cols) && chunked(x, cols), [&]<bool kAligned>() {
    if (by_tanh) map_chunks(stream, GeluMap<T, kAligned, true>{y, x, static_cast<int>(cols)}, rows, cols);
    else map_chunks(stream, GeluMap<T, kAligned, false>{y, x, static_cast<int>(cols)}, rows, cols);
  });
}

template <class T, class G>
void gelu_bwd(Stream stream, Rows<T> dx, Rows<const G> dy, Rows<const T> x, int64_t rows, int64_t cols, bool by_tanh) {
  dispatch_aligned(chunked(dx, cols) && chunked(dy, cols) && chunked(x, cols), [&]<bool kAligned>() {
    if (by_tanh) map_chunks(stream, GeluGradient<T, G, kAligned, true>{dx, dy, x, static_cast<int>(cols)}, rows, cols);
    else map_chunks(stream, GeluGradient<T, G, kAligned, false>{dx, dy, x, static_cast<int>(cols)}, rows, cols);
  });
}

#define KAVA_ACTIVATIONS_OF(T)                                                                                       \
  template void swiglu_fwd(Stream, Rows<T>, Rows<const T>, Rows<const T>, int64_t, int64_t);                         \
  template void swiglu_bwd(Stream, Rows<T>, Rows<T>, Rows<const T>, Rows<const T>, Rows<const T>, int64_t, int64_t); \
  template void gelu_fwd(Stream, Rows<T>, Rows<const T>, int64_t, int64_t, bool);
KAVA_ACTIVATIONS_OF(float)
KAVA_ACTIVATIONS_OF(bf16)
#undef KAVA_ACTIVATIONS_OF
template void gelu_bwd(Stream, Rows<float>, Rows<const float>, Rows<const float>, int64_t, int64_t, bool);
template void gelu_bwd(Stream, Rows<bf16>, Rows<const bf16>, Rows<const bf16>, int64_t, int64_t, bool);
template void gelu_bwd(Stream, Rows<bf16>, Rows<const float>, Rows<const bf16>, int64_t, int64_t, bool);

}  // namespace kava
