#include "engine/device/cpu/matmul.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <type_traits>
#include <vector>
#ifdef KAVA_ONEDNN
#include <sys/mman.h>

#include <dnnl.hpp>
#include <new>
#include <unordered_map>
#endif

namespace kava {

namespace {

constexpr int64_t kMostTileRows = 256;
constexpr int64_t kTileCols = Matmul::kTileCols;
constexpr int64_t kPlainRows = 32;  // of a tile of the plain product
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

// Where the operands of one tile lie.
struct Tile {
  void* c;
  int64_t ldc;
  DType c_type;
  const void* a;
  int64_t lda;
  const void* b;
  int64_t ldb;
  DType type;
  const void* bias = nullptr;
};

// Rows of a tile. A last tile is filled up with zero rows to a multiple of `unit`, so that few shapes exist and a row's result does not
// depend on them.
struct RowTiles {
  int64_t most, unit;
};

#ifdef KAVA_ONEDNN

struct Shape {
  int64_t m, n, k, lda, ldb, ldc;
  DType type, c_type;
  bool ta, tb, add, bias;
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

// Without a bias where it has no size. Empty where oneDNN has no such product and that may be.
dnnl::matmul::primitive_desc product_of(const dnnl::engine& engine, const dnnl::memory::desc& a, const dnnl::memory::desc& b,
                                        const dnnl::memory::desc& bias, const dnnl::memory::desc& c, const dnnl::primitive_attr& attr,
                                        bool may_lack) {
  const bool biased = bias.get_size() > 0;
#if DNNL_VERSION_MAJOR >= 3
  if (biased) return {engine, a, b, bias, c, attr, may_lack};
  return {engine, a, b, c, attr, may_lack};
#else
  return {biased ? dnnl::matmul::desc(a, b, bias, c) : dnnl::matmul::desc(a, b, c), attr, engine, may_lack};
#endif
}

struct Product {
  dnnl::matmul primitive;
  dnnl::memory a, b, c, bias;
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
    dnnl::memory::desc bias;
    if (s.bias) bias = dnnl::memory::desc({1, s.n}, dnnl_type(s.type), dims{s.n, 1});
    auto handle = [&](const dnnl::memory::desc& d) { return dnnl::memory(d, engine, nullptr); };
    Product product{dnnl::matmul(product_of(engine, a, b, bias, c, attr, false)), handle(a), handle(b), handle(c),
                    s.bias ? handle(bias) : dnnl::memory()};
    return products.emplace(s, std::move(product)).first->second;
  }
};

void tile_product(const Tile& t, bool ta, bool tb, int64_t m, int64_t n, int64_t k, bool add) {
  thread_local ThreadProducts products;
  Product& p = products.find({m, n, k, t.lda, t.ldb, t.ldc, t.type, t.c_type, ta, tb, add, t.bias != nullptr});
  p.a.set_data_handle(const_cast<void*>(t.a));
  p.b.set_data_handle(const_cast<void*>(t.b));
  p.c.set_data_handle(t.c);
  std::unordered_map<int, dnnl::memory> arguments{{DNNL_ARG_SRC, p.a}, {DNNL_ARG_WEIGHTS, p.b}, {DNNL_ARG_DST, p.c}};
  if (t.bias) {
    p.bias.set_data_handle(const_cast<void*>(t.bias));
    arguments.emplace(DNNL_ARG_BIAS, p.bias);
  }
  p.primitive.execute(products.stream, arguments);
}

constexpr bool has_onednn(DType t) { return t != DType::f64; }

// Without AVX-512 oneDNN 2.6 sums in an order that depends on the number of rows: there all tiles have the same.
RowTiles row_tiles() {
  static const bool wide = (dnnl_get_effective_cpu_isa() & dnnl_cpu_isa_avx512_core) == dnnl_cpu_isa_avx512_core;
  return wide ? RowTiles{kMostTileRows, 32} : RowTiles{64, 64};
}

// oneDNN has no bf16 product for processors without AVX-512.
bool has_bf16() {
  static const bool has = [] {
    dnnl::engine engine(dnnl::engine::kind::cpu, 0);
    const dnnl::memory::desc d({32, 32}, dnnl::memory::data_type::bf16, dnnl::memory::dims{32, 1});
    return static_cast<bool>(product_of(engine, d, d, {}, d, {}, true));
  }();
  return has;
}

#else

void tile_product(const Tile&, bool, bool, int64_t, int64_t, int64_t, bool) {}
constexpr bool has_onednn(DType) { return false; }
RowTiles row_tiles() { return {kMostTileRows, kPlainRows}; }
bool has_bf16() { return true; }

#endif

// The plain product of a tile whose first element is (row, col): sums over k in order, in the sum type. Eight sums of a row are made at a
// time, of a copy of a transposed b that is not.
template <class T, class O>
void plain_tile(O* c, int64_t ldc, const Operand& a, const Operand& b, const T* bias, int64_t row, int64_t col, int64_t m, int64_t n,
                int64_t k, bool add) {
  const DType t = DTypeOf<T>::value;
  std::vector<T> turned(static_cast<std::size_t>(b.transposed ? k * n : 0));
  for (int64_t j = 0; b.transposed && j < n; ++j) {
    const T* y = static_cast<const T*>(b.at(t, 0, col + j));
    for (int64_t l = 0; l < k; ++l) turned[static_cast<std::size_t>(l * n + j)] = y[l];
  }
  const T* const first = b.transposed ? turned.data() : static_cast<const T*>(b.at(t, 0, col));
  const int64_t next = b.transposed ? n : b.stride;
  std::vector<Sum<T>> x(static_cast<std::size_t>(k));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t l = 0; l < k; ++l) x[static_cast<std::size_t>(l)] = to_float(*static_cast<const T*>(a.at(t, row + i, l)));
    const auto sums_of = [&](int64_t j, auto width) {
      Sum<T> sums[width] = {};
      const T* y = first + j;
      for (int64_t l = 0; l < k; ++l, y += next)
        for (int64_t u = 0; u < width; ++u) sums[u] += x[static_cast<std::size_t>(l)] * to_float(y[u]);
      O* out = c + i * ldc + j;
      for (int64_t u = 0; u < width; ++u) {
        if (bias) sums[u] += to_float(bias[col + j + u]);
        if (add) sums[u] += to_float(out[u]);
        out[u] = rounded<O>(sums[u]);
      }
    };
    int64_t j = 0;
    for (; j + 8 <= n; j += 8) sums_of(j, std::integral_constant<int64_t, 8>());
    for (; j < n; ++j) sums_of(j, std::integral_constant<int64_t, 1>());
  }
}

