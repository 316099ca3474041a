// Whole steps on the cuda backend, its kernels emulated, against the cpu backend.
#include <catch2/catch_test_macros.hpp>
#include <optional>
#include <set>
#include <sstream>

#include "engine/device/cuda/ops_cuda.h"
#include "engine/device/op_observer.h"
#include "engine/files/files.h"
#include "engine/files/json.h"
#include "simt.h"
#include "tests/model/step_rig.h"
#include "tests/model/train_rig.h"
#include "tests/ops/op_rig.h"
#include "tools/progress.h"

using namespace kava;
using namespace kava::test;

namespace {
using Sets = std::vector<std::string>;

Sets with(Sets sets, const char* dtype) {
  sets.push_back(std::string("model.dtype=") + dtype);
  return sets;
}

/// Of all gradients together, relative.
double gradient_error(const StepRun& run, const StepRun& exact) {
  std::vector<double> a, b;
  for (const auto& [name, gradient] : exact.gradients) {
    const std::vector<double>& got = run.gradients.at(name);
    a.insert(a.end(), got.begin(), got.end()), b.insert(b.end(), gradient.begin(), gradient.end());
  }
  return relative_error(a, b);
}

/// Errors of `run` against `exact`, by tensor.
std::map<std::string, double> errors(const StepRun& run, const StepRun& exact) {
  std::map<std::string, double> e;
  e["loss.total"] = std::fabs(run.total - exact.total) / std::fabs(exact.total);
  for (const auto& [name, gradient] : exact.gradients) e["grad." + name] = relative_error(run.gradients.at(name), gradient);
  for (const auto& [name, t] : exact.dump)
    if (!t.is_index) e[name] = relative_error(run.dump.at(name).values, t.values);
  return e;
}
}  // namespace

TEST_CASE("a step on the cuda backend is the cpu's as far as its types can, twice the same") {
  if (!simt::supported()) SKIP("ThreadSanitizer does not know the emulator's fibers");
  const Sets forms[] = {{},
                        {"method=full_cot"},
                        {"method=no_cot"},
                        {"method=pccot", "lora.dropout=0.3"},
                        {"method=codi", "latent.iterations=5", "codi.loss=l1", "codi.std=global"},
                        {"model.path=../models/qwen2"},
                        {"kv.loss=mse", "kv.std=global", "kv.keys=pre_rope", "rkv.order=score"},
                        {"kv.projection=true", "rkv.group=max_prob", "rkv.short=zero", "kv.reduction=slot_sum"},
                        {"rkv.policy=random", "rkv.group=mean_prob", "latent.update=residual", "latent.projection=false"},
                        {"train.trainable=all", "step.prefix_sharing=false", "step.prune_latents=false"},
                        {"latent.count=1", "latent.iterations=3", "step.prune_latents=false"}};  // products of no rows
  for (const Sets& form : forms) {
    StepRig exact_rig(with(form, "f64"));
    const StepRun exact = exact_rig.run();
    for (const char* dtype : {"f32", "bf16"}) {
      take_schedule(0);
      StepRig cpu_rig(with(form, dtype)), cuda_rig(with(form, dtype), 1, 0.2, make_emulated_cuda());
      const StepRun on_cpu = cpu_rig.run(), on_cuda = cuda_rig.run(), again = cuda_rig.run();
      CHECK(again.gradients == on_cuda.gradients);
      CHECK(again.total == on_cuda.total);
      INFO((form.empty() ? "defaults" : form[0]) << " in " << dtype);
      if (std::string(dtype) == "bf16") {
        const double on_cuda_error = gradient_error(on_cuda, exact), on_cpu_error = gradient_error(on_cpu, exact);
        INFO("gradients: cuda " << on_cuda_error << ", cpu " << on_cpu_error);
        CHECK(on_cuda_error <= 1.5 * on_cpu_error);
        continue;
      }
      const auto cpu_errors = errors(on_cpu, exact);
      for (const auto& [name, error] : errors(on_cuda, exact)) {
        INFO(name << ": cuda " << error << ", cpu " << cpu_errors.at(name));
        CHECK(error <= 10 * cpu_errors.at(name) + 1e-6);
      }
      for (const auto& [name, t] : exact.dump)
        if (t.is_index) CHECK(on_cuda.dump.at(name).indices == t.indices);
    }
  }
}

