// GpuRuntime by the CUDA runtime. The driver's calls for address ranges are looked up through it, so that nothing links to the driver.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "engine/device/cuda/runtime.h"
#include "engine/error.h"
#include "kernels/gpu_error.h"
#include "kernels/launched.h"

namespace kava {

namespace {

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // it is told here; one that stays is told again by the next call
  throw GpuError(call, static_cast<int>(status), cudaGetErrorString(status));
}
#define KAVA_CUDA(call) check(call, #call)

/// A function of the driver, by name.
template <class F>
F driver_function(const char* name) {
  void* address = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  KAVA_CUDA(cudaGetDriverEntryPointByVersion(name, &address, 12000, cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess || !address)
    throw Error(Exit::preflight, "cuda", fmt::format("the driver has no {}", name), "install a newer driver");
  return reinterpret_cast<F>(address);
}
void check_driver(CUresult status, const char* call) { check(static_cast<cudaError_t>(status), call); }  // whose numbers are the runtime's

constexpr int64_t kStagingBytes = int64_t{32} << 20;

}  // namespace

const char* gpu_backend_name() { return "cuda"; }
bool gpu_is_emulated() { return false; }
std::string gpu_nccl_library() { return "libnccl.so.2"; }

int gpu_count(std::string& why) {
  int version = 0, count = 0;
  cudaDriverGetVersion(&version);
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return count;
  const bool none = status == cudaErrorNoDevice || status == cudaSuccess;
  why = why_no_device(version, status == cudaErrorStubLibrary, none, cudaGetErrorString(status));
  return 0;
}

/// Pinned memory in two halves: a half is written again only after the copies from it were made. And what a read that was begun copies to.
struct GpuRuntime::State {
  struct Driver {
    decltype(&cuMemAddressReserve) reserve = driver_function<decltype(&cuMemAddressReserve)>("cuMemAddressReserve");
    decltype(&cuMemAddressFree) free = driver_function<decltype(&cuMemAddressFree)>("cuMemAddressFree");
    decltype(&cuMemCreate) create = driver_function<decltype(&cuMemCreate)>("cuMemCreate");
    decltype(&cuMemRelease) release = driver_function<decltype(&cuMemRelease)>("cuMemRelease");
    decltype(&cuMemMap) map = driver_function<decltype(&cuMemMap)>("cuMemMap");
    decltype(&cuMemUnmap) unmap = driver_function<decltype(&cuMemUnmap)>("cuMemUnmap");
    decltype(&cuMemSetAccess) access = driver_function<decltype(&cuMemSetAccess)>("cuMemSetAccess");
    decltype(&cuGraphKernelNodeGetParams) kernel = driver_function<decltype(&cuGraphKernelNodeGetParams)>("cuGraphKernelNodeGetParams");
  } const driver;
  std::vector<cudaEvent_t> marks;
  cudaStream_t side = nullptr;
  cudaEvent_t forked = nullptr, joined = nullptr, done[2] = {}, arrived = nullptr;
  char *data = nullptr, *begun = nullptr;
  int64_t used = 0, begun_room = 0;
  int half = 0;
};

GpuInfo gpu_info(int device) {
  std::string why;
  require_device(device, gpu_count(why), why);
  cudaDeviceProp p{};
  KAVA_CUDA(cudaGetDeviceProperties(&p, device));
  GpuInfo info;
  info.name = p.name, info.memory_bytes = static_cast<int64_t>(p.totalGlobalMem), info.compute_capability = 10 * p.major + p.minor;
  char address[32] = {};
  KAVA_CUDA(cudaDeviceGetPCIBusId(address, sizeof address, device)), info.address = address;
  cudaDriverGetVersion(&info.driver);
  return info;
}

GpuRuntime::GpuRuntime(int device) : info_(gpu_info(device)), device_(device) {
  KAVA_CUDA(cudaSetDevice(device)), KAVA_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  state_ = new State{};
  KAVA_CUDA(cudaMallocHost(reinterpret_cast<void**>(&state_->data), static_cast<std::size_t>(kStagingBytes)));
  KAVA_CUDA(cudaStreamCreateWithFlags(&state_->side, cudaStreamNonBlocking));
  for (cudaEvent_t* e : {&state_->done[0], &state_->done[1], &state_->arrived, &state_->forked, &state_->joined})
    KAVA_CUDA(cudaEventCreateWithFlags(e, cudaEventDisableTiming));
}

GpuRuntime::~GpuRuntime() {
  if (state_) {
    cudaStreamSynchronize(stream_);
    for (cudaEvent_t e : {state_->done[0], state_->done[1], state_->arrived, state_->forked, state_->joined})
      if (e) cudaEventDestroy(e);
    if (state_->side) cudaStreamDestroy(state_->side);
    cudaFreeHost(state_->data), cudaFreeHost(state_->begun);
    delete state_;
  }
  if (stream_) cudaStreamDestroy(stream_);
}

int64_t GpuRuntime::free_bytes() const {
  std::size_t free = 0, total = 0;
  KAVA_CUDA(cudaMemGetInfo(&free, &total));
  return static_cast<int64_t>(free);
}
void* GpuRuntime::allocate(int64_t bytes) {
  ++counts_.allocations;
  void* data = nullptr;
  KAVA_CUDA(cudaMalloc(&data, static_cast<std::size_t>(std::max<int64_t>(bytes, 1))));
  return data;
}
void GpuRuntime::release(void* data) { cudaFree(data); }

AddressRange GpuRuntime::reserve() {
  CUdeviceptr begin = 0;
  const int64_t bytes = (info_.memory_bytes + Arena::kPiece - 1) / Arena::kPiece * Arena::kPiece;
  check_driver(state_->driver.reserve(&begin, static_cast<std::size_t>(bytes), 0, 0, 0), "cuMemAddressReserve");
  return {reinterpret_cast<char*>(begin), bytes};
}
void GpuRuntime::commit(void* data, int64_t bytes) {
  ++counts_.commits;
  const CUmemAllocationProp prop{
      CU_MEM_ALLOCATION_TYPE_PINNED, CU_MEM_HANDLE_TYPE_NONE, {CU_MEM_LOCATION_TYPE_DEVICE, {device_}}, nullptr, {}};
  CUmemGenericAllocationHandle handle{};
  check_driver(state_->driver.create(&handle, static_cast<std::size_t>(bytes), &prop, 0), "cuMemCreate");
  const auto at = reinterpret_cast<CUdeviceptr>(data);
  const CUresult mapped = state_->driver.map(at, static_cast<std::size_t>(bytes), 0, handle, 0);
  state_->driver.release(handle);  // the mapping keeps the memory
  check_driver(mapped, "cuMemMap");
  const CUmemAccessDesc access{prop.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  check_driver(state_->driver.access(at, static_cast<std::size_t>(bytes), &access, 1), "cuMemSetAccess");
}
void GpuRuntime::unreserve(const AddressRange& range, int64_t committed) {
  cudaStreamSynchronize(stream_);
  const auto at = reinterpret_cast<CUdeviceptr>(range.begin);
  if (committed > 0) state_->driver.unmap(at, static_cast<std::size_t>(committed));
  state_->driver.free(at, static_cast<std::size_t>(range.bytes));
}
void GpuRuntime::discard(void*, int64_t) {}

void GpuRuntime::write(void* device, const void* host, int64_t bytes) {
  require_not_capturing("cudaMemcpyAsync");
  ++counts_.uploads;
  constexpr int64_t kHalf = kStagingBytes / 2;
  for (int64_t done = 0; done < bytes;) {
    if (state_->used == kHalf) {
      KAVA_CUDA(cudaEventRecord(state_->done[state_->half], stream_));
      state_->half ^= 1, state_->used = 0;
      while (watch_ && cudaEventQuery(state_->done[state_->half]) == cudaErrorNotReady) watch_();
      KAVA_CUDA(cudaEventSynchronize(state_->done[state_->half]));
    }
    const int64_t n = std::min(bytes - done, kHalf - state_->used);
    char* from = state_->data + state_->half * kHalf + state_->used;
    std::memcpy(from, static_cast<const char*>(host) + done, static_cast<std::size_t>(n));
    KAVA_CUDA(cudaMemcpyAsync(static_cast<char*>(device) + done, from, static_cast<std::size_t>(n), cudaMemcpyHostToDevice, stream_));
    state_->used += n, done += n;
  }
}
void GpuRuntime::read(void* host, const void* device, int64_t bytes) {
  ++counts_.reads;
  finish();  // first: a copy to pageable memory waits within the call, where nobody watches
  KAVA_CUDA(cudaMemcpyAsync(host, device, static_cast<std::size_t>(bytes), cudaMemcpyDeviceToHost, stream_));
  KAVA_CUDA(cudaStreamSynchronize(stream_));
}
void GpuRuntime::begin_read(const void* device, int64_t bytes) {
  require_not_capturing("cudaMemcpyAsync");
  ++counts_.reads;
  State& s = *state_;
  if (bytes > s.begun_room) {
    KAVA_CUDA(cudaFreeHost(std::exchange(s.begun, nullptr)));
    s.begun_room = 0;
    KAVA_CUDA(cudaMallocHost(reinterpret_cast<void**>(&s.begun), static_cast<std::size_t>(bytes)));
    s.begun_room = bytes;
  }
  KAVA_CUDA(cudaMemcpyAsync(s.begun, device, static_cast<std::size_t>(bytes), cudaMemcpyDeviceToHost, stream_));
  KAVA_CUDA(cudaEventRecord(s.arrived, stream_));
}
void GpuRuntime::end_read(void* host, int64_t bytes) {
  while (watch_ && cudaEventQuery(state_->arrived) == cudaErrorNotReady) watch_();
  KAVA_CUDA(cudaEventSynchronize(state_->arrived));
  std::memcpy(host, state_->begun, static_cast<std::size_t>(bytes));
}
int64_t GpuRuntime::launches() const { return launched; }
void GpuRuntime::finish() {
  while (watch_ && !idle()) watch_();
  KAVA_CUDA(cudaStreamSynchronize(stream_));
}

void GpuRuntime::begin_capture() {
  // Of this thread alone: the streams and threads of libraries go on.
  KAVA_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  capturing_ = true;
}
CUgraph_st* GpuRuntime::end_capture(GraphForm& form) {
  CUgraph_st* graph = nullptr;
  std::size_t count = 0;
  capturing_ = false;
  KAVA_CUDA(cudaStreamEndCapture(stream_, &graph));
  KAVA_CUDA(cudaGraphGetNodes(graph, nullptr, &count));
  std::vector<cudaGraphNode_t> nodes(count);
  KAVA_CUDA(cudaGraphGetNodes(graph, nodes.data(), &count));
  form = {static_cast<int64_t>(count)};
  for (std::size_t i = 0; i < count; ++i) {
    cudaGraphNodeType type{};
    cudaLaunchAttributeValue of{};
    KAVA_CUDA(cudaGraphNodeGetType(nodes[i], &type));
    if (type != cudaGraphNodeTypeKernel) continue;
    KAVA_CUDA(cudaGraphKernelNodeGetAttribute(nodes[i], cudaLaunchAttributeClusterDimension, &of)), add_cluster(form, 2 * i, of.clusterDim);
    if (info_.compute_capability < 100) continue;
    CUDA_KERNEL_NODE_PARAMS of_node{};
    check_driver(state_->driver.kernel(nodes[i], &of_node), "cuGraphKernelNodeGetParams");
    for (const void* handle : {static_cast<void*>(of_node.func), static_cast<void*>(of_node.kern)})
      form.push_back(reinterpret_cast<int64_t>(handle));
  }
  return graph;
}
void GpuRuntime::abandon_capture() noexcept {
  CUgraph_st* graph = nullptr;
  if (std::exchange(capturing_, false) && cudaStreamEndCapture(stream_, &graph) == cudaSuccess) drop(graph);
  (void)cudaGetLastError();
}
CUgraphExec_st* GpuRuntime::instantiate(CUgraph_st* graph) {
  CUgraphExec_st* executable = nullptr;
  KAVA_CUDA(cudaGraphInstantiate(&executable, graph, 0));
  return executable;
}
bool GpuRuntime::update(CUgraphExec_st* executable, CUgraph_st* graph) {
  cudaGraphExecUpdateResultInfo info{};
  return cudaGraphExecUpdate(executable, graph, &info) == cudaSuccess;
}
void GpuRuntime::launch(CUgraphExec_st* executable) { KAVA_CUDA(cudaGraphLaunch(executable, stream_)); }
void GpuRuntime::drop(CUgraph_st* graph) noexcept { cudaGraphDestroy(graph); }
void GpuRuntime::drop(CUgraphExec_st* executable) noexcept { cudaGraphExecDestroy(executable); }

CUstream_st* GpuRuntime::side() { return state_->side; }
void GpuRuntime::fork() {
  require_not_capturing("cudaEventRecord");
  KAVA_CUDA(cudaEventRecord(state_->forked, stream_)), KAVA_CUDA(cudaStreamWaitEvent(state_->side, state_->forked, 0));
}
void GpuRuntime::join() {
  require_not_capturing("cudaStreamWaitEvent");
  KAVA_CUDA(cudaEventRecord(state_->joined, state_->side)), KAVA_CUDA(cudaStreamWaitEvent(stream_, state_->joined, 0));
}
void GpuRuntime::mark(CUstream_st* stream) {
  require_not_capturing("cudaEventRecord");
  KAVA_CUDA(cudaEventCreate(&state_->marks.emplace_back())), KAVA_CUDA(cudaEventRecord(state_->marks.back(), stream));
}
std::vector<double> GpuRuntime::take_marks() {
  std::vector<double> seconds;
  for (cudaEvent_t e : state_->marks) {
    float ms = 0;
    KAVA_CUDA(cudaEventElapsedTime(&ms, state_->marks[0], e));
    seconds.push_back(1e-3 * ms);
  }
  for (cudaEvent_t e : std::exchange(state_->marks, {})) cudaEventDestroy(e);
  return seconds;
}
bool GpuRuntime::forked() { return cudaEventQuery(state_->forked) != cudaErrorNotReady; }
bool GpuRuntime::joined() { return cudaEventQuery(state_->joined) != cudaErrorNotReady; }
bool GpuRuntime::idle() { return cudaStreamQuery(stream_) != cudaErrorNotReady; }

}  // namespace kava