void plain_product(Threads& threads, const Tensor& c, const Operand& a, const Operand& b, DType type, int64_t k, const Tensor& bias) {
  const int64_t row_tiles = (c.rows + kPlainRows - 1) / kPlainRows, col_tiles = (c.cols + kTileCols - 1) / kTileCols;
  threads.run(row_tiles * col_tiles, [&](int64_t task) {
    const int64_t row = task / col_tiles * kPlainRows, col = task % col_tiles * kTileCols;
    const int64_t m = std::min(kPlainRows, c.rows - row), n = std::min(kTileCols, c.cols - col);
    dispatch(type, [&]<class T>() {
      const T* added = static_cast<const T*>(bias.data);
      if (c.dtype == type) plain_tile<T>(c.row<T>(row) + col, c.stride, a, b, added, row, col, m, n, k, false);
      else plain_tile<T>(c.row<Sum<T>>(row) + col, c.stride, a, b, added, row, col, m, n, k, false);
    });
  });
}

int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// Rows begin..end of x, `stride` elements apart, followed by zero rows up to `rows`.
std::vector<char> padded_rows(const Tensor& x, int64_t begin, int64_t end, int64_t rows, int64_t stride) {
  const int64_t size = size_of(x.dtype);
  std::vector<char> out(static_cast<std::size_t>(rows * stride * size));
  for (int64_t r = begin; r < end; ++r)
    std::memcpy(out.data() + (r - begin) * stride * size, static_cast<const char*>(x.data) + r * x.stride * size,
                static_cast<std::size_t>(x.cols * size));
  return out;
}

