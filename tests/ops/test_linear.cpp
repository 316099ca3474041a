#include "tests/ops/group_rig.h"

using namespace kava;
using namespace kava::test;

namespace {
struct MapGroup {
  int64_t rows, in;
  std::vector<int64_t> outs, ranks;
  bool bias;
  double p;
  double scale = 0.5;  // a power of two, so that the op's scale * B is exact in every type
};

Matrices inputs_of(const MapGroup& g, Random& random) {
  Matrices m = {random.normal(g.rows, g.in)};
  for (std::size_t j = 0; j < g.outs.size(); ++j) {
    m.push_back(random.normal(g.outs[j], g.in, 0.3));
    m.push_back(random.normal(1, g.bias ? g.outs[j] : 0));
    m.push_back(random.normal(g.ranks[j], g.in, 0.3));
    m.push_back(random.normal(g.outs[j], g.ranks[j], 0.3));
    m.push_back(random.normal(g.rows, g.outs[j]));
  }
  return m;
}

struct Placed : PlacedGroup {
  Tensor y, xa;
  Dropout dropout;
};

Placed place(Rig& rig, const MapGroup& g, const Matrices& m) {
  Placed t{place_group(rig, m, g.ranks, g.scale), {}, {}, {}};
  t.y = rig.out(m[0].rows, t.map.outs());
  if (t.map.a) t.xa = t.xx.col_range(g.in, t.xx.cols);
  Matrix keys(m[0].rows, 2);
  for (int64_t n = 0; n < m[0].rows; ++n) keys(n, 0) = double(n / 7), keys(n, 1) = double(n % 7);
  t.dropout = {.p = g.p, .seed = 9, .step = 3, .site = 5, .row_keys = rig.packed().in(keys, Kind::i32)};
  return t;
}

// xa and, of the f64 algorithm with rounded tensors, what it is stored as.
void run_lora(Rig& rig, const Placed& t, Reads reads = Reads::tiled) {
  if (!t.map.a) return;
  rig.ops.lora_fwd(rig.arena, t.xx, t.map, t.dropout, reads);
  rig.round(t.xa);
}

Tensor columns(const Tensor& t, const LinearPart& p) { return t.col_range(p.out_begin, p.out_begin + p.outs); }

// Outputs: y of each map, then xa.
OpRun linear_fwd(const MapGroup& g, Reads reads = Reads::tiled) {
  return [g, reads](Rig& rig, const Matrices& m) {
    const Placed t = place(rig, g, m);
    run_lora(rig, t, reads);
    rig.ops.linear_group_fwd(rig.arena, t.y, t.xx, t.map, reads);
    std::vector<Tensor> out;
    for (const LinearPart& p : t.map.parts) out.push_back(columns(t.y, p));
    if (t.xa) out.push_back(t.xa);
    return out;
  };
}

// Outputs: dx, then dW, dbias, dA, dB of each map where they exist. All gradients of parameters start from zero.
OpRun linear_bwd(const MapGroup& g) {
  return [g](Rig& rig, const Matrices& m) {
    const Placed t = place(rig, g, m);
    const int64_t ranks = t.map.ranks();
    const Tensor dx = rig.out(m[0].rows, g.in), dxa = t.map.a ? rig.out(m[0].rows, ranks) : Tensor{};
    auto zero = [&](int64_t rows, int64_t cols) { return rig.in_out(Matrix(rows, cols), Kind::sum); };
    LinearGroupGrad grad{.dw = zero(t.map.outs(), g.in)};
    if (g.bias) grad.dbias = zero(1, t.map.outs());
    if (t.map.a) grad.da = zero(ranks, g.in);
    for (const LinearPart& p : t.map.parts) grad.db.push_back(p.rank > 0 ? zero(p.outs, p.rank) : Tensor{});
    run_lora(rig, t);
    rig.ops.linear_group_bwd_input(rig.arena, dx, dxa, t.dy, t.map, t.dropout);
    if (dxa) rig.round(dxa);
    rig.ops.linear_group_bwd_params(rig.arena, grad, t.dy, dxa, t.xx, t.map, t.dropout);
    std::vector<Tensor> out = {dx};
    for (std::size_t j = 0; j < g.outs.size(); ++j) {
      const LinearPart& p = t.map.parts[j];
      out.push_back(grad.dw.row_range(p.out_begin, p.out_begin + p.outs));
      if (g.bias) out.push_back(columns(grad.dbias, p));
      if (p.rank > 0) out.push_back(grad.da.row_range(p.rank_begin, p.rank_begin + p.rank)), out.push_back(grad.db[j]);
    }
    return out;
  };
}

const MapGroup kGroups[] = {
    {1, 8, {5}, {0}, false, 0},
    {1, 8, {3}, {2}, true, 0},
    {33, 19, {12, 4, 4}, {3, 0, 2}, true, 0},
    {70, 24, {24, 8, 8}, {4, 4, 4}, false, 0.3},
    {40, 64, {32}, {8}, false, 0.1},
    {300, 16, {10, 10}, {0, 0}, true, 0},
};
}  // namespace

