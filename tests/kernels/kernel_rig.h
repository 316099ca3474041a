// What the tests of the kernels share: device memory with guards, and the comparison of a kernel's outputs with f64 under several
// schedules.
#pragma once
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "guarded_bytes.h"
#include "kernels/gpu.h"
#include "kernels/kernels.h"
#include "simt.h"
#include "tests/ops/op_rig.h"
#include "watch.h"

#define SKIP_IF_UNSUPPORTED() \
  if (!simt::supported()) SKIP("ThreadSanitizer does not know the emulator's fibers")

namespace kava::test {

/// Device memory of one run. Each matrix lies in pages of its own, its last element right before a guard page (up to the alignment);
/// between rows and before the first lie bytes that must not change and that are NaN to a reader.
class Device {
 public:
  /// aligned: bases and strides are multiples of 16 bytes; else they are odd numbers of elements.
  explicit Device(bool aligned) : aligned_(aligned) {}
  /// All are aligned but matrix `number`, whose rows, or whose begin, are not.
  enum class Odd { rows, begin };
  Device(std::size_t number, Odd how) : aligned_(true), odd_(number), how_(how) {}
  std::size_t matrices() const { return slots_.size(); }

  template <class T>
  Rows<const T> in(const Matrix& m) {
    return put(place<T>(m.rows, m.cols), m);
  }
  template <class T>
  Rows<T> in_out(const Matrix& m) {
    const Rows<T> x = put(place<T>(m.rows, m.cols), m);
    slots_.back().output = true;
    return x;
  }
  /// Filled with NaN.
  template <class T>
  Rows<T> out(int64_t rows, int64_t cols) {
    const Rows<T> x = place<T>(rows, cols);
    slots_.back().output = true;
    return x;
  }
  const int32_t* index(const std::vector<int>& values) {
    slots_.emplace_back(values.size() * sizeof(int32_t));
    std::copy(values.begin(), values.end(), reinterpret_cast<int32_t*>(slots_.back().memory.data()));
    slots_.back().remember();
    return reinterpret_cast<const int32_t*>(slots_.back().memory.data());
  }

  /// Nothing but the elements of outputs changed.
  bool guards_hold() const {
    for (const Slot& s : slots_) {
      const std::size_t row = s.row_bytes, pitch = s.pitch_bytes;
      for (std::size_t i = 0; i < s.before.size(); ++i) {
        if (s.memory.data()[i] == s.before[i]) continue;
        if (!s.output || i < s.front || (i - s.front) / pitch >= s.rows || (i - s.front) % pitch >= row) return false;
      }
    }
    return true;
  }

 private:
  struct Slot {
    explicit Slot(std::size_t bytes) : memory(bytes) {}
    void remember() { before.assign(memory.data(), memory.data() + memory.size()); }
    simt::GuardedBytes memory;
    std::vector<unsigned char> before;
    std::size_t front = 0, rows = 0, row_bytes = 0, pitch_bytes = 1;
    bool output = false;
  };

  template <class T>
  Rows<T> place(int64_t rows, int64_t cols) {
    constexpr int64_t kSize = sizeof(T), kChunk = 16 / kSize;
    const bool odd = slots_.size() == odd_, odd_rows = !aligned_ || (odd && how_ == Odd::rows), odd_begin = !aligned_ || (odd && !odd_rows);
    const int64_t stride = odd_rows ? cols + (cols % 2 ? 4 : 3) : (cols + kChunk - 1) / kChunk * kChunk + kChunk;
    const int64_t front = odd_begin ? 64 + kSize : 64, payload = ((rows - 1) * stride + cols) * kSize;
    const int64_t bytes = front + payload;
    Slot& s = slots_.emplace_back(static_cast<std::size_t>(aligned_ ? (bytes + 15) / 16 * 16 : bytes));
    std::memset(s.memory.data(), 0xff, s.memory.size());
    s.front = static_cast<std::size_t>(front), s.rows = static_cast<std::size_t>(rows);
    s.row_bytes = static_cast<std::size_t>(cols * kSize), s.pitch_bytes = static_cast<std::size_t>(stride * kSize);
    s.remember();
    return {reinterpret_cast<T*>(s.memory.data() + front), stride};
  }
  template <class T>
  Rows<T> put(Rows<T> x, const Matrix& m) {
    for (int64_t r = 0; r < m.rows; ++r)
      for (int64_t c = 0; c < m.cols; ++c) {
        if constexpr (std::is_same_v<T, bf16>) x[r][c] = to_bf16(static_cast<float>(m(r, c)));
        else x[r][c] = static_cast<T>(m(r, c));
      }
    slots_.back().remember();
    return x;
  }