// Rows of a block whose elements are worth waking a thread for.
int64_t rows_of_block(int64_t cols) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, cols)); }

// Not set to anything.
using Floats = std::unique_ptr<float[]>;
Floats floats(int64_t count) { return std::make_unique_for_overwrite<float[]>(static_cast<std::size_t>(count)); }

// x in f32, contiguous.
Floats widened(Threads& threads, const Tensor& x) {
  Floats out = floats(x.count());
  threads.blocks(x.rows, rows_of_block(x.cols), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const bf16* from = x.row<bf16>(r);
      float* to = out.get() + r * x.cols;
      for (int64_t c = 0; c < x.cols; ++c) to[c] = to_float(from[c]);
    }
  });
  return out;
}
// y = x + bias, where there is one, rounded to y's type; x is contiguous.
template <class T>
void store_sums(Threads& threads, const Tensor& y, const float* x, const Tensor& bias) {
  const Floats added = bias ? widened(threads, bias) : std::make_unique<float[]>(static_cast<std::size_t>(y.cols));
  threads.blocks(y.rows, rows_of_block(y.cols), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* from = x + r * y.cols;
      T* to = y.row<T>(r);
      for (int64_t c = 0; c < y.cols; ++c) to[c] = rounded<T>(from[c] + added[c]);
    }
  });
}
Tensor view(const Floats& x, int64_t rows, int64_t cols) { return {x.get(), DType::f32, rows, cols, cols}; }

struct Area {
  int64_t row, rows, col, cols;
  char* of(const Tensor& c) const { return static_cast<char*>(c.data) + (row * c.stride + col) * size_of(c.dtype); }
};

std::vector<Area> areas_of(int64_t m, int64_t n, int64_t tile_rows) {
  const int64_t pieces = (n + kTileCols - 1) / kTileCols;
  const int64_t width = std::min(n, round_up((n + pieces - 1) / pieces, 64));
  std::vector<Area> areas;
  for (int64_t row = 0; row < m; row += tile_rows)
    for (int64_t col = 0; col < n; col += width) areas.push_back({row, std::min(tile_rows, m - row), col, std::min(width, n - col)});
  return areas;
}

// Rows of an operand of a RowSum, the last piece filled with zeros.
class PieceRows {
 public:
  PieceRows(const Tensor& x, int64_t whole, int64_t rest_rows) : x_(x), whole_(whole) {
    if (x.rows - whole != rest_rows) rest_ = padded_rows(x, whole, x.rows, rest_rows, x.cols);
  }
  const void* at(int64_t row, int64_t col) const {
    if (row >= whole_ && !rest_.empty()) return rest_.data() + col * size_of(x_.dtype);
    return static_cast<const char*>(x_.data) + (row * x_.stride + col) * size_of(x_.dtype);
  }
  int64_t stride(int64_t row) const { return row >= whole_ && !rest_.empty() ? x_.cols : x_.stride; }

 private:
  const Tensor& x_;
  int64_t whole_;
  std::vector<char> rest_;
};

// What a tile's products are summed in before something else is done to them; it belongs to the thread.
template <class S>
S* tile_scratch(int tiles) {
  thread_local std::vector<S> scratch;
  scratch.resize(static_cast<std::size_t>(tiles * kMostTileRows * kTileCols));
  return scratch.data();
}

template <class S>
void add_scaled(const Tensor& c, const Area& t, const S* product, S scale) {
  for (int64_t r = 0; r < t.rows; ++r) {
    S* out = c.row<S>(t.row + r) + t.col;
    for (int64_t j = 0; j < t.cols; ++j) out[j] += scale * product[r * kTileCols + j];
  }
}

