#include <algorithm>

#include "engine/device/cuda/ops_cuda.h"

namespace kava {

namespace {
// Of logits at a time: about a thousand rows of a large vocabulary, for which the head's weights are read three times as fast as they are
// multiplied on an H100 (989 TFLOP/s, 3.35 TB/s by NVIDIA's data sheet).
constexpr int64_t kHeadBytes = int64_t{512} << 20;
int64_t chunk_rows(int64_t vocab) { return std::clamp<int64_t>(kHeadBytes / (vocab * 4) / 64 * 64, 64, 4096); }

// The gradient in the place of the logits.
Tensor in_place(const Tensor& z, DType dtype) { return {z.data, dtype, z.rows, z.cols, z.stride * (size_of(z.dtype) / size_of(dtype))}; }
}  // namespace

void CudaOps::do_head_cross_entropy(Arena& arena, const Tensor& losses, const Tensor& dh, const Tensor& dw, const Tensor& correct,
                                    const Tensor& logits, const Tensor& h, const Tensor& w, const Tensor& targets, const Tensor& classes,
                                    const Tensor& owners, const std::array<double, 2>& weights) {
  ArenaScope all(arena);
  const int64_t V = w.rows, n = h.rows, chunk = chunk_rows(V);
  const bool backward = dh || dw;
  const Tensor nll = arena.alloc(DType::f32, 1, n), hit = correct ? arena.alloc(DType::i32, 1, n) : Tensor{};
  const float by_class[2] = {static_cast<float>(weights[0]), static_cast<float>(weights[1])};
  for (int64_t first = 0; first < n; first += chunk) {
    ArenaScope scope(arena);
    const int64_t last = std::min(n, first + chunk);
    const Tensor hc = h.row_range(first, last);
    const Tensor z = logits ? logits.row_range(first, last) : arena.alloc(DType::f32, hc.rows, V);
    const Tensor dz = !backward ? Tensor{} : logits ? arena.alloc(h.dtype, hc.rows, V) : in_place(z, h.dtype);
    if (dry()) continue;
    product(z, hc, false, w, true);
    on_storage(h.dtype, [&]<class T>() {
      HeadOutputs<T> out;
      out.nll = data_of<float>(nll) + first, out.hit = hit ? data_of<int32_t>(hit) + first : nullptr, out.dz = rows_of<T>(dz);
      kava::head_rows(stream(), out, rows_of<const float>(z), data_of<const int32_t>(targets) + first,
                      data_of<const int32_t>(classes) + first, by_class, hc.rows, V);
    });
    if (dh) product(dh.row_range(first, last), dz, false, w, false);
    if (dw) product(dw, dz, true, hc, false, true);
  }
  if (dry()) return;
  kava::head_loss(stream(), data_of<double>(losses), data_of<const float>(nll), data_of<const int32_t>(classes), n);
  if (!correct) return;
  kava::fill_rows(stream(), rows_of<int32_t>(correct), 1, 1, correct.cols);
  kava::head_correct(stream(), data_of<int32_t>(correct), data_of<const int32_t>(hit), data_of<const int32_t>(owners), n);
}

void CudaOps::do_head_argmax(Arena& arena, const Tensor& best, const Tensor& h, const Tensor& w) {
  const int64_t n = h.rows, V = w.rows, chunk = chunk_rows(V);
  for (int64_t first = 0; first < n; first += chunk) {
    ArenaScope scope(arena);
    const Tensor hc = h.row_range(first, std::min(n, first + chunk)), z = arena.alloc(DType::f32, hc.rows, V);
    if (dry()) continue;
    product(z, hc, false, w, true);
    on_storage(h.dtype, [&]<class T>() {
      HeadOutputs<T> out;
      out.best = data_of<int32_t>(best) + first;
      kava::head_rows(stream(), out, rows_of<const float>(z), nullptr, nullptr, {0.f, 0.f}, hc.rows, V);
    });
  }
}

void CudaOps::do_head_draw(Arena& arena, const Tensor& drawn, const Tensor& h, const Tensor& w, const Tensor& numbers, double temperature,
                           double top_p) {
  const int64_t n = h.rows, V = w.rows, chunk = chunk_rows(3 * V);
  for (int64_t first = 0; first < n; first += chunk) {
    ArenaScope scope(arena);
    const Tensor hc = h.row_range(first, std::min(n, first + chunk)), z = arena.alloc(DType::f32, hc.rows, V);
    const Tensor weights = arena.alloc(DType::f64, hc.rows, V);  // as wide as theirs
    if (dry()) continue;
    product(z, hc, false, w, true);
    kava::head_draw(stream(), data_of<int32_t>(drawn) + first, rows_of<const float>(z),
                    {static_cast<uint64_t*>(weights.data), weights.stride}, data_of<const int32_t>(numbers) + 2 * first, temperature, top_p,
                    hc.rows, V);
  }
}

}  // namespace kava
