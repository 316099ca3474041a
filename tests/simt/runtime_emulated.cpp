// GpuRuntime where kernels are emulated: device memory is host memory. It is as nasty as a device may be. Nothing that is queued happens
// before somebody waits for it: copies from the host have taken their bytes by then, kernels their parameters, and what either does wrong
// is told by the call that waits. What nobody wrote is NaN, and so is what was discarded; released memory cannot be touched any more.
//
// KAVA_EMULATED_FAIL=memory:K   the K-th request of memory is refused
//                    fault:K    the K-th launch faults; the next call that waits tells, and so does every call after it
//                    lost:K     the K-th call and all after it find the device lost
//                    count      prints at the end how many there were of each
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <string_view>
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
// The runtime's numbers for what can go wrong here.
constexpr int kOutOfMemory = 2, kUncorrectableEcc = 214, kIllegalAddress = 700;

int device_count() {
  const char* given = std::getenv("KAVA_EMULATED_DEVICES");
  return given ? std::max(0, std::atoi(given)) : 1;
}

char* map_pages(int64_t bytes, int protection) {
  void* data = mmap(nullptr, static_cast<std::size_t>(bytes), protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) throw GpuError("mmap", kOutOfMemory, "out of memory");
  return static_cast<char*>(data);
}

void spoil(void* data, int64_t bytes) { std::memset(data, 0xff, static_cast<std::size_t>(bytes)); }

int64_t whole_pages(int64_t bytes) { return (std::max<int64_t>(bytes, 1) + 4095) / 4096 * 4096; }

}  // namespace

const char* gpu_backend_name() { return "cuda (emulated)"; }
bool gpu_is_emulated() { return true; }

int gpu_count(std::string& why) {
  const int count = device_count();
  if (count == 0) why = "the emulator shows no device (KAVA_EMULATED_DEVICES)";
  return count;
}

GpuInfo gpu_info(int) {
  std::string why;
  if (gpu_count(why) == 0) throw Error(Exit::preflight, "--device", why, "use --device cpu");
  return {.name = "emulated", .memory_bytes = machine_memory(), .compute_capability = 90, .multiprocessors = 1};
}

struct GpuRuntime::State : CUstream_st {
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
  void request_memory(int64_t& count) {
    call();
    if (++requests == number && kind == "memory") throw GpuError("cudaMalloc", kOutOfMemory, "out of memory");
    ++count;
  }

  void queue(std::function<void()> launch) override {
    call();
    const bool faults = ++launches == number && kind == "fault";
    work.push_back(faults ? [this] { lose("an illegal memory access was encountered", kIllegalAddress); } : std::move(launch));
    constexpr std::size_t kMost = 4096;
    if (work.size() >= kMost) run();
  }
  void later(std::function<void()> copy) {
    call();
    work.push_back(std::move(copy));
  }

  /// Does what is queued, all or until something holds; what goes wrong is kept for the next call.
  void run(const bool* until = nullptr) {
    while (!failure && !work.empty() && !(until && *until)) {
      const std::function<void()> next = std::move(work.front());
      work.pop_front();
      try {
        next();
      } catch (...) {
        failure = std::current_exception();
      }
    }
    if (failure) work.clear();
  }
  void wait(const bool* until = nullptr) {
    call();
    run(until);
    if (failure) std::rethrow_exception(failure);
  }

  void lose(const char* text, int status) { failure = std::make_exception_ptr(GpuError("cudaStreamSynchronize", status, text)); }

  std::string_view kind;
  int64_t number = 0, calls = 0, requests = 0, launches = 0;
  std::deque<std::function<void()>> work;
  std::exception_ptr failure;
  std::unordered_map<void*, int64_t> sizes;  // of allocations
  std::vector<char> begun;                   // what a read that was begun copies to
  bool arrived = false;
};

GpuRuntime::GpuRuntime(int device) : info_(gpu_info(device)), device_(device) { stream_ = state_ = new State; }
GpuRuntime::~GpuRuntime() {
  state_->run();
  if (state_->kind == "count")
    fmt::print(stderr, "emulated device: {} requests of memory, {} launches, {} calls\n", state_->requests, state_->launches,
               state_->calls);
  delete state_;
}

int64_t GpuRuntime::free_bytes() const { return available_memory(); }

void* GpuRuntime::allocate(int64_t bytes) {
  state_->request_memory(counts_.allocations);
  const int64_t size = whole_pages(bytes);
  char* data = map_pages(size, PROT_READ | PROT_WRITE);
  spoil(data, size);
  state_->sizes[data] = size;
  return data;
}
void GpuRuntime::release(void* data) {
  if (!data) return;
  state_->run();
  const auto it = state_->sizes.find(data);
  KAVA_CHECK(it != state_->sizes.end(), "memory released that was not allocated");
  munmap(data, static_cast<std::size_t>(it->second));
  state_->sizes.erase(it);
}

AddressRange GpuRuntime::reserve() { return {map_pages(kAddresses, PROT_NONE), kAddresses}; }
void GpuRuntime::commit(void* data, int64_t bytes) {
  state_->request_memory(counts_.commits);
  if (mprotect(data, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE) != 0)
    throw GpuError("cuMemCreate", kOutOfMemory, "out of memory");
}
void GpuRuntime::unreserve(const AddressRange& range, int64_t) {
  state_->run();
  munmap(range.begin, static_cast<std::size_t>(range.bytes));
}
void GpuRuntime::discard(void* data, int64_t bytes) {
  if (!state_->failure) state_->work.push_back([=] { spoil(data, bytes); });
}

void GpuRuntime::write(void* device, const void* host, int64_t bytes) {
  ++counts_.uploads;
  const auto* from = static_cast<const char*>(host);
  state_->later([device, taken = std::vector<char>(from, from + bytes)] { std::memcpy(device, taken.data(), taken.size()); });
}
void GpuRuntime::read(void* host, const void* device, int64_t bytes) {
  ++counts_.reads;
  state_->wait();
  std::memcpy(host, device, static_cast<std::size_t>(bytes));
}
void GpuRuntime::begin_read(const void* device, int64_t bytes) {
  ++counts_.reads;
  state_->arrived = false;
  state_->later(
      [this, from = static_cast<const char*>(device), bytes] { state_->begun.assign(from, from + bytes), state_->arrived = true; });
}
void GpuRuntime::end_read(void* host, int64_t bytes) {
  state_->wait(&state_->arrived);
  std::memcpy(host, state_->begun.data(), static_cast<std::size_t>(bytes));
}
int64_t GpuRuntime::launches() const { return state_->launches; }
void GpuRuntime::finish() { state_->wait(); }
void GpuRuntime::zero(void* device, int64_t bytes) {
  state_->later([=] { std::memset(device, 0, static_cast<std::size_t>(bytes)); });
}

}  // namespace kava
