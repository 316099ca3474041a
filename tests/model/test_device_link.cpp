// Sums among the cuda devices of ranks, by NCCL's twin on the emulated backend: ranks are threads, with a device each.
#include <catch2/matchers/catch_matchers_string.hpp>

#include "engine/device/buffer.h"
#include "engine/device/cuda/device_link.h"
#include "engine/device/cuda_module.h"
#include "engine/device/host.h"
#include "gpu_emulated.h"
#include "simt.h"
#include "tests/model/step_rig.h"
#include "tests/model/train_rig.h"
#include "tests/ops/op_rig.h"
#include "tests/programs/programs.h"
#include "tests/rank_threads.h"

using namespace kava;
using namespace kava::test;
using Catch::Matchers::ContainsSubstring;

namespace {

struct Linked {
  explicit Linked(Comm& comm) : ops(new CudaOps(comm.rank(), false)) {
    std::string why;
    link = make_device_link(comm, *ops, why);
    if (!link) throw Error(Exit::internal, "link", why);
  }
  std::unique_ptr<CudaOps> ops;
  std::unique_ptr<DeviceLink> link;
};

void require_fibers() {
  if (!simt::supported()) SKIP("ThreadSanitizer does not know the emulator's fibers");
}

}  // namespace

TEST_CASE("a sum among cuda devices is what the ranks brought, beside what is queued later and before what follows it") {
  require_fibers();
  for (int n : {2, 3}) {
    INFO(n);
    const auto failed = on_rank_threads(n, 60, [&](Comm& comm) {
      Linked r(comm);
      for (const DType t : {DType::f32, DType::f64, DType::bf16})
        for (const int64_t count : {1, 999, 5000}) {
          const Buffer a(*r.ops, t, 1, count), b(*r.ops, t, 1, count), c(*r.ops, DType::f32, 1, 7);
          r.ops->fill(a.tensor(), comm.rank() + 1), r.ops->fill(b.tensor(), 3);
          const Tensor both[] = {a.tensor(), b.tensor()};
          r.link->sum(both, "adding");
          r.ops->fill(c.tensor(), 5);
          r.link->join();
          const std::vector<double> sum = to_host(*r.ops, a.tensor()), threes = to_host(*r.ops, b.tensor());
          const bool right = std::ranges::all_of(sum, [&](double x) { return x == n * (n + 1) / 2; }) &&
                             std::ranges::all_of(threes, [&](double x) { return x == 3 * n; });
          if (!right) throw Error(Exit::internal, "", fmt::format("{} elements: {} ...", count, sum[0]));
        }
    });
    for (const std::string& f : failed) CHECK(f == "");
  }
}

TEST_CASE("ranks whose sums among cuda devices differ are told what differs") {
  require_fibers();
  const auto failed = on_rank_threads(2, 60, [&](Comm& comm) {
    Linked r(comm);
    const Buffer a(*r.ops, DType::f32, 1, 10 + comm.rank());
    r.ops->fill(a.tensor(), 1);
    r.link->sum(std::array{a.tensor()}, "adding gradients");
    r.link->join();
    r.ops->finish();
  });
  CHECK_THAT(failed[0], ContainsSubstring("6 rank 0 of 2: adding gradients: NCCL: invalid usage (rank 0 makes AllReduce of 10 elements") &&
                            ContainsSubstring("rank 1 AllReduce of 11 elements"));
  CHECK_THAT(failed[1], ContainsSubstring("6 rank 1 of 2: adding gradients"));
}

TEST_CASE("a rank that brings nothing to a sum among cuda devices ends the others in time") {
  require_fibers();
  const auto failed = on_rank_threads(2, 3, [&](Comm& comm) {
    Linked r(comm);
    const Buffer a(*r.ops, DType::f32, 1, 10);
    r.ops->fill(a.tensor(), 1);
    if (comm.leads()) r.link->sum(std::array{a.tensor()}, "adding gradients"), r.link->join();
    else std::this_thread::sleep_for(std::chrono::seconds(5));
    r.ops->finish();
  });
  CHECK_THAT(failed[0], ContainsSubstring("6 rank 0 of 2: adding gradients: another rank did not come within 3 s"));
}

TEST_CASE("the time that ranks have for a sum among cuda devices ends with it") {
  require_fibers();
  const auto failed = on_rank_threads(2, 1, [&](Comm& comm) {
    Linked r(comm);
    const Buffer a(*r.ops, DType::f32, 1, 10);
    r.ops->fill(a.tensor(), 1);
    r.link->sum(std::array{a.tensor()}, "adding gradients"), r.link->join();
    r.ops->finish();
    std::this_thread::sleep_for(std::chrono::milliseconds(1500));
    r.ops->fill(a.tensor(), 2);
    r.ops->finish();
  });
  for (const std::string& f : failed) CHECK(f == "");
}

TEST_CASE("ranks on different backends are refused, cuda beside cpu") {
  require_fibers();
  const auto failed = on_rank_threads(2, 60, [&](Comm& comm) {
    std::unique_ptr<Ops> ops = comm.leads() ? make_cpu_ops(1) : std::make_unique<CudaOps>(1, false);
    std::string why;
    link_devices(comm, *ops, "", why);
  });
  for (const std::string& f : failed) CHECK_THAT(f, ContainsSubstring("rank 1 computes on cuda (emulated), rank 0 on cpu"));
}

TEST_CASE("ranks that share one cuda device sum through the host") {
  require_fibers();
  std::string reasons[2];
  const auto failed = on_rank_threads(2, 60, [&](Comm& comm) {
    CudaOps ops(0, false);
    if (make_device_link(comm, ops, reasons[comm.rank()])) throw Error(Exit::internal, "", "there is a link");
  });
  for (const std::string& f : failed) CHECK(f == "");
  for (const std::string& r : reasons) CHECK(r == "ranks 0 and 1 share a device");
}

