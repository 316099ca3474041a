#include "benchmarks/cudnn.h"

#include <dlfcn.h>
#include <fmt/core.h>

#include <cstdlib>
#include <ranges>

#include "engine/device/library_search.h"
#include "engine/error.h"

namespace kava {

namespace {

constexpr const char* kLibrary = "libcudnn.so.9";

// Kinds of descriptors, attributes and types of attributes, as cudnn_graph.h of 9.19 has them.
enum Kind {
  kPointwise = 0,
  kEngineConfig = 3,
  kHeuristics = 4,
  kPlan = 5,
  kOpPointwise = 13,
  kOpGraph = 15,
  kVariantPack = 16,
  kTensor = 17
};
enum MoreKinds { kMatmul = 18, kOpMatmul = 19, kReduction = 21, kOpReduction = 22, kOpReshape = 31, kDevice = 38 };
enum Type {
  kHandleType = 0,
  kDataType = 1,
  kBool = 2,
  kInt64 = 3,
  kPointer = 6,
  kHeuristicsMode = 8,
  kPointwiseMode = 14,
  kDescriptor = 15
};
enum MoreTypes { kReductionOp = 18, kChar = 24 };
constexpr int kModeA = 3;

}  // namespace

std::unique_ptr<Cudnn> Cudnn::open(std::string& why) {
  void* library = open_library(kLibrary);
  if (!library) return why = fmt::format("no {} is found", kLibrary), nullptr;
  std::unique_ptr<Cudnn> c(new Cudnn);
  bool all = true;
  auto find = [&]<class F>(F*& function, const char* name) { all = (function = reinterpret_cast<F*>(dlsym(library, name))) && all; };
  Api& a = c->api_;
  find(a.GetVersion, "cudnnGetVersion"), find(a.GetLastErrorString, "cudnnGetLastErrorString"), find(a.Create, "cudnnCreate");
  find(a.Destroy, "cudnnDestroy"), find(a.SetStream, "cudnnSetStream"), find(a.BackendExecute, "cudnnBackendExecute");
  find(a.BackendCreateDescriptor, "cudnnBackendCreateDescriptor"), find(a.BackendDestroyDescriptor, "cudnnBackendDestroyDescriptor");
  find(a.BackendSetAttribute, "cudnnBackendSetAttribute"), find(a.BackendGetAttribute, "cudnnBackendGetAttribute");
  find(a.BackendFinalize, "cudnnBackendFinalize");
  if (!all) return why = fmt::format("{} lacks functions of cuDNN 9", kLibrary), nullptr;
  c->version_ = static_cast<int64_t>(a.GetVersion());
  return c;
}

Cudnn::~Cudnn() {
  if (handle_) api_.Destroy(handle_);
}

void Cudnn::check(int status, const char* call) const {
  if (status == 0) return;
  std::array<char, 1024> text{};
  api_.GetLastErrorString(text.data(), text.size());
  throw CudnnError(fmt::format("cuDNN: {}: status {}: {}", call, status, escaped(text.data(), 400)));
}

void Cudnn::use(CUstream_st* stream) {
  check(api_.Create(&handle_), "cudnnCreate");
  check(api_.SetStream(handle_, stream), "cudnnSetStream");
}

CudnnGraph::~CudnnGraph() {
  for (void* descriptor : made_ | std::views::reverse) cudnn_.api_.BackendDestroyDescriptor(descriptor);
}

void* CudnnGraph::make(int type) {
  void* descriptor = nullptr;
  cudnn_.check(cudnn_.api_.BackendCreateDescriptor(type, &descriptor), "a descriptor");
  return made_.emplace_back(descriptor);
}
void CudnnGraph::finalize(void* descriptor, const char* what) const { cudnn_.check(cudnn_.api_.BackendFinalize(descriptor), what); }
void CudnnGraph::set(void* descriptor, int attribute, int type, int64_t count, const void* values) const {
  cudnn_.check(cudnn_.api_.BackendSetAttribute(descriptor, attribute, type, count, values), fmt::format("attribute {}", attribute).c_str());
}
void CudnnGraph::set(void* descriptor, int attribute, void* of) const { set(descriptor, attribute, kDescriptor, 1, &of); }
void CudnnGraph::set_ints(void* descriptor, int attribute, std::span<const int64_t> values) const {
  set(descriptor, attribute, kInt64, std::ssize(values), values.data());
}

CudnnGraph::Tensor CudnnGraph::tensor(int64_t number, const Dims& dims, const Dims& strides, CudnnType type, bool is_virtual,
                                      bool by_value) {
  enum { kAlignment = 900, kOfType = 901, kDims = 902, kStrides = 903, kNumber = 906, kIsVirtual = 907, kByValue = 908 };
  constexpr int64_t kAligned = 16;
  void* t = make(kTensor);
  set(t, kOfType, kDataType, 1, &type);
  set_ints(t, kDims, dims), set_ints(t, kStrides, strides), set_ints(t, kNumber, {&number, 1}), set_ints(t, kAlignment, {&kAligned, 1});
  if (is_virtual) set(t, kIsVirtual, kBool, 1, &is_virtual);
  if (by_value) set(t, kByValue, kBool, 1, &by_value);
  finalize(t, "a tensor");
  return t;
}
CudnnGraph::Tensor CudnnGraph::in_memory(int64_t number, const Dims& dims, const Dims& strides, CudnnType type) {
  return tensor(number, dims, strides, type, false, false);
}
CudnnGraph::Tensor CudnnGraph::scalar(int64_t number) { return tensor(number, {1, 1, 1, 1}, {1, 1, 1, 1}, CudnnType::f32, false, true); }
CudnnGraph::Tensor CudnnGraph::between(const Dims& d, CudnnType type) {
  return between(d, {d[1] * d[2] * d[3], d[2] * d[3], d[3], 1}, type);
}
CudnnGraph::Tensor CudnnGraph::between(const Dims& dims, const Dims& strides, CudnnType type) {
  return tensor(next_++, dims, strides, type, true, false);
}

void CudnnGraph::matmul(Tensor a, Tensor b, Tensor c) {
  constexpr int kComputedIn = 1500, kA = 1520, kB = 1521, kC = 1522, kDesc = 1523;
  constexpr CudnnType kSums = CudnnType::f32;
  void* desc = make(kMatmul);
  set(desc, kComputedIn, kDataType, 1, &kSums);
  finalize(desc, "a product");
  void* op = operations_.emplace_back(make(kOpMatmul));
  set(op, kA, a), set(op, kB, b), set(op, kC, c), set(op, kDesc, desc);
  finalize(op, "the operation of a product");
}

void CudnnGraph::pointwise(CudnnPointwise mode, Tensor x, Tensor b, Tensor y, Tensor t) { pointwise(mode, -1, x, b, y, t); }
void CudnnGraph::gen_index(int64_t axis, Tensor x, Tensor y) { pointwise(CudnnPointwise::gen_index, axis, x, nullptr, y, nullptr); }

void CudnnGraph::pointwise(CudnnPointwise mode, int64_t axis, Tensor x, Tensor b, Tensor y, Tensor t) {
  constexpr int kMode = 0, kComputedIn = 1, kAxis = 9, kDesc = 750, kX = 751, kB = 752, kY = 753, kT = 758;
  const CudnnType type = mode == CudnnPointwise::gen_index ? CudnnType::i32
                         : mode == CudnnPointwise::cmp_ge  ? CudnnType::boolean
                                                           : CudnnType::f32;
  void* desc = make(kPointwise);
  set(desc, kMode, kPointwiseMode, 1, &mode), set(desc, kComputedIn, kDataType, 1, &type);
  if (axis >= 0) set_ints(desc, kAxis, {&axis, 1});
  finalize(desc, "a pointwise function");
  void* op = operations_.emplace_back(make(kOpPointwise));
  set(op, kDesc, desc), set(op, kX, x), set(op, kY, y);
  if (b) set(op, kB, b);
  if (t) set(op, kT, t);
  finalize(op, "a pointwise operation");
}

void CudnnGraph::reduce(CudnnReduction reduction, Tensor x, Tensor y) {
  constexpr int kOperator = 1600, kComputedIn = 1601, kX = 1610, kY = 1611, kDesc = 1612;
  constexpr CudnnType kSums = CudnnType::f32;
  void* desc = make(kReduction);
  set(desc, kOperator, kReductionOp, 1, &reduction), set(desc, kComputedIn, kDataType, 1, &kSums);
  finalize(desc, "a reduction");
  void* op = operations_.emplace_back(make(kOpReduction));
  set(op, kX, x), set(op, kY, y), set(op, kDesc, desc);
  finalize(op, "the operation of a reduction");
}

void CudnnGraph::reshape(Tensor x, Tensor y) {
  constexpr int kX = 2200, kY = 2201;
  void* op = operations_.emplace_back(make(kOpReshape));
  set(op, kX, x), set(op, kY, y);
  finalize(op, "a reshape");
}

void CudnnGraph::finish() {
  constexpr int kHandle = 800, kOperations = 801;
  graph_ = make(kOpGraph);
  set(graph_, kOperations, kDescriptor, std::ssize(operations_), operations_.data());
  if (cudnn_.handle_) set(graph_, kHandle, kHandleType, 1, &cudnn_.handle_);
  finalize(graph_, "the graph");
}

// device: null for the one in use.
void* CudnnGraph::heuristics(void* device) {
  constexpr int kMode = 200, kGraph = 201, kFor = 204;
  void* heuristics = make(kHeuristics);
  set(heuristics, kGraph, graph_), set(heuristics, kMode, kHeuristicsMode, 1, &kModeA);
  if (device) set(heuristics, kFor, device);
  finalize(heuristics, "the heuristics");
  return heuristics;
}

constexpr int kResults = 202;

int64_t CudnnGraph::candidates(const std::string& device) {
  constexpr int kJson = 2702;
  void* described = make(kDevice);
  set(described, kJson, kChar, std::ssize(device), device.data());
  finalize(described, "the description of a device");
  int64_t count = 0;
  cudnn_.check(cudnn_.api_.BackendGetAttribute(heuristics(described), kResults, kDescriptor, 0, &count, nullptr), "the configurations");
  return count;
}

int64_t CudnnGraph::make_plans() {
  constexpr int kHandle = 400, kConfig = 401, kWorkspace = 402;
  void* const asked = heuristics(nullptr);
  int64_t count = 0, given = 0;
  cudnn_.check(cudnn_.api_.BackendGetAttribute(asked, kResults, kDescriptor, 0, &count, nullptr), "the configurations");
  std::vector<void*> configs;
  for (int64_t i = 0; i < count; ++i) configs.push_back(make(kEngineConfig));
  cudnn_.check(cudnn_.api_.BackendGetAttribute(asked, kResults, kDescriptor, count, &given, configs.data()), "the configurations");
  std::string last = fmt::format("its heuristics name {} configurations, of which it gives {}", count, given);
  for (void* config : std::span(configs).first(static_cast<std::size_t>(given))) try {
      void* plan = make(kPlan);
      set(plan, kHandle, kHandleType, 1, &cudnn_.handle_), set(plan, kConfig, config);
      finalize(plan, "a plan");
      int64_t workspace = 0, one = 0;
      cudnn_.check(cudnn_.api_.BackendGetAttribute(plan, kWorkspace, kInt64, 1, &one, &workspace), "a plan's workspace");
      plans_.push_back({plan, workspace});
    } catch (const CudnnError& e) {
      last = e.what();
    }
  if (plans_.empty()) throw CudnnError("cuDNN has no plan for this graph: " + last);
  return std::ssize(plans_);
}

void* CudnnGraph::pack(std::span<const std::pair<int64_t, void*>> tensors, void* workspace) {
  constexpr int kNumbers = 1000, kPointers = 1001, kWorkspace = 1003;
  std::vector<int64_t> numbers;
  std::vector<void*> addresses;
  for (const auto& [number, address] : tensors) numbers.push_back(number), addresses.push_back(address);
  void* pack = make(kVariantPack);
  set_ints(pack, kNumbers, numbers);
  set(pack, kPointers, kPointer, std::ssize(addresses), addresses.data()), set(pack, kWorkspace, kPointer, 1, &workspace);
  finalize(pack, "the tensors of a run");
  return pack;
}

void CudnnGraph::run(int64_t plan, void* pack) {
  cudnn_.check(cudnn_.api_.BackendExecute(cudnn_.handle_, plans_[static_cast<std::size_t>(plan)].descriptor, pack), "a run");
}

}  // namespace kava
