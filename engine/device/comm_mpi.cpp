#include "engine/device/comm_mpi.h"

#include "engine/device/module.h"
#include "engine/error.h"

namespace kava {

std::unique_ptr<Comm> make_mpi_comm(int rank, int size, const CommOptions& options) {
  // Its symbols are global: what MPI itself loads asks for them.
  LoadedModule module = load_module("libkava_mpi.so", true);
  auto* make = reinterpret_cast<MpiCommFactory*>(module.find("kava_mpi_comm"));
  if (!make)
    throw Error(Exit::usage, "--device cpu", fmt::format("{} ranks need MPI: {}", size, module.why),
                "build with libopenmpi-dev, or start one rank");
  return std::unique_ptr<Comm>(make(rank, size, options));
}

}  // namespace kava
