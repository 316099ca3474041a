#include "benchmarks/cudnn_attention.h"

namespace kava {

namespace {

using Dims = CudnnGraph::Dims;
using Node = CudnnGraph::Tensor;

class Builder {
 public:
  Builder(Cudnn& cudnn, const AttentionSizes& sizes) : graph_(std::make_unique<CudnnGraph>(cudnn)), g_(*graph_), s_(sizes) {}

  std::unique_ptr<CudnnGraph> forward() {
    const Node scores = masked_scores(), most = g_.between(row_), shifted = g_.between(all_), weights = g_.between(all_),
               sum = g_.between(row_), log = g_.between(row_), shares = g_.between(all_, CudnnType::bf16);
    g_.reduce(CudnnReduction::max, scores, most);
    g_.pointwise(CudnnPointwise::sub, scores, most, shifted);
    g_.pointwise(CudnnPointwise::exp, shifted, nullptr, weights);
    g_.reduce(CudnnReduction::add, weights, sum);
    g_.pointwise(CudnnPointwise::log, sum, nullptr, log);
    g_.pointwise(CudnnPointwise::add, most, log, stats());
    g_.pointwise(CudnnPointwise::div, weights, sum, shares);
    g_.matmul(shares, rows(kV, s_.kv_heads), rows(kO, s_.heads));
    return finished();
  }

  std::unique_ptr<CudnnGraph> backward() {
    const bool shared = s_.heads != s_.kv_heads;
    const Node q = rows(kQ, s_.heads), dout = rows(kDout, s_.heads), dk = rows(kDk, s_.kv_heads), dv = rows(kDv, s_.kv_heads),
               dk_heads = shared ? packed(kDkOfHeads) : dk, dv_heads = shared ? packed(kDvOfHeads) : dv;
    const Node products = g_.between(head_), delta = g_.between(row_);
    g_.pointwise(CudnnPointwise::mul, dout, rows(kO, s_.heads), products);
    g_.reduce(CudnnReduction::add, products, delta);
    const Node scores = masked_scores(), shifted = g_.between(all_), p = g_.between(all_), p_turned = turned();
    g_.pointwise(CudnnPointwise::sub, scores, stats(), shifted);
    g_.pointwise(CudnnPointwise::exp, shifted, nullptr, p);
    g_.reshape(p, p_turned);
    g_.matmul(p_turned, dout, dv_heads);
    const Node dp = g_.between(all_), centred = g_.between(all_), weighted = g_.between(all_), ds = g_.between(all_, CudnnType::bf16),
               ds_turned = turned();
    g_.matmul(dout, columns(kVColumns), dp);
    g_.pointwise(CudnnPointwise::sub, dp, delta, centred);
    g_.pointwise(CudnnPointwise::mul, centred, p, weighted);
    g_.pointwise(CudnnPointwise::mul, weighted, scale_, ds);
    g_.matmul(ds, rows(kK, s_.kv_heads), rows(kDq, s_.heads));
    g_.reshape(ds, ds_turned);
    g_.matmul(ds_turned, q, dk_heads);
    if (shared) g_.reduce(CudnnReduction::add, dk_heads, dk), g_.reduce(CudnnReduction::add, dv_heads, dv);
    return finished();
  }

 private:
  std::unique_ptr<CudnnGraph> finished() {
    g_.finish();
    return std::move(graph_);
  }
  Node rows(AttentionTensor number, int64_t heads) {
    const int64_t n = s_.length, d = s_.head_dim;
    return g_.in_memory(number, {s_.segments, heads, n, d}, {n * heads * d, d, heads * d, 1}, CudnnType::bf16);
  }
  /// Keys or values with their rows as columns.
  Node columns(AttentionTensor number) {
    const int64_t n = s_.length, d = s_.head_dim, heads = s_.kv_heads;
    return g_.in_memory(number, {s_.segments, heads, d, n}, {n * heads * d, d, 1, heads * d}, CudnnType::bf16);
  }
  Node packed(AttentionTensor number) {
    const int64_t n = s_.length, d = s_.head_dim, heads = s_.heads;
    return g_.in_memory(number, head_, {heads * n * d, n * d, d, 1}, CudnnType::bf16);
  }
  Node stats() { return g_.in_memory(kStats, row_, {s_.heads * s_.length, s_.length, 1, 1}, CudnnType::f32); }
  Node turned() {
    const int64_t n = s_.length;
    return g_.between(all_, {s_.heads * n * n, n * n, 1, n}, CudnnType::bf16);
  }

  /// scale q k^T, minus infinity where the key comes after the query.
  Node masked_scores() {
    const Node raw = g_.between(all_), scaled = g_.between(all_), query = g_.between(all_, CudnnType::i32),
               key = g_.between(all_, CudnnType::i32), seen = g_.between(all_, CudnnType::boolean), scores = g_.between(all_);
    scale_ = g_.scalar(kScale);
    g_.matmul(rows(kQ, s_.heads), columns(kKColumns), raw);
    g_.pointwise(CudnnPointwise::mul, raw, scale_, scaled);
    g_.gen_index(2, scaled, query);
    g_.gen_index(3, scaled, key);
    g_.pointwise(CudnnPointwise::cmp_ge, query, key, seen);
    g_.pointwise(CudnnPointwise::select, scaled, g_.scalar(kMinusInfinity), scores, seen);
    return scores;
  }

  std::unique_ptr<CudnnGraph> graph_;
  CudnnGraph& g_;
  const AttentionSizes s_;
  const Dims all_{s_.segments, s_.heads, s_.length, s_.length}, row_{s_.segments, s_.heads, s_.length, 1},
      head_{s_.segments, s_.heads, s_.length, s_.head_dim};
  Node scale_ = nullptr;
};

}  // namespace

std::unique_ptr<CudnnGraph> cudnn_attention_fwd(Cudnn& cudnn, const AttentionSizes& sizes) { return Builder(cudnn, sizes).forward(); }
std::unique_ptr<CudnnGraph> cudnn_attention_bwd(Cudnn& cudnn, const AttentionSizes& sizes) { return Builder(cudnn, sizes).backward(); }

}  // namespace kava
