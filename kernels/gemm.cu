// A block owns a tile of C and walks the products in steps of 32 of k.
//
// bf16: a tile of kTile x kTile by four warps, each of which owns a quarter of it in mma fragments; operands come through kStages stages of
// asynchronous copies. Aligned: every chunk of 16 bytes lies wholly inside its operand or wholly outside, and is copied or zeroed at once.
// f32: 32 x 32, a thread owns 8 rows of one column. It is the form to compare by: summed in f64 and rounded once, so that three passes of
// latents leave what rounding there is to the other ops.
//
// A product in parts: grid.z of them, whose sums a second kernel adds.
#include "kernels/chunks.h"
#include "kernels/dropout.h"
#include "kernels/gemm.h"
#include "kernels/tile.h"

namespace kava {

namespace {

constexpr int kStep = 32, kThreads = 128;
constexpr bool a_by_k(GemmForm form) { return form == GemmForm::tn; }
constexpr bool b_by_k(GemmForm form) { return form != GemmForm::nt; }

/// What of the mask goes by the row: its sample, and its place there.
struct RowKey {
  int32_t sample, row;
};
__device__ __forceinline__ RowKey row_key(const DropoutMask& mask, int row) { return {mask.row_keys[2 * row], mask.row_keys[2 * row + 1]}; }
/// keys: the seed's, made on the host, so that each round has its two at hand among the kernel's parameters.
__device__ __forceinline__ void mask_bits(uint32_t (&bits)[4], const DropoutMask& mask, const PhiloxKeys& keys, RowKey row,
                                          int column_block) {
  dropout_bits(bits, keys, mask.step, mask.site, row.sample, row.row, static_cast<uint32_t>(column_block));
}

/// What of k a product of g has to be summed over for the columns of C from first_n on, in this block's part.
struct Stretch {
  int begin, count;
};
template <class T>
__device__ __forceinline__ Stretch needed(const Gemm<T>& g, int product, int first_n, int columns) {
  const int all = g.products[product].k;
  if (g.band_count == 0 || product + 1 < g.count) {
    // Of the last parts less may be left than nothing: they have no steps.
    const int length = div_up(div_up(all, g.parts), kStep) * kStep, from = static_cast<int>(blockIdx.z) * length, left = all - from;
    return {from, left < length ? left : length};
  }
  int begin = all, end = 0;
#pragma unroll
  for (int i = 0; i < Gemm<T>::kMostBands; ++i) {
    const Band& band = g.bands[i];
    if (i >= g.band_count || band.n_begin >= first_n + columns || band.n_end <= first_n) continue;
    begin = band.k_begin < begin ? band.k_begin : begin;
    end = band.k_end > end ? band.k_end : end;
  }
  // Whole mma steps of 16: which zeros are left out, which depends on the tile's width, then changes no sum.
  begin = begin / 16 * 16;
  end = div_up(end, 16) * 16 < all ? div_up(end, 16) * 16 : all;
  return end > begin ? Stretch{begin, end - begin} : Stretch{0, 0};
}
/// An operand from place k on of the dimension that is summed over.
template <bool kByK, class T>
__device__ __forceinline__ Rows<const T> from_k(Rows<const T> x, int k) {
  return {x.data + (kByK ? k * x.stride : k), x.stride};
}

// ---- bf16

constexpr int kStages = 3;

/// An operand on its way to shared memory: a block's rows of it, kStep of k at a time. Its tile has rows of k (kByK) or rows of the outer
/// dimension, m or n. A thread copies the chunks of one column of chunks, every kRowStep-th row.
template <bool kByK, int kTile, bool kAligned>
struct Operand {
  static constexpr int kRows = kByK ? kStep : kTile, kCols = kByK ? kTile : kStep;
  using TileType = Tile<kRows, kCols>;
  static constexpr int kRowStep = kThreads / TileType::kChunks, kTrips = kRows / kRowStep, kBytes = TileType::kBytes;

  const bf16 *next, *anywhere;  // the thread's first chunk of the next step, and any valid address
  int64_t stride;
  int row, col;     // of that chunk within the tile
  int outer, left;  // of the outer dimension from the tile's begin; of k from the next step's begin
  uint32_t place;   // of that chunk within the tile, in bytes

