#include "engine/device/cuda/comm_nccl.h"

#include <fmt/core.h>

#include <utility>

#include "engine/error.h"

namespace kava {

void Nccl::check(int status, const char* call) const {
  if (status != kNcclSuccess && status != kNcclInProgress)
    throw NcclError(fmt::format("{}: {} ({})", call, api_.GetErrorString(status), escaped(api_.GetLastError(comm_), 400)));
}

Nccl::Id Nccl::make_id() const {
  Id id;
  check(api_.GetUniqueId(&id), "ncclGetUniqueId");
  return id;
}

void Nccl::begin(int rank, int size, const Id& id) {
  NcclConfig config;
  check(api_.CommInitRankConfig(&comm_, size, id, rank, &config), "ncclCommInitRankConfig");
}

bool Nccl::done() const {
  if (!comm_) return true;
  int state = kNcclSuccess;
  check(api_.CommGetAsyncError(comm_, &state), "ncclCommGetAsyncError");
  check(state, "NCCL");
  return state == kNcclSuccess;
}

void Nccl::group_start() const { check(api_.GroupStart(), "ncclGroupStart"); }
void Nccl::group_end() const { check(api_.GroupEnd(), "ncclGroupEnd"); }

void Nccl::all_reduce(const Tensor& x, CUstream_st* stream) const {
  check(api_.AllReduce(x.data, x.data, static_cast<std::size_t>(x.count()), nccl_type(x.dtype), kNcclSum, comm_, stream), "ncclAllReduce");
}
void Nccl::broadcast(const Tensor& x, CUstream_st* stream) const {
  check(api_.Broadcast(x.data, x.data, static_cast<std::size_t>(x.count()), nccl_type(x.dtype), 0, comm_, stream), "ncclBroadcast");
}

void Nccl::abort() noexcept {
  if (ncclComm* comm = std::exchange(comm_, nullptr)) api_.CommAbort(comm);
}

}  // namespace kava
