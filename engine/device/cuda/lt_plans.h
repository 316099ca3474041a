// The algorithms that cuBLASLt's heuristics chose, recorded in a file for each device and version of the library: a product takes the same
// one in every run, so that its bytes repeat.
#pragma once
#include <array>
#include <compare>
#include <cstdint>
#include <map>
#include <set>
#include <string>

#include "kernels/gemm.h"

namespace kava {

/// What an algorithm is chosen for. The rows of an activation differ in every step. Backward (nn, tn) m, or k in form tn, counts in steps
/// of kRowStep. Forward (nt) it is always kForwardRows: a row's bytes must not depend on how many rows stand beside it (Reads in ops.h).
///
/// Where cuBLASLt sums k in parts, it may leave out what is beyond the last whole step of its tiles (seen of 12.8.5, 13.1.1 and 13.2.2 on
/// H100, GB200 and GB300: facebookexperimental/triton, pull request 2767). It gets whole steps of kDepthStep, which those of its tiles
/// divide.
struct LtKey {
  static constexpr int kRowStep = 256, kForwardRows = 4096, kDepthStep = 128;
  GemmForm form = GemmForm::nt;
  int m = 0, n = 0, k = 0;
  bool sums = false, adds = false, bias = false;  // f32 outputs; onto what is there, in the outputs' type; a bias
  auto operator<=>(const LtKey&) const = default;
};

/// The key that an algorithm is chosen for.
LtKey rounded_key(LtKey key);
/// Whether cuBLASLt is asked for a product, and its key: as MatmulLt::run says.
bool lt_takes(GemmForm form, const Gemm<bf16>& g, bool any_size, LtKey& key, bool onto = false);

struct LtPlan {
  std::array<uint64_t, 8> algorithm{};
  int64_t workspace = 0;
  bool operator==(const LtPlan&) const = default;
};

class LtPlans {
 public:
  /// The file of a device and version in the user's cache folder (KAVA_CACHE, else XDG_CACHE_HOME/kava, else ~/.cache/kava).
  static std::string file_for(const std::string& device, int64_t version);

  /// Reads the file where it is there; a line that is none of ours ends what is taken from it.
  explicit LtPlans(std::string file);

  const LtPlan* find(const LtKey& key) const;
  /// That cuBLASLt has no algorithm, for as long as this process lives.
  void refuse(const LtKey& key) { refused_.insert(key); }
  bool refused(const LtKey& key) const { return refused_.contains(key); }
  /// That this process has made such a product, or tried to, outside of a recording.
  void use(const LtKey& key) { used_.insert(key); }
  bool used(const LtKey& key) const { return used_.contains(key); }
  /// Recorded on the disk at once. Returns a line that says so where that failed, once.
  std::string add(const LtKey& key, const LtPlan& plan);

  static std::string line_of(const LtKey& key, const LtPlan& plan);
  static bool parse(const std::string& line, LtKey& key, LtPlan& plan);

 private:
  void read();

  std::string file_;
  std::map<LtKey, LtPlan> plans_;
  std::set<LtKey> refused_, used_;
  bool told_ = false;
};

}  // namespace kava
