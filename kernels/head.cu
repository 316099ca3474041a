// What follows the head's product: for each row of logits z [V] its maximum, the sum of exp(z - max), the first index of the maximum, the
// negative log-likelihood of the target, and the gradient weight (softmax - onehot); then the sums of the losses by class.
//
// A block owns a row. It walks the row once with a running maximum and sum per thread, and once more for the gradient; of each stretch of
// the row a thread owns two chunks of four columns. The gradient may take the place of the logits: where it is narrower, a stretch of it
// lies on logits of this stretch or earlier ones, which all threads have read by then.
#include "kernels/chunks.h"
#include "kernels/draw.h"

namespace kava {

namespace {

constexpr int kHeadThreads = 256, kHeadWarps = kHeadThreads / kWarpSize;

constexpr int kFar = kHeadThreads * kHalfChunk, kStretch = 2 * kFar;

/// Where in the row a thread's column i lies, of the stretch in which its first one is `first`.
__device__ __forceinline__ int column(int first, int i) { return first + (i < kHalfChunk ? i : kFar + i - kHalfChunk); }
__device__ __forceinline__ int first_column() { return static_cast<int>(threadIdx.x) * kHalfChunk; }

template <bool kAligned>
__device__ __forceinline__ Columns load_both(const float* z, int first, int V) {
  const auto near = load_columns<float, kAligned, kHalfChunk>(z, first, V);
  auto far = near;
  if (first + kFar < V) far = load_columns<float, kAligned, kHalfChunk>(z, first + kFar, V);
  return {near.at[0], near.at[1], near.at[2], near.at[3], far.at[0], far.at[1], far.at[2], far.at[3]};
}

/// Maximum of some logits, the first place where it stands, and the sum of exp(z - most).
struct Softmax {
  float most = -INFINITY, sum = 0;
  int best = 0x7fffffff;

