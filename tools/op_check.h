// --check-ops of kava_train: which op made the first value of a step that is not finite.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "engine/device/op_observer.h"

namespace kava {

/// Looks at what every op writes. Every op is waited for; no byte of the run changes.
class OpCheck final : public OpObserver {
 public:
  /// Watches `ops` from now on, and must outlive what is called of it.
  explicit OpCheck(Ops& ops) : ops_(ops) { ops.add_observer(*this); }
  void after(const OpCall& call) override;

  /// The first op since the last call of this that wrote a value that is not finite, and from what; "" where none did.
  std::string take();

 private:
  /// The place of the first value that is not finite, -1 where there is none.
  int64_t first_not_finite(const Tensor& x);

  Ops& ops_;
  bool looking_ = false;  // what is read here is an op too
  int64_t calls_ = 0;
  std::string found_;
  std::vector<char> host_;
};

}  // namespace kava
