#include <chrono>
#include <mutex>
#include <set>
#include <thread>

#include "engine/device/cuda/ops_cuda.h"
#include "engine/device/op_observer.h"
#include "tests/ops/op_rig.h"

using namespace kava;
using namespace kava::test;

namespace {

// Runs every op again on a second backend, on copies of its inputs, and keeps the names of those whose outputs differ.
class Checker final : public OpObserver {
 public:
  explicit Checker(Ops& other) : other_(other), room_(other) {}
  void before(const OpCall& call) override {
    copies_.clear();
    for (auto list : {call.outputs, call.inputs})
      for (const Tensor& t : list) {
        if (!t || copies_.contains(t.data)) continue;
        std::vector<char>& bytes = copies_[t.data];
        bytes.resize(bytes_of(t));
        std::memcpy(bytes.data(), t.data, bytes.size());
      }
    names.emplace_back(call.name);
  }
  void after(const OpCall& call) override {
    call.again(other_, {[&](const Tensor& t) {
                          Tensor there = t;
                          there.data = copies_.at(t.data).data();
                          return there;
                        },
                        room_});
    for (const Tensor& t : call.outputs)
      if (t && std::memcmp(t.data, copies_.at(t.data).data(), bytes_of(t)) != 0) differing.emplace_back(call.name);
  }
  std::vector<std::string> names, differing;

 private:
  static std::size_t bytes_of(const Tensor& t) { return std::size_t(((t.rows - 1) * t.stride + t.cols) * size_of(t.dtype)); }
  Ops& other_;
  Arena room_;
  std::map<void*, std::vector<char>> copies_;
};

}  // namespace

TEST_CASE("observers see every op with its tensors, and can run it again on another backend") {
  const std::unique_ptr<Ops> ops = make_cpu_ops(2), other = make_cpu_ops(1);
  Arena arena(*ops);
  Random random(51);
  auto tensor = [&](int64_t rows, int64_t cols, DType type = DType::f32) {
    const Tensor t = arena.alloc(type, rows, cols);
    const Matrix m = random.normal(rows, cols);
    const std::vector<float> host(m.at.begin(), m.at.end());
    if (type == DType::f32) ops->upload(t, host.data());
    else ops->fill(t, 0);
    return t;
  };
  const Tensor x = tensor(40, 16), xx = tensor(40, 18), y = tensor(40, 12), joined = tensor(12, 18), a = tensor(2, 16), b = tensor(12, 2);
  const Tensor dx = tensor(40, 16), dgain = tensor(1, 16), gain = tensor(1, 16), rstd = tensor(40, 1), loss = tensor(1, 1, DType::f64);
  const LinearGroup group{joined, {}, a, {{.outs = 12, .rank = 2, .scale = 0.5, .b = b}}, 16};
  Checker checker(*other);
  OpTimer timer(*ops);
  {
    const Observed checked(*ops, checker), timed(*ops, timer);
    ops->linear_prepare(group);
    ops->lora_fwd(arena, xx, group, {});
    ops->linear_group_fwd(arena, y, xx, group);
    ops->rms_norm_bwd(arena, dx, dgain, x, x, rstd, gain);
    ops->sum_squares(arena, loss, x);
    ops->add(dx, x);
  }
  ops->fill(x, 1);
  REQUIRE(checker.names ==
          std::vector<std::string>{"linear_prepare", "lora_fwd", "linear_group_fwd", "rms_norm_bwd", "sum_squares", "add"});
  REQUIRE(checker.differing.empty());
  REQUIRE(timer.times().size() == 6);
  REQUIRE(timer.times().at("linear_group_fwd").calls == 1);
  REQUIRE(timer.times().at("linear_group_fwd").flops == 2.0 * 40 * 12 * 18);
}