  __device__ __forceinline__ void merge(float most_, float sum_, int best_) {
    const float high = most_ > most ? most_ : most;
    if (most_ > most || (most_ == most && best_ < best)) best = best_;
    // -infinity on both sides: nothing was seen yet.
    sum = (most == high ? sum : sum * expf(most - high)) + (most_ == high ? sum_ : sum_ * expf(most_ - high));
    most = high;
  }
};

template <bool kAligned>
__device__ __forceinline__ Softmax row_softmax(const float* z, int V) {
  Softmax s;
  for (int first = first_column(); first < V; first += kStretch) {
    const Columns x = load_both<kAligned>(z, first, V);
    float most = x.at[0];
    int best = first;
#pragma unroll
    for (int i = 1; i < kChunk; ++i)
      if (column(first, i) < V && x.at[i] > most) most = x.at[i], best = column(first, i);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (column(first, i) < V) sum += expf(x.at[i] - most);
    s.merge(most, sum, best);
  }
  float* scratch = dynamic_smem<float>();
  for (int step = 1; step < kWarpSize; step *= 2) {
    const float most = __shfl_xor_sync(kAllLanes, s.most, step), sum = __shfl_xor_sync(kAllLanes, s.sum, step);
    const int best = __shfl_xor_sync(kAllLanes, s.best, step);
    s.merge(most, sum, best);
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  if (threadIdx.x % kWarpSize == 0)
    scratch[3 * warp] = s.most, scratch[3 * warp + 1] = s.sum, scratch[3 * warp + 2] = __int_as_float(s.best);
  __syncthreads();  // every warp's part is there
  Softmax all;
  for (int w = 0; w < kHeadWarps; ++w) all.merge(scratch[3 * w], scratch[3 * w + 1], __float_as_int(scratch[3 * w + 2]));
  return all;
}

template <class T>
struct HeadRows {
  float* nll;
  int32_t *best, *hit;
  Rows<T> dz;
  Rows<const float> z;
  const int32_t *targets, *classes;
  float weights[2];
  int V;
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kHeadThreads) head_rows_kernel(const __grid_constant__ HeadRows<T> p) {
  const int64_t r = blockIdx.x;
  const float* z = p.z[r];
  const Softmax s = row_softmax<kAligned>(z, p.V);
  const int target = p.targets ? p.targets[r] : 0;
  if (threadIdx.x == 0) {
    const int best = s.best == 0x7fffffff ? 0 : s.best;
    if (p.best) p.best[r] = best;
    if (p.hit) p.hit[r] = best == target;
    if (p.nll) p.nll[r] = logf(s.sum) + s.most - z[target];
  }
  if (!p.dz.data) return;
  const float weight = p.classes[r] == 0 ? p.weights[0] : p.weights[1], scale = weight / s.sum;
  for (int begin = 0; begin < p.V; begin += kStretch) {
    const int first = begin + first_column();
    Columns x{};
    if (first < p.V) x = load_both<kAligned>(z, first, p.V);
    __syncthreads();  // what the gradient overwrites was read
    if (first >= p.V) continue;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x.at[i] = expf(x.at[i] - s.most) * scale - (column(first, i) == target ? weight : 0.f);
    store_columns<T, kAligned>(p.dz[r], first, p.V, ColumnsOf<kHalfChunk>{x.at[0], x.at[1], x.at[2], x.at[3]});
    if (first + kFar < p.V)
      store_columns<T, kAligned>(p.dz[r], first + kFar, p.V, ColumnsOf<kHalfChunk>{x.at[4], x.at[5], x.at[6], x.at[7]});
  }
}

struct HeadDraw {
  int32_t* drawn;
  Rows<const float> z;
  Rows<uint64_t> weights;
  const int32_t* numbers;
  double temperature, top_p;
  int V;
};

/// The least weight of the fewest best tokens that weigh `need` together: the largest whose tokens and all heavier ones do, found by two
/// bits at a time. `mine`: a thread's first weight.
__device__ __forceinline__ uint64_t least_kept(const uint64_t* mine, int count, uint64_t need, uint64_t* scratch) {
  uint64_t limit = 0;
  for (int shift = kDrawBits - 2; shift >= 0; shift -= 2) {
    const uint64_t step = uint64_t{1} << shift;
    uint64_t sums[3] = {};
    for (int i = 0; i < count; ++i) {
      const uint64_t weight = mine[i * kDrawStride];
#pragma unroll
      for (int j = 0; j < 3; ++j) sums[j] += weight >= limit + (j + 1) * step ? weight : 0;
    }
    uint64_t next = limit;
#pragma unroll
    for (int j = 0; j < 3; ++j)
      if (block_sum<uint64_t, kDrawStride>(sums[j], scratch) >= need) next = limit + (j + 1) * step;
    limit = next;
  }
  return limit;
}

/// A block draws for a row. A thread weighs every 256th token, and the first thread finds the one whose tokens the number falls among.
__global__ void __launch_bounds__(kDrawStride) head_draw_kernel(const __grid_constant__ HeadDraw p) {
  const int64_t r = blockIdx.x;
  const int me = static_cast<int>(threadIdx.x), count = (p.V - me + kDrawStride - 1) / kDrawStride;
  const float* z = p.z[r] + me;
  uint64_t *weights = p.weights[r] + me, *scratch = dynamic_smem<uint64_t>();
  uint64_t* heavier = scratch + kDrawStride / kWarpSize;
  int* equal = reinterpret_cast<int*>(heavier + kDrawStride);
  float most = -INFINITY;
  bool finite = true;
  for (int i = 0; i < count; ++i) {
    const float x = z[i * kDrawStride];
    finite = finite && fabsf(x) < INFINITY;
    most = fmaxf(most, x);
  }
  if (__syncthreads_or(finite ? 0 : 1)) {
    if (me == 0) p.drawn[r] = -1;
    return;
  }
  most = warp_max(most);
  float* parts = reinterpret_cast<float*>(heavier);
  if (me % kWarpSize == 0) parts[me / kWarpSize] = most;
  __syncthreads();  // every warp's maximum is there
  for (int w = 0; w < kDrawStride / kWarpSize; ++w) most = fmaxf(most, parts[w]);
  uint64_t sum = 0;
  for (int i = 0; i < count; ++i) {
    const uint64_t weight = draw_weight(static_cast<double>(z[i * kDrawStride]), static_cast<double>(most), p.temperature);
    weights[i * kDrawStride] = weight;
    sum += weight;
  }
  const uint64_t all = block_sum<uint64_t, kDrawStride>(sum, scratch), need = draw_need(p.top_p, all);
  const uint64_t limit = need < all ? least_kept(weights, count, need, scratch) : 0;
  // What the thread's tokens weigh that are heavier than the limit, and how many are as heavy.
  uint64_t own_heavier = 0;
  int own_equal = 0;
  for (int i = 0; i < count; ++i) {
    const uint64_t weight = weights[i * kDrawStride];
    own_heavier += weight > limit ? weight : 0;
    own_equal += weight == limit ? 1 : 0;
  }
  heavier[me] = own_heavier, equal[me] = own_equal;
  const uint64_t above = block_sum<uint64_t, kDrawStride>(own_heavier, scratch);  // and all threads have told their own
  // The thread, the place among its tokens, and how many of the lightest it may keep.
  int owner = 0;
  uint64_t left = limit == 0 ? 0 : (need - above + limit - 1) / limit;
  uint64_t place = draw_place(draw_bits(p.numbers + 2 * r), above + left * limit);
  for (;; ++owner) {
    const uint64_t lightest = left < static_cast<uint64_t>(equal[owner]) ? left : static_cast<uint64_t>(equal[owner]);
    const uint64_t own = heavier[owner] + lightest * limit;
    if (place < own) break;
    place -= own, left -= lightest;
  }
  if (me != owner) return;
  for (int i = 0;; ++i) {
    const uint64_t weight = weights[i * kDrawStride];
    if (weight < limit || (weight == limit && left == 0)) continue;
    if (weight == limit) --left;
    if (place < weight) {
      p.drawn[r] = me + i * kDrawStride;
      return;
    }
    place -= weight;
  }
}

constexpr int kLossThreads = 256;

/// loss[c] += sum of nll over the rows of class c. One block; a thread sums every 256th row, then the threads in a fixed order.
__global__ void __launch_bounds__(kLossThreads) head_loss_kernel(double* loss, const float* nll, const int32_t* classes, int rows) {
  double sum0 = 0, sum1 = 0;
  for (int r = static_cast<int>(threadIdx.x); r < rows; r += kLossThreads) {
    const double x = static_cast<double>(nll[r]);
    if (classes[r] == 0) sum0 += x;
    else sum1 += x;
  }
  double* scratch = dynamic_smem<double>();
  const double first = block_sum<double, kLossThreads>(sum0, scratch), second = block_sum<double, kLossThreads>(sum1, scratch);
  if (threadIdx.x == 0) loss[0] += first, loss[1] += second;
}

__global__ void __launch_bounds__(kLossThreads) head_correct_kernel(int32_t* correct, const int32_t* hit, const int32_t* owners, int rows) {
  const int r = static_cast<int>(blockIdx.x) * kLossThreads + static_cast<int>(threadIdx.x);
  if (r < rows && owners[r] >= 0 && !hit[r]) correct[owners[r]] = 0;
}

}  // namespace

template <class T>
void head_rows(Stream stream, const HeadOutputs<T>& out, Rows<const float> z, const int32_t* targets, const int32_t* classes,
               const float (&weights)[2], int64_t rows, int64_t vocabulary) {
  if (rows == 0) return;
  const HeadRows<T> p{out.nll, out.best, out.hit, out.dz, z, targets, classes, {weights[0], weights[1]}, static_cast<int>(vocabulary)};
  dispatch_aligned(chunked(z, vocabulary) && chunked(out.dz, vocabulary), [&]<bool kAligned>() {
    launch(stream, head_rows_kernel<T, kAligned>, static_cast<unsigned>(rows), kHeadThreads, 3 * kHeadWarps * sizeof(float), p);
  });
}
template void head_rows(Stream, const HeadOutputs<float>&, Rows<const float>, const int32_t*, const int32_t*, const float (&)[2], int64_t,
                        int64_t);
template void head_rows(Stream, const HeadOutputs<bf16>&, Rows<const float>, const int32_t*, const int32_t*, const float (&)[2], int64_t,
                        int64_t);

void head_draw(Stream stream, int32_t* drawn, Rows<const float> z, Rows<uint64_t> weights, const int32_t* numbers, double temperature,
               double top_p, int64_t rows, int64_t vocabulary) {
  if (rows == 0) return;
  const HeadDraw p{drawn, z, weights, numbers, temperature, top_p, static_cast<int>(vocabulary)};
  constexpr std::size_t kWords = (kDrawStride / kWarpSize + kDrawStride) * sizeof(uint64_t) + kDrawStride * sizeof(int);
  launch(stream, head_draw_kernel, static_cast<unsigned>(rows), kDrawStride, kWords, p);
}

void head_loss(Stream stream, double* loss, const float* nll, const int32_t* classes, int64_t rows) {
  if (rows == 0) return;
  launch(stream, head_loss_kernel, 1, kLossThreads, kLossThreads / kWarpSize * sizeof(double), loss, nll, classes, static_cast<int>(rows));
}

void head_correct(Stream stream, int32_t* correct, const int32_t* hit, const int32_t* owners, int64_t rows) {
  if (rows == 0) return;
  launch(stream, head_correct_kernel, static_cast<unsigned>(div_up(rows, int64_t{kLossThreads})), kLossThreads, 0, correct, hit, owners,
         static_cast<int>(rows));
}

}  // namespace kava
