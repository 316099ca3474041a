// Causal attention over segments of one length as cuDNN computes it: the rival of the cuda backend's, and a second opinion on its values.
#pragma once
#include "benchmarks/cudnn.h"

namespace kava {

struct AttentionSizes {
  int64_t segments, length, heads, kv_heads, head_dim;
};

// Numbers of the graphs' tensors, in bf16 but for stats. Rows are those of all segments in order.
// * forward: q, o [rows, heads * head_dim]; k, v [rows, kv_heads * head_dim], each by rows or by columns at the same address; stats f32
//   [segments, heads, length]; the numbers scale and minus infinity
// * backward: those, o and stats being read; dout, dq like q; dk, dv like k; and where heads share keys dk_of_heads, dv_of_heads
//   [segments, heads, length, head_dim], from which they are summed
enum AttentionTensor : int64_t {
  kQ = 1,
  kK,
  kKColumns,
  kV,
  kVColumns,
  kO,
  kStats,
  kScale,
  kMinusInfinity,
  kDout,
  kDq,
  kDk,
  kDv,
  kDkOfHeads,
  kDvOfHeads
};

/// The graph of products, mask and softmax that cuDNN has fused kernels for (its one operation for all of it has no causal mask in 9.19).
std::unique_ptr<CudnnGraph> cudnn_attention_fwd(Cudnn& cudnn, const AttentionSizes& sizes);
std::unique_ptr<CudnnGraph> cudnn_attention_bwd(Cudnn& cudnn, const AttentionSizes& sizes);

}  // namespace kava
