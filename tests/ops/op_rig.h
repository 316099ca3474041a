// What the tests of the waist share: tensors with guard zones around them, one op run in every storage type and thread count, and central
// differences.
#pragma once
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "engine/device/buffer.h"
#include "engine/device/ops.h"
#include "guarded_bytes.h"

namespace kava::test {

struct Matrix {
  int64_t rows = 0, cols = 0;
  std::vector<double> at;
  Matrix() = default;
  Matrix(int64_t r, int64_t c, double value = 0) : rows(r), cols(c), at(static_cast<std::size_t>(r * c), value) {}
  double& operator()(int64_t r, int64_t c) { return at[static_cast<std::size_t>(r * cols + c)]; }
  double operator()(int64_t r, int64_t c) const { return at[static_cast<std::size_t>(r * cols + c)]; }
};

inline Matrix row_of(const std::vector<int>& values) {
  Matrix m(1, static_cast<int64_t>(values.size()));
  m.at.assign(values.begin(), values.end());
  return m;
}

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  Matrix normal(int64_t rows, int64_t cols, double scale = 1, double mean = 0) {
    Matrix m(rows, cols);
    for (double& v : m.at) v = mean + scale * normal_(engine_);
    return m;
  }
  Matrix whole(int64_t rows, int64_t cols, int least, int most) {
    Matrix m(rows, cols);
    for (double& v : m.at) v = std::uniform_int_distribution<int>(least, most)(engine_);
    return m;
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<double> normal_;
};

inline Ops& cpu(int threads) {
  static std::map<int, std::unique_ptr<Ops>> all;
  auto& ops = all[threads];
  if (!ops) ops = make_cpu_ops(threads);
  return *ops;
}

/// The cuda backend on the emulator's device, whose memory is the host's; null where the emulator cannot run.
Ops* emulated_cuda();
std::unique_ptr<Ops> make_emulated_cuda();
/// The cuda backend that tests of ops run beside the cpu: emulated_cuda(), or with KAVA_TEST_DEVICE=cuda that of libkava_cuda.so, on its
/// device: Error(code preflight) where there is none. Its memory is its own. Null with KAVA_TEST_DEVICE=cpu: the cpu alone.
Ops* tested_cuda();
constexpr const char* kNoTestedCuda = "no cuda backend: KAVA_TEST_DEVICE is cpu, or ThreadSanitizer does not know the emulator's fibers";
/// Whether that is the module's.
bool tests_device();
/// Takes a schedule for the launches that follow, 0 <= number < kSchedules.
constexpr int kSchedules = 3;
void take_schedule(int number);
/// KAVA_SCHEDULES=all: every form under every schedule, else under one or two, so that all forms have all of them.
bool every_schedule();
/// Whether launches that follow are searched for races, which makes them slow.
void search_races(bool on);

enum class Kind { storage, sum, i32, f64 };

/// Tensors of one run of an op. Each lies in pages of its own, its last element right before a guard page, rows apart by `gap` elements;
/// before and between the rows lie bytes that must not change. With rows at multiples of eight elements it is the first one that lies right
/// behind a guard page. Of a backend with memory of its own these pages are an image, which is sent there and read back: each tensor is an
/// allocation that begins at a multiple of 16 bytes where its image does, and ends with it.
class Rig {
 public:
  /// A gap for rows that begin at multiples of eight elements.
  static constexpr int64_t kToEights = -1;

  /// round_to: the type that storage and sum values are rounded to (storage itself, but for the f64 algorithm with rounded tensors).
  Rig(Ops& backend, DType storage, DType round_to, int64_t gap)
      : ops(backend), arena(backend), storage_(storage), round_to_(round_to), gap_(gap) {}
  Rig(int threads, DType storage, DType round_to, int64_t gap) : Rig(cpu(threads), storage, round_to, gap) {}