TEST_CASE("an observer is told what an op moves, however large the tensors are that it takes rows of") {
  const std::unique_ptr<Ops> ops = make_cpu_ops(1, true);
  Arena arena(*ops);
  struct Last final : OpObserver {
    void before(const OpCall& call) override { bytes = call.bytes(); }
    double bytes = 0;
  } last;
  const Observed observed(*ops, last);
  auto tensor = [&](int64_t rows, int64_t cols, DType type = DType::f32) { return arena.alloc(type, rows, cols); };
  const Tensor table = tensor(1000, 16), extra = tensor(3, 16), x = tensor(5, 16), ids = tensor(1, 5, DType::i32);
  constexpr double kRow = 64, kIds = 20;
  ops->embed_fwd(x, table, extra, ids);
  CHECK(last.bytes == 10 * kRow + kIds);
  ops->embed_bwd(table, extra, x, ids);
  CHECK(last.bytes == 10 * kRow + kIds);
  ops->embed_bwd({}, extra, x, ids);
  CHECK(last.bytes == 8 * kRow + kIds);  // which rows of dx are of new tokens is not known
  ops->gather_rows(x, table, ids);
  CHECK(last.bytes == 10 * kRow + kIds);
  ops->scatter_rows(table, x, ids);
  CHECK(last.bytes == 10 * kRow + kIds);
  ops->scatter_add_rows(table, x, ids);
  CHECK(last.bytes == 10 * kRow + kIds);
  const Tensor cosine = tensor(1000, 4), sine = tensor(1000, 4);
  ops->rope_fwd(x, ids, cosine, sine, 8, false);
  CHECK(last.bytes == 5 * kRow + kIds + 2 * 5 * 16);

  const Tensor xx = tensor(5, 18), y = tensor(5, 12), dxa = tensor(5, 2), joined = tensor(12, 18), a = tensor(2, 16), b = tensor(12, 2);
  const LinearGroup group{joined, {}, a, {{.outs = 12, .rank = 2, .scale = 0.5, .b = b}}, 16};
  ops->linear_prepare(group);
  CHECK(last.bytes == 4 * (12 * 2 + 12 * 2));
  ops->lora_fwd(arena, xx, group, {}, Reads::tiled);
  CHECK(last.bytes == 4 * (5 * 18 + 2 * 16));
  ops->linear_group_fwd(arena, y, xx, group, Reads::tiled);
  CHECK(last.bytes == 4 * (5 * 12 + 5 * 18 + 12 * 18));
  ops->linear_group_bwd_input(arena, x, dxa, y, group, {});
  CHECK(last.bytes == 4 * (5 * 16 + 5 * 2 + 5 * 12 + 12 * 18 + 2 * 16));
  ops->linear_group_bwd_input(arena, {}, dxa, y, group, {});
  CHECK(last.bytes == 4 * (5 * 2 + 5 * 12 + 12 * 2));
  const Tensor da = tensor(2, 16), db = tensor(12, 2);
  ops->linear_group_bwd_params(arena, {{}, {}, da, {db}}, y, dxa, xx, group, {});
  CHECK(last.bytes == 4 * (2 * 16 + 12 * 2 + 5 * 12 + 5 * 2 + 5 * 18));

  const Tensor k = tensor(1000, 16), v = tensor(1000, 16), o = tensor(5, 16), two = tensor(1, 2, DType::i32),
               one = tensor(1, 1, DType::i32);
  const Segments segments{two, tensor(1, 7, DType::i32), one, one, two, 1, 1, 7, 5, 5};
  ops->attention_fwd(arena, o, {}, x, k, v, segments, 2, 2, 1);
  CHECK(last.bytes == 10 * kRow + 2 * 7 * kRow + 4 * (2 + 7 + 1 + 1 + 2));
}

TEST_CASE("a dry backend takes from the arena what a real one takes, and touches nothing", "[device][ops]") {
  take_schedule(0);
  for (const auto& [backend, type] : every_backend()) {
    if (type == DType::f64) continue;
    INFO(backend->name() << ", " << name_of(type));
    int64_t peaks[2];
    for (bool dry : {false, true}) {
      const std::unique_ptr<Ops> twin = backend->dry_twin();
      Ops* const ops = dry ? twin.get() : backend;
      REQUIRE(ops->dry() == dry);
      Arena arena(*ops);
      auto tensor = [&](int64_t rows, int64_t cols, DType t) {
        const Tensor x = arena.alloc(t, rows, cols);
        ops->fill(x, 0);
        return x;
      };
      auto index = [&](const std::vector<int32_t>& list) {
        const Tensor x = arena.alloc(DType::i32, 1, std::ssize(list));
        ops->upload(x, list.data());
        return x;
      };
      const DType sum = sum_type(type);
      const Tensor x = tensor(70, 48, type), dx = tensor(70, 48, type), w = tensor(300, 48, type), gain = tensor(1, 48, type);
      const Tensor dgain = tensor(1, 48, sum), rstd = tensor(70, 1, sum), lse = tensor(70, 3, sum), dk = tensor(70, 48, sum);
      std::vector<int32_t> all(70);
      for (int32_t i = 0; i < 70; ++i) all[std::size_t(i)] = i;
      Segments s{index({0, 70}), index(all), index({0}), index({70}), index({0, 1}), 1, 1, 70, 70, 70};
      const Tensor zeros = index(std::vector<int32_t>(70, 0)), losses = tensor(1, 2, DType::f64), keys = tensor(70, 2, DType::i32);
      ops->rms_norm_bwd(arena, dx, dgain, x, x, rstd, gain);
      ops->attention_fwd(arena, dx, lse, x, x, x, s, 3, 3, 1);
      ops->attention_bwd(arena, dx, dk, dk, x, x, lse, x, x, x, s, 3, 3, 1);
      ops->head_cross_entropy(arena, losses, dk, {}, zeros, {}, x, w, zeros, zeros, zeros, {1, 1});
      ops->sum_squares(arena, losses.col_range(0, 1), x);
      const Tensor a = tensor(4, 48, type), b = tensor(48, 4, type), joined = tensor(48, 52, type), xx = tensor(70, 52, type);
      const Tensor dxa = tensor(70, 4, type);
      const LinearGroup group{joined, gain, a, {{.outs = 48, .rank = 4, .scale = 1, .b = b}}, 48};
      const Dropout dropout{.p = 0.1, .row_keys = keys};
      ops->linear_prepare(group);
      ops->lora_fwd(arena, xx, group, dropout);
      ops->linear_group_fwd(arena, dx, xx, group);
      ops->linear_group_bwd_input(arena, dx, dxa, x, group, dropout);
      const LinearGroupGrad grad{.da = tensor(4, 48, sum), .db = {tensor(48, 4, sum)}};
      ops->linear_group_bwd_params(arena, grad, x, dxa, xx, group, dropout);
      double read = 7;
      ops->download(&read, losses.col_range(0, 1));
      REQUIRE(read == 0);
      peaks[dry] = arena.peak_bytes();
    }
    REQUIRE(peaks[1] == peaks[0]);
  }
}

