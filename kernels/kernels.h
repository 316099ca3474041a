// Launchers of the kernels: raw pointers, dimensions and a stream. What an op computes is said in engine/device/ops.h; here stands what a
// kernel asks of its arguments. All pointers are device memory. T is the storage type, bf16 or float; sums are f32. bf16 products run on
// tensor cores (mma.sync), f32 ones as plain multiply-adds. Rows may begin anywhere; where base and stride are multiples of 16 bytes, loads
// are faster. A launch that fails throws GpuError.
#pragma once
#include <cstdint>
#include <span>
#include <type_traits>

#include "kernels/bf16.h"

struct CUstream_st;

namespace kava {

using Stream = CUstream_st*;

/// Row r of a matrix begins at data + r * stride. A null pointer stands for "not there".
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;
  constexpr T* operator[](int64_t r) const { return data + r * stride; }
  template <class U>
  requires std::is_same_v<U, const T>
  constexpr operator Rows<U>() const { return {data, stride}; }
};

// ---- attention

/// The lists of ops.h's Segments. The key rows of one segment are distinct; segments of different groups share none.
struct SegmentLists {
  const int32_t *key_offsets = nullptr, *keys = nullptr, *query_begin = nullptr, *query_count = nullptr, *group_offsets = nullptr;
  int count = 0, groups = 0;
  int most_queries = 0;  // at least the largest query_count
};

/// head_dim: 1..128, heads a multiple of kv_heads; else std::invalid_argument.
struct AttentionDims {
  int heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 0;
};

/// o, lse of every query row of a segment; other rows are left alone. lse may be null.
template <class T>
void attention_fwd(Stream stream, Rows<T> o, Rows<float> lse, Rows<const T> q, Rows<const T> k, Rows<const T> v,
                   const SegmentLists& segments, const AttentionDims& dims);

/// dq of every query row of a segment is set; dk and dv are added to, each element by one thread in the order of the group's segments.
/// delta: workspace [query rows, H].
template <class T>
void attention_bwd(Stream stream, Rows<T> dq, Rows<float> dk, Rows<float> dv, Rows<float> delta, Rows<const T> dout, Rows<const T> o,
                   Rows<const float> lse, Rows<const T> q, Rows<const T> k, Rows<const T> v, const SegmentLists& segments,
                   const AttentionDims& dims);

// ---- linear maps with LoRA

/// One map y = x W^T + bias + scale * drop(x) A^T B^T with W [out, in], A [rank, in], B [out, rank]. rank 0: without LoRA; bias may be
/// null.
template <class T>
struct LinearMap {
  Rows<const T> w, lora_a, lora_b;
  const T* bias = nullptr;
  int out = 0, rank = 0;
  float scale = 0;
};

/// Gradients that are added to; null where not wanted.
struct LinearMapGrad {
  Rows<float> dw, dlora_a, dlora_b;
  float* dbias = nullptr;
};

/// The mask of kernels/dropout.h on the columns of x. row_keys [rows, 2], null: no dropout.
struct DropoutMask {
  const int32_t* row_keys = nullptr;
  uint64_t seed = 0;
  uint32_t step = 0, site = 0, threshold = 0;
  float inverse_keep = 1;  // 1 / (1 - p)
};

/// Maps of one group; more are std::invalid_argument.
constexpr int kMostMaps = 4;

/// y[j] [rows, out_j]; xa [rows, sum of ranks] gets drop(x) A^T of the maps with LoRA side by side.
template <class T>
void linear_group_fwd(Stream stream, std::span<const Rows<T>> y, Rows<T> xa, Rows<const T> x, std::span<const LinearMap<T>> maps,
                      const DropoutMask& mask, int rows, int in);

/// dxa = scale * dy B side by side; dx = sum_j dy[j] W_j + drop'(dxa A), dx may be null.
template <class T>
void linear_group_bwd_input(Stream stream, Rows<T> dx, Rows<T> dxa, std::span<const Rows<const T>> dy, std::span<const LinearMap<T>> maps,
                            const DropoutMask& mask, int rows, int in);

/// dA += dxa^T drop(x), dB += scale * dy^T xa, dW += dy^T x, dbias += column sums of dy. One owner per element, rows in order.
template <class T>
void linear_group_bwd_params(Stream stream, std::span<const LinearMapGrad> grads, std::span<const Rows<const T>> dy, Rows<const T> dxa,
                             Rows<const T> x, Rows<const T> xa, std::span<const LinearMap<T>> maps, const DropoutMask& mask, int rows,
                             int in);

}  // namespace kava
