#include "engine/device/cuda/lt_plans.h"

#include <cctype>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <utility>

#include "engine/error.h"
#include "engine/files/cache.h"
#include "engine/files/files.h"

namespace kava {

namespace fs = std::filesystem;

namespace {
constexpr const char* kForms[] = {"nt", "nn", "tn"};
constexpr double kSmallest = 1 << 24;  // multiply-adds of a product that is worth a call
}  // namespace

LtKey rounded_key(LtKey key) {
  if (key.form == GemmForm::nt) {
    key.m = LtKey::kForwardRows;
    return key;
  }
  int& rows = key.form == GemmForm::tn ? key.k : key.m;
  rows = (rows + LtKey::kRowStep - 1) / LtKey::kRowStep * LtKey::kRowStep;
  return key;
}

bool lt_takes(GemmForm form, const Gemm<bf16>& g, bool any_size, LtKey& key, bool onto) {
  const Product<bf16>& p = g.products[0];
  if (g.count != 1 || (g.scaled == 1 && g.masked) || g.m == 0 || g.n == 0 || p.k == 0) return false;
  const bool adds = g.add.data != nullptr, sums = adds || g.set_sum.data != nullptr;
  key = {form, g.m, g.n, p.k, sums, adds || onto, g.bias != nullptr};
  const LtKey chosen_for = rounded_key(key);
  if (!any_size && static_cast<double>(chosen_for.m) * chosen_for.n * chosen_for.k < kSmallest) return false;
  // The algorithm is chosen with a bias at such an address.
  if (reinterpret_cast<std::uintptr_t>(g.bias) % 16 != 0) return false;
  return rows_at_16(p.a) && rows_at_16(p.b) && (adds ? rows_at_16(g.add) : sums ? rows_at_16(g.set_sum) : rows_at_16(g.set));
}

std::string LtPlans::file_for(const std::string& device, int64_t version) {
  const fs::path folder = cache_folder();
  if (folder.empty()) return "";
  std::string name;
  for (char c : device) name += std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
  return (folder / fmt::format("cublaslt-{}-{}.txt", name, version)).string();
}

LtPlans::LtPlans(std::string file) : file_(std::move(file)) { read(); }

void LtPlans::read() {
  std::ifstream in(file_);
  LtKey key;
  LtPlan plan;
  for (std::string line; std::getline(in, line) && parse(line, key, plan);) plans_.emplace(key, plan);
}

const LtPlan* LtPlans::find(const LtKey& key) const {
  const auto it = plans_.find(key);
  return it == plans_.end() ? nullptr : &it->second;
}

std::string LtPlans::add(const LtKey& key, const LtPlan& plan) {
  plans_[key] = plan;
  read();  // what another process has recorded since; what is here stays
  std::string text;
  for (const auto& [k, p] : plans_) text += line_of(k, p) + "\n";
  try {
    if (file_.empty()) throw Error(Exit::write, "KAVA_CACHE", "names no folder, and there is no home", "set it");
    fs::create_directories(fs::path(file_).parent_path());
    write_file(file_, text);
  } catch (const std::exception& e) {
    if (!std::exchange(told_, true))
      return fmt::format("cuBLASLt's algorithms cannot be recorded, so another run may take others: {}", e.what());
  }
  return "";
}

std::string LtPlans::line_of(const LtKey& key, const LtPlan& plan) {
  return fmt::format("{} {} {} {} {:d} {:d} {:d} {} {:016x}", kForms[static_cast<int>(key.form)], key.m, key.n, key.k, key.sums, key.adds,
                     key.bias, plan.workspace, fmt::join(plan.algorithm, " "));
}

bool LtPlans::parse(const std::string& line, LtKey& key, LtPlan& plan) {
  std::istringstream in(line);
  std::string form, rest;
  in >> form >> key.m >> key.n >> key.k >> key.sums >> key.adds >> key.bias >> plan.workspace >> std::hex;
  for (uint64_t& word : plan.algorithm) in >> word;
  if (!in || (in >> rest) || key.m <= 0 || key.n <= 0 || key.k <= 0 || plan.workspace < 0) return false;
  for (int f = 0; f < 3; ++f)
    if (form == kForms[f]) {
      key.form = static_cast<GemmForm>(f);
      return true;
    }
  return false;
}

}  // namespace kava
