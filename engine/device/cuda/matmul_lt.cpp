// MatmulLt by cuBLASLt. Its matrices are stored by columns: a matrix of rows is the transpose of one, so C = A B is asked for as C^T = B^T
// A^T.
#include "engine/device/cuda/matmul_lt.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <fmt/core.h>

#include <cstdlib>
#include <cstring>

#include "engine/cli.h"
#include "engine/device/cuda/lt_plans.h"
#include "engine/device/library_search.h"
#include "engine/error.h"
#include "kernels/gpu_error.h"
#include "kernels/launched.h"

namespace kava {

namespace {

constexpr const char* kLibrary = "libcublasLt.so.13";
constexpr std::size_t kWorkspace = std::size_t{32} << 20;

void check(cublasStatus_t status, const char* call) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  const int meaning = status == CUBLAS_STATUS_ALLOC_FAILED ? cudaErrorMemoryAllocation : cudaErrorLaunchFailure;
  throw GpuError(call, meaning, fmt::format("cuBLASLt status {}", static_cast<int>(status)));
}
#define KAVA_LT(call) check(call, #call)
#define KAVA_LT_FUNCTION(field, name) decltype(&name) field = find<decltype(&name)>(#name)

}  // namespace

struct MatmulLt::State {
  State(GpuRuntime& r, void* l) : runtime(r), library(l) {}
  ~State() {
    if (workspace) runtime.release(workspace);
    if (handle) destroy(handle);
  }

  template <class F>
  F find(const char* name) const {
    if (void* function = dlsym(library, name)) return reinterpret_cast<F>(function);
    throw Error(Exit::preflight, kLibrary, fmt::format("has no {}", name), "install that of CUDA 13");
  }

  GpuRuntime& runtime;
  void* library;
  cublasLtHandle_t handle = nullptr;
  char* workspace = nullptr;
  std::unique_ptr<LtPlans> plans;
  KAVA_LT_FUNCTION(create, cublasLtCreate);
  KAVA_LT_FUNCTION(destroy, cublasLtDestroy);
  KAVA_LT_FUNCTION(version, cublasLtGetVersion);
  KAVA_LT_FUNCTION(desc_create, cublasLtMatmulDescCreate);
  KAVA_LT_FUNCTION(desc_destroy, cublasLtMatmulDescDestroy);
  KAVA_LT_FUNCTION(desc_set, cublasLtMatmulDescSetAttribute);
  KAVA_LT_FUNCTION(layout_create, cublasLtMatrixLayoutCreate);
  KAVA_LT_FUNCTION(layout_destroy, cublasLtMatrixLayoutDestroy);
  KAVA_LT_FUNCTION(preference_create, cublasLtMatmulPreferenceCreate);
  KAVA_LT_FUNCTION(preference_destroy, cublasLtMatmulPreferenceDestroy);
  KAVA_LT_FUNCTION(preference_set, cublasLtMatmulPreferenceSetAttribute);
  KAVA_LT_FUNCTION(heuristic, cublasLtMatmulAlgoGetHeuristic);
  KAVA_LT_FUNCTION(algo_check, cublasLtMatmulAlgoCheck);
  KAVA_LT_FUNCTION(matmul, cublasLtMatmul);

  /// What a call needs, for one shape.
  struct Call {
    Call(State& s, const LtKey& key, int64_t lda, int64_t ldb, int64_t ldc, const void* bias) : state(s) {
      KAVA_LT(s.desc_create(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
      // First operand: B's rows; second: A's.
      const bool nt = key.form == GemmForm::nt, tn = key.form == GemmForm::tn;
      set(CUBLASLT_MATMUL_DESC_TRANSA, nt ? CUBLAS_OP_T : CUBLAS_OP_N), set(CUBLASLT_MATMUL_DESC_TRANSB, tn ? CUBLAS_OP_T : CUBLAS_OP_N);
      if (key.bias) {
        set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
        set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
        set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, CUDA_R_16BF);
      }
      const auto m = static_cast<uint64_t>(key.m), n = static_cast<uint64_t>(key.n), k = static_cast<uint64_t>(key.k);
      KAVA_LT(s.layout_create(&b, CUDA_R_16BF, nt ? k : n, nt ? n : k, ldb));
      KAVA_LT(s.layout_create(&a, CUDA_R_16BF, tn ? m : k, tn ? k : m, lda));
      KAVA_LT(s.layout_create(&c, key.sums ? CUDA_R_32F : CUDA_R_16BF, n, m, ldc));
    }
    ~Call() {
      if (desc) state.desc_destroy(desc);
      for (cublasLtMatrixLayout_t layout : {a, b, c})
        if (layout) state.layout_destroy(layout);
    }
    template <class V>
    void set(cublasLtMatmulDescAttributes_t attribute, const V& value) {
      KAVA_LT(state.desc_set(desc, attribute, &value, sizeof value));
    }
    State& state;
    cublasLtMatmulDesc_t desc = nullptr;
    cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr;
  };

