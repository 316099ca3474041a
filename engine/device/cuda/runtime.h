// What the cuda backend asks of the CUDA runtime: one device, one stream, memory. runtime_cuda.cpp calls the runtime; where kernels are
// emulated, tests/simt/runtime_emulated.cpp stands in its place.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "engine/device/arena.h"
#include "kernels/gpu_error.h"

struct CUstream_st;
struct CUgraph_st;
struct CUgraphExec_st;

namespace kava {

struct GpuInfo {
  std::string name;            // as the driver gives it; "emulated" in the emulator
  std::string address;         // on its machine
  int64_t memory_bytes = 0;    // of the device
  int compute_capability = 0;  // 90 for 9.0
  int driver = 0;              // the CUDA version that it serves, 13000 for 13.0
};

/// "cuda", or "cuda (emulated)".
const char* gpu_backend_name();
bool gpu_is_emulated();
/// The file of NCCL's library: "libnccl.so.2", or that of its twin.
std::string gpu_nccl_library();

/// How many devices there are. Where there is none, `why` says it in a line: no driver, a driver too old, the toolkit's link stub on the
/// library path, or no device.
int gpu_count(std::string& why);
/// Error(code preflight) where there is no such device.
GpuInfo gpu_info(int device);
/// That line, from the driver's version (0: there is none), what it answered, and the text of that.
std::string why_no_device(int driver, bool is_stub, bool shows_none, const char* status);
/// Error(code preflight) where `device` is none of so many.
void require_device(int device, int count, const std::string& why);

/// Error(code preflight) where the kernels are not compiled for such a device.
void require_capability(const GpuInfo& info);

/// Thrown by what cannot be asked for while a pass is recorded: the pass is run again without a recording.
struct NotRecordable {};

/// What tells recordings apart whose executables cannot be updated to each other: the number of nodes, then for each kernel in clusters
/// twice its number and their three sizes. An update to clusters of other sizes is told to have been made, and has not (MLX, pull request
/// 2813). From compute capability 10.0 on a kernel may prefer other clusters, which cannot be read back (sglang, pull request 37657): there
/// each kernel's number, twice and one more, and its handles.
using GraphForm = std::vector<int64_t>;
template <class Sizes>
void add_cluster(GraphForm& form, std::size_t number, const Sizes& c) {
  if (c.x * c.y * c.z > 1) form.insert(form.end(), {static_cast<int64_t>(number), c.x, c.y, c.z});
}

/// What a runtime was asked for, since its start.
struct GpuCounts {
  int64_t allocations = 0, commits = 0;  // requests of memory
  int64_t uploads = 0, reads = 0;
};

/// Everything is queued on one stream in the order of the calls, but for what ranks exchange: that has a stream beside it. A failure is a
/// GpuError (kernels/gpu_error.h): memory refused, or a device that is lost for this process. One that happens on the device is seen by a
/// later call, as a rule by the next read.
class GpuRuntime {
 public:
  explicit GpuRuntime(int device);
  ~GpuRuntime();
  GpuRuntime(const GpuRuntime&) = delete;
  GpuRuntime& operator=(const GpuRuntime&) = delete;

  const GpuInfo& info() const { return info_; }
  const GpuCounts& counts() const { return counts_; }
  /// Kernels launched so far: in the emulator by this runtime, else by this process.
  int64_t launches() const;
  CUstream_st* stream() const { return stream_; }
  int64_t free_bytes() const;

  void* allocate(int64_t bytes);
  void release(void* data);
  /// As Ops says.
  AddressRange reserve();
  void commit(void* data, int64_t bytes);
  void unreserve(const AddressRange& range, int64_t committed);
  /// Nobody reads what lies there now: the emulator makes it NaN.
  void discard(void* data, int64_t bytes);

  /// The host's bytes are taken before it returns.
  void write(void* device, const void* host, int64_t bytes);
  /// Waits for all that is queued, as finish() does, and where memory is given back.
  void read(void* host, const void* device, int64_t bytes);
  /// The same in two halves, one at a time. The second waits for what was queued before the first alone.
  void begin_read(const void* device, int64_t bytes);
  void end_read(void* host, int64_t bytes);
  void finish();

  /// Until end_capture() or abandon_capture() what is queued on stream() is recorded, not done. No more may be asked for: another call
  /// fails, and so does end_capture() then.
  void begin_capture();
  bool capturing() const { return capturing_; }
  CUgraph_st* end_capture(GraphForm& form);
  /// Ends a recording, if one goes on, and forgets it with the failures that were told since, so that no later call tells of them.
  void abandon_capture() noexcept;
  CUgraphExec_st* instantiate(CUgraph_st* graph);
  /// Gives an executable what another recording of the same form and topology holds, for its next launches; false: it is of no use any
  /// more.
  bool update(CUgraphExec_st* executable, CUgraph_st* graph);
  void launch(CUgraphExec_st* executable);
  static void drop(CUgraph_st* graph) noexcept;
  static void drop(CUgraphExec_st* executable) noexcept;

  /// Beside stream(): goes on after what was queued on that before fork(), which goes on after what was queued here before join().
  CUstream_st* side();
  void fork();
  void join();
  /// Whether what the last fork() or join() waits for, or all that is queued on stream(), is done.
  bool forked();
  bool joined();
  bool idle();
  /// Marks a place among what is queued on either. take_marks(), once finish() has returned: the seconds of each since the first, which are
  /// forgotten then.
  void mark(CUstream_st* stream);
  std::vector<double> take_marks();
  /// `watch` is called again and again while somebody waits, and may throw; an empty one is not.
  void set_watch(std::function<void()> watch) { watch_ = std::move(watch); }

 private:
  /// CUDA would record copies of the host's memory and waits for events without a word.
  void require_not_capturing(const char* call) const {
    if (capturing_) throw GpuError(call, 900, "operation not permitted when stream is capturing");
  }

  GpuInfo info_;
  GpuCounts counts_;
  CUstream_st* stream_ = nullptr;
  [[maybe_unused]] int device_ = 0;  // the emulated one has no use for it
  std::function<void()> watch_;
  bool capturing_ = false;
  struct State;
  State* state_ = nullptr;
};

}  // namespace kava
