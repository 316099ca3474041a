// Whole steps on the cuda backend, its kernels emulated, against the cpu backend.
#include <catch2/catch_test_macros.hpp>

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
