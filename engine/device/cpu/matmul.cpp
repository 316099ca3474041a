#include "engine/device/cpu/matmul.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <vector>
#ifdef KAVA_ONEDNN
#include <sys/mman.h>

#include <dnnl.hpp>
#include <new>
#endif

namespace kava {

namespace {

constexpr int64_t kTileRows = 256;
constexpr int64_t kTileCols = 256;
// Rows of a last tile are filled up with zeros to a multiple of this, so that few shapes exist and a row's result does not depend on them.
constexpr int64_t kRowUnit = 32;
// A sum over step rows (weight gradients) is cut into pieces of this length.
constexpr int64_t kSumPiece = 512;

struct Operand {
  const void* data;
  int64_t stride;
  bool transposed;
  const void* at(DType t, int64_t row, int64_t col) const {  // element (row, col) of op(x)
    int64_t i = transposed ? col * stride + row : row * stride + col;
    return static_cast<const char*>(data) + i * size_of(t);
  }
};

#ifdef KAVA_ONEDNN

struct Shape {
  int64_t m, n, k, lda, ldb, ldc;
  DType type, c_type;
  bool ta, tb, add;
  auto operator<=>(const Shape&) const = default;
};

dnnl::memory::data_type dnnl_type(DType t) { return t == DType::bf16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32; }

// oneDNN 2.6 crashes where there is no memory for the code it generates: far more than it takes must be there.
void require_room_for_code() {
  constexpr std::size_t kRoom = std::size_t{32} << 20;
  void* room = ::mmap(nullptr, kRoom, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (room == MAP_FAILED) throw std::bad_alloc();
  ::munmap(room, kRoom);
}

struct Product {
  dnnl::matmul primitive;
  dnnl::memory a, b, c;
};

// Primitives and their memory handles belong to a thread: oneDNN's scratchpads do.
struct ThreadProducts {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  std::map<Shape, Product> products;

  Product& find(const Shape& s) {
    if (auto it = products.find(s); it != products.end()) return it->second;
    if (products.size() > 4096) products.clear();
    require_room_for_code();
    using dims = dnnl::memory::dims;
    dnnl::memory::desc a({s.m, s.k}, dnnl_type(s.type), s.ta ? dims{1, s.lda} : dims{s.lda, 1});
    dnnl::memory::desc b({s.k, s.n}, dnnl_type(s.type), s.tb ? dims{1, s.ldb} : dims{s.ldb, 1});
    dnnl::memory::desc c({s.m, s.n}, dnnl_type(s.c_type), dims{s.ldc, 1});
    dnnl::primitive_attr attr;
    if (s.add) {
      dnnl::post_ops sum;
      sum.append_sum(1.f);
      attr.set_post_ops(sum);
    }
    dnnl::matmul::primitive_desc pd(dnnl::matmul::desc(a, b, c), attr, engine);
    return products
        .emplace(s, Product{dnnl::matmul(pd), dnnl::memory(a, engine, nullptr), dnnl::memory(b, engine, nullptr),
                            dnnl::memory(c, engine, nullptr)})
        .first->second;
  }
};

void tile_product(void* c, int64_t ldc, DType c_type, const void* a, int64_t lda, bool ta, const void* b, int64_t ldb, bool tb, DType type,
                  int64_t m, int64_t n, int64_t k, bool add) {
  thread_local ThreadProducts products;
  Product& p = products.find({m, n, k, lda, ldb, ldc, type, c_type, ta, tb, add});
  p.a.set_data_handle(const_cast<void*>(a));
  p.b.set_data_handle(const_cast<void*>(b));
  p.c.set_data_handle(c);
  p.primitive.execute(products.stream, {{DNNL_ARG_SRC, p.a}, {DNNL_ARG_WEIGHTS, p.b}, {DNNL_ARG_DST, p.c}});
}

constexpr bool has_onednn(DType t) { return t != DType::f64; }

// oneDNN has no bf16 product for processors without AVX-512.
bool has_bf16() {
  static const bool has = [] {
    dnnl::engine engine(dnnl::engine::kind::cpu, 0);
    const dnnl::memory::desc d({32, 32}, dnnl::memory::data_type::bf16, dnnl::memory::dims{32, 1});
    return static_cast<bool>(dnnl::matmul::primitive_desc(dnnl::matmul::desc(d, d, d), engine, true));
  }();
  return has;
}

#else

void tile_product(void*, int64_t, DType, const void*, int64_t, bool, const void*, int64_t, bool, DType, int64_t, int64_t, int64_t, bool) {}
constexpr bool has_onednn(DType) { return false; }
bool has_bf16() { return true; }

#endif

// The plain product of one tile: sums over k in order, in the sum type.
template <class T, class O>
void plain_tile(O* c, int64_t ldc, const Operand& a, const Operand& b, int64_t row, int64_t col, int64_t m, int64_t n, int64_t k,
                bool add) {
  const DType t = DTypeOf<T>::value;
  std::vector<Sum<T>> sums(static_cast<std::size_t>(n));
  for (int64_t i = 0; i < m; ++i) {
    std::fill(sums.begin(), sums.end(), Sum<T>{0});
    for (int64_t l = 0; l < k; ++l) {
      Sum<T> x = to_float(*static_cast<const T*>(a.at(t, row + i, l)));
      const T* y = static_cast<const T*>(b.at(t, l, col));
      const int64_t step = b.transposed ? b.stride : 1;
      for (int64_t j = 0; j < n; ++j) sums[static_cast<std::size_t>(j)] += x * to_float(y[j * step]);
    }
    O* out = c + (row + i) * ldc + col;
    for (int64_t j = 0; j < n; ++j) {
      Sum<T> s = sums[static_cast<std::size_t>(j)];
      if (add) s += to_float(out[j]);
      out[j] = rounded<O>(s);
    }
  }
}

void plain_product(Threads& threads, const Tensor& c, const Operand& a, const Operand& b, DType type, int64_t k, bool add) {
  const int64_t row_tiles = (c.rows + kRowUnit - 1) / kRowUnit, col_tiles = (c.cols + kTileCols - 1) / kTileCols;
  threads.run(row_tiles * col_tiles, [&](int64_t task) {
    const int64_t row = task / col_tiles * kRowUnit, col = task % col_tiles * kTileCols;
    const int64_t m = std::min(kRowUnit, c.rows - row), n = std::min(kTileCols, c.cols - col);
    dispatch(type, [&]<class T>() {
      if (c.dtype == type) plain_tile<T>(static_cast<T*>(c.data), c.stride, a, b, row, col, m, n, k, add);
      else plain_tile<T>(static_cast<Sum<T>*>(c.data), c.stride, a, b, row, col, m, n, k, add);
    });
  });
}

int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// Rows begin..end of x, followed by zero rows up to `rows`.
std::vector<char> padded_rows(const Tensor& x, int64_t begin, int64_t end, int64_t rows) {
  const int64_t width = x.cols * size_of(x.dtype);
  std::vector<char> out(static_cast<std::size_t>(rows * width));
  for (int64_t r = begin; r < end; ++r)
    std::memcpy(out.data() + (r - begin) * width, static_cast<const char*>(x.data) + r * x.stride * size_of(x.dtype),
                static_cast<std::size_t>(width));
  return out;
}

// x in f32, contiguous.
std::vector<float> widened(const Tensor& x) {
  std::vector<float> out(static_cast<std::size_t>(x.count()));
  for (int64_t r = 0; r < x.rows; ++r)
    for (int64_t c = 0; c < x.cols; ++c) out[static_cast<std::size_t>(r * x.cols + c)] = to_float(x.row<bf16>(r)[c]);
  return out;
}
Tensor view(std::vector<float>& x, int64_t rows, int64_t cols) { return {x.data(), DType::f32, rows, cols, cols}; }

struct Tile {
  int64_t row, rows, col, cols;
  char* of(const Tensor& c) const { return static_cast<char*>(c.data) + (row * c.stride + col) * size_of(c.dtype); }
};

std::vector<Tile> tiles_of(int64_t m, int64_t n) {
  const int64_t pieces = (n + kTileCols - 1) / kTileCols;
  const int64_t width = std::min(n, round_up((n + pieces - 1) / pieces, 64));
  std::vector<Tile> tiles;
  for (int64_t row = 0; row < m; row += kTileRows)
    for (int64_t col = 0; col < n; col += width) tiles.push_back({row, std::min(kTileRows, m - row), col, std::min(width, n - col)});
  return tiles;
}

// c (+)= a^T b, a sum over rows of the step: pieces of fixed length, the last one filled with zeros.
void sum_product(Threads& threads, const Tensor& c, const Tensor& a, const Tensor& b, bool add) {
  const DType type = a.dtype;
  const int64_t k = a.rows, whole = k / kSumPiece * kSumPiece, rest = k - whole, rest_rows = round_up(rest, 64);
  KAVA_CHECK(c.dtype == sum_type(type) || k <= kSumPiece, "a sum over {} rows in {}", k, name_of(c.dtype));
  const Operand oa{a.data, a.stride, true}, ob{b.data, b.stride, false};
  std::vector<char> a_rest, b_rest;
  if (rest != rest_rows) a_rest = padded_rows(a, whole, k, rest_rows), b_rest = padded_rows(b, whole, k, rest_rows);
  const std::vector<Tile> tiles = tiles_of(c.rows, c.cols);
  threads.run(static_cast<int64_t>(tiles.size()), [&](int64_t task) {
    const Tile& t = tiles[static_cast<std::size_t>(task)];
    bool sum = add;
    for (int64_t l = 0; l < whole; l += kSumPiece, sum = true)
      tile_product(t.of(c), c.stride, c.dtype, oa.at(type, t.row, l), a.stride, true, ob.at(type, l, t.col), b.stride, false, type, t.rows,
                   t.cols, kSumPiece, sum);
    if (rest == 0) return;
    const Operand ra = a_rest.empty() ? Operand{oa.at(type, 0, whole), a.stride, true} : Operand{a_rest.data(), a.cols, true};
    const Operand rb = b_rest.empty() ? Operand{ob.at(type, whole, 0), b.stride, false} : Operand{b_rest.data(), b.cols, false};
    tile_product(t.of(c), c.stride, c.dtype, ra.at(type, t.row, 0), ra.stride, true, rb.at(type, 0, t.col), rb.stride, false, type, t.rows,
                 t.cols, rest_rows, sum);
  });
}

// c (+)= a op(b); the last tile of rows is filled with zeros to a multiple of kRowUnit.
void row_product(Threads& threads, const Tensor& c, const Tensor& a, const Tensor& b, bool transpose_b, bool add) {
  const DType type = a.dtype;
  const int64_t m = c.rows, n = c.cols, k = a.cols, c_size = size_of(c.dtype);
  const int64_t tail = m % kTileRows, tail_begin = m - tail, tail_rows = round_up(tail, kRowUnit);
  const Operand oa{a.data, a.stride, false}, ob{b.data, b.stride, transpose_b};
  std::vector<char> a_tail, c_tail;
  if (tail != tail_rows) {
    a_tail = padded_rows(a, tail_begin, m, tail_rows);
    c_tail = add ? padded_rows(c, tail_begin, m, tail_rows) : std::vector<char>(static_cast<std::size_t>(tail_rows * n * c_size));
  }
  const std::vector<Tile> tiles = tiles_of(m, n);
  threads.run(static_cast<int64_t>(tiles.size()), [&](int64_t task) {
    const Tile& t = tiles[static_cast<std::size_t>(task)];
    const void* b_tile = ob.at(type, 0, t.col);
    if (t.rows == kTileRows || a_tail.empty()) {
      tile_product(t.of(c), c.stride, c.dtype, oa.at(type, t.row, 0), a.stride, false, b_tile, b.stride, transpose_b, type, t.rows, t.cols,
                   k, add);
      return;
    }
    char* out = c_tail.data() + t.col * c_size;
    tile_product(out, n, c.dtype, a_tail.data(), k, false, b_tile, b.stride, transpose_b, type, tail_rows, t.cols, k, add);
    for (int64_t r = 0; r < t.rows; ++r)
      std::memcpy(t.of(c) + r * c.stride * c_size, out + r * n * c_size, static_cast<std::size_t>(t.cols * c_size));
  });
}

}  // namespace

void Matmul::run(const Tensor& c, const Tensor& a, bool transpose_a, const Tensor& b, bool transpose_b, Store store) {
  const int64_t m = transpose_a ? a.cols : a.rows, k = transpose_a ? a.rows : a.cols;
  const int64_t n = transpose_b ? b.rows : b.cols, kb = transpose_b ? b.cols : b.rows;
  const DType type = a.dtype;
  KAVA_CHECK(k == kb && c.rows == m && c.cols == n, "[{}, {}] = [{}, {}] [{}, {}]", c.rows, c.cols, m, k, kb, n);
  KAVA_CHECK(b.dtype == type && (c.dtype == type || c.dtype == sum_type(type)), "{} = {} {}", name_of(c.dtype), name_of(type),
             name_of(b.dtype));
  const bool add = store == Store::add;
  KAVA_CHECK(!add || c.dtype == sum_type(type), "sums are added in {}", name_of(sum_type(type)));
  if (m == 0 || n == 0) return;
  if (!has_onednn(type) || k == 0)
    return plain_product(threads_, c, {a.data, a.stride, transpose_a}, {b.data, b.stride, transpose_b}, type, k, add);
  if (type == DType::bf16 && !has_bf16()) {
    std::vector<float> wide_a = widened(a), wide_b = widened(b), wide_c;
    Tensor sum = c;
    if (c.dtype == DType::bf16) wide_c.resize(static_cast<std::size_t>(c.count())), sum = view(wide_c, c.rows, c.cols);
    run(sum, view(wide_a, a.rows, a.cols), transpose_a, view(wide_b, b.rows, b.cols), transpose_b, store);
    for (int64_t r = 0; r < c.rows && !wide_c.empty(); ++r)
      for (int64_t j = 0; j < n; ++j) c.row<bf16>(r)[j] = to_bf16(sum.row<float>(r)[j]);
    return;
  }

  KAVA_CHECK(!transpose_a || !transpose_b, "both operands transposed");
  if (transpose_a) sum_product(threads_, c, a, b, add);
  else row_product(threads_, c, a, b, transpose_b, add);
}

}  // namespace kava