TEST_CASE("linear_group computes its formula") {
  Random random(21);
  for (MapGroup g : kGroups) {
    g.p = 0, g.scale = 0.7;
    const Matrices m = inputs_of(g, random), out = run_f64(linear_fwd(g), m), streamed = run_f64(linear_fwd(g, Reads::streamed), m);
    for (std::size_t j = 0; j < g.outs.size(); ++j) {
      const Matrix* part = &m[1 + kMapParts * j];
      for (int64_t n = 0; n < g.rows; ++n)
        for (int64_t o = 0; o < g.outs[j]; ++o) {
          double want = g.bias ? part[1](0, o) : 0;
          for (int64_t c = 0; c < g.in; ++c) {
            double weight = part[0](o, c);
            for (int64_t r = 0; r < g.ranks[j]; ++r) weight += g.scale * part[3](o, r) * part[2](r, c);
            want += m[0](n, c) * weight;
          }
          for (const Matrices* y : {&out, &streamed}) REQUIRE(std::fabs((*y)[j](n, o) - want) < 1e-11);
        }
    }
  }
}

TEST_CASE("linear_group is as exact as its storage and has the gradients of central differences", "[device][ops]") {
  Random random(22);
  for (const MapGroup& g : kGroups) {
    INFO("rows " << g.rows << ", in " << g.in << ", maps " << g.outs.size() << ", dropout " << g.p);
    const Matrices m = inputs_of(g, random);
    check_op("linear_group_fwd", m, linear_fwd(g));
    check_op("linear_group_fwd, streamed", m, linear_fwd(g, Reads::streamed));
    check_op("linear_group_bwd", m, linear_bwd(g));
    std::vector<std::size_t> which = {0};
    Matrices weights;
    for (std::size_t j = 0; j < g.outs.size(); ++j) {
      const std::size_t at = 1 + kMapParts * j;
      which.push_back(at);
      if (g.bias) which.push_back(at + 1);
      if (g.ranks[j] > 0) which.push_back(at + 2), which.push_back(at + 3);
      weights.push_back(m[at + 4]);
    }
    check_gradient(
        "linear_group", m, [&](const Matrices& moved) { return weighted(run_f64(linear_fwd(g), moved), weights); }, which,
        run_f64(linear_bwd(g), m));
  }
}

namespace {

void check_first_rows(const MapGroup& g, Random& random, std::initializer_list<std::pair<DType, Reads>> kinds,
                      std::initializer_list<int64_t> counts) {
  const Matrices m = inputs_of(g, random);
  for (const auto& [type, reads] : kinds) {
    auto rows = [&, type = type, reads = reads](int64_t n) {
      Matrices some = m;
      for (std::size_t x = 0; x < some.size(); x += kMapParts) some[x].rows = n, some[x].at.resize(std::size_t(n * some[x].cols));
      Rig rig(2, type, type, 0);
      Matrices out = read_all(rig, linear_fwd(g, reads)(rig, some));
      for (Matrix& y : out) y.at.resize(std::size_t(y.cols));
      return out;
    };
    const Matrices all = rows(g.rows);
    for (int64_t n : counts) {
      INFO(name_of(type) << (reads == Reads::tiled ? ", tiled, " : ", streamed, ") << n << " rows");
      const Matrices some = rows(n);
      for (std::size_t j = 0; j < all.size(); ++j) REQUIRE(some[j].at == all[j].at);
    }
  }
}

}  // namespace

