// Passes of a step as CUDA graphs: what a pass queues is recorded and launched as one graph, by an executable that is made once and updated
// from then on.
#pragma once
#include <functional>
#include <map>
#include <string>
#include <utility>

#include "engine/device/arena.h"
#include "engine/device/cuda/runtime.h"

namespace kava {

class PassGraphs {
 public:
  explicit PassGraphs(GpuRuntime& runtime) : runtime_(runtime) {}
  ~PassGraphs();
  PassGraphs(const PassGraphs&) = delete;
  PassGraphs& operator=(const PassGraphs&) = delete;

  /// As Ops::pass. What fails while a pass is recorded or its graph made ends all recording: the pass is run again without it, and where
  /// that goes well a line on standard error says why. A line also says that a pass needs new executables too often, of the first such
  /// pass.
  void run(Arena& arena, int64_t key, const std::function<void()>& body);

  struct Counts {
    int64_t captures = 0;  // begun; as many as are launched where nothing failed
    int64_t instantiated = 0, updated = 0, launched = 0;
    int64_t fallbacks = 0;  // passes run kernel by kernel, but for the first time of each
  };
  const Counts& counts() const { return counts_; }

  /// Executables kept for one pass, those used last. A pass that made as many more of them than it updated is not recorded any more.
  static constexpr int kMostKept = 16;

 private:
  struct Executable {
    CUgraphExec_st* graph = nullptr;
    int64_t used = 0;  // at which launch
  };
  struct Pass {
    bool seen = false;
    int credit = kMostKept;  // one less with each that is made, one more, up to this, with each update
    std::map<GraphForm, Executable> executables;
  };
  bool recorded(Pass& pass, const std::function<void()>& body, std::string& why);
  void launch(Pass& pass);

  GpuRuntime& runtime_;
  std::map<int64_t, Pass> passes_;
  Counts counts_;
  bool off_ = false, many_told_ = false;
};

}  // namespace kava