  __device__ Operand(Rows<const bf16> x, int first_outer, int outer_size, int k)
      : anywhere(x.data),
        stride(x.stride),
        row(static_cast<int>(threadIdx.x) / TileType::kChunks),
        col(static_cast<int>(threadIdx.x) % TileType::kChunks * 8),
        outer(outer_size - first_outer),
        left(k),
        place(TileType{0}.chunk(row, col / 8)) {
    next = kByK ? x[row] + first_outer + col : x[first_outer + row] + col;
  }

  /// Columns of the chunk in trip j that are there.
  __device__ __forceinline__ int there(int j) const {
    const int r = row + j * kRowStep;
    return r < (kByK ? left : outer) ? (kByK ? outer : left) - col : 0;
  }

  /// Starts the copies of the next step into the tile at `base`. Beyond the end of k they only write zeros.
  __device__ __forceinline__ void load(uint32_t base) {
#pragma unroll
    for (int j = 0; j < kTrips; ++j) {
      // The permutation of a tile's chunks repeats after kRowStep rows.
      const uint32_t dst = base + place + static_cast<uint32_t>(j * kRowStep * TileType::kChunks * 16);
      const bf16* src = next + j * kRowStep * stride;
      const int count = there(j);
      if constexpr (kAligned) cp_async_16(dst, count > 0 ? src : anywhere, count > 0 ? 16 : 0);
      else put_chunk(dst, src, count);
    }
    next += kByK ? kStep * stride : kStep;
    left -= kStep;
  }

  /// Of the rows whose chunks this thread loads of a tile that begins at row `first` of x; beyond the end, where the tile is zero, the last
  /// one's.
  struct RowKeys {
    RowKey of[kTrips];
  };
  __device__ __forceinline__ RowKeys row_keys(const DropoutMask& mask, int first, int end) const {
    RowKeys keys;
#pragma unroll
    for (int j = 0; j < kTrips; ++j) {
      const int r = first + row + j * kRowStep;
      keys.of[j] = row_key(mask, r < end ? r : end - 1);
    }
    return keys;
  }
  /// Zeros what the mask drops of the tile at `base`, whose rows are rows of x, from x's column first_col on: each thread the chunks that
  /// it loaded itself.
  __device__ __forceinline__ void drop(uint32_t base, const DropoutMask& mask, const PhiloxKeys& keys, const RowKeys& rows,
                                       int first_col) const {
#pragma unroll
    for (int j = 0; j < kTrips; ++j) {
      uint32_t bits[4], *chunk = smem_words(base + place + static_cast<uint32_t>(j * kRowStep * TileType::kChunks * 16));
      mask_bits(bits, mask, keys, rows.of[j], (first_col + col) / 8);
      Bytes16 bytes = load_16(chunk);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t low = (bits[w] & 0xffffu) >= mask.threshold ? 0xffffu : 0u,
                       high = bits[w] >> 16 >= mask.threshold ? 0xffff0000u : 0u;
        bytes.word[w] &= low | high;
      }
      store_16(chunk, bytes);
    }
  }
};

__device__ __forceinline__ bool chunks_at_16(Rows<bf16> x) {
  return reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && x.stride % 8 == 0;
}
__device__ __forceinline__ bool pairs_at_8(Rows<float> x) { return reinterpret_cast<std::uintptr_t>(x.data) % 8 == 0 && x.stride % 2 == 0; }

/// A warp's kSize x kSize of C from (row, col) on.
template <GemmForm form, int kSize>
struct WarpSum {
  int row, col;
  float acc[kSize / 16][kSize / 8][4] = {};

  /// Adds one step; warp_m, warp_n: the warp's place in the block's tile.
  template <class TileA, class TileB>
  __device__ __forceinline__ void add(TileA a_smem, TileB b_smem, int warp_m, int warp_n) {
#pragma unroll
    for (int k = 0; k < kStep; k += 16) {
      uint32_t a[kSize / 16][4];
#pragma unroll
      for (int i = 0; i < kSize / 16; ++i) load_a<a_by_k(form)>(a[i], a_smem, warp_m + i * 16, k);
#pragma unroll
      for (int j = 0; j < kSize / 16; ++j) {
        uint32_t b[2][2];
        load_b<b_by_k(form)>(b, b_smem, warp_n + j * 16, k);
#pragma unroll
        for (int i = 0; i < kSize / 16; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half) mma_m16n8k16_bf16(acc[i][2 * j + half], a[i], b[half]);
      }
    }
  }