  DType type(Kind k) const {
    return k == Kind::i32 ? DType::i32 : k == Kind::f64 ? DType::f64 : k == Kind::sum ? sum_type(storage_) : storage_;
  }
  Tensor in(const Matrix& m, Kind kind = Kind::storage) {
    const Tensor t = place(m.rows, m.cols, kind, 0x5A);
    Slot& s = slots_.back();
    for (int64_t r = 0; r < m.rows; ++r)
      for (int64_t c = 0; c < m.cols; ++c) put(s.image(t), kind, r, c, m(r, c));
    s.remember();
    return t;
  }
  Tensor in_out(const Matrix& m, Kind kind = Kind::storage) {
    Tensor t = in(m, kind);
    slots_.back().written = true;
    return t;
  }
  Rig(const Rig&) = delete;
  /// Nothing may touch the tensors any more.
  ~Rig() { ops.finish(); }

  /// Filled with NaN (i32: with a number that is no index).
  Tensor out(int64_t rows, int64_t cols, Kind kind = Kind::storage) {
    Tensor t = place(rows, cols, kind, kind == Kind::i32 ? 0x77 : 0xFF);
    slots_.back().written = true;
    return t;
  }
  /// Without gaps, for ops that need it.
  Rig& packed() { return next_gap_ = 0, *this; }

  /// Of the tensors to come number `tensor` alone has rows that begin anywhere, or begins anywhere itself: an element early.
  enum class Odd { none, rows, begin };
  void set_odd(std::size_t tensor, Odd how) { odd_tensor_ = tensor, odd_ = how; }
  /// Numbers of the tensors whose rows consist of whole chunks of eight elements.
  std::vector<std::size_t> chunked() const {
    std::vector<std::size_t> numbers;
    for (std::size_t i = 0; i < slots_.size(); ++i)
      if (const Tensor& t = slots_[i].tensor; t.cols > 0 && t.cols % 8 == 0 && slots_[i].may_gap) numbers.push_back(i);
    return numbers;
  }

  /// Whether this is the f64 algorithm with rounded tensors; round() then rounds a tensor that the op stores on its way.
  bool emulates() const { return storage_ != round_to_; }
  void round(const Tensor& t) const {
    if (!emulates()) return;
    const Matrix m = read(t);
    for (int64_t r = 0; r < t.rows; ++r) std::copy_n(m.at.begin() + r * t.cols, t.cols, t.row<double>(r));
  }

  Matrix read(const Tensor& t) const {
    std::vector<char> host(static_cast<std::size_t>(t.count() * size_of(t.dtype)));
    ops.download(host.data(), t);
    const Tensor copy{host.data(), t.dtype, t.rows, t.cols, t.cols};
    Matrix m(t.rows, t.cols);
    const Kind kind = kind_of(t);
    for (int64_t r = 0; r < t.rows; ++r)
      for (int64_t c = 0; c < t.cols; ++c) m(r, c) = rounded(get(copy, r, c), kind);
    return m;
  }
  /// All bytes of outputs, for bitwise comparison.
  std::vector<unsigned char> bytes() const {
    ops.finish();
    std::vector<unsigned char> all;
    for (const Slot& s : slots_) {
      s.fetch();
      all.insert(all.end(), s.memory.data(), s.memory.data() + s.memory.size());
    }
    return all;
  }
  /// Nothing but the elements of outputs changed.
  bool guards_hold() const {
    ops.finish();
    for (const Slot& s : slots_) {
      s.fetch();
      std::size_t from = 0;  // of the next bytes that must not change
      const auto same_to = [&](std::size_t end) {
        return std::equal(s.before.data() + from, s.before.data() + end, s.memory.data() + from);
      };
      const std::size_t row = static_cast<std::size_t>(s.tensor.cols * size_of(s.tensor.dtype));
      for (int64_t r = 0; s.written && r < s.tensor.rows; ++r) {
        const auto begin = static_cast<std::size_t>(before() + r * s.tensor.stride * size_of(s.tensor.dtype));
        if (!same_to(begin)) return false;
        from = begin + row;
      }
      if (!same_to(s.memory.size())) return false;
    }
    return true;
  }

  Ops& ops;
  Arena arena;

