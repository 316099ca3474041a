#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <sstream>
#include <string>

#include "engine/device/cuda_module.h"
#include "tests/folders.h"
#include "tests/programs/programs.h"

using namespace kava;

TEST_CASE("the doctor tells of each thing in one line what it is and what to do") {
  const TempFolder folder;
  const Ended run = run_command("kava_inspect doctor --device cpu --threads 2", folder.path());
  CHECK(run.code == 0);
  CHECK(run.err.empty());
  std::istringstream lines(run.out);
  for (std::string line; std::getline(lines, line);) {
    CAPTURE(line);
    CHECK((line.starts_with("ok ") || line.starts_with("warn ") || line.starts_with("missing ")));
    CHECK(line.find(": ") < line.find("; "));
    CHECK(line.find("; ") != std::string::npos);
  }
  for (const char* name : {"cpu", "libraries", "memory", "huge_pages", "disk", "cpu_product", "cuda", "driver", "mpi", "slurm"}) {
    CAPTURE(name);
    CHECK(run.out.find(std::string(" ") + name + ": ") != std::string::npos);
  }
  CHECK(run.out.find("ok disk: ") != std::string::npos);
  CHECK(run.out.find("ok cpu_product: ") != std::string::npos);
  CHECK(std::filesystem::is_empty(folder.path()));
}

TEST_CASE("the doctor's --help has its lines' form and an example that runs") {
  const Ended help = run_command("kava_inspect doctor --help");
  CHECK(help.code == 0);
  CHECK(help.out.find("\nLines `ok|warn|missing NAME: what; remedy`") != std::string::npos);
  const auto at = help.out.find("\nExample:\n  ");
  REQUIRE(at != std::string::npos);
  const std::string example = help.out.substr(at + 12, help.out.find('\n', at + 12) - at - 12);
  const TempFolder folder;
  CHECK(run_command("kava_inspect --version >/dev/null; " + example, folder.path()).code == 0);
}

TEST_CASE("the doctor ends with 3 only where something is missing that the device needs") {
  const TempFolder folder;
  std::string why;
  CHECK(run_command("kava_inspect doctor --device cuda --threads 1", folder.path()).code == (cuda_devices(why) > 0 ? 0 : 3));
  const Ended no_disk = run_command("kava_inspect doctor --threads 1 --folder /proc", folder.path());
  CHECK(no_disk.code == 3);
  CHECK(no_disk.out.find("missing disk: ") != std::string::npos);
  CHECK(run_command("kava_inspect doctor --device gpu", folder.path()).code == 2);
}

TEST_CASE("the doctor reads GPUs from the driver's library") {
  const TempFolder folder;
  overwrite(folder / "nvml.c", R"(#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlSystemGetDriverVersion(char* out, unsigned n) { strncpy(out, "580.1", n); return 0; }
int nvmlDeviceGetCount_v2(unsigned* n) { *n = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void** out) { *out = (void*)(1L + i); return 0; }
int nvmlDeviceGetName(void* d, char* out, unsigned n) { strncpy(out, "Test GPU", n); return 0; }
int nvmlDeviceGetEccMode(void* d, int* now, int* pending) { *now = *pending = 1; return 0; }
int nvmlDeviceGetTotalEccErrors(void* d, int kind, int since, unsigned long long* n) { *n = d == (void*)2L ? 3 : 0; return 0; }
int nvmlDeviceGetClockInfo(void* d, int kind, unsigned* mhz) { *mhz = 1000; return 0; }
int nvmlDeviceGetMaxClockInfo(void* d, int kind, unsigned* mhz) { *mhz = 1980; return 0; }
)");
  const std::string build = "cd '" + folder.path().string() + "' && cc -shared -fPIC -o libnvidia-ml.so.1 nvml.c 2>/dev/null";
  if (std::system(build.c_str()) != 0) SKIP("there is no C compiler to make a driver's library with");
  const Ended run = run_command("kava_inspect doctor --threads 1", folder.path(), "LD_LIBRARY_PATH='" + folder.path().string() + "'");
  CHECK(run.code == 0);
  CHECK(run.out.find("ok driver: NVIDIA 580.1, 2 GPUs; ") != std::string::npos);
  CHECK(run.out.find("ok gpu0: Test GPU, 1000 of at most 1980 MHz, ECC on; ") != std::string::npos);
  CHECK(run.out.find("warn gpu1: Test GPU, 1000 of at most 1980 MHz, ECC on, 3 uncorrected memory errors; ") != std::string::npos);
}
