#include "engine/device/cuda/pass_graphs.h"

#include <fmt/core.h>

#include <algorithm>

#include "engine/cli.h"
#include "kernels/gpu_error.h"

namespace kava {

PassGraphs::~PassGraphs() {
  for (auto& [key, pass] : passes_)
    for (const auto& [form, executable] : pass.executables)
      if (executable.graph) GpuRuntime::drop(executable.graph);
}

void PassGraphs::run(Arena& arena, int64_t key, const std::function<void()>& body) {
  Pass& pass = passes_[key];
  // The first time loads the kernels and takes the memory.
  if (!std::exchange(pass.seen, true)) return body();
  if (pass.credit == 0 && !off_ && !std::exchange(many_told_, true))
    print_note(fmt::format("{}: the kernels of a pass are launched one by one, as it needed new graphs too often", gpu_backend_name()));
  if (off_ || pass.credit == 0) {
    ++counts_.fallbacks;
    return body();
  }
  const Arena::Mark mark = arena.mark();
  std::string why;
  if (recorded(pass, body, why)) return;
  arena.release(mark);
  ++counts_.fallbacks;
  body();
  if (why.empty()) return;
  off_ = true;
  print_note(fmt::format("{}: kernels are launched one by one, as graphs failed: {}", gpu_backend_name(), why));
}

bool PassGraphs::recorded(Pass& pass, const std::function<void()>& body, std::string& why) {
  try {
    ++counts_.captures;
    runtime_.begin_capture();
    body();
    launch(pass);
    return true;
  } catch (const NotRecordable&) {
    runtime_.abandon_capture();
  } catch (const GpuError& e) {
    runtime_.abandon_capture();
    why = e.what();
  } catch (...) {
    runtime_.abandon_capture();
    throw;
  }
  return false;
}

void PassGraphs::launch(Pass& pass) {
  struct Recording {
    explicit Recording(GpuRuntime& runtime) : graph(runtime.end_capture(form)) {}
    ~Recording() { GpuRuntime::drop(graph); }
    GraphForm form;
    CUgraph_st* graph;
  } const recording(runtime_);
  Executable& executable = pass.executables[recording.form];
  if (executable.graph) {
    if (runtime_.update(executable.graph, recording.graph)) {
      ++counts_.updated;
      pass.credit = std::min(pass.credit + 1, kMostKept);
    } else {
      runtime_.abandon_capture();
      GpuRuntime::drop(std::exchange(executable.graph, nullptr));
    }
  }
  if (!executable.graph) executable.graph = runtime_.instantiate(recording.graph), --pass.credit, ++counts_.instantiated;
  runtime_.launch(executable.graph);
  executable.used = ++counts_.launched;
  if (std::ssize(pass.executables) <= kMostKept) return;
  const auto oldest = std::ranges::min_element(pass.executables, {}, [](const auto& each) { return each.second.used; });
  GpuRuntime::drop(oldest->second.graph);
  pass.executables.erase(oldest);
}

}  // namespace kava