 private:
  struct Slot {
    Slot(Ops& backend, std::size_t bytes, Kind k, std::size_t align) : memory(bytes, align), kind(k) {
      std::memset(memory.data(), 0xC3, bytes);
      there = memory.data();
      if (!tests_device() || &backend != tested_cuda()) return;
      const std::size_t lead = reinterpret_cast<std::uintptr_t>(memory.data()) % 16;
      room = Buffer(backend, DType::bf16, 1, static_cast<int64_t>(lead + bytes) / 2);
      there = static_cast<unsigned char*>(room.tensor().data) + lead;
      device = &backend;
    }
    void remember() {
      before.assign(memory.data(), memory.data() + memory.size());
      if (device) device->upload(whole(), memory.data());
    }
    void fetch() const {
      if (device) device->download(memory.data(), whole());
    }
    /// All its bytes, as numbers of two.
    Tensor whole() const { return {there, DType::bf16, 1, std::ssize(before) / 2, std::ssize(before) / 2}; }
    /// A tensor in it where the host sees it.
    Tensor image(Tensor t) const {
      t.data = memory.data() + (static_cast<unsigned char*>(t.data) - there);
      return t;
    }
    simt::GuardedBytes memory;
    Ops* device = nullptr;           // whose memory is its own
    Buffer room;                     // there
    unsigned char* there = nullptr;  // where the backend sees the memory
    std::vector<unsigned char> before;
    Kind kind;
    Tensor tensor;
    bool written = false;  // its elements; else nothing may change
    bool may_gap = true;
  };
  /// Bytes before a tensor, so many that rows without gaps lie at multiples of 16 bytes where their length allows it.
  int64_t before() const { return gap_ == kToEights ? 0 : 80; }

  Tensor place(int64_t rows, int64_t cols, Kind kind, unsigned char inside) {
    const DType t = type(kind);
    const Odd odd = slots_.size() == odd_tensor_ && next_gap_ < 0 ? odd_ : Odd::none;
    const int64_t to_eights = (8 - cols % 8) % 8, usual = gap_ == kToEights ? to_eights : gap_;
    const int64_t gap = next_gap_ >= 0 ? next_gap_ : odd == Odd::rows ? usual + 3 : usual, stride = cols + gap, size = size_of(t);
    // What of a last row's gap makes the first row begin at a multiple of 16 bytes, and an element behind one that begins early.
    const int64_t behind = gap_ == kToEights ? to_eights : odd == Odd::begin ? 1 : 0;
    const int64_t elements = rows > 0 ? (rows - 1) * stride + cols + behind : 0;
    Slot& placed =
        slots_.emplace_back(ops, static_cast<std::size_t>(before() + elements * size), kind, before() > 0 ? 1 : simt::GuardedBytes::kBegin);
    placed.may_gap = next_gap_ < 0;
    next_gap_ = -1;
    unsigned char* data = placed.memory.data() + before();
    placed.tensor = {placed.there + before(), t, rows, cols, stride};
    for (int64_t r = 0; r < rows; ++r) std::memset(data + r * stride * size, inside, static_cast<std::size_t>(cols * size));
    placed.remember();
    return placed.tensor;
  }
  Kind kind_of(const Tensor& t) const {
    for (const Slot& s : slots_) {
      const auto* data = static_cast<const unsigned char*>(t.data);
      if (data >= s.there && data < s.there + s.memory.size()) return s.kind;
    }
    return Kind::f64;
  }
  double rounded(double v, Kind kind) const {
    if (kind == Kind::i32 || kind == Kind::f64 || round_to_ == DType::f64) return v;
    if (kind == Kind::sum || round_to_ == DType::f32) return static_cast<float>(v);
    return to_float(to_bf16(static_cast<float>(v)));
  }
  void put(const Tensor& t, Kind kind, int64_t r, int64_t c, double v) {
    switch (t.dtype) {
      case DType::f32:
        t.row<float>(r)[c] = static_cast<float>(v);
        break;
      case DType::bf16:
        t.row<bf16>(r)[c] = to_bf16(static_cast<float>(v));
        break;
      case DType::f64:
        t.row<double>(r)[c] = rounded(v, kind);
        break;
      case DType::i32:
        t.row<int32_t>(r)[c] = static_cast<int32_t>(v);
        break;
    }
  }
  static double get(const Tensor& t, int64_t r, int64_t c) {
    switch (t.dtype) {
      case DType::f32:
        return t.row<float>(r)[c];
      case DType::bf16:
        return to_float(t.row<bf16>(r)[c]);
      case DType::f64:
        return t.row<double>(r)[c];
      default:
        return t.row<int32_t>(r)[c];
    }
  }

