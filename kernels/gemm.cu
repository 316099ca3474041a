// A block owns a tile of C of one problem (blockIdx.z) and walks its products in steps of 32 of k. bf16: 64 x 64, a warp owns 32 x 32 of it
// in mma fragments, operands come through a double buffer. f32: 32 x 32, a thread owns 8 rows of one column.
#include "kernels/dropout.h"
#include "kernels/gemm.h"
#include "kernels/tile.h"

namespace kava {

namespace {

constexpr int kStep = 32, kThreads = 128;
constexpr bool a_by_k(GemmForm form) { return form == GemmForm::tn; }
constexpr bool b_by_k(GemmForm form) { return form != GemmForm::nt; }

__device__ __forceinline__ void mask_bits(uint32_t (&bits)[4], const DropoutMask& mask, int row, int column_block) {
  dropout_bits(bits, mask.seed, mask.step, mask.site, mask.row_keys[2 * row], mask.row_keys[2 * row + 1],
               static_cast<uint32_t>(column_block));
}

/// The rows and columns of an operand that a block reads in one step.
template <class T>
struct Panel {
  Rows<const T> x;
  int first_row, rows, first_col, cols;  // of x; rows, cols: of all of x

  __device__ const T* row(int r) const { return first_row + r < rows ? x[first_row + r] + first_col : nullptr; }
};

/// Panel of the operand that runs over `outer` (m or n) and k.
template <bool kByK, class T>
__device__ Panel<T> panel(Rows<const T> x, int first_outer, int outer, int first_k, int k) {
  if constexpr (kByK) return {x, first_k, k, first_outer, outer};
  else return {x, first_outer, outer, first_k, k};
}

/// A walk over all steps of all products.
template <class T>
struct Walk {
  int product = 0, k = 0;

  __device__ bool at_end(const Gemm<T>& g) const { return product == g.count; }
  __device__ void advance(const Gemm<T>& g) {
    k += kStep;
    if (k < g.products[product].k) return;
    k = 0;
    ++product;
  }
  /// Whether the scaled sum is complete before this step.
  __device__ bool after_scaled(const Gemm<T>& g) const { return k == 0 && product == g.scaled; }
};

// ---- bf16

constexpr int kTile = 64, kWarpTile = 32;
template <bool kByK>
using OperandTile = std::conditional_t<kByK, Tile<kStep, kTile>, Tile<kTile, kStep>>;
constexpr int kOperandBytes = kTile * kStep * 2, kStageBytes = 2 * kOperandBytes;

__device__ __forceinline__ bool aligned(Rows<const bf16> x) { return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride % 8 == 0; }

template <class TileType>
__device__ __forceinline__ void load_panel(TileType tile, const Panel<bf16>& p) {
  load_tile<kThreads>(tile, p.cols - p.first_col, p.x.data, aligned(p.x), [&](int r) { return p.row(r); });
}

/// Zeros what the mask drops, each thread the chunks that it loaded itself.
template <class TileType>
__device__ __forceinline__ void mask_panel(TileType tile, const Panel<bf16>& p, const DropoutMask& mask) {
  for (int i = static_cast<int>(threadIdx.x); i < TileType::kChunkCount; i += kThreads) {
    const int r = i / TileType::kChunks, c = i % TileType::kChunks;
    if (p.first_row + r >= p.rows) continue;
    uint32_t bits[4], *words = smem_words(tile.chunk(r, c));
    mask_bits(bits, mask, p.first_row + r, p.first_col / 8 + c);
    for (int w = 0; w < 4; ++w) {
      const uint32_t low = dropout_keep(bits, 2 * w, mask.threshold) ? 0xffffu : 0u,
                     high = dropout_keep(bits, 2 * w + 1, mask.threshold) ? 0xffff0000u : 0u;
      words[w] &= low | high;
    }
  }
}

/// A warp's 32 x 32 of C from (row, col) on.
template <GemmForm form>
struct WarpSum {
  int row, col;
  float acc[kWarpTile / 16][kWarpTile / 8][4] = {};

  /// Adds one step; warp_m, warp_n: the warp's place in the block's tile.
  __device__ __forceinline__ void add(OperandTile<a_by_k(form)> a_smem, OperandTile<b_by_k(form)> b_smem, int warp_m, int warp_n) {
#pragma unroll
    for (int k = 0; k < kStep; k += 16) {
      uint32_t a[kWarpTile / 16][4];
#pragma unroll
      for (int i = 0; i < kWarpTile / 16; ++i) load_a<a_by_k(form)>(a[i], a_smem, warp_m + i * 16, k);
#pragma unroll
      for (int j = 0; j < kWarpTile / 16; ++j) {
        uint32_t b[2][2];
        load_b<b_by_k(form)>(b, b_smem, warp_n + j * 16, k);
#pragma unroll
        for (int i = 0; i < kWarpTile / 16; ++i)
          for (int half = 0; half < 2; ++half) mma_m16n8k16_bf16(acc[i][2 * j + half], a[i], b[half]);
      }
    }
  }

