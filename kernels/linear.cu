// A group of linear maps with LoRA as sums of products (gemm.h), each op in one or two launches for the whole group; and the bias gradient.
// 1 / (1 - p) of the dropout goes into the factor of the scaled sum: masked operands are x or zero, exactly.
#include <stdexcept>
#include <string>

#include "kernels/gemm.h"
#include "kernels/gpu.h"

namespace kava {

namespace {

template <class T>
Rows<T> columns(Rows<T> x, int first) {
  return {x.data + first, x.stride};
}

template <class T>
Gemm<T> gemm_to(Rows<T> c, int m, int n) {
  Gemm<T> g;
  g.set = c, g.m = m, g.n = n;
  return g;
}
template <class T>
Gemm<T> gemm_onto(Rows<float> c, int m, int n) {
  Gemm<T> g;
  g.add = c, g.m = m, g.n = n;
  return g;
}

/// Problems of one form, launched when the batch is full and by flush().
template <GemmForm form, class T>
class Launches {
 public:
  Launches(Stream stream, const DropoutMask& mask) : stream_(stream) { batch_.mask = mask; }
  void add(const Gemm<T>& g) {
    batch_.gemms[batch_.count++] = g;
    if (batch_.count == GemmBatch<T>::kMostGemms) flush();
  }
  void flush() {
    gemm<form>(stream_, batch_);
    batch_.count = 0;
  }