TEST_CASE("a row of linear_group has the same bytes whatever rows stand beside it") {
  Random random(23);
  check_first_rows({600, 96, {80, 33}, {4, 0}, true, 0.2}, random,
                   {{DType::f32, Reads::tiled},
                    {DType::bf16, Reads::tiled},
                    {DType::f64, Reads::tiled},
                    {DType::f32, Reads::streamed},
                    {DType::bf16, Reads::streamed},
                    {DType::f64, Reads::streamed}},
                   {1, 2, 5, 6, 7, 31, 192, 193, 256, 257, 300});
}

TEST_CASE("a row of linear_group has the same bytes at the sizes of real models too, at which a library may choose another product") {
  Random random(24);
  // SmolLM2's with ranks of 128, and more columns at once.
  check_first_rows({448, 576, {576, 192, 192}, {128, 128, 128}, true, 0.1}, random,
                   {{DType::f32, Reads::tiled}, {DType::bf16, Reads::tiled}}, {1, 31, 32, 33, 96, 160, 192, 224, 255, 256, 257, 288});
  check_first_rows({448, 1536, {576}, {64}, false, 0}, random, {{DType::f32, Reads::tiled}, {DType::bf16, Reads::tiled}},
                   {1, 31, 32, 192, 224, 256, 257});
}

TEST_CASE("a range of a group's parts gives the bytes of those parts, and of A's and B's gradients only its own") {
  Random random(28);
  const MapGroup g{300, 72, {40, 17, 24}, {3, 5, 2}, true, 0.2};
  const Matrices m = inputs_of(g, random);
  for (DType type : {DType::f32, DType::bf16, DType::f64}) {
    INFO(name_of(type));
    Rig rig(2, type, type, 0);
    const Placed t = place(rig, g, m);
    run_lora(rig, t);
    const Tensor some = rig.out(g.rows, g.outs[1] + g.outs[2]);
    rig.ops.linear_group_fwd(rig.arena, t.y, t.xx, t.map);
    rig.ops.linear_group_fwd(rig.arena, some, t.xx, t.map.out_range(t.map.parts[1].out_begin, t.map.outs()));
    REQUIRE(rig.read(some).at == rig.read(t.y.col_range(g.outs[0], t.y.cols)).at);

    const Tensor dxa = rig.out(g.rows, 10), part_dxa = rig.out(g.rows, 10), dx = rig.out(g.rows, g.in);
    LinearGroupGrad grad{.da = rig.in_out(Matrix(10, g.in), Kind::sum)}, part{.da = rig.in_out(Matrix(10, g.in), Kind::sum)};
    for (std::size_t j = 0; j < 3; ++j)
      for (LinearGroupGrad* x : {&grad, &part}) x->db.push_back(rig.in_out(Matrix(g.outs[j], g.ranks[j]), Kind::sum));
    const LinearGroup range = t.map.out_range(t.map.parts[1].out_begin, t.map.outs());
    const Tensor dy = t.dy.col_range(g.outs[0], t.dy.cols);
    rig.ops.linear_group_bwd_input(rig.arena, dx, dxa, t.dy, t.map, t.dropout);
    rig.ops.linear_group_bwd_params(rig.arena, grad, t.dy, dxa, t.xx, t.map, t.dropout);
    rig.ops.linear_group_bwd_input(rig.arena, {}, part_dxa, dy, range, t.dropout);
    rig.ops.linear_group_bwd_params(rig.arena, part.out_range(t.map, t.map.parts[1].out_begin, t.map.outs()), dy, part_dxa, t.xx, range,
                                    t.dropout);
    REQUIRE(rig.guards_hold());
    for (double v : rig.read(part_dxa.col_range(0, 3)).at) REQUIRE(v == 0);
    REQUIRE(rig.read(part_dxa.col_range(3, 10)).at == rig.read(dxa.col_range(3, 10)).at);
    for (double v : rig.read(part.da.row_range(0, 3)).at) REQUIRE(v == 0);
    // oneDNN's products for processors without AVX-512 group the sum over rows by the outputs' size: 300 roundings of 2^-24 at most.
    const double close = type == DType::f64 ? 0 : 300 * 0x1p-24;
    REQUIRE(normalised_error(rig.read(part.da.row_range(3, 10)), rig.read(grad.da.row_range(3, 10))) <= close * close);
    for (double v : rig.read(part.db[0]).at) REQUIRE(v == 0);
    for (std::size_t j : {1u, 2u}) REQUIRE(normalised_error(rig.read(part.db[j]), rig.read(grad.db[j])) <= close * close);
  }
}