// The rows of an operand by tiles: the last one is filled with zero rows to a multiple of the unit. It keeps the stride, by which oneDNN
// chooses among products that sum in different orders.
class TileRows {
 public:
  TileRows(const Tensor& a, RowTiles height)
      : a_(a), tail_begin_(a.rows - a.rows % height.most), tail_rows_(round_up(a.rows % height.most, height.unit)) {
    if (a.rows - tail_begin_ != tail_rows_) tail_ = padded_rows(a, tail_begin_, a.rows, tail_rows_, a.stride);
  }
  bool padded(int64_t row) const { return !tail_.empty() && row >= tail_begin_; }
  int64_t rows(const Area& t) const { return padded(t.row) ? tail_rows_ : t.rows; }
  const void* at(int64_t row) const {
    return padded(row) ? tail_.data() : static_cast<const char*>(a_.data) + row * a_.stride * size_of(a_.dtype);
  }

 private:
  const Tensor& a_;
  int64_t tail_begin_, tail_rows_;
  std::vector<char> tail_;
};

// Columns of an f32 product that are summed at once: beyond 768 oneDNN sums in an order that depends on the number of rows.
int64_t depth_of(int64_t k) {
  constexpr int64_t kMost = 768;
  const int64_t parts = (k + kMost - 1) / kMost;
  return std::min(k, round_up((k + parts - 1) / parts, 16));
}

// Each with the last tile of its rows filled up.
void row_products(Threads& threads, std::span<const Matmul::Product> products) {
  struct Task {
    std::size_t product;
    Area area;
  };
  const RowTiles height = row_tiles();
  std::vector<Task> tasks;
  std::vector<TileRows> rows;
  std::vector<std::vector<char>> c_tails(products.size());  // what padded tiles are written to
  for (std::size_t i = 0; i < products.size(); ++i) {
    const Tensor &a = products[i].a, &c = products[i].c;
    for (const Area& t : areas_of(c.rows, c.cols, height.most)) tasks.push_back({i, t});
    rows.emplace_back(a, height);
    if (c.rows == 0 || !rows[i].padded(c.rows - 1)) continue;
    const int64_t begin = c.rows - c.rows % height.most, padded = round_up(c.rows - begin, height.unit);
    c_tails[i].resize(static_cast<std::size_t>(padded * c.stride * size_of(c.dtype)));
  }
  threads.run(static_cast<int64_t>(tasks.size()), [&](int64_t task) {
    const auto& [i, t] = tasks[static_cast<std::size_t>(task)];
    const Matmul::Product& p = products[i];
    const DType type = p.a.dtype;
    const int64_t row_size = p.c.stride * size_of(p.c.dtype);
    const bool padded = rows[i].padded(t.row);
    Tile tile{t.of(p.c),         p.c.stride, p.c.dtype,
              rows[i].at(t.row), p.a.stride, Operand{p.b.data, p.b.stride, p.transpose_b}.at(type, 0, t.col),
              p.b.stride,        type};
    if (p.bias) tile.bias = static_cast<const char*>(p.bias.data) + t.col * size_of(type);
    if (padded) tile.c = c_tails[i].data() + t.col * size_of(p.c.dtype);
    const int64_t depth = p.a.dtype == DType::f32 ? depth_of(p.a.cols) : p.a.cols;
    for (int64_t k = 0; k < p.a.cols; k += depth) {
      Tile part = tile;
      part.a = static_cast<const char*>(tile.a) + k * size_of(type);
      part.b = Operand{p.b.data, p.b.stride, p.transpose_b}.at(type, k, t.col);
      if (k > 0) part.bias = nullptr;
      tile_product(part, false, p.transpose_b, rows[i].rows(t), t.cols, std::min(depth, p.a.cols - k), k > 0);
    }
    for (int64_t r = 0; padded && r < t.rows; ++r)
      std::memcpy(t.of(p.c) + r * row_size, static_cast<char*>(tile.c) + r * row_size,
                  static_cast<std::size_t>(t.cols * size_of(p.c.dtype)));
  });
}