  std::deque<Slot> slots_;
  DType storage_, round_to_;
  int64_t gap_, next_gap_ = -1;
  std::size_t odd_tensor_ = 0;
  Odd odd_ = Odd::none;
};

/// The cpu backend in every storage type, and the cuda backend in those that it has.
inline std::vector<std::pair<Ops*, DType>> every_backend() {
  std::vector<std::pair<Ops*, DType>> all = {{&cpu(2), DType::f64}, {&cpu(2), DType::f32}, {&cpu(2), DType::bf16}};
  take_schedule(0);
  if (tested_cuda()) all.insert(all.end(), {{tested_cuda(), DType::f32}, {tested_cuda(), DType::bf16}});
  return all;
}

using Matrices = std::vector<Matrix>;
/// Places its inputs in the rig, calls the op and returns the outputs.
using OpRun = std::function<std::vector<Tensor>(Rig&, const Matrices&)>;

inline Matrices read_all(const Rig& rig, const std::vector<Tensor>& outputs) {
  Matrices m;
  for (const Tensor& t : outputs) m.push_back(rig.read(t));
  return m;
}

inline Matrices run_f64(const OpRun& op, const Matrices& in) {
  Rig rig(1, DType::f64, DType::f64, 0);
  return read_all(rig, op(rig, in));
}

/// Mean square of y - x over the mean square of x.
inline double normalised_error(const Matrix& y, const Matrix& x) {
  double error = 0, square = 0;
  for (std::size_t i = 0; i < x.at.size(); ++i) error += (y.at[i] - x.at[i]) * (y.at[i] - x.at[i]), square += x.at[i] * x.at[i];
  return square > 0 ? error / square : error;
}

/// The error against f64 is at most twice that of the f64 algorithm with rounded tensors, plus a floor.
inline void check_errors(const Matrices& got, const Matrices& exact, const Matrices& rounded, double floor) {
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double error = normalised_error(got[i], exact[i]), allowed = normalised_error(rounded[i], exact[i]);
    INFO("output " << i << " [" << got[i].rows << ", " << got[i].cols << "]: error " << error << ", of rounded tensors " << allowed);
    REQUIRE(error <= 2 * allowed + floor);  // also refuses NaN
  }
}

/// Runs the op in f64, f32 and bf16 with 1, 2 and 3 threads, twice, with and without gaps between rows and with rows at multiples of eight
/// elements, and in f32 and bf16 on the cuda backend under its schedules, one of which the emulator searches for races: guards
/// hold, no output is NaN, the bytes of a backend are equal, and the errors are those of check_errors with a floor of 1e-12 (relative RMS
/// 1e-6: sums in f32). In bf16 on cuda then with one tensor after the other that begins, or whose rows begin, anywhere.
/// tensor_cores: the op's products take operands that are rounded to bf16 on their way, which the f64 algorithm does not know; its bf16 is
/// judged by tests/kernels, and on the module's device by the emulator's error.
inline void check_op(const char* name, const Matrices& in, const OpRun& op, bool tensor_cores = false) {
  const Matrices exact = run_f64(op, in);
  for (DType storage : {DType::bf16, DType::f32, DType::f64}) {
    Rig rounded_rig(1, DType::f64, storage, 0);
    const Matrices rounded = read_all(rounded_rig, op(rounded_rig, in));
    const bool by_emulator = storage == DType::bf16 && tensor_cores;
    Ops* const cuda = storage == DType::f64 || (by_emulator && !(tests_device() && emulated_cuda())) ? nullptr : tested_cuda();
    Matrices allowed = rounded;
    if (cuda && by_emulator) {
      Rig emulated(*emulated_cuda(), storage, storage, 0);
      allowed = read_all(emulated, op(emulated, in));
    }
    for (int64_t gap : {int64_t{0}, int64_t{3}, Rig::kToEights}) {
      std::vector<unsigned char> first;
      auto run = [&](Ops& backend, const Matrices& judge) {
        Rig rig(backend, storage, storage, gap);
        const Matrices got = read_all(rig, op(rig, in));
        REQUIRE(rig.guards_hold());
        if (first.empty()) first = rig.bytes();
        REQUIRE(rig.bytes() == first);
        check_errors(got, exact, judge, storage == DType::f64 ? 1e-28 : 1e-12);
      };
      std::vector<int> schedules = gap == 0 ? std::vector{0} : std::vector{1, 2};
      if (every_schedule()) schedules = {1, 2, 0};
      if (gap == Rig::kToEights) schedules = {1};
      for (int schedule : schedules) {
        if (!cuda) break;
        INFO(name << " in " << name_of(storage) << ", " << cuda->name() << ", schedule " << schedule << ", gap " << gap);
        take_schedule(schedule);
        search_races(schedule == 0);
        run(*cuda, allowed);
        search_races(false);
      }
      first.clear();
      for (int threads : {1, 2, 3, 1}) {
        if (gap == Rig::kToEights) break;
        INFO(name << " in " << name_of(storage) << ", " << threads << " threads, gap " << gap);
        run(cpu(threads), rounded);
      }
    }
    if (!cuda || storage != DType::bf16) continue;
    take_schedule(1);
    Rig even(*cuda, storage, storage, 0);
    op(even, in);
    for (std::size_t tensor : even.chunked())
      for (Rig::Odd how : {Rig::Odd::rows, Rig::Odd::begin}) {
        INFO(name << ", " << cuda->name() << ", tensor " << tensor << (how == Rig::Odd::rows ? " with odd rows" : " with an odd begin"));
        Rig rig(*cuda, storage, storage, 0);
        rig.set_odd(tensor, how);
        const Matrices got = read_all(rig, op(rig, in));
        REQUIRE(rig.guards_hold());
        check_errors(got, exact, allowed, 1e-12);
      }
  }
}

