// The graphs that kava_bench gives cuDNN, as far as cuDNN takes them without a device.
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include "benchmarks/cudnn_attention.h"
#include "engine/files/json.h"

namespace kava {

namespace {

Json device(const char* name, int compute_capability, int multiprocessors) {
  return {{"deviceName", name},
          {"deviceVer", 10 * compute_capability},
          {"driverVer", 13000},
          {"cudaDeviceId", 0},
          {"pciDeviceId", 0},
          {"isTccDriver", 0},
          {"supportCoopLaunch", 1},
          {"multiProcessorCount", multiprocessors},
          {"warpSize", 32},
          {"maxGridSize", {2147483647, 65535, 65535}},
          {"maxBlockSize", {1024, 1024, 64}},
          {"maxThreadsPerBlock", 1024},
          {"maxThreadsPerSM", 2048},
          {"maxCtasPerSM", 32},
          {"regsPerBlock", 65536},
          {"maxRegistersPerSM", 65536},
          {"maxSharedMemoryPerBlock", 49152},
          {"maxSharedMemoryPerBlockOptin", 232448},
          {"reservedSharedMemoryPerBlock", 1024},
          {"totalGlobalMem", int64_t{140} << 30},
          {"l2CacheSize", 60 << 20},
          {"smClockRateKHz", 1980000},
          {"memClockRateKHz", 3201000}};
}

}  // namespace

// Its heuristics look at the device and the products; whether values are right shows on a GPU alone (benchmarks/bench_rivals.cpp).
TEST_CASE("cuDNN takes the causal attention that it is measured by, and names configurations for the devices that it has kernels for") {
  std::string why;
  const std::unique_ptr<Cudnn> cudnn = Cudnn::open(why);
  if (!cudnn) SKIP(why);
  const AttentionSizes sizes[] = {{110, 100, 32, 8, 64}, {110, 100, 14, 2, 64}, {110, 100, 24, 8, 128}, {2, 100, 4, 4, 64}};
  for (const AttentionSizes& s : sizes)
    for (const Json& gpu : {device("NVIDIA H200", 90, 132), device("NVIDIA B200", 100, 148)}) {
      INFO(s.heads << " heads on " << s.kv_heads << " of " << s.head_dim << ", " << gpu["deviceName"]);
      CHECK(cudnn_attention_fwd(*cudnn, s)->candidates(gpu.dump()) > 0);
      CHECK(cudnn_attention_bwd(*cudnn, s)->candidates(gpu.dump()) > 0);
    }
  const std::string turing = device("Tesla T4", 75, 40).dump();
  CHECK(cudnn_attention_fwd(*cudnn, sizes[0])->candidates(turing) == 0);
  CHECK(cudnn_attention_bwd(*cudnn, sizes[0])->candidates(turing) == 0);
}

TEST_CASE("what cuDNN refuses is told in its own words") {
  std::string why;
  const std::unique_ptr<Cudnn> cudnn = Cudnn::open(why);
  if (!cudnn) SKIP(why);
  using Catch::Matchers::ContainsSubstring;
  Json gpu = device("NVIDIA H200", 90, 132);
  gpu.erase("maxGridSize");
  const AttentionSizes sizes{2, 100, 4, 4, 64};
  CHECK_THROWS_WITH(cudnn_attention_fwd(*cudnn, sizes)->candidates(gpu.dump()), ContainsSubstring("maxGridSize"));
  CudnnGraph graph(*cudnn);
  const auto a = graph.between({1, 1, 8, 16}), b = graph.between({1, 1, 8, 16}), c = graph.between({1, 1, 8, 8});
  CHECK_THROWS_AS(graph.matmul(a, b, c), CudnnError);
}

}  // namespace kava