  bool aligned_;
  std::size_t odd_ = static_cast<std::size_t>(-1);
  Odd how_ = Odd::rows;
  std::deque<Slot> slots_;
};

template <class T>
Matrix read(Rows<T> x, int64_t rows, int64_t cols) {
  Matrix m(rows, cols);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) m(r, c) = static_cast<double>(to_float(x[r][c]));
  return m;
}

/// What a value becomes when it is stored in T; double: nothing.
template <class T>
double stored(double v) {
  if constexpr (std::is_same_v<T, bf16>) return to_float(to_bf16(static_cast<float>(v)));
  else return static_cast<double>(static_cast<T>(v));
}
template <class T>
Matrix stored(Matrix m) {
  for (double& v : m.at) v = stored<T>(v);
  return m;
}

inline bool same_bytes(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}

/// The error against `exact` is at most twice that of `rounded`, the f64 algorithm with stored tensors rounded, plus a floor of 1e-12
/// (relative RMS 1e-6: sums in f32). Returns the largest share of what is allowed.
inline double check_errors(const Matrices& got, const Matrices& exact, const Matrices& rounded) {
  REQUIRE(got.size() == exact.size());
  double worst = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    const double error = normalised_error(got[i], exact[i]), allowed = 2 * normalised_error(rounded[i], exact[i]) + 1e-12;
    INFO("output " << i << " [" << exact[i].rows << ", " << exact[i].cols << "]: error " << error << ", allowed " << allowed);
    REQUIRE(error <= allowed);  // also refuses NaN
    worst = std::max(worst, error / allowed);
  }
  return worst;
}

/// Runs a kernel with aligned and with odd rows, under five schedules, the first one twice (or each under one of them: every_schedule):
/// guards hold, all runs give the same bytes, and these pass check_errors, whose share this returns. The first run is searched for races.
inline double check_kernel(const Matrices& exact, const Matrices& rounded, const std::function<Matrices(Device&)>& kernel) {
  using Order = simt::Schedule::Order;
  const simt::Schedule schedules[] = {{Order::forward, 0, true, false, 0}, {Order::forward, 0, true, false, 0},
                                      {Order::forward, 0, true, true, 0},  {Order::reverse, 0, true, true, 0},
                                      {Order::random, 3, true, false, 0},  {Order::random, 4, false, true, 0}};
  Matrices first;
  for (bool aligned : {true, false})
    for (const simt::Schedule& schedule : schedules) {
      if (!test::every_schedule() && &schedule - schedules != (aligned ? 0 : 5)) continue;
      INFO((aligned ? "aligned" : "odd") << " rows, schedule " << &schedule - schedules);
      simt::set_schedule(schedule);
      simt::set_watched({.races = simt::watchable() && &schedule == schedules});
      Device device(aligned);
      const Matrices got = kernel(device);
      simt::set_watched({});
      REQUIRE(device.guards_hold());
      if (first.empty()) first = got;
      for (std::size_t i = 0; i < got.size(); ++i) REQUIRE(same_bytes(got[i].at, first[i].at));
    }
  return check_errors(first, exact, rounded);
}

/// The unrounded f64 algorithm of a test is the cpu backend's.
inline void check_reference(const Matrices& reference, const Matrices& cpu) {
  REQUIRE(reference.size() == cpu.size());
  for (std::size_t i = 0; i < cpu.size(); ++i) REQUIRE(normalised_error(reference[i], cpu[i]) < 1e-14);
}

/// Counts what is launched on it and runs none of it.
struct Unrun : CUstream_st {
  int launches = 0;
  void queue(std::function<void()>) override { ++launches; }
  void queue_until(std::function<bool()>) override {}
};

}  // namespace kava::test
