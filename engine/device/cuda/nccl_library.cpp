// Finds NCCL's library and its functions.
#include <dlfcn.h>
#include <fmt/core.h>

#include <cstdlib>

#include "engine/device/cuda/comm_nccl.h"
#include "engine/device/cuda/runtime.h"
#include "engine/device/library_search.h"

namespace kava {

namespace {

void* load(std::string& why) {
  void* library = open_library(gpu_nccl_library());
  if (!library) why = fmt::format("no {} is found", gpu_nccl_library());
  return library;
}

}  // namespace

std::unique_ptr<Nccl> Nccl::open(std::string& why) {
  void* library = load(why);
  if (!library) return nullptr;
  std::unique_ptr<Nccl> n(new Nccl);
  bool all = true;
  auto find = [&]<class F>(F*& function, const char* name) { all = (function = reinterpret_cast<F*>(dlsym(library, name))) && all; };
  Api& a = n->api_;
  find(a.GetVersion, "ncclGetVersion"), find(a.GetUniqueId, "ncclGetUniqueId"), find(a.CommInitRankConfig, "ncclCommInitRankConfig");
  find(a.CommGetAsyncError, "ncclCommGetAsyncError"), find(a.CommAbort, "ncclCommAbort"), find(a.GroupStart, "ncclGroupStart");
  find(a.GroupEnd, "ncclGroupEnd"), find(a.AllReduce, "ncclAllReduce"), find(a.Broadcast, "ncclBroadcast");
  find(a.GetErrorString, "ncclGetErrorString"), find(a.GetLastError, "ncclGetLastError");
  if (all && a.GetVersion(&n->version_) == kNcclSuccess && n->version_ >= kOldestNccl) return n;
  why = fmt::format("{} is older than {}.{}", gpu_nccl_library(), kOldestNccl / 10000, kOldestNccl / 100 % 100);
  return nullptr;
}

}  // namespace kava
