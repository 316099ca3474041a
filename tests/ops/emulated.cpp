#include "engine/device/cuda/ops_cuda.h"
#include "simt.h"
#include "tests/ops/op_rig.h"
#include "watch.h"

namespace kava::test {

Ops* emulated_cuda() {
  if (!simt::supported()) return nullptr;
  static CudaOps ops(0, false);
  return &ops;
}

std::unique_ptr<Ops> make_emulated_cuda() { return std::make_unique<CudaOps>(0, false); }

void take_schedule(int number) {
  using Order = simt::Schedule::Order;
  constexpr simt::Schedule kTaken[kSchedules] = {
      {Order::forward, 0, true, false, 0}, {Order::reverse, 0, true, true, 0}, {Order::random, 4, false, true, 0}};
  simt::set_schedule(kTaken[number]);
}

void search_races(bool on) { simt::set_watched({.races = on && simt::watchable()}); }

}  // namespace kava::test