bool multiplies_in_f32(DType type) { return has_onednn(type) && type == DType::bf16 && !has_bf16(); }

}  // namespace

void Matmul::run_all(std::span<const Product> products) {
  for (const Product& p : products) {
    const DType type = p.a.dtype;
    const int64_t n = p.transpose_b ? p.b.rows : p.b.cols, k = p.transpose_b ? p.b.cols : p.b.rows;
    KAVA_CHECK(p.c.rows == p.a.rows && p.c.cols == n && p.a.cols == k && k > 0 && p.c.rows == products[0].c.rows,
               "[{}, {}] = [{}, {}] [{}, {}]", p.c.rows, p.c.cols, p.a.rows, p.a.cols, k, n);
    KAVA_CHECK(p.b.dtype == type && type == products[0].a.dtype && (p.c.dtype == type || p.c.dtype == sum_type(type)) &&
                   (!p.bias || (p.bias.dtype == type && p.bias.cols == n)),
               "{} = {} {}", name_of(p.c.dtype), name_of(type), name_of(p.b.dtype));
  }
  if (products.empty() || products[0].c.rows == 0) return;
  const DType type = products[0].a.dtype;
  if (has_onednn(type) && !multiplies_in_f32(type)) return row_products(threads_, products);
  for (const Product& p : products) {
    if (!has_onednn(type)) {
      plain_product(threads_, p.c, {p.a.data, p.a.stride, false}, {p.b.data, p.b.stride, p.transpose_b}, type, p.a.cols, p.bias);
      continue;
    }
    const Floats a = widened(threads_, p.a), b = widened(threads_, p.b), sums = floats(p.c.count());
    run({view(sums, p.c.rows, p.c.cols), view(a, p.a.rows, p.a.cols), view(b, p.b.rows, p.b.cols), p.transpose_b});
    if (p.c.dtype == DType::bf16) store_sums<bf16>(threads_, p.c, sums.get(), p.bias);
    else store_sums<float>(threads_, p.c, sums.get(), p.bias);
  }
}

void Matmul::add_all(std::span<const RowSum> sums) {
  if (sums.empty() || sums[0].a.rows == 0) return;
  const DType type = sums[0].a.dtype;
  const int64_t k = sums[0].a.rows;
  for (const RowSum& s : sums) {
    KAVA_CHECK(s.a.rows == k && s.b.rows == k && s.c.rows == s.a.cols && s.c.cols == s.b.cols, "[{}, {}] += [{}, {}]^T [{}, {}]", s.c.rows,
               s.c.cols, s.a.rows, s.a.cols, s.b.rows, s.b.cols);
    KAVA_CHECK(s.a.dtype == type && s.b.dtype == type && s.c.dtype == sum_type(type), "{} += {} {}", name_of(s.c.dtype), name_of(s.a.dtype),
               name_of(s.b.dtype));
  }
  if (multiplies_in_f32(type)) {
    for (const RowSum& s : sums) {
      const Floats a = widened(threads_, s.a), b = widened(threads_, s.b);
      add_all(std::array{RowSum{s.c, view(a, k, s.a.cols), view(b, k, s.b.cols), s.scale}});
    }
    return;
  }
  const int64_t whole = k / kSumPiece * kSumPiece, rest_rows = round_up(k - whole, 64);
  struct Task {
    std::size_t sum;
    Area area;
  };
  std::vector<Task> tasks;
  std::vector<PieceRows> a, b;
  for (std::size_t i = 0; i < sums.size(); ++i) {
    for (const Area& t : areas_of(sums[i].c.rows, sums[i].c.cols, kMostTileRows)) tasks.push_back({i, t});
    a.emplace_back(sums[i].a, whole, rest_rows), b.emplace_back(sums[i].b, whole, rest_rows);
  }
  threads_.run(static_cast<int64_t>(tasks.size()), [&](int64_t task) {
    const std::size_t i = tasks[static_cast<std::size_t>(task)].sum;
    const Area& t = tasks[static_cast<std::size_t>(task)].area;
    const RowSum& s = sums[i];
    dispatch(type, [&]<class T>() {
      Sum<T>* product = tile_scratch<Sum<T>>(1);
      for (int64_t row = 0; row < k; row += kSumPiece) {
        if (has_onednn(type))
          tile_product({product, kTileCols, s.c.dtype, a[i].at(row, t.row), a[i].stride(row), b[i].at(row, t.col), b[i].stride(row), type},
                       true, false, t.rows, t.cols, row < whole ? kSumPiece : rest_rows, false);
        else
          plain_tile<T>(product, kTileCols, {s.a.row<T>(row), s.a.stride, true}, {s.b.row<T>(row), s.b.stride, false},
                        static_cast<const T*>(nullptr), t.row, t.col, t.rows, t.cols, std::min(kSumPiece, k - row), false);
        add_scaled(s.c, t, product, static_cast<Sum<T>>(s.scale));
      }
    });
  });
}

