// --device and --threads, the same in every program that computes.
#pragma once
#include <CLI/CLI.hpp>
#include <memory>
#include <optional>
#include <string>

#include "engine/device/ops.h"

namespace kava {

struct DeviceOptions {
  std::optional<std::string> device;   // auto where none is given
  std::optional<std::string> threads;  // text, so that a fault is reported in the words of the other errors
};

void add_device_options(CLI::App& app, DeviceOptions& options);

/// The number of threads asked for; all cores that the process may use (engine/cores.h) without --threads. Error(code usage)
/// outside 1..4096.
int thread_count(const DeviceOptions& options);

/// Whether make_ops() will take a cuda device, as far as can be told before the device is opened.
bool takes_cuda(const DeviceOptions& options);

/// The backend asked for; of several cuda devices the one of that number, modulo how many there are. "auto" takes cuda where a device
/// works, but for an emulated one, and else says on stderr why it took the cpu; where nobody asked for a device, a build without the cuda
/// backend has nothing to say. Error(code usage) for an unknown name, Error(code preflight) for a device that is not there.
std::unique_ptr<Ops> make_ops(const DeviceOptions& options, int number = 0);

}  // namespace kava
