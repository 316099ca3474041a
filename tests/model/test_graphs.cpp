// Passes as graphs on the emulated cuda backend: the same bytes as without, few executables, and what becomes of a pass that cannot be
// recorded.
#include <fcntl.h>
#include <unistd.h>

#include <catch2/catch_test_macros.hpp>
#include <cstdio>
#include <optional>

#include "engine/device/cuda/ops_cuda.h"
#include "engine/device/host.h"
#include "engine/device/op_observer.h"
#include "engine/files/files.h"
#include "gpu_emulated.h"
#include "kernels/gpu_error.h"
#include "models/decode.h"
#include "simt.h"
#include "tests/model/train_rig.h"
#include "tests/ops/op_rig.h"
#include "tests/programs/programs.h"

using namespace kava;
using namespace kava::test;

namespace {

constexpr const char* kNoFibers = "ThreadSanitizer does not know the emulator's fibers";
constexpr const char* kFail = "KAVA_EMULATED_FAIL";

const PassGraphs::Counts& graphs_of(const Ops& ops) { return dynamic_cast<const CudaOps&>(ops).graphs().counts(); }

/// What body writes to standard error.
std::string notes_of(const std::function<void()>& body) {
  const TempFolder folder;
  const int saved = ::dup(2), file = ::open((folder / "err").c_str(), O_WRONLY | O_CREAT, 0600);
  REQUIRE((saved >= 0 && file >= 0));
  std::fflush(stderr);
  ::dup2(file, 2);
  body();
  std::fflush(stderr);
  ::dup2(saved, 2);
  ::close(saved), ::close(file);
  return read_file(folder / "err", 1 << 20);
}

/// A backend with a sum that passes add to.
struct Adder {
  std::unique_ptr<Ops> ops = make_emulated_cuda();
  Arena arena{*ops};
  Tensor sum = arena.alloc(DType::f32, 1, 16);
  double expected = 0;

  Adder() { ops->fill(sum, 0); }
  /// Adds value `times` times, in room of its own.
  void add(double value, int times) {
    ArenaScope scope(arena);
    const Tensor x = arena.alloc(DType::f32, 1, 16);
    ops->fill(x, value);
    for (int i = 0; i < times; ++i) ops->add(sum, x);
  }
  void pass(int64_t key, double value, int times, const std::function<void()>& more = {}) {
    ops->pass(arena, key, [&] {
      add(value, times);
      if (more) more();
    });
    expected += value * times;
  }
  void check() { CHECK(to_host(*ops, sum) == std::vector<double>(16, expected)); }
  const PassGraphs::Counts& graphs() const { return graphs_of(*ops); }
};

struct Trained {
  std::vector<double> losses, value, m, v;
  PassGraphs::Counts half, graphs;
  bool operator==(const Trained& o) const { return losses == o.losses && value == o.value && m == o.m && v == o.v; }
};

Trained train(const std::vector<std::string>& sets, int64_t steps, bool observed = false) {
  TinyRun run(sets, 1, make_emulated_cuda());
  Trainer trainer(*run.model, run.samples, {});
  OpCounter counter(*run.ops);
  std::optional<Observed> watching;
  if (observed) watching.emplace(*run.ops, counter);
  Trained t;
  for (int64_t i = 0; i < steps; ++i) {
    t.losses.push_back(trainer.step().loss);
    if (i + 1 == steps / 2) t.half = graphs_of(*run.ops);
  }
  const ParameterStore& p = run.model->parameters;
  t.value = p.get(p.value()), t.m = p.get(p.m()), t.v = p.get(p.v()), t.graphs = graphs_of(*run.ops);
  return t;
}

}  // namespace

TEST_CASE("decoding on cuda with graphs has the tokens of that without, and an executable for each pass of a question and one for tokens") {
  if (!simt::supported()) SKIP(kNoFibers);
  auto decoded = [](bool observed) {
    TinyRun run({}, 1, make_emulated_cuda());
    Arena arena(*run.ops);
    OpCounter counter(*run.ops);
    std::optional<Observed> watching;
    if (observed) watching.emplace(*run.ops, counter);
    DecodeOptions options;
    options.max_new_tokens = 8;
    std::vector<std::vector<int32_t>> ids;
    for (int i = 0; i < 3; ++i)
      for (const DecodeResult& r : decode(*run.model, arena, run.samples, options)) ids.push_back(r.ids);
    return std::pair(ids, graphs_of(*run.ops));
  };
  const auto with = decoded(false), without = decoded(true);
  CHECK(with.first == without.first);
  CHECK(without.second.captures == 0);
  CHECK(with.second.launched > 2 * with.second.instantiated);
  CHECK(with.second.instantiated == 4 + 1);  // a question's passes with three over the latents
}

