// Products by cuBLASLt, whose twin in the emulator makes them by the own kernels: which of them it is asked for, and when it is not
// trusted.
#include <cmath>

#include "engine/device/cuda/ops_cuda.h"
#include "simt.h"
#include "tests/ops/group_rig.h"
#include "tests/programs/programs.h"

using namespace kava;
using namespace kava::test;

namespace {

constexpr const char* kLt = "KAVA_EMULATED_LT";
constexpr const char* kNoFibers = "ThreadSanitizer does not know the emulator's fibers";
constexpr int kTried = 14;  // products that a backend compares at its start

std::unique_ptr<CudaOps> backend(const std::string& lt) {
  const WithVariable given(kLt, lt);
  return std::make_unique<CudaOps>(0, false);
}

// Outputs: y, y streamed, dx, dW.
Matrices linear(Ops& ops, DType type, const Matrices& m, int64_t rank, double p = 0) {
  Rig rig(ops, type, type, 0);
  const PlacedGroup t = place_group(rig, m, {rank}, 0.5);
  const int64_t rows = m[0].rows, in = m[0].cols, outs = t.map.outs();
  const Dropout dropout{.p = p, .seed = 9, .step = 3, .site = 5, .row_keys = rig.packed().in(Matrix(rows, 2, 1), Kind::i32)};
  const Tensor y = rig.out(rows, outs), streamed = rig.out(rows, outs), dx = rig.out(rows, in);
  const Tensor dxa = rank > 0 ? rig.out(rows, rank) : Tensor{}, dw = rig.in_out(Matrix(outs, in, 1), Kind::sum);
  if (rank > 0) ops.lora_fwd(rig.arena, t.xx, t.map, dropout);
  ops.linear_group_fwd(rig.arena, y, t.xx, t.map);
  ops.linear_group_fwd(rig.arena, streamed, t.xx, t.map, Reads::streamed);
  ops.linear_group_bwd_input(rig.arena, dx, dxa, t.dy, t.map, dropout);
  ops.linear_group_bwd_params(rig.arena, {.dw = dw}, t.dy, dxa, t.xx, t.map, dropout);
  REQUIRE(rig.guards_hold());
  return read_all(rig, {y, streamed, dx, dw});
}

Matrices inputs(int64_t rows, int64_t in, int64_t outs, int64_t rank) {
  Random random(51);
  return {random.normal(rows, in), random.normal(outs, in),   random.normal(1, outs),
          random.normal(rank, in), random.normal(outs, rank), random.normal(rows, outs)};
}

}  // namespace

TEST_CASE("cuBLASLt makes products on cuda only where all that are tried are the own kernels'") {
  if (!simt::supported()) SKIP(kNoFibers);
  take_schedule(0);
  CHECK_FALSE(CudaOps(0, false).has_lt());
  CHECK(backend("all")->has_lt());
  for (int k = 1; k <= kTried; ++k) CHECK_FALSE(backend(fmt::format("wrong:{}", k))->has_lt());
  for (int k : {1, kTried}) CHECK_FALSE(backend(fmt::format("fails:{}", k))->has_lt());
  // What it does not make is made by the own kernel later too.
  for (int k : {1, kTried}) CHECK(backend(fmt::format("none:{}", k))->has_lt());
  CHECK_FALSE(backend("none")->has_lt());
  CHECK(backend(fmt::format("wrong:{}", kTried + 1))->has_lt());
}