TEST_CASE("what is kept and what is computed again gives the same bytes on cuda") {
  if (!simt::supported()) SKIP("ThreadSanitizer does not know the emulator's fibers");
  take_schedule(0);
  const Sets forms[] = {{"lora.dropout=0.3"},
                        {"train.trainable=all", "model.path=../models/qwen3"},
                        {"method=codi", "latent.iterations=5", "model.path=../models/qwen2", "lora.dropout=0.3"}};
  for (const Sets& form : forms)
    for (const char* dtype : {"f32", "bf16"}) {
      std::optional<StepRun> none;
      for (const char* recompute : {"none", "cheap", "block"}) {
        Sets sets = with(form, dtype);
        sets.push_back(std::string("train.recompute=") + recompute);
        StepRig rig(sets, 1, 0.2, make_emulated_cuda());
        StepRun run = rig.run();
        INFO(form[0] << " in " << dtype << ", " << recompute);
        if (!none) none = std::move(run);
        else CHECK((run.gradients == none->gradients && run.total == none->total && same(run.dump, none->dump)));
      }
    }
}

TEST_CASE("a training step on cuda is read once, and asks for memory only where it is larger than all before") {
  if (!simt::supported()) SKIP("ThreadSanitizer does not know the emulator's fibers");
  take_schedule(0);
  StepRig rig({"model.dtype=bf16"}, 1, 0.2, make_emulated_cuda());
  const GpuCounts& counts = dynamic_cast<CudaOps&>(*rig.ops).runtime().counts();
  Ops& ops = *rig.ops;
  const Tensor grad_square = rig.arena->alloc(DType::f64, 1, 1), sums = rig.arena->alloc(DType::f64, 1, kStepSums);
  const BatchTotals totals = batch_totals(rig.config, recipe_of(rig.config), rig.samples);
  for (uint32_t step = 0; step < 3; ++step) {
    const GpuCounts before = counts;
    rig.model->parameters.zero_grad();
    StepOptions options;
    options.step = step;
    ops.fill(sums, 0);
    add_step(*rig.model, *rig.arena, rig.samples, totals, options, sums);
    rig.model->parameters.update(*rig.arena, {1e-4, 0.9, 0.999, 1e-8, 0.1, 2}, grad_square, sums);
    CHECK(counts.reads == before.reads);
    to_host(ops, sums);
    if (step == 0) continue;  // it also sends what stays
    CHECK((counts.allocations == before.allocations && counts.commits == before.commits));
    CHECK((counts.reads == before.reads + 1 && counts.uploads == before.uploads + 1));
  }
}

TEST_CASE("a run on cuda takes a step's scalars when the next one is queued, and before what needs them") {
  if (!simt::supported()) SKIP("ThreadSanitizer does not know the emulator's fibers");
  take_schedule(0);
  const Sets sets{"train.max_steps=7", "train.valid_every=4", "train.checkpoint_every=100", "train.log_every=3"};
  TinyRun run(sets, 1, make_emulated_cuda()), stepped(sets, 1, make_emulated_cuda());
  Trainer trainer(*run.model, run.samples, {}), one_by_one(*stepped.model, stepped.samples, {});
  OpCounter counter(*run.ops);
  std::vector<int64_t> uploads, reads;  // until each step is told
  int64_t validated_at = 0;
  TrainingHooks hooks;
  hooks.on_step = [&](const StepReport& r, const Speed&) {
    const StepReport expected = one_by_one.step();
    CHECK((r.step == expected.step && r.loss == expected.loss && r.grad_norm == expected.grad_norm && r.samples == expected.samples));
    uploads.push_back(counter.counts().uploads), reads.push_back(counter.counts().reads);
  };
  hooks.validate = [&](Arena&, int64_t) {
    validated_at = std::ssize(uploads);
    CHECK((validated_at == 4 || validated_at == 7));
    return std::optional(Validation{});
  };
  TempFolder folder;
  RunFolder out(folder.path() / "run");
  out.open(run.config, {});
  {
    const Observed observed(*run.ops, counter);
    CHECK(trainer.run(&out, hooks));
  }
  // Told after the next one's lists are sent, but for the fourth and the last.
  REQUIRE(uploads.size() == 7);
  for (std::size_t i : {0, 1, 2, 4, 5}) CHECK(uploads[i] == uploads[0] + static_cast<int64_t>(i));
  CHECK(uploads[3] == uploads[2]);
  CHECK(uploads[6] == uploads[5]);
  for (std::size_t i : {1, 2, 3, 5, 6}) CHECK(reads[i] == reads[i - 1] + 1);  // between them a checkpoint of the fourth
  const ParameterStore &a = run.model->parameters, &b = stepped.model->parameters;
  CHECK((a.get(a.value()) == b.get(b.value()) && a.get(a.m()) == b.get(b.m()) && a.get(a.v()) == b.get(b.v())));
  CHECK((trainer.state().updates == 7 && trainer.state().samples == one_by_one.state().samples));
  std::istringstream lines(read_file((out.path() / "metrics.jsonl").string(), std::size_t{1} << 20));
  std::vector<int64_t> logged;
  for (std::string line; std::getline(lines, line);)
    if (const Json j = Json::parse(line); j.contains("step")) logged.push_back(j["step"]);
  CHECK(logged == std::vector<int64_t>{3, 6, 7});
}