  /// Factor and mask of the scaled sum. Eight columns are one block of the mask, of which a thread holds the pair `lane % 4` in each of
  /// four blocks: the four threads draw a block each and exchange the words.
  template <bool kMasked>
  __device__ __forceinline__ void finish_scaled(const Gemm<bf16>& g, const PhiloxKeys& keys) {
    const AccumulatorPlace place;
#pragma unroll
    for (int i = 0; i < kSize / 16; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = row + i * 16 + place.row(2 * h);
        RowKey key;
        if constexpr (kMasked) key = row_key(g.mask, r < g.m ? r : g.m - 1);
#pragma unroll
        for (int first = 0; first < kSize / 8; first += 4) {
          uint32_t bits[4];
          if constexpr (kMasked) {
            mask_bits(bits, g.mask, keys, key, col / 8 + first + place.lane % 4);
            transpose_words(bits);
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            float &low = acc[i][first + j][2 * h], &high = acc[i][first + j][2 * h + 1];
            low *= g.factor, high *= g.factor;
            if constexpr (kMasked) {
              if ((bits[j] & 0xffffu) < g.mask.threshold) low = 0;
              if (bits[j] >> 16 < g.mask.threshold) high = 0;
            }
          }
        }
      }
  }

  /// Four blocks of eight columns at a time: bf16 goes in chunks of 16 bytes, f32 in pairs.
  __device__ __forceinline__ void store(const Gemm<bf16>& g) {
    const AccumulatorPlace place;
    const bool whole = chunks_at_16(g.set), pairs = pairs_at_8(g.set_sum) && pairs_at_8(g.add);
#pragma unroll
    for (int first = 0; first < kSize / 8; first += 4) {
      if (g.bias) {
#pragma unroll
        for (int j = first; j < first + 4; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int c = col + j * 8 + place.col(e);
            const float bias = c < g.n ? to_float(g.bias[c]) : 0.f;
#pragma unroll
            for (int i = 0; i < kSize / 16; ++i) acc[i][j][e] += bias, acc[i][j][2 + e] += bias;
          }
      }
#pragma unroll
      for (int i = 0; i < kSize / 16; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int r = row + i * 16 + place.row(2 * h);
          if (g.set.data) {
            uint32_t chunk[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) chunk[j] = pack_bf16(acc[i][first + j][2 * h], acc[i][first + j][2 * h + 1]);
            transpose_words(chunk);
            store_chunk(r < g.m ? g.set[r] : nullptr, col + (first + place.lane % 4) * 8, g.n, whole, chunk);
          } else if (r < g.m) {
#pragma unroll
            for (int j = first; j < first + 4; ++j) {
              const int c = col + j * 8 + place.col(0), count = g.n - c;
              if (g.set_sum.data)
                store_pair<false>(g.set_sum[r + static_cast<int64_t>(blockIdx.z) * g.m] + c, pairs, count, acc[i][j][2 * h],
                                  acc[i][j][2 * h + 1]);
              else store_pair<true>(g.add[r] + c, pairs, count, acc[i][j][2 * h], acc[i][j][2 * h + 1]);
            }
          }
        }
    }
  }
};

/// Where the mask acts.
enum class Masked { nowhere, operand, scaled_sum };

template <GemmForm form, int kTile, bool kAligned, Masked masked>
__global__ void __launch_bounds__(kThreads, 2)
    gemm_bf16_kernel(const __grid_constant__ Gemm<bf16> g, const __grid_constant__ PhiloxKeys keys) {
  constexpr int kWarpSize_ = kTile / 2;
  using A = Operand<a_by_k(form), kTile, kAligned>;
  using B = Operand<b_by_k(form), kTile, kAligned>;
  constexpr uint32_t kStageBytes = A::kBytes + B::kBytes;
  constexpr bool kDropsA = masked == Masked::operand && form == GemmForm::nt, kDropsB = masked == Masked::operand && form == GemmForm::tn;
  const int first_n = static_cast<int>(blockIdx.x) * kTile, first_m = static_cast<int>(blockIdx.y) * kTile;
  const uint32_t smem = smem_addr(dynamic_smem<unsigned char>());
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, warp_m = warp / 2 * kWarpSize_, warp_n = warp % 2 * kWarpSize_;
  WarpSum<form, kWarpSize_> sum{first_m + warp_m, first_n + warp_n};
  const bool works = sum.row < g.m && sum.col < g.n;  // else the warp only helps to copy

  for (int product = 0;; ++product) {
    if (product == g.scaled) sum.template finish_scaled<masked == Masked::scaled_sum>(g, keys);
    if (product == g.count) break;
    const Product<bf16>& p = g.products[product];
    const Stretch k = needed(g, product, first_n, kTile);
    const int steps = div_up(k.count, kStep);
    A a(from_k<a_by_k(form)>(p.a, k.begin), first_m, g.m, k.count);
    B b(from_k<b_by_k(form)>(p.b, k.begin), first_n, g.n, k.count);
#pragma unroll
    for (uint32_t stage = 0; stage + 1 < kStages; ++stage) {
      a.load(smem + stage * kStageBytes);
      b.load(smem + stage * kStageBytes + A::kBytes);
      cp_async_commit();
    }
    uint32_t at = smem, ahead = smem + (kStages - 1) * kStageBytes;
    auto next_stage = [&](uint32_t stage) { return stage == smem + (kStages - 1) * kStageBytes ? smem : stage + kStageBytes; };
    [[maybe_unused]] typename A::RowKeys a_rows;
    [[maybe_unused]] typename B::RowKeys b_rows;
    if constexpr (kDropsA) a_rows = a.row_keys(g.mask, first_m, g.m);
    for (int step = 0; step < steps; ++step) {
      if constexpr (kDropsB) b_rows = b.row_keys(g.mask, k.begin + step * kStep, k.begin + k.count);
      cp_async_wait<kStages - 2>();
      if constexpr (kDropsA) a.drop(at, g.mask, keys, a_rows, k.begin + step * kStep);
      if constexpr (kDropsB) b.drop(at + A::kBytes, g.mask, keys, b_rows, first_n);
      __syncthreads();  // the step's operands are complete for all threads, and the stage before it has been read by all
      a.load(ahead);
      b.load(ahead + A::kBytes);
      cp_async_commit();
      if (works) sum.add(typename A::TileType{at}, typename B::TileType{at + A::kBytes}, warp_m, warp_n);
      at = next_stage(at), ahead = next_stage(ahead);
    }
    cp_async_wait<0>();
    __syncthreads();  // the last steps have been read before the next product's copies overwrite them
  }
  if (works) sum.store(g);
}

template <GemmForm form>
bool all_aligned(const Gemm<bf16>& g) {
  for (int i = 0; i < g.count; ++i) {
    const Product<bf16>& p = g.products[i];
    if (!rows_at_16(p.a) || (a_by_k(form) ? g.m : p.k) % 8 != 0 || !rows_at_16(p.b) || (b_by_k(form) ? g.n : p.k) % 8 != 0) return false;
  }
  return true;
}

// ---- f32

constexpr int kTileF32 = 32, kPitch = kTileF32 + 1, kRowsOfThread = kTileF32 * kTileF32 / kThreads;

/// The rows and columns of an operand that a block reads in one step.
struct Panel {
  Rows<const float> x;
  int first_row, rows, first_col, cols;  // of x; rows, cols: of all of x

