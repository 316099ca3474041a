// NCCL, which is looked for and loaded at run time: nothing of it is needed to build. In the emulator its twin tests/simt/nccl_twin.cpp
// stands in its place.
#pragma once
#include <array>
#include <climits>
#include <memory>
#include <stdexcept>
#include <string>

#include "engine/device/tensor.h"
#include "engine/error.h"

struct CUstream_st;
struct ncclComm;

namespace kava {

// What is used of NCCL's interface, as nccl.h of 2.18 has it; later versions take it so.
constexpr int kNcclSuccess = 0, kNcclInProgress = 7, kNcclSum = 0, kOldestNccl = 21800;
struct NcclConfig {
  std::size_t size = sizeof(NcclConfig);
  unsigned magic = 0xcafebeef, version = kOldestNccl;
  int blocking = 0, cga_cluster_size = INT_MIN, min_ctas = INT_MIN, max_ctas = INT_MIN;
  const char* net_name = nullptr;
  int split_share = INT_MIN;
};
inline int nccl_type(DType t) {
  KAVA_CHECK(t == DType::f32 || t == DType::f64 || t == DType::bf16, "a sum of {} among ranks", name_of(t));
  return t == DType::f32 ? 7 : t == DType::f64 ? 8 : 9;
}

/// A call that failed, or the failure of one that went on: "ncclAllReduce: unhandled system error (...)".
struct NcclError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// One communicator. No call waits; the next one may come once done() is true, and what a group has queued lies on its stream then.
class Nccl {
 public:
  struct Id {
    std::array<char, 128> bytes{};
  };

  /// Null where there is no NCCL that can be used; `why` says it in a line.
  static std::unique_ptr<Nccl> open(std::string& why);
  ~Nccl() { abort(); }

  int version() const { return version_; }  // 22809 for 2.28.9
  Id make_id() const;
  void begin(int rank, int size, const Id& id);
  bool done() const;
  bool ended() const { return !comm_; }
  void group_start() const;
  void group_end() const;
  void all_reduce(const Tensor& x, CUstream_st* stream) const;  // x = the sum over the ranks
  void broadcast(const Tensor& x, CUstream_st* stream) const;   // x = that of rank 0
  /// Ends what is going on and the communicator.
  void abort() noexcept;

 private:
  Nccl() = default;
  void check(int status, const char* call) const;

  struct Api {
    int (*GetVersion)(int*);
    int (*GetUniqueId)(Id*);
    int (*CommInitRankConfig)(ncclComm**, int, Id, int, void*);
    int (*CommGetAsyncError)(ncclComm*, int*);
    int (*CommAbort)(ncclComm*);
    int (*GroupStart)();
    int (*GroupEnd)();
    int (*AllReduce)(const void*, void*, std::size_t, int, int, ncclComm*, CUstream_st*);
    int (*Broadcast)(const void*, void*, std::size_t, int, int, ncclComm*, CUstream_st*);
    const char* (*GetErrorString)(int);
    const char* (*GetLastError)(ncclComm*);
  } api_{};
  ncclComm* comm_ = nullptr;
  int version_ = 0;
};

}  // namespace kava