TEST_CASE("dropout keeps its share of elements, by the row's keys, site, step and seed alone") {
  const int64_t n = 40, c = 300;
  const double p = 0.3;
  Matrix identity(c, c);
  for (int64_t i = 0; i < c; ++i) identity(i, i) = 1;
  // With x all ones and A the identity, xa is the mask.
  auto mask = [&](const Matrix& keys, uint64_t seed, uint32_t step, uint32_t site) {
    Rig rig(2, DType::f32, DType::f32, 0);
    const PlacedGroup t =
        place_group(rig, {Matrix(keys.rows, c, 1), Matrix(1, c), Matrix(1, 0), identity, Matrix(1, c), Matrix(keys.rows, 1)}, {c}, 1);
    const Dropout d{.p = p, .seed = seed, .step = step, .site = site, .row_keys = rig.in(keys, Kind::i32)};
    rig.ops.lora_fwd(rig.arena, t.xx, t.map, d);
    return rig.read(t.xx.col_range(c, 2 * c));
  };
  Matrix keys(n, 2);
  for (int64_t i = 0; i < n; ++i) keys(i, 0) = double(i / 8), keys(i, 1) = double(i % 8);
  const Matrix first = mask(keys, 1, 1, 1);
  double kept = 0;
  for (double v : first.at) {
    REQUIRE((v == 0 || std::fabs(v - 1 / (1 - p)) < 1e-6));
    kept += v > 0;
  }
  const double count = double(n * c), spread = std::sqrt(count * p * (1 - p));
  REQUIRE(std::fabs(kept - count * (1 - p)) < 5 * spread);
  Matrix backwards(n, 2);
  for (int64_t i = 0; i < n; ++i) backwards(i, 0) = keys(n - 1 - i, 0), backwards(i, 1) = keys(n - 1 - i, 1);
  const Matrix turned = mask(backwards, 1, 1, 1);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < c; ++j) REQUIRE(turned(i, j) == first(n - 1 - i, j));
  for (const Matrix& other : {mask(keys, 2, 1, 1), mask(keys, 1, 2, 1), mask(keys, 1, 1, 2)}) {
    double equal = 0;
    for (std::size_t i = 0; i < first.at.size(); ++i) equal += other.at[i] == first.at[i];
    REQUIRE(std::fabs(equal / count - (p * p + (1 - p) * (1 - p))) < 0.03);
  }
  for (int64_t i = 1; i < n; ++i) REQUIRE(!std::equal(&first.at[0], &first.at[std::size_t(c)], &first.at[std::size_t(i * c)]));
}

TEST_CASE("what dropout keeps is divided by 1 - p in the type of the sums") {
  Rig rig(1, DType::f64, DType::f64, 0);
  const int64_t c = 64;
  const double p = 0.1;
  const PlacedGroup t =
      place_group(rig, {Matrix(1, c, 1), Matrix(1, c), Matrix(1, 0), Matrix(1, c, 1), Matrix(1, 1, 1), Matrix(1, 1, 1)}, {1}, 1);
  const Tensor dx = rig.out(1, c), dxa = rig.out(1, 1);
  const Dropout d{.p = p, .seed = 1, .step = 1, .site = 1, .row_keys = rig.in(Matrix(1, 2), Kind::i32)};
  rig.ops.lora_fwd(rig.arena, t.xx, t.map, d);
  rig.ops.linear_group_bwd_input(rig.arena, dx, dxa, t.dy, t.map, d);
  double kept = 0;
  for (double v : rig.read(dx).at) {
    REQUIRE((v == 0 || v == 1 / (1 - p)));
    kept += v;
  }
  REQUIRE(kept > 0);
  REQUIRE(std::fabs(rig.read(t.xx)(0, c) - kept) < 1e-13);
}