  __device__ const float* row(int r) const { return first_row + r < rows ? x[first_row + r] + first_col : nullptr; }
};

/// Panel of the operand that runs over `outer` (m or n) and k.
template <bool kByK>
__device__ Panel panel(Rows<const float> x, int first_outer, int outer, int first_k, int k) {
  if constexpr (kByK) return {x, first_k, k, first_outer, outer};
  else return {x, first_outer, outer, first_k, k};
}

/// tile[outer][k] of a panel of 32 x 32; a thread loads 8 columns, one block of the mask.
template <bool kByK>
__device__ __forceinline__ void load_panel(float* tile, const Panel& p, bool masked, const DropoutMask& mask, const PhiloxKeys& keys) {
  const int r = static_cast<int>(threadIdx.x) / 4, c0 = static_cast<int>(threadIdx.x) % 4 * 8;
  const float* src = p.row(r);
  uint32_t bits[4] = {};
  masked = masked && src;
  if (masked) mask_bits(bits, mask, keys, row_key(mask, p.first_row + r), (p.first_col + c0) / 8);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int c = c0 + i;
    const bool there = src && p.first_col + c < p.cols && (!masked || dropout_keep(bits, static_cast<uint32_t>(i), mask.threshold));
    tile[kByK ? c * kPitch + r : r * kPitch + c] = there ? src[c] : 0.f;
  }
}

