// --device and --threads, the same in every program that computes.
#pragma once
#include <CLI/CLI.hpp>
#include <memory>
#include <optional>
#include <string>

#include "engine/device/ops.h"

namespace kava {

struct DeviceOptions {
  std::string device = "auto";
  std::optional<std::string> threads;  // text, so that a fault is reported in the words of the other errors
};

void add_device_options(CLI::App& app, DeviceOptions& options);

/// The number of threads asked for; all cores without --threads. Error(code usage) outside 1..4096.
int thread_count(const DeviceOptions& options);

/// The backend asked for; of several devices the one of that number (rank i of a machine takes device i modulo their number). Error(code
/// usage) for an unknown name, Error(code preflight) for a device that is not there.
std::unique_ptr<Ops> make_ops(const DeviceOptions& options, int number = 0);

}  // namespace kava
