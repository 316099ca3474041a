#include "benchmarks/bench_results.h"

#include <algorithm>

namespace kava {

namespace {

Json json_of(const BenchResults::WholeStep& step) {
  const MeasuredStep& m = step.measured;
  Json out = {{"name", "step"},
              {"share", step.share},
              {"seconds", m.median()},
              {"flops", m.flops},
              {"matrix_rate", step.matrix_rate},
              {"bytes", m.peak_bytes},
              {"launches", m.asked.launches},
              {"calls", m.asked.calls},
              {"uploads", m.asked.uploads},
              {"reads", m.asked.reads},
              {"allocations", m.asked.allocations}};
  if (!m.one_by_one.empty()) out["fastest"] = m.fastest(), out["fastest_one_by_one"] = *std::ranges::min_element(m.one_by_one);
  if (const auto& graphs = step.graphs)
    out["graphs"] = {{"recorded", graphs->recorded}, {"updated", graphs->updated}, {"fallbacks", graphs->fallbacks}};
  return out;
}

}  // namespace

Json json_of(const BenchResults& found, const std::string& device, const std::string& shape) {
  Json out = Json::array();
  for (const BenchResults::Row& r : found.rows) {
    out.push_back({{"name", r.name}, {"seconds", r.seconds}, {"rate", r.amount / r.seconds / 1e9}, {"unit", r.unit}});
    if (r.ceiling > 0) out.back()["ceiling"] = r.ceiling;
  }
  out.push_back({{"name", "matrix rate"}, {"rate", found.matrix_rate}, {"unit", "GFLOP/s"}, {"by", found.multiplier}});
  out.push_back({{"name", "copy rate"}, {"rate", found.copy_rate}, {"unit", "GB/s"}});
  if (found.step) out.push_back(json_of(*found.step));
  for (Json& row : out) row["shape"] = shape;
  for (const BenchResults::Compared& c : found.compared)
    out.push_back({{"name", c.name}, {"shape", c.shape}, {"share", c.share}, {"of_first", c.of_first}});
  for (Json& row : out) row["device"] = device;
  return out;
}

}  // namespace kava