TEST_CASE("a step is told where the next one fails before it is queued") {
  if (!simt::supported()) SKIP("ThreadSanitizer does not know the emulator's fibers");
  take_schedule(0);
  TinyRun run({"train.max_steps=7", "train.checkpoint_every=100"}, 1, make_emulated_cuda());
  Trainer trainer(*run.model, run.samples, {});
  std::vector<int64_t> told;
  TrainingHooks hooks;
  hooks.on_step = [&](const StepReport& r, const Speed&) {
    told.push_back(r.step);
    for (Sample& s : run.samples) s.answer.back() = static_cast<int32_t>(run.text.shape.vocab);
  };
  CHECK_THROWS(trainer.run(nullptr, hooks));
  CHECK(told == std::vector<int64_t>{1, 2});  // the second was queued when the first was told
}

TEST_CASE("ten skipped steps in a row are told as such where an eleventh is queued") {
  if (!simt::supported()) SKIP("ThreadSanitizer does not know the emulator's fibers");
  take_schedule(0);
  TinyRun run({"train.max_steps=40", "train.checkpoint_every=1000"}, 1, make_emulated_cuda());
  run.model->parameters.set("new_tokens.weight", std::vector<double>(3 * 16, std::nan("")));
  run.model->parameters.refresh();
  const std::vector<double> m = run.model->parameters.get(run.model->parameters.m());
  Trainer trainer(*run.model, run.samples, {});
  std::vector<int64_t> told;
  TrainingHooks hooks;
  hooks.on_step = [&](const StepReport& r, const Speed&) { told.push_back(r.updated ? -1 : r.step); };
  try {
    trainer.run(nullptr, hooks);
    FAIL("it went on");
  } catch (const Error& e) {
    CHECK(e.code() == Exit::numeric);
    CHECK(std::string(e.what()).find("step 10") != std::string::npos);
  }
  CHECK(told == std::vector<int64_t>{1, 2, 3, 4, 5, 6, 7, 8, 9, 10});
  CHECK(run.model->parameters.get(run.model->parameters.m()) == m);
}

TEST_CASE("the matrix rate is measured once on cuda, on random numbers, and again on the cpu where a step beats it") {
  if (!simt::supported()) SKIP("ThreadSanitizer does not know the emulator's fibers");
  struct Products : OpObserver {
    explicit Products(Ops& o) : ops(o) {}
    void before(const OpCall& call) override {
      if (std::string(call.name) != "linear_group_fwd") return;
      ++count;
      if (count > 1) return;
      for (const Tensor& x : call.inputs) {
        if (!x || x.rows == 1) continue;
        const std::vector<double> values = to_host(ops, x);
        distinct.push_back(std::set<double>(values.begin(), values.end()).size());
      }
    }
    Ops& ops;
    int count = 0;
    std::vector<std::size_t> distinct;
  };
  for (const bool on_cuda : {false, true}) {
    const std::unique_ptr<Ops> ops = on_cuda ? make_emulated_cuda() : make_cpu_ops(1);
    Products products(*ops);
    const Observed observed(*ops, products);
    MatrixRate rate(*ops, DType::bf16, 1e9);
    const double measured = rate.measured();
    const int before = products.count;
    CHECK(measured > 0);
    CHECK((rate.after(measured / 2) == measured && products.count == before));
    REQUIRE(products.distinct.size() >= 2);
    if (on_cuda) {
      for (std::size_t n : products.distinct) CHECK(n > 1000);
      CHECK((rate.after(100 * measured) == measured && products.count == before));
    } else {
      CHECK((rate.after(100 * measured) == 100 * measured && products.count > before));
    }
  }
}