  /// The recorded algorithm, or the heuristics' for a dense product of the rounded shape, which is recorded then. False where there is
  /// none.
  bool plan(const LtKey& key, cublasLtMatmulAlgo_t& algorithm) {
    static_assert(sizeof algorithm == sizeof(LtPlan::algorithm));
    if (const LtPlan* known = plans->find(key)) {
      if (known->workspace > static_cast<int64_t>(kWorkspace)) return false;
      if (runtime.capturing() && !plans->used(key)) throw NotRecordable();  // what its first call loads is loaded outside of recordings
      std::memcpy(&algorithm, known->algorithm.data(), sizeof algorithm);
      return true;
    }
    if (plans->refused(key)) return false;
    if (runtime.capturing()) throw NotRecordable();  // where the heuristics fail (seen of CUDA 13.3: vllm.cpp, issue 1732)
    Call call(*this, key, key.form == GemmForm::tn ? key.m : key.k, key.form == GemmForm::nt ? key.k : key.n, key.n, workspace + 16);
    cublasLtMatmulPreference_t preference = nullptr;
    KAVA_LT(preference_create(&preference));
    // Parts of a sum are added in a fixed order, not as they come; forward a sum has no parts, whose number could go by the rows.
    const bool whole = key.form == GemmForm::nt || key.k % LtKey::kDepthStep != 0;
    const uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_NONE | (whole ? 0 : CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
    KAVA_LT(preference_set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kWorkspace, sizeof kWorkspace));
    KAVA_LT(preference_set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions, sizeof reductions));
    const uint32_t alignment = 16;  // and of a bias the pointer's
    for (auto which : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                       CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
      KAVA_LT(preference_set(preference, which, &alignment, sizeof alignment));
    cublasLtMatmulHeuristicResult_t result{};
    int found = 0;
    const cublasStatus_t status = heuristic(handle, call.desc, call.b, call.a, call.c, call.c, preference, 1, &result, &found);
    preference_destroy(preference);
    if (status != CUBLAS_STATUS_SUCCESS || found == 0 || result.state != CUBLAS_STATUS_SUCCESS) return plans->refuse(key), false;
    algorithm = result.algo;
    LtPlan plan;
    std::memcpy(plan.algorithm.data(), &algorithm, sizeof algorithm), plan.workspace = static_cast<int64_t>(result.workspaceSize);
    if (const std::string note = plans->add(key, plan); !note.empty()) print_note(note);
    return true;
  }
};

MatmulLt::~MatmulLt() = default;

std::unique_ptr<MatmulLt> MatmulLt::open(GpuRuntime& runtime, std::string& why) {
  void* library = open_library(kLibrary);
  if (!library) return why = fmt::format("{} was not found: the own kernels make all products", kLibrary), nullptr;
  std::unique_ptr<MatmulLt> lt(new MatmulLt);
  try {
    lt->state_ = std::make_unique<State>(runtime, library);
    KAVA_LT(lt->state_->create(&lt->state_->handle));
    lt->state_->workspace = static_cast<char*>(runtime.allocate(static_cast<int64_t>(kWorkspace)));
  } catch (const std::exception& e) {
    return why = fmt::format("{} cannot be used: {}", kLibrary, e.what()), nullptr;
  }
  const auto version = static_cast<int64_t>(lt->state_->version());
  lt->state_->plans = std::make_unique<LtPlans>(LtPlans::file_for(runtime.info().name, version));
  return lt;
}

bool MatmulLt::run(GemmForm form, const Gemm<bf16>& g, bool any_size, bool onto) {
  LtKey key;
  if (!lt_takes(form, g, any_size, key, onto)) return false;
  const Product<bf16>& p = g.products[0];
  const Rows<float> wide = g.add.data ? g.add : g.set_sum;
  void* out = key.sums ? static_cast<void*>(wide.data) : g.set.data;
  const int64_t ldc = key.sums ? wide.stride : g.set.stride;
  State& s = *state_;
  cublasLtMatmulAlgo_t algorithm;
  if (!s.plan(rounded_key(key), algorithm)) return false;
  if (!s.runtime.capturing()) s.plans->use(rounded_key(key));
  State::Call call(s, key, p.a.stride, p.b.stride, ldc, g.bias);
  cublasLtMatmulHeuristicResult_t checked{};
  if (!s.runtime.capturing() &&  // then the product's own answer has to do
      (s.algo_check(s.handle, call.desc, call.b, call.a, call.c, call.c, &algorithm, &checked) != CUBLAS_STATUS_SUCCESS ||
       checked.workspaceSize > kWorkspace))
    return false;
  const float factor = g.scaled == 1 ? g.factor : 1, kept = key.adds ? 1 : 0;
  const cublasStatus_t status = s.matmul(s.handle, call.desc, &factor, p.b.data, call.b, p.a.data, call.a, &kept, out, call.c, out, call.c,
                                         &algorithm, s.workspace, kWorkspace, reinterpret_cast<cudaStream_t>(s.runtime.stream()));
  for (const auto refused : {CUBLAS_STATUS_NOT_SUPPORTED, CUBLAS_STATUS_INVALID_VALUE, CUBLAS_STATUS_ARCH_MISMATCH})
    if (status == refused) return false;
  check(status, "cublasLtMatmul");
  ++launched;
  return true;
}

}  // namespace kava