 private:
  Stream stream_;
  GemmBatch<T> batch_;
};

void check_group(std::size_t maps) {
  if (maps > kMostMaps) throw std::invalid_argument("a group of more than " + std::to_string(kMostMaps) + " linear maps");
}

constexpr int kBiasRows = 8;  // rows that a block sums side by side

/// dbias[c] += sum_n dy[n, c]. A block owns 32 columns; warp w sums the rows w, w + 8, .., then the eight sums are added in order.
template <class T>
__global__ void __launch_bounds__(kBiasRows* kWarpSize) bias_bwd_kernel(float* dbias, Rows<const T> dy, int rows, int cols) {
  float* part = dynamic_smem<float>();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int col = static_cast<int>(blockIdx.x) * kWarpSize + lane;
  float sum = 0;
  for (int n = warp; n < rows && col < cols; n += kBiasRows) sum += to_float(dy[n][col]);
  part[threadIdx.x] = sum;
  __syncthreads();  // all parts are there
  if (warp != 0 || col >= cols) return;
  for (int w = 1; w < kBiasRows; ++w) sum += part[w * kWarpSize + lane];
  dbias[col] += sum;
}

}  // namespace

template <class T>
void linear_group_fwd(Stream stream, std::span<const Rows<T>> y, Rows<T> xa, Rows<const T> x, std::span<const LinearMap<T>> maps,
                      const DropoutMask& mask, int rows, int in) {
  check_group(maps.size());
  if (rows == 0) return;
  Launches<GemmForm::nt, T> down(stream, mask), up(stream, mask);
  int first = 0;
  for (const LinearMap<T>& map : maps) {
    if (map.rank == 0) continue;
    Gemm<T> g = gemm_to(columns(xa, first), rows, map.rank);
    g.then(x, map.lora_a, in);
    g.scaled = 1, g.factor = mask.inverse_keep, g.masked = mask.row_keys != nullptr;
    down.add(g);
    first += map.rank;
  }
  down.flush();
  first = 0;
  for (std::size_t j = 0; j < maps.size(); ++j) {
    const LinearMap<T>& map = maps[j];
    Gemm<T> g = gemm_to(y[j], rows, map.out);
    if (map.rank > 0) {
      g.then(columns(xa, first), map.lora_b, map.rank);
      g.scaled = 1, g.factor = map.scale;
    }
    g.then(x, map.w, in);
    g.bias = map.bias;
    up.add(g);
    first += map.rank;
  }
  up.flush();
}

template <class T>
void linear_group_bwd_input(Stream stream, Rows<T> dx, Rows<T> dxa, std::span<const Rows<const T>> dy, std::span<const LinearMap<T>> maps,
                            const DropoutMask& mask, int rows, int in) {
  check_group(maps.size());
  if (rows == 0) return;
  Launches<GemmForm::nn, T> launches(stream, mask);
  int first = 0;
  for (std::size_t j = 0; j < maps.size(); ++j) {
    if (maps[j].rank == 0) continue;
    Gemm<T> g = gemm_to(columns(dxa, first), rows, maps[j].rank);
    g.then(dy[j], maps[j].lora_b, maps[j].out);
    g.scaled = 1, g.factor = maps[j].scale;
    launches.add(g);
    first += maps[j].rank;
  }
  launches.flush();
  if (!dx.data) return;
  Gemm<T> g = gemm_to(dx, rows, in);
  first = 0;
  for (const LinearMap<T>& map : maps) {
    if (map.rank > 0) g.then(columns(dxa, first), map.lora_a, map.rank);
    first += map.rank;
  }
  g.scaled = g.count, g.factor = mask.inverse_keep, g.masked = mask.row_keys != nullptr && g.scaled > 0;
  for (std::size_t j = 0; j < maps.size(); ++j) g.then(dy[j], maps[j].w, maps[j].out);
  launches.add(g);
  launches.flush();
}

template <class T>
void linear_group_bwd_params(Stream stream, std::span<const LinearMapGrad> grads, std::span<const Rows<const T>> dy, Rows<const T> dxa,
                             Rows<const T> x, Rows<const T> xa, std::span<const LinearMap<T>> maps, const DropoutMask& mask, int rows,
                             int in) {
  check_group(maps.size());
  if (rows == 0) return;
  Launches<GemmForm::tn, T> launches(stream, mask);
  int first = 0;
  for (std::size_t j = 0; j < maps.size(); ++j) {
    const LinearMap<T>& map = maps[j];
    if (grads[j].dlora_a.data) {
      Gemm<T> g = gemm_onto<T>(grads[j].dlora_a, map.rank, in);
      g.then(columns(dxa, first), x, rows);
      g.scaled = 1, g.factor = mask.inverse_keep, g.masked = mask.row_keys != nullptr;
      launches.add(g);
    }
    if (grads[j].dlora_b.data) {
      Gemm<T> g = gemm_onto<T>(grads[j].dlora_b, map.out, map.rank);
      g.then(dy[j], columns(xa, first), rows);
      g.scaled = 1, g.factor = map.scale;
      launches.add(g);
    }
    if (grads[j].dw.data) {
      Gemm<T> g = gemm_onto<T>(grads[j].dw, map.out, in);
      g.then(dy[j], x, rows);
      launches.add(g);
    }
    if (grads[j].dbias)
      launch(stream, bias_bwd_kernel<T>, static_cast<unsigned>(div_up(map.out, kWarpSize)), kBiasRows * kWarpSize,
             kBiasRows * kWarpSize * sizeof(float), grads[j].dbias, dy[j], rows, map.out);
    first += map.rank;
  }
  launches.flush();
}

#define INSTANTIATE(T)                                                                                                          \
  template void linear_group_fwd(Stream, std::span<const Rows<T>>, Rows<T>, Rows<const T>, std::span<const LinearMap<T>>,       \
                                 const DropoutMask&, int, int);                                                                 \
  template void linear_group_bwd_input(Stream, Rows<T>, Rows<T>, std::span<const Rows<const T>>, std::span<const LinearMap<T>>, \
                                       const DropoutMask&, int, int);                                                           \
  template void linear_group_bwd_params(Stream, std::span<const LinearMapGrad>, std::span<const Rows<const T>>, Rows<const T>,  \
                                        Rows<const T>, Rows<const T>, std::span<const LinearMap<T>>, const DropoutMask&, int, int)
INSTANTIATE(bf16);
INSTANTIATE(float);
#undef INSTANTIATE

}  // namespace kava