TEST_CASE("cuBLASLt makes the large plain products of bf16 on cuda, and the own kernels all others") {
  if (!simt::supported()) SKIP(kNoFibers);
  take_schedule(0);
  // Rows that are no whole steps, and numbers whose sums are exact in any order.
  Matrices large = inputs(133, 256, 256, 0);
  const Matrices small = inputs(5, 256, 8, 0);
  for (Matrix& m : large)
    for (double& v : m.at) v = std::round(v);
  auto differing = [](const Matrices& a, const Matrices& b) {
    std::string all;
    for (std::size_t i = 0; i < a.size(); ++i)
      if (a[i].at != b[i].at) all += "ysxw"[i];
    return all;
  };
  const Matrices own = linear(*emulated_cuda(), DType::bf16, large, 0);
  const std::unique_ptr<CudaOps> all = backend("all");
  CHECK(differing(linear(*all, DType::bf16, large, 0), own).empty());
  // Asked for y, dx and dW in turn, and for nothing that is small or f32.
  const char* results[] = {"y", "x", "w", ""};
  for (int i = 0; i < 4; ++i) {
    const std::unique_ptr<CudaOps> ops = backend(fmt::format("wrong:{}", kTried + 1 + i));
    CHECK(differing(linear(*ops, DType::bf16, small, 0), linear(*emulated_cuda(), DType::bf16, small, 0)).empty());
    CHECK(differing(linear(*ops, DType::f32, large, 0), linear(*emulated_cuda(), DType::f32, large, 0)).empty());
    CHECK(differing(linear(*ops, DType::bf16, large, 0), own) == results[i]);
  }
  CHECK(differing(linear(*backend(fmt::format("none:{}", kTried + 2)), DType::bf16, large, 0), own).empty());
  CHECK(differing(linear(*backend(fmt::format("none:{}", kTried + 3)), DType::bf16, large, 0), own).empty());
  // With ranks y is one product over [x | xa].
  const Matrices ranks = inputs(5, 256, 256, 8), own_ranks = linear(*emulated_cuda(), DType::bf16, ranks, 8);
  const Matrices by_lt = linear(*all, DType::bf16, ranks, 8);
  CHECK(normalised_error(by_lt[0], own_ranks[0]) < 1e-6);
  for (std::size_t i : {1u, 3u}) CHECK(by_lt[i].at == own_ranks[i].at);
}

TEST_CASE("a product on cuda that cuBLASLt has not been asked for is first asked for outside of a recording") {
  if (!simt::supported()) SKIP(kNoFibers);
  take_schedule(0);
  const std::unique_ptr<CudaOps> ops = backend("all");
  const PassGraphs::Counts& counts = ops->graphs().counts();
  struct Rows {
    Rig rig;
    PlacedGroup t;
    Tensor dx;
    Rows(CudaOps& o, int64_t rows) : rig(o, DType::bf16, DType::bf16, 0), t(place_group(rig, inputs(rows, 256, 256, 0), {0}, 0.5)) {
      dx = rig.out(rows, 256);
    }
  } few(*ops, 5), many(*ops, 300);  // of two algorithms
  const auto pass = [&](Rows& r) {
    ops->pass(r.rig.arena, 1, [&] { ops->linear_group_bwd_input(r.rig.arena, r.dx, {}, r.t.dy, r.t.map, {}); });
  };
  pass(few), pass(few);
  CHECK((counts.captures == 1 && counts.launched == 1));
  pass(many);
  CHECK((counts.captures == 2 && counts.launched == 1 && counts.fallbacks == 1));
  pass(many), pass(few);
  CHECK((counts.captures == 4 && counts.launched == 3 && counts.fallbacks == 1));
  for (Rows* r : {&few, &many}) {
    Rows own(dynamic_cast<CudaOps&>(*emulated_cuda()), r->dx.rows);
    own.rig.ops.linear_group_bwd_input(own.rig.arena, own.dx, {}, own.t.dy, own.t.map, {});
    CHECK(read_all(r->rig, {r->dx})[0].at == read_all(own.rig, {own.dx})[0].at);
  }
}

TEST_CASE("dy W goes to cuBLASLt on cuda, onto the masked low-rank term, and dx is as exact as the cpu's") {
  if (!simt::supported()) SKIP(kNoFibers);
  take_schedule(0);
  for (double p : {0.0, 0.3}) {
    const Matrices m = inputs(257, 256, 256, 24);
    const Matrix exact = linear(cpu(2), DType::f64, m, 24, p)[2], on_cpu = linear(cpu(2), DType::bf16, m, 24, p)[2];
    const Matrix own = linear(*emulated_cuda(), DType::bf16, m, 24, p)[2];
    auto by = [&](const std::string& lt) { return linear(*backend(lt), DType::bf16, m, 24, p)[2]; };
    // y comes before dx, and xa before both where nothing is dropped.
    const int dx = kTried + (p > 0 ? 2 : 3);
    const Matrix by_lt = by("all"), wrong = by(fmt::format("wrong:{}", dx));
    CHECK(wrong(0, 0) != by_lt(0, 0));
    CHECK(std::equal(wrong.at.begin() + 1, wrong.at.end(), by_lt.at.begin() + 1));
    CHECK((by(fmt::format("none:{}", dx)).at == own.at));
    const double allowed = 1.5 * 1.5 * normalised_error(on_cpu, exact);
    INFO("p " << p << ": " << normalised_error(by_lt, exact) << ", own " << normalised_error(own, exact) << ", allowed " << allowed);
    CHECK((by_lt.at != own.at));
    CHECK(normalised_error(by_lt, exact) <= allowed);
    CHECK(normalised_error(own, exact) <= allowed);
  }
}