TEST_CASE("an op refuses a secondary operand of another type or shape") {
  Rig rig(1, DType::bf16, DType::bf16, 0);
  const Tensor x = rig.in(Matrix(3, 4)), xx = rig.in_out(Matrix(3, 6)), y = rig.out(3, 5), joined = rig.in_out(Matrix(5, 6));
  const Tensor a = rig.in(Matrix(2, 4)), b = rig.in(Matrix(5, 2)), single = rig.in(Matrix(5, 2), Kind::sum);
  const Tensor bias = rig.in(Matrix(1, 5), Kind::sum), gain = rig.in(Matrix(1, 4), Kind::sum);
  auto linear = [&](const Tensor& of_bias, const Tensor& of_b, const Tensor& to, const Tensor& from) {
    rig.ops.linear_group_fwd(rig.arena, to, from, {joined, of_bias, a, {{.outs = 5, .rank = 2, .scale = 1, .b = of_b}}, 4});
  };
  linear({}, b, y, xx);
  REQUIRE_THROWS_AS(linear({}, single, y, xx), Error);  // B in f32
  REQUIRE_THROWS_AS(linear(bias, b, y, xx), Error);     // the bias in f32
  REQUIRE_THROWS_AS(linear({}, b, y, x), Error);
  REQUIRE_THROWS_AS(linear({}, b, rig.out(3, 4), xx), Error);
  const Tensor norm = rig.out(3, 4);
  REQUIRE_THROWS_AS(rig.ops.add_rms_norm_fwd(norm, {}, {}, x, {}, gain, 1e-5), Error);
  const Tensor positions = rig.in(row_of({0, 0, 0}), Kind::i32), angle = rig.in(Matrix(1, 2), Kind::sum), narrow = rig.in(Matrix(1, 2));
  rig.ops.rope_fwd(norm, positions, angle, angle, 4, false);
  REQUIRE_THROWS_AS(rig.ops.rope_fwd(norm, positions, angle, narrow, 4, false), Error);
  REQUIRE_THROWS_AS(rig.ops.rope_fwd(norm, rig.in(row_of({0}), Kind::i32), angle, angle, 4, false), Error);
}

TEST_CASE("what a device leaves to the host runs on as many threads as it is given") {
  if (!emulated_cuda()) SKIP(kNoTestedCuda);
  for (int threads : {1, 3}) {
    CudaOps ops(0, false, threads);
    std::set<std::thread::id> seen;
    std::mutex mutex;
    for (int call = 0; call < 20; ++call)
      ops.on_host(200, [&](int64_t) {
        std::this_thread::sleep_for(std::chrono::microseconds(20));
        const std::lock_guard lock(mutex);
        seen.insert(std::this_thread::get_id());
      });
    // In 20 calls not one thread more than there are: they are the same ones.
    CHECK(seen.size() <= static_cast<std::size_t>(threads));
    if (threads == 1) CHECK(seen.contains(std::this_thread::get_id()));
  }
}
