// GpuRuntime where kernels are emulated: device memory is host memory. It is as nasty as a device may be. Nothing that is queued happens
// before somebody waits for it: copies from the host have taken their bytes by then, kernels their parameters, and what either does wrong
// is told by the call that waits. What nobody wrote is NaN, and so is what was discarded; released memory cannot be touched any more.
//
// KAVA_EMULATED_FAIL=memory:K   the K-th request of memory is refused
//                    fault:K    the K-th launch faults; the next call that waits tells, and so does every call after it
//                    capture:K  the K-th recording of what is queued is spoilt
//                    update:K   the K-th update of an executable graph is refused
//                    lost:K     the K-th call and all after it find the device lost
//                    busy       the device does not say what it is
//                    count      prints at the end how many there were of requests, launches and calls
// KAVA_EMULATED_NCCL names another file to take for NCCL's library.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <string_view>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine/device/cuda/runtime.h"
#include "engine/error.h"
#include "engine/memory.h"
#include "gpu_emulated.h"
#include "kernels/gpu_error.h"

namespace kava {

namespace {

constexpr int64_t kAddresses = int64_t{1} << 38;
constexpr int kCuda = 13000;  // the version that it claims
// The runtime's numbers for what can go wrong here.
constexpr int kOutOfMemory = 2, kBusy = 46, kUncorrectableEcc = 214, kIllegalAddress = 700, kNotWhileCapturing = 900, kCaptureSpoilt = 901;

int device_count() {
  const char* given = std::getenv("KAVA_EMULATED_DEVICES");
  return given ? std::max(0, std::atoi(given)) : 1;
}

/// What KAVA_EMULATED_MEMORY gives each device, in bytes; 0: as much as there is.
int64_t given_memory() {
  const char* given = std::getenv("KAVA_EMULATED_MEMORY");
  return given ? std::atoll(given) : 0;
}

char* map_pages(int64_t bytes, int protection) {
  void* data = mmap(nullptr, static_cast<std::size_t>(bytes), protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) throw GpuError("mmap", kOutOfMemory, "out of memory");
  return static_cast<char*>(data);
}

void spoil(void* data, int64_t bytes) { std::memset(data, 0xff, static_cast<std::size_t>(bytes)); }

int64_t whole_pages(int64_t bytes) { return (std::max<int64_t>(bytes, 1) + 4095) / 4096 * 4096; }

}  // namespace
}  // namespace kava

/// What was queued, in its order. A discard is no node: a device would know nothing of it.
struct CUgraph_st {
  std::vector<std::function<void()>> work;
  kava::GraphForm form = {0};
};
struct CUgraphExec_st {
  CUgraph_st holds;
};

namespace kava {

const char* gpu_backend_name() { return "cuda (emulated)"; }
bool gpu_is_emulated() { return true; }
std::string gpu_nccl_library() {
  const char* given = std::getenv("KAVA_EMULATED_NCCL");
  return given ? given : "libkava_nccl.so";
}

int gpu_count(std::string& why) {
  const int count = device_count();
  if (count == 0) why = "the emulator shows no device (KAVA_EMULATED_DEVICES)";
  return count;
}

GpuInfo gpu_info(int device) {
  std::string why;
  require_device(0, gpu_count(why), why);  // there is any where there is one
  const char* fail = std::getenv("KAVA_EMULATED_FAIL");
  if (fail && std::string_view(fail) == "busy") throw GpuError("cudaGetDeviceProperties", kBusy, "the device is busy or unavailable");
  return {.name = "emulated",
          .address = std::to_string(device),
          .memory_bytes = given_memory() > 0 ? given_memory() : machine_memory(),
          .compute_capability = 90,
          .driver = kCuda};
}

struct GpuRuntime::State {
  /// Work in its order; its first is asked until it is over.
  struct Stream : CUstream_st {
    explicit Stream(State& s) : state(s) {}
    void queue(std::function<void()> launch) override { state.launch(*this, std::move(launch)); }
    void queue_until(std::function<bool()> over) override {
      state.call();
      if (this == &state.main) state.not_captured("a call of a library");
      push(std::move(over));
    }
    void push(std::function<bool()> over) { work.push_back(std::move(over)), ++queued; }
    /// Whether the first of what is queued is over now.
    bool step() {
      if (work.empty() || !work.front()()) return false;
      work.pop_front(), ++done;
      return true;
    }
    State& state;
    std::deque<std::function<bool()>> work;
    int64_t queued = 0, done = 0;
  };

  State() {
    const char* given = std::getenv("KAVA_EMULATED_FAIL");
    const std::string_view text = given ? given : "";
    const std::size_t colon = text.find(':');
    kind = text.substr(0, colon);
    if (colon != text.npos) number = std::atoll(text.data() + colon + 1);
  }

  /// Every call that a device would answer begins here.
  void call() {
    if (++calls == number && kind == "lost") lose("uncorrectable ECC error encountered", kUncorrectableEcc);
    if (failure) std::rethrow_exception(failure);
  }
  void request_memory(int64_t& count, int64_t bytes) {
    call();
    if ((++requests == number && kind == "memory") || (given_memory() > 0 && bytes > free()))
      throw GpuError("cudaMalloc", kOutOfMemory, "out of memory");
    ++count, held += bytes;
  }
  int64_t free() const { return std::max<int64_t>(0, room - held); }