  /// Factor and mask of the scaled sum. The 8 columns of an accumulator are one block of the mask.
  __device__ __forceinline__ void finish_scaled(const Gemm<bf16>& g, const DropoutMask& mask) {
    const AccumulatorPlace place;
#pragma unroll
    for (int i = 0; i < kWarpTile / 16; ++i)
#pragma unroll
      for (int j = 0; j < kWarpTile / 8; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int r = row + i * 16 + place.row(2 * h);
          const bool masked = form == GemmForm::nn && g.masked && r < g.m;
          uint32_t bits[4];
          if (masked) mask_bits(bits, mask, r, col / 8 + j);
          for (int e = 0; e < 2; ++e) {
            const bool kept = !masked || dropout_keep(bits, static_cast<uint32_t>(place.col(e)), mask.threshold);
            acc[i][j][2 * h + e] = kept ? acc[i][j][2 * h + e] * g.factor : 0.f;
          }
        }
  }

  __device__ __forceinline__ void store(const Gemm<bf16>& g) const {
    const AccumulatorPlace place;
#pragma unroll
    for (int i = 0; i < kWarpTile / 16; ++i)
#pragma unroll
      for (int j = 0; j < kWarpTile / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = row + i * 16 + place.row(e), c = col + j * 8 + place.col(e);
          if (r >= g.m || c >= g.n) continue;
          const float v = acc[i][j][e] + (g.bias ? to_float(g.bias[c]) : 0.f);
          if (g.set.data) g.set[r][c] = from_float<bf16>(v);
          else g.add[r][c] += v;
        }
  }
};

template <GemmForm form>
__global__ void __launch_bounds__(kThreads, 2) gemm_bf16_kernel(const __grid_constant__ GemmBatch<bf16> batch) {
  constexpr bool kAByK = a_by_k(form), kBByK = b_by_k(form);
  const Gemm<bf16>& g = batch.gemms[blockIdx.z];
  const int first_n = static_cast<int>(blockIdx.x) * kTile, first_m = static_cast<int>(blockIdx.y) * kTile;
  if (first_m >= g.m || first_n >= g.n) return;
  const uint32_t smem = smem_addr(dynamic_smem<unsigned char>());
  auto a_smem = [&](int stage) { return OperandTile<kAByK>{smem + static_cast<uint32_t>(stage * kStageBytes)}; };
  auto b_smem = [&](int stage) { return OperandTile<kBByK>{smem + static_cast<uint32_t>(stage * kStageBytes + kOperandBytes)}; };
  auto a_panel = [&](const Walk<bf16>& at) { return panel<kAByK>(g.products[at.product].a, first_m, g.m, at.k, g.products[at.product].k); };
  auto b_panel = [&](const Walk<bf16>& at) { return panel<kBByK>(g.products[at.product].b, first_n, g.n, at.k, g.products[at.product].k); };
  auto load = [&](const Walk<bf16>& at, int stage) {
    load_panel(a_smem(stage), a_panel(at));
    load_panel(b_smem(stage), b_panel(at));
  };

  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, warp_m = warp / 2 * kWarpTile, warp_n = warp % 2 * kWarpTile;
  WarpSum<form> sum{first_m + warp_m, first_n + warp_n};
  Walk<bf16> at, ahead;
  load(ahead, 0);
  cp_async_commit();
  for (int stage = 0; !at.at_end(g); at = ahead, stage ^= 1) {
    ahead.advance(g);
    if (!ahead.at_end(g)) load(ahead, stage ^ 1);
    cp_async_commit();
    cp_async_wait<1>();
    if (form == GemmForm::nt && g.masked) mask_panel(a_smem(stage), a_panel(at), batch.mask);
    if (form == GemmForm::tn && g.masked) mask_panel(b_smem(stage), b_panel(at), batch.mask);
    __syncthreads();  // the step's operands are complete for all threads
    if (at.after_scaled(g)) sum.finish_scaled(g, batch.mask);
    sum.add(a_smem(stage), b_smem(stage), warp_m, warp_n);
    __syncthreads();  // the stage is read before the next but one load overwrites it
  }
  if (g.scaled == g.count) sum.finish_scaled(g, batch.mask);
  sum.store(g);
}

// ---- f32

constexpr int kTileF32 = 32, kPitch = kTileF32 + 1, kRowsOfThread = kTileF32 * kTileF32 / kThreads;

/// tile[outer][k] of a panel of 32 x 32; a thread loads 8 columns, one block of the mask.
template <bool kByK>
__device__ __forceinline__ void load_panel(float* tile, const Panel<float>& p, bool masked, const DropoutMask& mask) {
  const int r = static_cast<int>(threadIdx.x) / 4, c0 = static_cast<int>(threadIdx.x) % 4 * 8;
  const float* src = p.row(r);
  uint32_t bits[4] = {};
  masked = masked && src;
  if (masked) mask_bits(bits, mask, p.first_row + r, (p.first_col + c0) / 8);
  for (int c = c0; c < c0 + 8; ++c) {
    const bool there = src && p.first_col + c < p.cols && (!masked || dropout_keep(bits, static_cast<uint32_t>(c), mask.threshold));
    tile[kByK ? c * kPitch + r : r * kPitch + c] = there ? src[c] : 0.f;
  }
}

template <GemmForm form>
__global__ void __launch_bounds__(kThreads, 2) gemm_f32_kernel(const __grid_constant__ GemmBatch<float> batch) {
  constexpr bool kAByK = a_by_k(form), kBByK = b_by_k(form);
  const Gemm<float>& g = batch.gemms[blockIdx.z];
  const int first_n = static_cast<int>(blockIdx.x) * kTileF32, first_m = static_cast<int>(blockIdx.y) * kTileF32;
  if (first_m >= g.m || first_n >= g.n) return;
  float *a_smem = dynamic_smem<float>(), *b_smem = a_smem + kTileF32 * kPitch;
  const int n = static_cast<int>(threadIdx.x) % kTileF32, m = static_cast<int>(threadIdx.x) / kTileF32 * kRowsOfThread, col = first_n + n;
  float acc[kRowsOfThread] = {};
  auto finish_scaled = [&] {
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      uint32_t bits[4];
      bool kept = true;
      if (form == GemmForm::nn && g.masked && first_m + m + i < g.m) {
        mask_bits(bits, batch.mask, first_m + m + i, col / 8);
        kept = dropout_keep(bits, static_cast<uint32_t>(col), batch.mask.threshold);
      }
      acc[i] = kept ? acc[i] * g.factor : 0.f;
    }
  };

