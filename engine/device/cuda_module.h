// The cuda backend, which lies in a module of its own beside the engine: libkava_cuda.so is loaded on the first call and never unloaded, so
// that programs run where no CUDA is installed.
#pragma once
#include <memory>
#include <string>

#include "engine/device/ops.h"

struct CUstream_st;

namespace kava {

class Comm;
class DeviceLink;

/// The backend's name, "cuda" or "cuda (emulated)"; empty where this build has none.
std::string cuda_name();
/// Whether its kernels run on the host, for tests: such a backend is taken only where it is asked for.
bool cuda_is_emulated();

/// How many CUDA devices this process could use; where there is none, `why` says it in a line.
int cuda_devices(std::string& why);
/// A line about one of them, or about why it cannot be used.
std::string cuda_device_text(int device);

/// The backend on the device of that number, modulo how many there are, with so many threads for what it leaves to the host. Error(code
/// preflight) where there is none.
std::unique_ptr<Ops> make_cuda_ops(int number = 0, int threads = 1);

/// A dry backend, which needs neither device nor driver; null where this build has none.
std::unique_ptr<Ops> make_dry_cuda_ops();

/// What benchmarks ask of a cuda backend: the stream that its ops lie on, whether cuBLASLt makes its large products, and if it is there and
/// does not, why; and of its passes (Ops::pass) so far how many were launched as a recording, how many of these by an update of an earlier
/// one's graph, and how many were not, but for the first of each. Of another backend null, false, empty and 0.
struct CudaInside {
  CUstream_st* stream = nullptr;
  bool cublaslt = false;
  std::string cublaslt_fault;
  int64_t recorded = 0, updated = 0, fallbacks = 0;
};
CudaInside cuda_inside(Ops& ops);

/// Where a cuda backend's device is found on its machine; empty of another backend and of a dry one.
std::string device_address(const Ops& ops);
/// Bytes that a backend's memory can still give.
int64_t free_memory(const Ops& ops);
/// The most bytes that a cuda backend's device itself counted as taken since the backend was opened, by whatever process, at the times that
/// this was asked: nothing that is queued is waited for. 0 of another backend.
int64_t taken_memory(Ops& ops);

/// What sums tensors among the ranks' devices by NCCL, its log in this folder; nothing where tensors go through the host, with the reason
/// in `why` where the backend has devices. Every rank calls it. Error(code usage) where their
/// backends differ, (code comm) where NCCL does not work.
std::unique_ptr<DeviceLink> link_devices(Comm& comm, Ops& ops, const std::string& log_folder, std::string& why);

/// What the module exports, as kava_cuda_module.
struct CudaModule {
  const char* name;
  bool emulated;
  int (*devices)(std::string& why);
  std::string (*device_text)(int device);
  Ops* (*ops)(int device, int threads);
  Ops* (*dry_ops)();
  CudaInside (*inside)(Ops& ops);
  std::string (*address)(const Ops& ops);
  int64_t (*free_memory)(const Ops& ops);
  int64_t (*taken_memory)(Ops& ops);
  DeviceLink* (*link)(Comm& comm, Ops& ops, std::string& why);
};

}  // namespace kava