TEST_CASE("a sum among cuda devices that is wrong ends the ranks at their start") {
  require_fibers();
  const WithVariable wrong("KAVA_NCCL_FAIL", "wrong");
  const auto failed = on_rank_threads(2, 60, [&](Comm& comm) { Linked r(comm); });
  for (const std::string& f : failed)
    CHECK_THAT(f, ContainsSubstring("trying NCCL: element 0 of a sum is 0 and not 1, of a broadcast 0 and not 0"));
}

TEST_CASE("what a sum among cuda devices takes is told as hidden where something is computed beside it, else as exposed") {
  require_fibers();
  using std::chrono::milliseconds;
  const auto failed = on_rank_threads(2, 60, [&](Comm& comm) {
    Linked r(comm);
    const Buffer a(*r.ops, DType::f32, 1, 10);
    r.ops->fill(a.tensor(), 1);
    r.link->measure();
    auto sum = [&](int beside) {
      const OverlapTime before = r.link->overlap();
      comm.barrier("beginning");
      if (!comm.leads() && beside == 0) std::this_thread::sleep_for(milliseconds(500));
      r.link->sum(std::array{a.tensor()}, "adding");
      r.link->sum(std::array{a.tensor()}, "adding more");
      if (beside > 0) r.ops->runtime().stream()->queue([&] { std::this_thread::sleep_for(milliseconds(beside)); });
      r.link->join();
      const OverlapTime& now = r.link->overlap();
      return OverlapTime{.hidden = now.hidden - before.hidden, .exposed = now.exposed - before.exposed};
    };
    const OverlapTime late = sum(0), beside = sum(500);
    if (comm.leads() && (late.exposed < 0.3 || late.hidden > late.exposed))
      throw Error(Exit::internal, "late", fmt::format("{} s are hidden, {} s exposed", late.hidden, late.exposed));
    if (beside.hidden < 0.3 || beside.exposed > beside.hidden)
      throw Error(Exit::internal, "beside", fmt::format("{} s are hidden, {} s exposed", beside.hidden, beside.exposed));
    const OverlapTime all = r.link->overlap();
    r.link->join();
    if (r.link->overlap().hidden != all.hidden || r.link->overlap().exposed != all.exposed)
      throw Error(Exit::internal, "", "no sum takes time");
    if (to_host(*r.ops, a.tensor())[0] != 16) throw Error(Exit::internal, "", "a sum is wrong");
  });
  for (const std::string& f : failed) CHECK(f == "");
}

TEST_CASE("cuda ranks without an NCCL that can be used sum through the host and are told why") {
  require_fibers();
  for (const auto& [variable, value, why] : {std::tuple("KAVA_EMULATED_NCCL", "libkava_none.so", "rank 0: no libkava_none.so is found"),
                                             {"KAVA_NCCL_FAIL", "old", "rank 0: libkava_nccl.so is older than 2.18"}}) {
    const WithVariable given(variable, value);
    std::string reasons[2];
    const auto failed = on_rank_threads(2, 60, [&](Comm& comm) {
      CudaOps ops(comm.rank(), false);
      if (make_device_link(comm, ops, reasons[comm.rank()])) throw Error(Exit::internal, "", "there is a link");
    });
    for (const std::string& f : failed) CHECK(f == "");
    for (const std::string& r : reasons) CHECK(r == why);
  }
}

TEST_CASE("linked cuda ranks train as far from f64 as one does, all to the same bytes") {
  require_fibers();
  const std::vector<std::string> sets = {"train.batch=5", "train.micro_batch=1", "train.max_steps=4", "train.clip=1e29"};
  auto gradient = [](Model& model) { return model.parameters.get(model.parameters.grad()); };
  auto with_dtype = [&](const char* dtype) {
    auto s = sets;
    s.push_back(fmt::format("model.dtype={}", dtype));
    return s;
  };
  struct Run {
    std::vector<double> first, losses, values;
  };
  auto train = [&](Comm* comm, std::unique_ptr<Ops> ops, const char* dtype) {
    TinyRun run(with_dtype(dtype), 1, std::move(ops));
    std::string why;
    const auto link = comm ? make_device_link(*comm, static_cast<CudaOps&>(*run.ops), why) : nullptr;
    if (comm && !link) throw Error(Exit::internal, "link", why);
    Trainer trainer(*run.model, run.samples, {}, comm);
    Run r;
    for (int i = 0; i < 3; ++i) {
      const StepReport report = trainer.step();
      if (i == 0) r.first = gradient(*run.model), r.losses = {report.losses.student_ce, report.losses.teacher_ce, report.losses.kv};
    }
    r.values = run.model->parameters.get(run.model->parameters.value());
    return r;
  };
  const Run exact = train(nullptr, make_cpu_ops(1), "f64");
  const Run one = train(nullptr, std::make_unique<CudaOps>(0, false), "f32");
  const double own = relative_error(one.first, exact.first);
  for (int n : {2, 3}) {
    INFO(n);
    std::vector<Run> ranks(static_cast<std::size_t>(n));
    const auto failed = on_rank_threads(n, 60, [&](Comm& comm) {
      ranks[static_cast<std::size_t>(comm.rank())] = train(&comm, std::make_unique<CudaOps>(comm.rank(), false), "f32");
    });
    for (const std::string& f : failed) CHECK(f == "");
    for (const Run& r : ranks) {
      CHECK(r.losses == one.losses);
      CHECK((r.first == ranks[0].first && r.values == ranks[0].values));
      CHECK(relative_error(r.first, exact.first) <= 2 * own);
    }
  }
}