TEST_CASE("20 steps on cuda with graphs have the bytes of those without, and as many executables after ten as after twenty") {
  if (!simt::supported()) SKIP(kNoFibers);
  take_schedule(0);
  const std::pair<std::vector<std::string>, int64_t> forms[] = {{{"lora.dropout=0.3"}, 20},
                                                                {{"model.dtype=bf16"}, 20},
                                                                {{"method=pccot", "train.recompute=block", "lora.dropout=0.3"}, 8},
                                                                {{"train.trainable=all", "train.recompute=cheap"}, 8},
                                                                {{"method=codi", "latent.iterations=5", "train.micro_batch=1"}, 8}};
  for (const auto& [sets, steps] : forms) {
    INFO(sets[0]);
    const Trained with = train(sets, steps);
    const WithVariable spoilt(kFail, "capture:1");
    const Trained without = train(sets, steps);
    CHECK(with == without);
    CHECK((without.graphs.captures == 1 && without.graphs.launched == 0));
    // In bf16 a forward pass has one kernel of attention or two, by the rows of its shortest and longest segment.
    const int64_t passes = 2 * (sets[0] == "method=codi" ? 6 : 4), most = passes + (sets[0] == "model.dtype=bf16" ? passes / 2 : 0);
    CHECK(with.graphs.instantiated >= passes);
    CHECK(with.graphs.instantiated <= most);
    CHECK(with.half.instantiated == with.graphs.instantiated);
    CHECK(with.graphs.updated == with.graphs.launched - with.graphs.instantiated);
    CHECK(with.graphs.launched >= (steps - 3) * passes);  // but where the batch is larger than all before
  }
}

TEST_CASE("on cuda a method whose passes change by stage makes executables for each form of a pass alone") {
  if (!simt::supported()) SKIP(kNoFibers);
  take_schedule(0);
  const std::vector<std::string> sets{"method=coconut",  "latent.token_init=", "train.epochs=5",
                                      "stages.epochs=1", "coconut.thoughts=1", "coconut.max_stage=2"};
  const Trained with = train(sets, 15), observed = train(sets, 15, true);
  CHECK(with == observed);
  CHECK(with.graphs.instantiated > with.half.instantiated);
  CHECK(with.graphs.instantiated <= 3 * 2 * 8);
  CHECK(with.graphs.updated > 0);
}

TEST_CASE("on cuda a pass is recorded from its second time on, and launched with what it then asks for") {
  if (!simt::supported()) SKIP(kNoFibers);
  Adder a;
  a.pass(1, 1, 2);
  CHECK(a.graphs().captures == 0);
  for (int i = 2; i < 6; ++i) a.pass(1, i, 2), a.pass(2, 0.5 * i, 3);
  CHECK((a.graphs().captures == 7 && a.graphs().launched == 7));
  CHECK((a.graphs().instantiated == 2 && a.graphs().updated == 5));
  a.check();
}

TEST_CASE("on cuda a pass of another topology has an executable of its own, and the first one's is updated again") {
  if (!simt::supported()) SKIP(kNoFibers);
  Adder a;
  a.pass(1, 1, 1);
  for (int i = 0; i < 4; ++i) a.pass(1, 1 + i, 1), a.pass(1, 3 + i, 2), a.pass(1, 0, 0);
  CHECK((a.graphs().launched == 12 && a.graphs().instantiated == 3));
  CHECK(a.graphs().fallbacks == 0);
  a.check();
  const std::string notes = notes_of([&] {
    // Forms 0 to 2 are known; sixteen more use the pass's credit up.
    for (int times = 0; times < 3 + 2 * PassGraphs::kMostKept; ++times) a.pass(1, 0.25, times);
    CHECK(a.graphs().instantiated == 3 + PassGraphs::kMostKept);
    CHECK(a.graphs().fallbacks == PassGraphs::kMostKept);
    a.pass(2, 1, 1), a.pass(2, 1, 1);
    CHECK(a.graphs().instantiated == 4 + PassGraphs::kMostKept);
    for (int times = 0; times < 3 + 2 * PassGraphs::kMostKept; ++times) a.pass(2, 0.25, times);
  });
  CHECK(notes == "cuda (emulated): the kernels of a pass are launched one by one, as it needed new graphs too often\n");
  a.check();
}

TEST_CASE("on cuda a pass keeps the executables that it used last, and makes the others anew") {
  if (!simt::supported()) SKIP(kNoFibers);
  Adder a;
  a.pass(1, 0, 1);
  int64_t made = 0;
  const auto makes = [&](int times) {
    a.pass(1, 0.5, times);
    return std::exchange(made, a.graphs().instantiated) != made;
  };
  for (int times = 0; times < PassGraphs::kMostKept - 1; ++times) CHECK(makes(times));
  CHECK_FALSE(makes(0));
  CHECK(makes(20));
  CHECK_FALSE(makes(0));
  CHECK(makes(21));  // in the place of 1
  CHECK_FALSE(makes(0));
  CHECK_FALSE(makes(2));
  CHECK(makes(1));
  // A new form in every third pass, for as long as there are passes.
  for (int i = 0; i < 90; ++i) makes(i % 3 == 0 ? 30 + i / 3 : 0);
  CHECK(a.graphs().fallbacks == 0);
  a.check();
}

