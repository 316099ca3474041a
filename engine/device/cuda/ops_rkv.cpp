#include "engine/device/cuda/ops_cuda.h"

namespace kava {

namespace {
RkvPolicy kernel_policy(Policy p) {
  switch (p) {
    case Policy::crop:
      return RkvPolicy::crop;
    case Policy::random:
      return RkvPolicy::random;
    case Policy::uniform:
      return RkvPolicy::uniform;
    default:
      return RkvPolicy::scored;
  }
}
RkvGroup kernel_group(Group g) {
  return g == Group::max_prob ? RkvGroup::max_prob : g == Group::mean_prob ? RkvGroup::mean_prob : RkvGroup::max_logits;
}
}  // namespace

void CudaOps::do_rkv_select(Arena& arena, const Tensor& target_k, const Tensor& target_v, const Tensor& kept, const Tensor& importance,
                            const Tensor& redundancy, const Tensor& score, const Tensor& q, const Tensor& q_rows, const Tensor& q_offsets,
                            const Tensor& k, const Tensor& v, const Tensor& k_rows, const Tensor& k_offsets, const Tensor& match_k,
                            const RkvOptions& o) {
  ArenaScope scope(arena);
  RkvDims d;
  d.samples = static_cast<int>(k_offsets.cols - 1), d.heads = static_cast<int>(o.heads), d.kv_heads = static_cast<int>(o.kv_heads);
  d.head_dim = static_cast<int>(k.cols / o.kv_heads), d.latents = static_cast<int>(o.latents);
  d.trace_tokens = static_cast<int>(k_rows.cols);
  d.policy = kernel_policy(o.policy), d.group = kernel_group(o.group), d.by_score = o.order_by_score;
  d.lambda = o.policy == Policy::cosine ? 0 : o.policy == Policy::attention ? 1 : o.lambda;
  d.seed = o.seed, d.step = o.step, d.layer = o.layer;
  const Tensor room = arena.alloc(DType::f64, 1, rkv_workspace_words(d));
  if (dry()) return;
  on_storage(k.dtype, [&]<class T>() {
    RkvInputs<T> in;
    in.q = rows_of<const T>(q), in.k = rows_of<const T>(k), in.v = rows_of<const T>(v);
    in.match_by_rows = !match_k;
    in.match_k = match_k ? rows_of<const T>(match_k) : in.k;
    in.query_rows = data_of<const int32_t>(q_rows), in.query_offsets = data_of<const int32_t>(q_offsets);
    in.trace_rows = data_of<const int32_t>(k_rows), in.trace_offsets = data_of<const int32_t>(k_offsets);
    in.samples = data_of<const int32_t>(o.samples);
    kava::rkv_select(stream(),
                     RkvOutputs<T>{rows_of<T>(target_k), rows_of<T>(target_v), rows_of<int32_t>(kept), rows_of<float>(importance),
                                   rows_of<float>(redundancy), rows_of<float>(score)},
                     data_of<double>(room), in, d);
  });
}

}  // namespace kava