namespace {
// Groups whose xa, dA and dB are sums in parts on cuda: of 4,100 columns, of 600 where they are streamed, and of 1,100 rows.
const MapGroup kLongIn{3, 4100, {8}, {8}, false, 0.1}, kStreamed{3, 600, {8, 8}, {8, 3}, false, 0},
    kLongRows{1100, 40, {24, 9}, {8, 3}, false, 0.2};
// A group whose xa has tiles enough for those of 128 x 128.
const MapGroup kManyRows{8450, 40, {8, 8, 8}, {128, 128, 128}, false, 0.1};
}  // namespace

TEST_CASE("linear_group on cuda is as exact where its sums are cut into parts", "[device][ops]") {
  if (!tested_cuda()) SKIP(kNoTestedCuda);
  Random random(29);
  check_op("linear_group_fwd, long", inputs_of(kLongIn, random), linear_fwd(kLongIn));
  check_op("linear_group_fwd, streamed", inputs_of(kStreamed, random), linear_fwd(kStreamed, Reads::streamed));
  check_op("linear_group_bwd, long", inputs_of(kLongRows, random), linear_bwd(kLongRows));
}

TEST_CASE("a row of xa has the same bytes on cuda whatever rows stand beside it, in parts too", "[device][ops]") {
  if (!tested_cuda()) SKIP(kNoTestedCuda);
  take_schedule(0);
  Random random(30);
  for (const auto& [group, reads] :
       {std::pair{kLongIn, Reads::tiled}, {kStreamed, Reads::streamed}, {kStreamed, Reads::tiled}, {kManyRows, Reads::tiled}}) {
    MapGroup g = group;
    g.rows = std::max<int64_t>(g.rows, 130);
    const Matrices m = inputs_of(g, random);
    auto first_row = [&, reads = reads](int64_t n) {
      Matrices some = m;
      for (std::size_t x = 0; x < some.size(); x += kMapParts) some[x].rows = n, some[x].at.resize(std::size_t(n * some[x].cols));
      Rig rig(*tested_cuda(), DType::bf16, DType::bf16, Rig::kToEights);
      Matrix xa = read_all(rig, linear_fwd(g, reads)(rig, some)).back();
      xa.at.resize(std::size_t(xa.cols));
      return xa.at;
    };
    const std::vector<double> all = first_row(g.rows);
    for (int64_t n : {1, 2, 65}) REQUIRE(first_row(n) == all);
  }
}

TEST_CASE("a dry run of linear_group on cuda takes as much of the arena as it does", "[device][ops]") {
  if (!tested_cuda()) SKIP(kNoTestedCuda);
  take_schedule(0);
  const std::unique_ptr<Ops> dry = tested_cuda()->dry_twin();
  auto peak = [](Ops& ops, DType type, const MapGroup& g, Reads reads, bool backward) {
    Arena arena(ops);
    const int64_t outs = g.outs[0], rank = g.ranks[0], rows = g.rows;
    auto zeros = [&](DType t, int64_t r, int64_t c) {
      const Tensor x = arena.alloc(t, r, c);
      ops.fill(x, 0);
      return x;
    };
    LinearGroup map{zeros(type, outs, g.in + rank), {}, zeros(type, rank, g.in), {{.outs = outs, .rank = rank, .scale = 1}}, g.in};
    map.parts[0].b = zeros(type, outs, rank);
    const Tensor xx = zeros(type, rows, g.in + rank), dy = zeros(type, rows, outs), dxa = zeros(type, rows, rank);
    const LinearGroupGrad grad{.da = zeros(DType::f32, rank, g.in), .db = {zeros(DType::f32, outs, rank)}};
    const int64_t before = arena.peak_bytes();
    if (backward) ops.linear_group_bwd_params(arena, grad, dy, dxa, xx, map, {});
    else ops.lora_fwd(arena, xx, map, {}, reads);
    ops.finish();
    return arena.peak_bytes() - before;
  };
  for (DType type : {DType::bf16, DType::f32})
    for (const auto& [g, reads] : {std::pair{kLongIn, Reads::tiled}, {kStreamed, Reads::streamed}, {kLongRows, Reads::tiled}})
      for (bool backward : {false, true}) {
        const int64_t taken = peak(*tested_cuda(), type, g, reads, backward);
        INFO(name_of(type) << ", " << g.rows << " rows of " << g.in << (backward ? ", backward" : ""));
        CHECK(peak(*dry, type, g, reads, backward) == taken);
        CHECK((taken > 0) == (type == DType::bf16 && (backward || g.rows < 10)));
      }
}