TEST_CASE("on cuda kernels in clusters of another size have an executable of their own") {
  if (!simt::supported()) SKIP(kNoFibers);
  Adder a;
  CUstream_st& stream = *dynamic_cast<CudaOps&>(*a.ops).runtime().stream();
  for (const int cluster : {1, 1, 2, 1, 4, 2, 4}) stream.cluster = cluster, a.pass(1, cluster, 2);
  CHECK((a.graphs().launched == 6 && a.graphs().instantiated == 3 && a.graphs().updated == 3));
  a.check();
}

TEST_CASE("on cuda an update that is refused makes the executable anew") {
  if (!simt::supported()) SKIP(kNoFibers);
  const WithVariable fail(kFail, "update:2");
  Adder a;
  for (int i = 0; i < 6; ++i) a.pass(1, i, 2);
  CHECK((a.graphs().launched == 5 && a.graphs().instantiated == 2 && a.graphs().updated == 3));
  a.check();
}

TEST_CASE("on cuda a pass that asks for memory is run again without a recording, and the next one has one") {
  if (!simt::supported()) SKIP(kNoFibers);
  Adder a;
  a.pass(1, 1, 1), a.pass(1, 2, 1);
  const int64_t before = a.arena.committed_bytes();
  const Arena::Mark mark = a.arena.mark();
  Tensor kept;
  a.pass(1, 3, 1, [&] {
    kept = a.arena.alloc(DType::f32, 1, 16);
    a.ops->fill(a.arena.alloc(DType::f32, 1, Arena::kPiece), 0);
    a.ops->fill(kept, 7);
  });
  CHECK(a.arena.committed_bytes() > before);
  CHECK(static_cast<char*>(kept.data) == static_cast<char*>(a.sum.data) + mark.used);
  CHECK((a.graphs().captures == 2 && a.graphs().launched == 1));
  CHECK(to_host(*a.ops, kept)[0] == 7);
  a.pass(1, 4, 1);
  CHECK((a.graphs().captures == 3 && a.graphs().launched == 2));
  a.check();
}

TEST_CASE("on cuda what cannot be recorded ends all recording, and the pass is run without") {
  if (!simt::supported()) SKIP(kNoFibers);
  const std::vector<float> ones(16, 1);
  std::vector<float> read(16);
  const std::function<void(Adder&)> offences[] = {[&](Adder& a) { a.ops->upload(a.arena.alloc(DType::f32, 1, 16), ones.data()); },
                                                  [&](Adder& a) { a.ops->download(read.data(), a.sum); },
                                                  [&](Adder& a) { dynamic_cast<CudaOps&>(*a.ops).runtime().begin_read(a.sum.data, 4); },
                                                  [&](Adder& a) { a.ops->finish(); },
                                                  [&](Adder& a) { a.ops->release(a.ops->allocate(64), 64); },
                                                  [&](Adder& a) { dynamic_cast<CudaOps&>(*a.ops).runtime().fork(); },
                                                  [&](Adder& a) { dynamic_cast<CudaOps&>(*a.ops).runtime().join(); },
                                                  [&](Adder& a) { (void)dynamic_cast<CudaOps&>(*a.ops).runtime().idle(); }};
  for (const auto& offence : offences) {
    Adder a;
    a.pass(1, 1, 1), a.pass(1, 2, 1);
    CHECK(a.graphs().launched == 1);
    a.pass(1, 3, 1, [&] { offence(a); });
    CHECK((a.graphs().captures == 2 && a.graphs().launched == 1));
    a.pass(1, 4, 1);
    CHECK((a.graphs().captures == 2 && a.graphs().fallbacks == 2));
    a.check();
  }
}

TEST_CASE("on cuda a spoilt recording loses nothing, and neither does a pass that throws") {
  if (!simt::supported()) SKIP(kNoFibers);
  {
    const WithVariable fail(kFail, "capture:2");
    Adder a;
    for (int i = 0; i < 5; ++i) a.pass(1, i, 2);
    CHECK((a.graphs().captures == 2 && a.graphs().launched == 1));
    a.check();
  }
  Adder a;
  for (int i = 0; i < 2; ++i) a.pass(1, i, 2);
  CHECK_THROWS_AS(a.pass(1, 5, 2, [] { throw Error(Exit::data, "x", "y", "z"); }), Error);
  a.pass(1, 3, 2);
  CHECK((a.graphs().captures == 3 && a.graphs().launched == 2));
  a.check();
}

TEST_CASE("on cuda a kernel that faults in a graph is told by the call that waits") {
  if (!simt::supported()) SKIP(kNoFibers);
  const WithVariable fail(kFail, "fault:6");
  Adder a;  // one launch; a pass has two
  for (int i = 0; i < 3; ++i) a.pass(1, i, 1);
  CHECK(a.graphs().launched == 2);
  CHECK_THROWS_AS(to_host(*a.ops, a.sum), GpuError);
}
