// Products of few rows: y = x W^T + bias, each weight read once, at the rate at which memory gives it.
#pragma once
#include <span>

#include "engine/device/cpu/matmul.h"
#include "engine/device/cpu/threads.h"

namespace kava {

/// c = a b^T + bias of several products (transpose_b of each is set). An element is one sum over k in a fixed order: its bytes depend on
/// its row of a, its row of b and its bias alone, for any number of rows.
void streamed_products(Threads& threads, std::span<const Matmul::Product> products);

}  // namespace kava