  void launch(Stream& stream, std::function<void()> work) {
    call();
    const bool faults = ++launches == number && kind == "fault";
    auto node = [this, faults, work = std::move(work)] {
      if (faults) lose("an illegal memory access was encountered", kIllegalAddress);
      else work();
    };
    if (captured && &stream == &main) {
      if (stream.cluster > 1) captured->form.insert(captured->form.end(), {captured->form[0], stream.cluster, 1, 1});
      captured->work.emplace_back(std::move(node)), ++captured->form[0];
      return;
    }
    stream.push([node = std::move(node)] { return node(), true; });
    if (stream.work.size() >= kMostQueued) run();
  }
  void later(const char* name, std::function<void()> copy) {
    call();
    not_captured(name);
    main.push([copy = std::move(copy)] { return copy(), true; });
  }
  void discard(std::function<void()> spoils) {
    if (captured) captured->work.push_back(std::move(spoils));
    else if (!failure) main.push([spoils = std::move(spoils)] { return spoils(), true; });
  }
  /// What cannot be recorded: it fails, and spoils the recording that goes on.
  void not_captured(const char* name) {
    if (!captured) return;
    spoilt = true;
    throw GpuError(name, kNotWhileCapturing, "operation not permitted when stream is capturing");
  }

  /// Goes on with what is queued until nothing moves or something holds; what goes wrong is kept for the next call. What may run beside the
  /// main stream comes before what stands there, so that whatever is not told to wait finds what it reads unwritten.
  void go_on(const bool* until = nullptr) {
    try {
      while (!failure && !(until && *until) && (side.step() || main.step())) {
      }
    } catch (...) {
      failure = std::current_exception();
    }
    if (failure) main.work.clear(), side.work.clear();
  }
  /// Does all that is queued, or until something holds.
  void run(const bool* until = nullptr) {
    for (go_on(until); !main.work.empty() && !(until && *until); go_on(until)) std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  void wait(const bool* until = nullptr) {
    call();
    run(until);
    if (failure) std::rethrow_exception(failure);
  }

  void lose(const char* text, int status) { failure = std::make_exception_ptr(GpuError("cudaStreamSynchronize", status, text)); }

  static constexpr std::size_t kMostQueued = 4096;
  std::string_view kind;
  int64_t number = 0, calls = 0, requests = 0, launches = 0, captures = 0, updates = 0;
  std::unique_ptr<CUgraph_st> captured;  // what is being recorded of the main stream
  bool spoilt = false;
  Stream main{*this}, side{*this};
  std::vector<std::chrono::steady_clock::time_point> marks;
  int64_t forked = 0, joined = 0;  // how much of each stream the other waits for
  std::exception_ptr failure;
  std::unordered_map<void*, int64_t> sizes;                                           // of allocations
  int64_t room = given_memory() > 0 ? given_memory() : available_memory(), held = 0;  // bytes
  std::vector<char> begun;                                                            // what a read that was begun copies to
  bool arrived = false;
};

GpuRuntime::GpuRuntime(int device) : info_(gpu_info(device)), device_(device) {
  state_ = new State;
  stream_ = &state_->main;
}
GpuRuntime::~GpuRuntime() {
  state_->run();
  if (state_->kind == "count")
    fmt::print(stderr, "emulated device: {} requests of memory, {} launches, {} calls\n", state_->requests, state_->launches,
               state_->calls);
  delete state_;
}

int64_t GpuRuntime::free_bytes() const { return state_->free(); }

void* GpuRuntime::allocate(int64_t bytes) {
  state_->not_captured("cudaMalloc");
  const int64_t size = whole_pages(bytes);
  state_->request_memory(counts_.allocations, size);
  char* data = map_pages(size, PROT_READ | PROT_WRITE);
  spoil(data, size);
  state_->sizes[data] = size;
  return data;
}
void GpuRuntime::release(void* data) {
  if (!data) return;
  state_->spoilt |= state_->captured != nullptr;
  state_->run();
  const auto it = state_->sizes.find(data);
  KAVA_CHECK(it != state_->sizes.end(), "memory released that was not allocated");
  munmap(data, static_cast<std::size_t>(it->second));
  state_->held -= it->second;
  state_->sizes.erase(it);
}

AddressRange GpuRuntime::reserve() { return {map_pages(kAddresses, PROT_NONE), kAddresses}; }
void GpuRuntime::commit(void* data, int64_t bytes) {
  state_->not_captured("cuMemCreate");
  state_->request_memory(counts_.commits, bytes);
  if (mprotect(data, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE) != 0)
    throw GpuError("cuMemCreate", kOutOfMemory, "out of memory");
}
void GpuRuntime::unreserve(const AddressRange& range, int64_t committed) {
  state_->run();
  state_->held -= committed;
  munmap(range.begin, static_cast<std::size_t>(range.bytes));
}
void GpuRuntime::discard(void* data, int64_t bytes) {
  state_->discard([=] { spoil(data, bytes); });
}

void GpuRuntime::write(void* device, const void* host, int64_t bytes) {
  ++counts_.uploads;
  const auto* from = static_cast<const char*>(host);
  state_->later("cudaMemcpyAsync",
                [device, taken = std::vector<char>(from, from + bytes)] { std::memcpy(device, taken.data(), taken.size()); });
}
void GpuRuntime::read(void* host, const void* device, int64_t bytes) {
  ++counts_.reads;
  finish();
  std::memcpy(host, device, static_cast<std::size_t>(bytes));
}
void GpuRuntime::begin_read(const void* device, int64_t bytes) {
  ++counts_.reads;
  state_->arrived = false;
  state_->later("cudaMemcpyAsync", [this, from = static_cast<const char*>(device), bytes] {
    state_->begun.assign(from, from + bytes), state_->arrived = true;
  });
}
void GpuRuntime::end_read(void* host, int64_t bytes) {
  state_->not_captured("cudaEventSynchronize");
  while (watch_ && !state_->arrived && !state_->failure) state_->go_on(&state_->arrived), watch_();
  state_->wait(&state_->arrived);
  std::memcpy(host, state_->begun.data(), static_cast<std::size_t>(bytes));
}
int64_t GpuRuntime::launches() const { return state_->launches; }
void GpuRuntime::finish() {
  state_->not_captured("cudaStreamSynchronize");
  // Asks at least once, as a wait for a device that computes does.
  for (bool asked = false; watch_ && !(idle() && asked); asked = true) watch_();
  state_->wait();
}

void GpuRuntime::begin_capture() {
  state_->call();
  state_->not_captured("cudaStreamBeginCapture");
  state_->captured = std::make_unique<CUgraph_st>();
  state_->spoilt = ++state_->captures == state_->number && state_->kind == "capture";
  capturing_ = true;
}
CUgraph_st* GpuRuntime::end_capture(GraphForm& form) {
  capturing_ = false;
  std::unique_ptr<CUgraph_st> graph = std::move(state_->captured);
  state_->call();
  if (state_->spoilt) throw GpuError("cudaStreamEndCapture", kCaptureSpoilt, "operation failed due to a previous error during capture");
  form = graph->form;
  return graph.release();
}
void GpuRuntime::abandon_capture() noexcept {
  capturing_ = false;
  state_->captured.reset();
}
CUgraphExec_st* GpuRuntime::instantiate(CUgraph_st* graph) {
  state_->call();
  return new CUgraphExec_st{*graph};
}
bool GpuRuntime::update(CUgraphExec_st* executable, CUgraph_st* graph) {
  if (++state_->updates == state_->number && state_->kind == "update") return false;
  if (executable->holds.form[0] != graph->form[0]) return false;
  if (executable->holds.form == graph->form) executable->holds = *graph;
  else executable->holds.work.clear();  // kernels in other clusters than they need, of which nothing is said
  return true;
}
void GpuRuntime::launch(CUgraphExec_st* executable) {
  state_->call();
  for (const auto& work : executable->holds.work) state_->main.push([work] { return work(), true; });
  if (state_->main.work.size() >= State::kMostQueued) state_->run();
}
void GpuRuntime::drop(CUgraph_st* graph) noexcept { delete graph; }
void GpuRuntime::drop(CUgraphExec_st* executable) noexcept { delete executable; }

CUstream_st* GpuRuntime::side() { return &state_->side; }
void GpuRuntime::fork() {
  state_->call();
  state_->not_captured("cudaEventRecord");
  state_->forked = state_->main.queued;
  state_->side.push([s = state_, mark = state_->forked] { return s->main.done >= mark; });
}
void GpuRuntime::join() {
  state_->call();
  state_->not_captured("cudaStreamWaitEvent");
  state_->joined = state_->side.queued;
  state_->main.push([s = state_, mark = state_->joined] { return s->side.done >= mark; });
}
void GpuRuntime::mark(CUstream_st* stream) {
  state_->not_captured("cudaEventRecord");
  const std::size_t i = state_->marks.size();
  state_->marks.emplace_back();
  static_cast<State::Stream*>(stream)->push([s = state_, i] { return s->marks[i] = std::chrono::steady_clock::now(), true; });
}
std::vector<double> GpuRuntime::take_marks() {
  std::vector<double> seconds;
  for (const auto& at : state_->marks) seconds.push_back(std::chrono::duration<double>(at - state_->marks[0]).count());
  state_->marks.clear();
  return seconds;
}
bool GpuRuntime::forked() {
  state_->not_captured("cudaEventQuery");
  return state_->failure || state_->main.done >= state_->forked;
}
bool GpuRuntime::joined() {
  state_->not_captured("cudaEventQuery");
  state_->go_on();
  return state_->failure || state_->side.done >= state_->joined;
}
bool GpuRuntime::idle() {
  state_->not_captured("cudaStreamQuery");
  state_->go_on();
  return state_->main.work.empty();
}

}  // namespace kava
