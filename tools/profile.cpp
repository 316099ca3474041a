#include "tools/profile.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "engine/clock.h"
#include "engine/device/arena.h"
#include "engine/files/files.h"
#include "tools/progress.h"

namespace kava {

namespace {

// Bytes per second, read and written, of the best of some copies.
double measured_copy(Ops& ops) {
  constexpr int64_t kRows = 16384, kCols = 1024;
  Arena arena(ops);
  const Tensor from = arena.alloc(DType::f32, kRows, kCols), to = arena.alloc(DType::f32, kRows, kCols);
  ops.fill(from, 1);
  ops.fill(to, 1);
  double best = 0;
  for (int i = 0; i < 3; ++i) {
    ops.finish();
    const auto begin = std::chrono::steady_clock::now();
    ops.copy(to, from);
    ops.finish();
    best = std::max(best, 8.0 * kRows * kCols / seconds_since(begin));
  }
  return best;
}

}  // namespace

Profile::Profile(Ops& ops, DType storage)
    : ops_(ops),
      storage_(storage),
      matrix_rate_(MatrixRate(ops, storage, std::numeric_limits<double>::infinity()).measured()),
      copy_rate_(measured_copy(ops)),
      first_(Clock::now()) {
  ops.add_observer(*this);
}

double Profile::of_ceiling(double flops, double bytes, double seconds) const {
  return seconds > 0 ? std::max(flops / matrix_rate_, bytes / copy_rate_) / seconds : 0;
}

void Profile::before(const OpCall&) {
  ops_.finish();
  begin_ = Clock::now();
}

void Profile::after(const OpCall& call) {
  ops_.finish();
  const double seconds = seconds_since(begin_), bytes = call.bytes();
  Total& t = totals_[call.name];
  ++t.calls, t.seconds += seconds, t.flops += call.flops, t.bytes += bytes;
  if (events_.size() < kMostEvents)
    events_.push_back({call.name, std::chrono::duration<double>(begin_ - first_).count(), seconds, call.flops, bytes});
}

std::string Profile::table() const {
  std::vector<std::pair<std::string, Total>> rows(totals_.begin(), totals_.end());
  std::ranges::stable_sort(rows, [](const auto& a, const auto& b) { return a.second.seconds > b.second.seconds; });
  double all = 0;
  for (const auto& [name, t] : rows) all += t.seconds;
  std::string text = fmt::format("ceilings    {:.1f} GFLOP/s of a product in {}, {:.1f} GB/s of a copy that no cache holds\n",
                                 matrix_rate_ * 1e-9, name_of(storage_), copy_rate_ * 1e-9);
  text += fmt::format("{:<26}{:>10}{:>12}{:>9}{:>12}{:>10}{:>10}{:>9}{:>11}\n", "op", "calls", "seconds", "share %", "GFLOP", "GB",
                      "GFLOP/s", "GB/s", "ceiling %");
  auto rate = [](double work, double seconds) { return seconds > 0 ? work / seconds * 1e-9 : 0.0; };
  for (const auto& [name, t] : rows)
    text += fmt::format("{:<26}{:>10}{:>12.4f}{:>9.1f}{:>12.3f}{:>10.3f}{:>10.1f}{:>9.1f}{:>11.1f}\n", name, t.calls, t.seconds,
                        all > 0 ? 100 * t.seconds / all : 0.0, t.flops * 1e-9, t.bytes * 1e-9, rate(t.flops, t.seconds),
                        rate(t.bytes, t.seconds), 100 * of_ceiling(t.flops, t.bytes, t.seconds));
  return text + fmt::format("{:<26}{:>10}{:>12.4f}\n", "all ops", "", all);
}

std::string Profile::table(const Comm& comm) {
  std::string text = fmt::format("{:<36}{:>10}{:>12}{:>10}\n", "between ranks", "calls", "seconds", "GB/s");
  for (const auto& [name, t] : comm.times())
    text += fmt::format("{:<36}{:>10}{:>12.4f}{:>10.3f}\n", name, t.calls, t.seconds,
                        t.seconds > 0 ? 1e-9 * static_cast<double>(t.bytes) / t.seconds : 0.0);
  const OverlapTime& sums = comm.link() ? comm.link()->overlap() : comm.overlap();
  for (const auto& [name, seconds] : {std::pair("sums of gradients, hidden", sums.hidden), {"sums of gradients, exposed", sums.exposed}})
    text += fmt::format("{:<36}{:>10}{:>12.4f}\n", name, "", seconds);
  return text;
}

void Profile::write_trace(const std::filesystem::path& file) const {
  std::string text = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n";
  for (const Event& e : events_)
    text += fmt::format(
        "{}{{\"name\":\"{}\",\"ph\":\"X\",\"pid\":0,\"tid\":0,\"ts\":{:.3f},\"dur\":{:.3f},\"args\":{{\"flops\":{:.0f},\"bytes\":{:.0f},"
        "\"of_ceiling\":{:.4f}}}}}",
        &e == events_.data() ? "" : ",\n", e.name, 1e6 * e.begin, 1e6 * e.seconds, e.flops, e.bytes,
        of_ceiling(e.flops, e.bytes, e.seconds));
  write_file(file.string(), text + "\n]}\n");
}

}  // namespace kava
