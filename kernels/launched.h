// Kernels that this process has launched on a GPU, for who tells what a step takes.
#pragma once
#include <atomic>
#include <cstdint>

namespace kava {

inline std::atomic<int64_t> launched{0};

}  // namespace kava