  for (Walk<float> at; !at.at_end(g); at.advance(g)) {
    const Product<float>& p = g.products[at.product];
    load_panel<kAByK>(a_smem, panel<kAByK>(p.a, first_m, g.m, at.k, p.k), form == GemmForm::nt && g.masked, batch.mask);
    load_panel<kBByK>(b_smem, panel<kBByK>(p.b, first_n, g.n, at.k, p.k), form == GemmForm::tn && g.masked, batch.mask);
    __syncthreads();  // the step's operands are complete for all threads
    if (at.after_scaled(g)) finish_scaled();
    for (int k = 0; k < kStep; ++k) {
      const float b = b_smem[n * kPitch + k];
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) acc[i] += a_smem[(m + i) * kPitch + k] * b;
    }
    __syncthreads();  // the operands are read before the next step overwrites them
  }
  if (g.scaled == g.count) finish_scaled();

#pragma unroll
  for (int i = 0; i < kRowsOfThread; ++i) {
    const int row = first_m + m + i;
    if (row >= g.m || col >= g.n) continue;
    const float v = acc[i] + (g.bias ? g.bias[col] : 0.f);
    if (g.set.data) g.set[row][col] = v;
    else g.add[row][col] += v;
  }
}

template <class T>
dim3 gemm_grid(const GemmBatch<T>& batch, int tile) {
  int m = 0, n = 0;
  for (int i = 0; i < batch.count; ++i) {
    m = batch.gemms[i].m > m ? batch.gemms[i].m : m;
    n = batch.gemms[i].n > n ? batch.gemms[i].n : n;
  }
  return dim3(static_cast<unsigned>(div_up(n, tile)), static_cast<unsigned>(div_up(m, tile)), static_cast<unsigned>(batch.count));
}

}  // namespace

template <GemmForm form, class T>
void gemm(Stream stream, const GemmBatch<T>& batch) {
  if (batch.count == 0) return;
  if constexpr (sizeof(T) == 2) launch(stream, gemm_bf16_kernel<form>, gemm_grid(batch, kTile), kThreads, 2 * kStageBytes, batch);
  else launch(stream, gemm_f32_kernel<form>, gemm_grid(batch, kTileF32), kThreads, 2 * kTileF32 * kPitch * sizeof(float), batch);
}

template void gemm<GemmForm::nt>(Stream, const GemmBatch<bf16>&);
template void gemm<GemmForm::nn>(Stream, const GemmBatch<bf16>&);
template void gemm<GemmForm::tn>(Stream, const GemmBatch<bf16>&);
template void gemm<GemmForm::nt>(Stream, const GemmBatch<float>&);
template void gemm<GemmForm::nn>(Stream, const GemmBatch<float>&);
template void gemm<GemmForm::tn>(Stream, const GemmBatch<float>&);

}  // namespace kava