template <GemmForm form>
__global__ void __launch_bounds__(kThreads, 2)
    gemm_f32_kernel(const __grid_constant__ Gemm<float> g, const __grid_constant__ PhiloxKeys keys) {
  constexpr bool kAByK = a_by_k(form), kBByK = b_by_k(form);
  const int first_n = static_cast<int>(blockIdx.x) * kTileF32, first_m = static_cast<int>(blockIdx.y) * kTileF32;
  float *a_smem = dynamic_smem<float>(), *b_smem = a_smem + kTileF32 * kPitch;
  const int n = static_cast<int>(threadIdx.x) % kTileF32, m = static_cast<int>(threadIdx.x) / kTileF32 * kRowsOfThread, col = first_n + n;
  double acc[kRowsOfThread] = {};
  auto finish_scaled = [&] {
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      bool kept = true;
      if (form == GemmForm::nn && g.masked && first_m + m + i < g.m) {
        uint32_t bits[4];
        mask_bits(bits, g.mask, keys, row_key(g.mask, first_m + m + i), col / 8);
        const int pair = col % 8 / 2;
        const uint32_t word = pair == 0 ? bits[0] : pair == 1 ? bits[1] : pair == 2 ? bits[2] : bits[3];
        kept = (col % 2 ? word >> 16 : word & 0xffffu) >= g.mask.threshold;
      }
      acc[i] = kept ? acc[i] * g.factor : 0.0;
    }
  };

  for (int product = 0; product < g.count; ++product) {
    if (product == g.scaled) finish_scaled();
    const Stretch k = needed(g, product, first_n, kTileF32);
    const Rows<const float> a = from_k<kAByK>(g.products[product].a, k.begin), b = from_k<kBByK>(g.products[product].b, k.begin);
    for (int first_k = 0; first_k < k.count; first_k += kStep) {
      load_panel<kAByK>(a_smem, panel<kAByK>(a, first_m, g.m, first_k, k.count), form == GemmForm::nt && g.masked, g.mask, keys);
      load_panel<kBByK>(b_smem, panel<kBByK>(b, first_n, g.n, first_k, k.count), form == GemmForm::tn && g.masked, g.mask, keys);
      __syncthreads();  // the step's operands are complete for all threads
      for (int at = 0; at < kStep; ++at) {
        const float b_at = b_smem[n * kPitch + at];
#pragma unroll
        for (int i = 0; i < kRowsOfThread; ++i) acc[i] += static_cast<double>(a_smem[(m + i) * kPitch + at]) * b_at;
      }
      __syncthreads();  // the operands are read before the next step overwrites them
    }
  }
  if (g.scaled == g.count) finish_scaled();

#pragma unroll
  for (int i = 0; i < kRowsOfThread; ++i)
    if (const int r = first_m + m + i; r < g.m && col < g.n) {
      const float v = static_cast<float>(acc[i]) + (g.bias ? g.bias[col] : 0.f);
      if (g.set.data) g.set[r][col] = v;
      else if (g.set_sum.data) g.set_sum[r][col] = v;
      else g.add[r][col] += v;
    }
}

// ---- parts

/// y = or += factor times the sum of the parts, in their order.
template <class Y, bool kAdd, bool kAligned>
struct AddParts {
  static constexpr int kLoads = 2, kColumns = kHalfChunk;
  using Chunk = ColumnsOf<kColumns>;
  Rows<Y> y;
  Rows<const float> partial;
  int parts, m, n;
  float factor;

