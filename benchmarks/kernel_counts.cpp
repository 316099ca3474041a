#include "benchmarks/kernel_counts.h"

#include <fmt/core.h>

#include <algorithm>
#include <vector>

#include "engine/device/module.h"
#include "engine/error.h"

namespace kava {

namespace {

// "-" where there was nothing.
std::string ratio(double counted, double fewest) { return fewest > 0 ? fmt::format("{:.2f}", counted / fewest) : "-"; }
std::string ratio(const Json& of, const char* counted, const char* fewest) {
  return ratio(of[counted].get<double>(), of[fewest].get<double>());
}

}  // namespace

CountedAttention::CountedAttention(int64_t heads, int64_t kv_heads, int64_t head_dim) {
  constexpr int32_t kSamples = 2, kLengths[] = {46, 24, 19};
  const int64_t group = heads / kv_heads;
  int32_t begin = 0;
  for (int32_t s = 0; s < kSamples; ++s) {
    std::vector<int32_t> question;
    for (const int32_t own : kLengths) {
      segments.add(question, begin, own, begin, own);
      for (int64_t row = 0; row < own * group; row += 16) {
        const int64_t last = std::min(row + 15, own * group - 1), seen = std::ssize(question) + last / group + 1;
        const double scores = static_cast<double>((seen + 7) / 8 * ((head_dim + 15) / 16)),
                     sums = static_cast<double>((seen + 15) / 16 * ((head_dim + 7) / 8)), blocks = static_cast<double>(kv_heads);
        fewest_forward += blocks * (scores + sums), fewest_backward += blocks * (2 * scores + 3 * sums);
      }
      if (question.empty())
        for (int32_t i = 0; i < own; ++i) question.push_back(begin + i);
      begin += own;
    }
    segments.end_group();
  }
  rows = begin;
}

KernelCounts::KernelCounts() {
  LoadedModule module = load_module("libkava_cuda.so");
  start_ = reinterpret_cast<void (*)(int)>(module.find("kava_emulated_count"));
  take_ = reinterpret_cast<const char* (*)()>(module.find("kava_emulated_counts"));
  KAVA_CHECK(start_ && take_, "the emulated backend counts nothing: {}", module.why);
}

void KernelCounts::begin(const std::string& shape) {
  shape_ = shape;
  fmt::print(
      "\ncounts at {}'s shape: over the fewest, {} blocks spread over a launch, of products {}, standing for it; mma of the whole launch\n"
      "{:<64} {:>8} {:>8} {:>8} {:>8} {:>8} {:>9} {:>8}\n",
      shape, kBlocks, kProductBlocks, "op, kernel", "blocks", "sectors", "bytes", "wavefr.", "mma", "in flight", "barriers");
}

void KernelCounts::count(Ops& ops, const std::string& op, double fewest_mma, const std::function<void()>& run) {
  ops.finish();
  // An attention kernel's blocks differ: all of them are counted. Those of a product are alike, and take long.
  start_(op.starts_with("attention") ? 1 << 20 : op.starts_with("linear") || op.starts_with("head") ? kProductBlocks : kBlocks);
  run();
  ops.finish();
  start_(0);
  Json launches = Json::parse(take_());
  double mma = 0;
  fmt::print("{}\n", op);
  for (Json& l : launches) {
    const double counted = l["counted"].get<double>();
    mma += l["mma"].get<double>() / counted * l["blocks"].get<double>();
    l["name"] = op, l["device"] = ops.name(), l["shape"] = shape_;
    fmt::print("  {:<62} {:>8} {:>8} {:>8} {:>8} {:>8} {:>6.1f} K {:>8.0f}\n", l["kernel"].get<std::string>(), l["blocks"].get<int64_t>(),
               ratio(l, "sectors", "fewest_sectors"), ratio(l, "bytes_moved", "fewest_bytes"), ratio(l, "wavefronts", "fewest_wavefronts"),
               "", l["most_bytes_in_flight"].get<double>() / 1024, l["barriers"].get<double>() / counted);
    for (const Json& line : l["lines"]) {
      // Lines in order of what they waste; the last are those of no account.
      const double waste = line["sectors"].get<double>() - line["fewest_sectors"].get<double>() + line["wavefronts"].get<double>() -
                           line["fewest_wavefronts"].get<double>();
      if (waste < 0.02 * (l["sectors"].get<double>() + l["wavefronts"].get<double>())) break;
      fmt::print("    {:<60} {:>8} {:>8} {:>8} {:>8}\n", line["place"].get<std::string>(), "", ratio(line, "sectors", "fewest_sectors"), "",
                 ratio(line, "wavefronts", "fewest_wavefronts"));
    }
    results_.push_back(l);
  }
  if (fewest_mma > 0) {
    fmt::print("  {:<62} {:>8} {:>8} {:>8} {:>8} {:>8}\n", "all products of the op", "", "", "", "", ratio(mma, fewest_mma));
    results_.push_back({{"name", op}, {"device", ops.name()}, {"shape", shape_}, {"mma", mma}, {"fewest_mma", fewest_mma}});
  }
}

}  // namespace kava
