#include "engine/device/cuda/ops_cuda.h"

namespace kava {

namespace {
SegmentLists lists_of(const Segments& s) {
  return {data_of<const int32_t>(s.key_offsets),
          data_of<const int32_t>(s.keys),
          data_of<const int32_t>(s.query_begin),
          data_of<const int32_t>(s.query_count),
          data_of<const int32_t>(s.group_offsets),
          static_cast<int>(s.count),
          static_cast<int>(s.groups),
          static_cast<int>(s.most_queries),
          static_cast<int>(s.fewest_queries),
          static_cast<int>(s.most_keys)};
}
AttentionDims dims_of(const Tensor& q, int64_t heads, int64_t kv_heads, double scale) {
  return {static_cast<int>(heads), static_cast<int>(kv_heads), static_cast<int>(q.cols / heads), static_cast<float>(scale)};
}
Tensor room(Arena& arena, int64_t floats) { return floats > 0 ? arena.alloc(DType::f32, 1, floats) : Tensor{}; }
void check_head_size(int64_t head_dim) {
  if (head_dim > 128)
    throw Error(Exit::preflight, "--device",
                fmt::format("the cuda backend has no attention for heads of {} numbers, 128 at most", head_dim), "use --device cpu");
}
}  // namespace

void CudaOps::do_attention_fwd(Arena& arena, const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                               const Segments& segments, int64_t heads, int64_t kv_heads, double scale) {
  check_head_size(q.cols / heads);
  ArenaScope scope(arena);
  on_storage(q.dtype, [&]<class T>() {
    const SegmentLists lists = lists_of(segments);
    const AttentionDims dims = dims_of(q, heads, kv_heads, scale);
    const Tensor workspace = room(arena, attention_fwd_workspace<T>(lists, dims));
    if (dry()) return;
    kava::attention_fwd(stream(), rows_of<T>(o), rows_of<float>(lse), data_of<float>(workspace), rows_of<const T>(q), rows_of<const T>(k),
                        rows_of<const T>(v), lists, dims);
  });
}
void CudaOps::do_attention_bwd(Arena& arena, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dout, const Tensor& o,
                               const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments,
                               int64_t heads, int64_t kv_heads, double scale) {
  ArenaScope scope(arena);
  on_storage(q.dtype, [&]<class T>() {
    const SegmentLists lists = lists_of(segments);
    const AttentionDims dims = dims_of(q, heads, kv_heads, scale);
    const Tensor workspace = room(arena, attention_bwd_workspace<T>(q.rows, lists, dims));
    if (dry()) return;
    kava::attention_bwd(stream(), rows_of<T>(dq), rows_of<float>(dk), rows_of<float>(dv), data_of<float>(workspace), rows_of<const T>(dout),
                        rows_of<const T>(o), rows_of<const float>(lse), rows_of<const T>(q), rows_of<const T>(k), rows_of<const T>(v),
                        lists, dims);
  });
}

}  // namespace kava
