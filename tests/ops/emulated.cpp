#include <cstdlib>

#include "engine/device/cuda/ops_cuda.h"
#include "engine/device/cuda_module.h"
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

namespace {
const std::string& test_device() {
  static const std::string given = [] {
    const char* value = std::getenv("KAVA_TEST_DEVICE");
    return std::string(value ? value : "");
  }();
  KAVA_CHECK(given.empty() || given == "cuda" || given == "cpu", "KAVA_TEST_DEVICE is {}, which is no device: cuda, cpu or nothing", given);
  return given;
}
}  // namespace

bool tests_device() { return test_device() == "cuda"; }

Ops* tested_cuda() {
  if (test_device() == "cpu") return nullptr;
  if (!tests_device()) return emulated_cuda();
  static Ops* const ops = make_cuda_ops().release();  // the module's own end comes before that of what is static here
  return ops;
}

void take_schedule(int number) {
  using Order = simt::Schedule::Order;
  constexpr simt::Schedule kTaken[kSchedules] = {
      {Order::forward, 0, true, false, 0}, {Order::reverse, 0, true, true, 0}, {Order::random, 4, false, true, 0}};
  simt::set_schedule(kTaken[number]);
}

bool every_schedule() {
  static const bool every = [] {
    const char* value = std::getenv("KAVA_SCHEDULES");
    const std::string given = value ? value : "";
    KAVA_CHECK(given.empty() || given == "all", "KAVA_SCHEDULES is {}, not all", given);
    return !given.empty();
  }();
  return every;
}

void search_races(bool on) { simt::set_watched({.races = on && simt::watchable()}); }

}  // namespace kava::test
