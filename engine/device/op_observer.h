// Who watches the ops of a backend: times them, counts them, or, in tests, runs them again on another backend.
#pragma once
#include <chrono>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "engine/device/ops.h"

namespace kava {

/// Where the tensors of a call lie on another backend; what is empty stays empty.
struct TensorMap {
  std::function<Tensor(const Tensor&)> there;
  Arena& room;

  Tensor operator()(const Tensor& t) const { return t ? there(t) : t; }
  Arena& operator()(Arena&) const { return room; }
  Segments operator()(Segments s) const;
  Dropout operator()(Dropout d) const;
  RkvOptions operator()(RkvOptions o) const;
  LinearGroup operator()(LinearGroup g) const;
  LinearGroupGrad operator()(LinearGroupGrad g) const;
};

/// One call of an op.
struct OpCall {
  const char* name;
  std::span<const Tensor> outputs, inputs;  // what is read and written stands in both; tensors that are not there are empty
  double flops = 0;                         // of products, an addition and a multiplication being two
  double untouched = 0;                     // bytes of those tensors, each counted once, that are neither read nor written
  /// Read and written, at least: a tensor that stands in both lists counts once, and caches are not counted on.
  double bytes() const;
  /// The same call on another backend, with the tensors that the map names.
  std::function<void(Ops& other, const TensorMap& map)> again;
};

inline double bytes_of(const Tensor& t) { return static_cast<double>(t.count() * size_of(t.dtype)); }

class OpObserver {
 public:
  virtual ~OpObserver() = default;
  virtual void before(const OpCall&) {}
  virtual void after(const OpCall&) {}
  /// A request of memory, by a buffer or an arena.
  virtual void allocated(int64_t /*bytes*/) {}
};

/// An observer for as long as this object lives.
class Observed {
 public:
  Observed(Ops& ops, OpObserver& observer) : ops_(ops), observer_(observer) { ops_.add_observer(observer_); }
  ~Observed() { ops_.remove_observer(observer_); }
  Observed(const Observed&) = delete;
  Observed& operator=(const Observed&) = delete;

 private:
  Ops& ops_;
  OpObserver& observer_;
};

/// Counts what a backend was asked for since this began.
class OpCounter final : public OpObserver {
 public:
  struct Counts {
    int64_t uploads = 0, reads = 0, allocations = 0;
    int64_t calls = 0;     // of ops that compute
    int64_t launches = 0;  // as Ops says
  };
  explicit OpCounter(const Ops& ops) : ops_(ops), launches_before_(ops.launches()) {}
  void before(const OpCall&) override;
  void allocated(int64_t) override { ++counts_.allocations; }
  Counts counts() const;

 private:
  const Ops& ops_;
  const int64_t launches_before_;
  Counts counts_;
};

/// Adds up calls, wall time and work of each op. Every op is waited for, so that its time is its own.
class OpTimer final : public OpObserver {
 public:
  struct Time {
    double seconds = 0, flops = 0;
    int64_t calls = 0;
  };
  explicit OpTimer(Ops& ops) : ops_(ops) {}
  void before(const OpCall&) override;
  void after(const OpCall& call) override;
  const std::map<std::string, Time>& times() const { return times_; }
  void clear() { times_.clear(); }

 private:
  Ops& ops_;
  std::chrono::steady_clock::time_point start_;
  std::map<std::string, Time> times_;
};

}  // namespace kava
