// Whole steps on the cuda backend, its kernels emulated, against the cpu backend.
#include <catch2/catch_test_macros.hpp>

#include "engine/device/cuda/ops_cuda.h"
#include "simt.h"
#include "tests/model/step_rig.h"
#include "tests/ops/op_rig.h"

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
                        {"train.trainable=all", "step.prefix_sharing=false", "step.prune_latents=false"}};
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

TEST_CASE("a training step on cuda is read once, and asks for memory only where it is larger than all before") {
  if (!simt::supported()) SKIP("ThreadSanitizer does not know the emulator's fibers");
  take_schedule(0);
  StepRig rig({"model.dtype=bf16"}, 1, 0.2, make_emulated_cuda());
  const GpuCounts& counts = dynamic_cast<CudaOps&>(*rig.ops).runtime().counts();
  Ops& ops = *rig.ops;
  const Tensor grad_square = rig.arena->alloc(DType::f64, 1, 1), sums = rig.arena->alloc(DType::f64, 1, kStepSums);
  const BatchTotals totals = batch_totals(rig.config, recipe_of(rig.config), rig.samples);
  std::vector<GpuCounts> steps;
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
    steps.push_back({counts.allocations - before.allocations, counts.commits - before.commits, counts.uploads - before.uploads,
                     counts.reads - before.reads, counts.launches - before.launches});
  }
  for (const GpuCounts& step : {steps[1], steps[2]}) {
    CHECK((step.allocations == 0 && step.commits == 0 && step.reads == 1));
    CHECK(step.uploads == steps[1].uploads);  // the first also sends what stays
    CHECK(step.launches == steps[0].launches);
    // Lists of rows alone are uploaded: a fixed number for each pass, whatever the batch.
    CHECK(step.uploads <= 40 * static_cast<int64_t>(rig.config.latent.iterations + 1));
  }
}