  __device__ Chunk load(int64_t r, int first) const {
    Chunk sum = load_columns<float, kAligned, kColumns>(partial[r], first, n);
#pragma unroll 4
    for (int part = 1; part < parts; ++part) {
      const Chunk x = load_columns<float, kAligned, kColumns>(partial[r + static_cast<int64_t>(part) * m], first, n);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sum.at[i] += x.at[i];
    }
    return sum;
  }
  __device__ void store(int64_t r, int first, const Chunk& sum) const {
    Chunk v = {};
    if constexpr (kAdd) v = load_columns<Y, kAligned, kColumns>(y[r], first, n);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) v.at[i] = fmaf(sum.at[i], factor, v.at[i]);  // of aligned rows and others alike
    store_columns<Y, kAligned>(y[r], first, n, v);
  }
};

template <class Y, bool kAdd>
void add_parts(Stream stream, Rows<Y> y, const Gemm<bf16>& g) {
  dispatch_aligned(chunked(y, g.n), [&]<bool kAligned>() {
    map_chunks(stream, AddParts<Y, kAdd, kAligned>{y, g.partial, g.parts, g.m, g.n, g.factor}, g.m, g.n);
  });
}

template <class T>
dim3 gemm_grid(const Gemm<T>& g, int tile) {
  return dim3(static_cast<unsigned>(div_up(g.n, tile)), static_cast<unsigned>(div_up(g.m, tile)), static_cast<unsigned>(g.parts));
}

template <GemmForm form, int kTile, bool kAligned, Masked masked>
void launch_bf16(Stream stream, const Gemm<bf16>& g) {
  constexpr std::size_t kSmem = kStages * 2 * std::size_t{kTile} * kStep * sizeof(bf16);
  launch(stream, gemm_bf16_kernel<form, kTile, kAligned, masked>, gemm_grid(g, kTile), kThreads, kSmem, g, dropout_keys(g.mask.seed));
}

/// Where tiles of 128 are worth their coarser grid. Either size gives the same bytes.
bool large(const Gemm<bf16>& g) { return large_tiles(g.m, g.n) * g.parts >= kGemmBlocks * 3 / 4; }

template <GemmForm form>
void launch_bf16(Stream stream, const Gemm<bf16>& g) {
  constexpr Masked kPlace = form == GemmForm::nn ? Masked::scaled_sum : Masked::operand;
  if (!all_aligned<form>(g)) {
    if (g.masked) launch_bf16<form, 64, false, kPlace>(stream, g);
    else launch_bf16<form, 64, false, Masked::nowhere>(stream, g);
  } else if (large(g)) {
    if (g.masked) launch_bf16<form, 128, true, kPlace>(stream, g);
    else launch_bf16<form, 128, true, Masked::nowhere>(stream, g);
  } else {
    if (g.masked) launch_bf16<form, 64, true, kPlace>(stream, g);
    else launch_bf16<form, 64, true, Masked::nowhere>(stream, g);
  }
}

}  // namespace

template <GemmForm form, class T>
void gemm(Stream stream, const Gemm<T>& g) {
  if (g.m == 0 || g.n == 0) return;
  if constexpr (sizeof(T) == 2) {
    if (!g.partial.data) return launch_bf16<form>(stream, g);
    Gemm<bf16> cut = g;
    cut.set = {}, cut.add = {}, cut.set_sum = g.partial, cut.scaled = 0;
    launch_bf16<form>(stream, cut);
    if (g.add.data) add_parts<float, true>(stream, g.add, g);
    else add_parts<bf16, false>(stream, g.set, g);
  } else {
    launch(stream, gemm_f32_kernel<form>, gemm_grid(g, kTileF32), kThreads, 2 * kTileF32 * kPitch * sizeof(float), g,
           dropout_keys(g.mask.seed));
  }
}

template void gemm<GemmForm::nt>(Stream, const Gemm<bf16>&);
template void gemm<GemmForm::nn>(Stream, const Gemm<bf16>&);
template void gemm<GemmForm::tn>(Stream, const Gemm<bf16>&);
template void gemm<GemmForm::nt>(Stream, const Gemm<float>&);
template void gemm<GemmForm::nn>(Stream, const Gemm<float>&);
template void gemm<GemmForm::tn>(Stream, const Gemm<float>&);

}  // namespace kava
