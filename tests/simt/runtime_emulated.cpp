// GpuRuntime where kernels are emulated: device memory is host memory, and the stream is the order of the calls. It is as nasty as a device
// may be: what nobody wrote is NaN, copies from the host take their bytes and arrive only when something could see them.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "engine/device/cuda/runtime.h"
#include "engine/error.h"

namespace kava {

namespace {
constexpr int64_t kMemory = int64_t{64} << 30;
int device_count() {
  const char* given = std::getenv("KAVA_EMULATED_DEVICES");
  return given ? std::max(0, std::atoi(given)) : 1;
}
}  // namespace

const char* gpu_backend_name() { return "cuda (emulated)"; }

int gpu_count(std::string& why) {
  const int count = device_count();
  if (count == 0) why = "the emulator shows no device";
  return count;
}

struct GpuRuntime::Staging {};

GpuRuntime::GpuRuntime(int device) : device_(device) {
  std::string why;
  const int count = gpu_count(why);
  if (count == 0) throw Error(Exit::preflight, "--device", why, "use --device cpu");
  device_ = device % count;
  info_.name = "emulated", info_.memory_bytes = kMemory, info_.compute_capability = 90, info_.multiprocessors = 1;
}
GpuRuntime::~GpuRuntime() = default;

int64_t GpuRuntime::free_bytes() const { return kMemory; }

void* GpuRuntime::allocate(int64_t bytes) {
  const auto size = static_cast<std::size_t>((std::max<int64_t>(bytes, 1) + 255) / 256 * 256);
  void* data = std::aligned_alloc(256, size);
  if (!data) throw Error(Exit::preflight, "cuda", "out of memory", "lower train.micro_batch");
  std::memset(data, 0xff, size);
  return data;
}
void GpuRuntime::release(void* data) { std::free(data); }

AddressRange GpuRuntime::reserve() {
  void* begin = mmap(nullptr, static_cast<std::size_t>(kMemory), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (begin == MAP_FAILED) throw Error(Exit::preflight, "cuda", "no addresses for the step", "raise the limit of the address space");
  return {static_cast<char*>(begin), kMemory};
}
void GpuRuntime::commit(void* data, int64_t bytes) {
  if (mprotect(data, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE) != 0)
    throw Error(Exit::preflight, "cuda", "out of memory", "lower train.micro_batch");
  std::memset(data, 0xff, static_cast<std::size_t>(bytes));
}
void GpuRuntime::unreserve(const AddressRange& range, int64_t) { munmap(range.begin, static_cast<std::size_t>(range.bytes)); }

void GpuRuntime::write(void* device, const void* host, int64_t bytes) { std::memcpy(device, host, static_cast<std::size_t>(bytes)); }
void GpuRuntime::read(void* host, const void* device, int64_t bytes) { std::memcpy(host, device, static_cast<std::size_t>(bytes)); }
void GpuRuntime::zero(void* device, int64_t bytes) { std::memset(device, 0, static_cast<std::size_t>(bytes)); }

}  // namespace kava
