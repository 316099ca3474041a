// There is no cuBLASLt for an emulated device: the own kernels make all products. A twin that takes what cuBLASLt would, and makes it by
// the own kernels too, is there where a variable asks for it:
//
// KAVA_EMULATED_LT=all       it makes all of them
//                  none      it has no way to make any; none:K: the K-th
//                  wrong:K   the first element of the K-th is not what it should be
//                  fails:K   the K-th ends in a failure
#include <algorithm>
#include <cstdlib>
#include <set>
#include <string>

#include "engine/device/cuda/lt_plans.h"
#include "engine/device/cuda/matmul_lt.h"
#include "engine/error.h"
#include "kernels/gpu_error.h"

namespace kava {

struct MatmulLt::State {
  static constexpr int kWorkspace = 1 << 16;  // floats
  State(GpuRuntime& r, std::string k, int64_t n) : runtime(r), kind(std::move(k)), number(n) {}
  ~State() { runtime.release(workspace); }
  GpuRuntime& runtime;
  std::string kind;
  int64_t number, products = 0;
  std::set<LtKey> planned;
  float* workspace = static_cast<float*>(runtime.allocate(kWorkspace * sizeof(float)));
};

namespace {
void multiply(Stream stream, GemmForm form, const Gemm<bf16>& g) {
  if (form == GemmForm::nt) gemm<GemmForm::nt>(stream, g);
  else if (form == GemmForm::nn) gemm<GemmForm::nn>(stream, g);
  else gemm<GemmForm::tn>(stream, g);
}
}  // namespace

MatmulLt::~MatmulLt() = default;

std::unique_ptr<MatmulLt> MatmulLt::open(GpuRuntime& runtime, std::string& why) {
  const char* given = std::getenv("KAVA_EMULATED_LT");
  if (!given) {
    why = "the emulator has no cuBLASLt";
    return nullptr;
  }
  const std::string text = given;
  const std::size_t colon = text.find(':');
  std::unique_ptr<MatmulLt> lt(new MatmulLt);
  lt->state_ = std::make_unique<State>(runtime, text.substr(0, colon), colon == text.npos ? 0 : std::atoll(given + colon + 1));
  return lt;
}

bool MatmulLt::run(GemmForm form, const Gemm<bf16>& g, bool any_size, bool onto) {
  State& s = *state_;
  LtKey key;
  if (!lt_takes(form, g, any_size, key, onto)) return false;
  KAVA_CHECK(form != GemmForm::tn || key.k % LtKey::kDepthStep == 0, "cuBLASLt is asked to sum over {} rows", key.k);
  const bool meant = ++s.products == s.number;
  if (s.kind == "none" && (meant || s.number == 0)) return false;
  if (meant && s.kind == "fails") throw GpuError("cublasLtMatmul", 719, "cuBLASLt status 13");
  if (s.runtime.capturing() && !s.planned.contains(rounded_key(key))) throw NotRecordable();
  s.planned.insert(rounded_key(key));
  const Stream stream = s.runtime.stream();
  if (!onto) multiply(stream, form, g);
  // As many rows at a time as the workspace holds of the sums.
  KAVA_CHECK(!onto || g.n <= State::kWorkspace, "the twin of cuBLASLt adds to at most {} columns", State::kWorkspace);
  for (int row = 0, rows = State::kWorkspace / g.n; onto && row < g.m; row += rows) {
    Gemm<bf16> some = g;
    some.m = std::min(rows, g.m - row), some.set = {}, some.set_sum = {s.workspace, g.n};
    some.products[0].a.data += form == GemmForm::tn ? row : row * some.products[0].a.stride;
    multiply(stream, form, some);
    add_rows<bf16, float>(stream, {g.set[row], g.set.stride}, some.set_sum, some.m, g.n);
  }
  if (meant && s.kind == "wrong") {
    if (key.sums) fill_rows(stream, key.adds ? g.add : g.set_sum, 1e6f, 1, 1);
    else fill_rows(stream, g.set, to_bf16(1e6f), 1, 1);
  }
  return true;
}

}  // namespace kava