void Matmul::sum_tiles(const Term& x, const Term& y, bool apart, const std::function<void(const SumTile&)>& finish) {
  const DType type = x.a.dtype, sum = sum_type(type);
  const int64_t m = x.a.rows, n = x.b.cols;
  KAVA_CHECK(x.a.cols == x.b.rows && y.a.cols == y.b.rows && y.a.rows == m && y.b.cols == n && x.a.cols > 0 && y.a.cols > 0,
             "[{}, {}] [{}, {}] + [{}, {}] [{}, {}]", m, x.a.cols, x.b.rows, n, y.a.rows, y.a.cols, y.b.rows, y.b.cols);
  KAVA_CHECK(x.b.dtype == type && y.a.dtype == type && y.b.dtype == type, "operands of several types");
  if (multiplies_in_f32(type)) {
    const Floats xa = widened(threads_, x.a), xb = widened(threads_, x.b), ya = widened(threads_, y.a), yb = widened(threads_, y.b);
    return sum_tiles({view(xa, m, x.a.cols), view(xb, x.b.rows, n)}, {view(ya, m, y.a.cols), view(yb, y.b.rows, n)}, apart, finish);
  }
  const bool plain = !has_onednn(type);
  const RowTiles height = plain ? RowTiles{kPlainRows, kPlainRows} : row_tiles();
  const std::vector<Area> areas = areas_of(m, n, height.most);
  const TileRows x_rows(x.a, height), y_rows(y.a, height);
  threads_.run(static_cast<int64_t>(areas.size()), [&](int64_t task) {
    const Area& t = areas[static_cast<std::size_t>(task)];
    void *first = nullptr, *second = nullptr;
    dispatch(sum, [&]<class S>() {
      S* scratch = tile_scratch<S>(2);
      first = scratch, second = apart ? scratch + kMostTileRows * kTileCols : scratch;
    });
    auto product = [&](void* c, const Term& term, const TileRows& rows, bool add) {
      const Operand b{term.b.data, term.b.stride, false};
      if (plain)
        dispatch(type, [&]<class T>() {
          plain_tile<T>(static_cast<Sum<T>*>(c), kTileCols, {term.a.data, term.a.stride, false}, b, static_cast<const T*>(nullptr), t.row,
                        t.col, t.rows, t.cols, term.a.cols, add);
        });
      else
        tile_product({c, kTileCols, sum, rows.at(t.row), term.a.stride, b.at(type, 0, t.col), term.b.stride, type}, false, false,
                     rows.rows(t), t.cols, term.a.cols, add);
    };
    product(first, x, x_rows, false);
    product(second, y, y_rows, !apart);
    finish({t.row, t.rows, t.col, t.cols, first, apart ? second : nullptr});
  });
}

}  // namespace kava