/// Compares gradients[i] = d(sum of weights . outputs of `forward`)/d(in[which[i]]) with central differences of fourth order in f64.
inline void check_gradient(const char* name, const Matrices& in, const std::function<double(const Matrices&)>& forward,
                           const std::vector<std::size_t>& which, const Matrices& gradients, double tolerance = 1e-8) {
  REQUIRE(which.size() == gradients.size());
  for (std::size_t i = 0; i < which.size(); ++i) {
    const Matrix& gradient = gradients[i];
    REQUIRE(gradient.at.size() == in[which[i]].at.size());
    double largest = 0;
    for (double g : gradient.at) largest = std::max(largest, std::fabs(g));
    INFO(name << ", input " << which[i] << ", largest gradient " << largest);
    if (!gradient.at.empty()) REQUIRE(largest > 0);
    const std::size_t stride = std::max<std::size_t>(1, gradient.at.size() / 61);
    for (std::size_t e = 0; e < gradient.at.size(); e += stride) {
      auto at = [&](double shift) {
        Matrices moved = in;
        moved[which[i]].at[e] += shift;
        return forward(moved);
      };
      const double h = 1e-3;
      const double slope = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h);
      INFO("element " << e << ": " << gradient.at[e] << ", by differences " << slope);
      REQUIRE(std::fabs(gradient.at[e] - slope) <= tolerance * std::max(1.0, largest));
    }
  }
}

inline double weighted(const Matrices& outputs, const Matrices& weights) {
  double total = 0;
  for (std::size_t i = 0; i < weights.size(); ++i)
    for (std::size_t e = 0; e < weights[i].at.size(); ++e) total += outputs[i].at[e] * weights[i].at[e];
  return total;
}

/// Shapes that fill no block, one, and more than one.
struct Size {
  int64_t rows, cols;
};
inline const Size kSizes[] = {{1, 1}, {1, 7}, {3, 16}, {33, 19}, {70, 64}, {65, 130}};

inline void require_close(const Matrix& got, const Matrix& want, double tolerance = 1e-12) {
  REQUIRE(got.at.size() == want.at.size());
  for (std::size_t i = 0; i < got.at.size(); ++i) {
    INFO("element " << i << ": " << got.at[i] << " for " << want.at[i]);
    REQUIRE(std::fabs(got.at[i] - want.at[i]) <= tolerance * std::max(1.0, std::fabs(want.at[i])));
  }
}

}  // namespace kava::test
