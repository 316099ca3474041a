#include "tools/profile.h"

#include <fmt/format.h>

#include <algorithm>

#include "engine/files/files.h"

namespace kava {

namespace {

// A tensor that is read and written stands in both lists.
double bytes_of(const OpCall& call) {
  double bytes = 0;
  for (const Tensor& t : call.outputs) bytes += static_cast<double>(t.count() * size_of(t.dtype));
  for (const Tensor& t : call.inputs)
    if (std::ranges::none_of(call.outputs, [&](const Tensor& y) { return y.data == t.data; }))
      bytes += static_cast<double>(t.count() * size_of(t.dtype));
  return bytes;
}

}  // namespace

Profile::Profile(Ops& ops) : ops_(ops), first_(Clock::now()) { ops.add_observer(*this); }

void Profile::before(const OpCall&) {
  ops_.finish();
  begin_ = Clock::now();
}

void Profile::after(const OpCall& call) {
  ops_.finish();
  const double seconds = std::chrono::duration<double>(Clock::now() - begin_).count(), bytes = bytes_of(call);
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
  std::string text = fmt::format("{:<26}{:>10}{:>12}{:>9}{:>12}{:>10}\n", "op", "calls", "seconds", "share %", "GFLOP/s", "GB/s");
  auto rate = [](double work, double seconds) { return seconds > 0 ? work / seconds * 1e-9 : 0.0; };
  for (const auto& [name, t] : rows)
    text += fmt::format("{:<26}{:>10}{:>12.4f}{:>9.1f}{:>12.1f}{:>10.1f}\n", name, t.calls, t.seconds,
                        all > 0 ? 100 * t.seconds / all : 0.0, rate(t.flops, t.seconds), rate(t.bytes, t.seconds));
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
        "{}{{\"name\":\"{}\",\"ph\":\"X\",\"pid\":0,\"tid\":0,\"ts\":{:.3f},\"dur\":{:.3f},\"args\":{{\"flops\":{:.0f},\"bytes\":{:.0f}}}}"
        "}",
        &e == events_.data() ? "" : ",\n", e.name, 1e6 * e.begin, 1e6 * e.seconds, e.flops, e.bytes);
  write_file(file.string(), text + "\n]}\n");
}

}  // namespace kava
