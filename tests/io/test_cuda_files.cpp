// What the cuda backend looks for on a machine and keeps there: libraries, recorded algorithms.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <map>

#include "engine/device/cuda/lt_plans.h"
#include "engine/device/cuda/runtime.h"
#include "engine/device/library_search.h"
#include "engine/files/files.h"
#include "tests/programs/programs.h"

namespace kava {

namespace fs = std::filesystem;

TEST_CASE("a library of CUDA is looked for by its name, in the toolkit, and in Python environments") {
  const TempFolder folder;
  const std::string name = "libkava_test.so.13";
  const std::map<std::string, std::string> places = {{"CUDA_PATH", folder / "toolkit/lib64"},
                                                     {"KAVA_PYTHON", folder / "named/lib/python3.13/site-packages/nvidia/cu13/lib"},
                                                     {"VIRTUAL_ENV", folder / "venv/lib/python3.11/site-packages/nvidia/cu13/lib"},
                                                     {"PATH", folder / "env/lib/python3.12/site-packages/nvidia/cublas/lib"}};
  for (const auto& [variable, place] : places) {
    fs::create_directories(place);
    overwrite(place + "/" + name, "");
  }
  const std::map<std::string, std::string> variables = {{"CUDA_PATH", folder / "toolkit"},
                                                        {"KAVA_PYTHON", folder / "named/bin/python3"},
                                                        {"VIRTUAL_ENV", folder / "venv"},
                                                        {"PATH", "relative:" + folder / "env/bin" + ":" + folder / "none"}};
  auto environment = [&](const char* variable) { return variables.contains(variable) ? variables.at(variable).c_str() : nullptr; };
  fs::create_directories(folder / "named/bin");
  fs::create_symlink("/usr/bin/true", folder / "named/bin/python3");
  CHECK(library_places(name, environment) ==
        std::vector<std::string>{name, places.at("CUDA_PATH") + "/" + name, places.at("KAVA_PYTHON") + "/" + name,
                                 places.at("VIRTUAL_ENV") + "/" + name, places.at("PATH") + "/" + name});
  CHECK(library_places(name, [](const char*) { return nullptr; }) == std::vector<std::string>{name});
}

TEST_CASE("why there is no device is told apart: the stub, no driver, an old one, none shown") {
  CHECK(why_no_device(0, true, false, "").find("link stub") != std::string::npos);
  CHECK(why_no_device(0, false, false, "") == "no NVIDIA driver is loaded");
  CHECK(why_no_device(12080, false, false, "") == "the driver serves CUDA 12.8, and 13.0 is needed (driver 580 or newer)");
  CHECK(why_no_device(13000, false, true, "") == "the driver shows no device");
  CHECK(why_no_device(13000, false, false, "system not yet initialized") == "system not yet initialized");
  CHECK_NOTHROW(require_device(1, 2, ""));
  GpuInfo info;
  info.name = "Tesla T4", info.compute_capability = 75;
  CHECK_THROWS_WITH(require_capability(info),
                    Catch::Matchers::ContainsSubstring("Tesla T4 has compute capability 7.5, and the kernels need 8.0 or newer"));
  info.compute_capability = 80;
  CHECK_NOTHROW(require_capability(info));
  CHECK_THROWS_WITH(require_device(2, 2, ""), Catch::Matchers::ContainsSubstring("device 2 of 2"));
  CHECK_THROWS_WITH(require_device(0, 0, "none at all"), Catch::Matchers::ContainsSubstring("none at all"));
}

TEST_CASE("cuBLASLt is asked for large plain products of aligned rows alone") {
  constexpr int kSide = 256;  // 2^24 multiply-adds
  auto* at = reinterpret_cast<bf16*>(1 << 20);
  const auto plain = [&](int64_t stride, int n) {
    Gemm<bf16> g;
    g.set = {at, stride}, g.m = kSide, g.n = n;
    g.then({at, stride}, {at, stride}, kSide);
    return g;
  };
  LtKey key;
  CHECK(lt_takes(GemmForm::nn, plain(kSide, kSide), false, key));
  CHECK(key == LtKey{GemmForm::nn, kSide, kSide, kSide, false, false, false});
  CHECK_FALSE(lt_takes(GemmForm::nn, plain(kSide, kSide - 8), false, key));
  CHECK(lt_takes(GemmForm::nn, plain(kSide, kSide - 8), true, key));
  CHECK(lt_takes(GemmForm::nt, plain(kSide, kSide - 8), false, key));  // as 4,096 rows
  CHECK_FALSE(lt_takes(GemmForm::nn, plain(kSide + 4, kSide), false, key));
  Gemm<bf16> masked = plain(kSide, kSide), scaled = masked, added = masked, off = masked, two = masked;
  scaled.scaled = 1, scaled.factor = 0.25f;
  CHECK(lt_takes(GemmForm::tn, scaled, false, key));
  masked.scaled = 1, masked.masked = true;
  CHECK_FALSE(lt_takes(GemmForm::nn, masked, false, key));
  added.add = {reinterpret_cast<float*>(at), kSide + 4}, added.bias = at;
  CHECK(lt_takes(GemmForm::tn, added, false, key));
  CHECK(key == LtKey{GemmForm::tn, kSide, kSide, kSide, true, true, true});
  CHECK(lt_takes(GemmForm::nn, plain(kSide, kSide), false, key, true));
  CHECK(key == LtKey{GemmForm::nn, kSide, kSide, kSide, false, true, false});
  added.bias = at + 4;
  CHECK_FALSE(lt_takes(GemmForm::tn, added, false, key));
  off.set.data = at + 1;
  CHECK_FALSE(lt_takes(GemmForm::nn, off, false, key));
  two.then({at, kSide}, {at, kSide}, kSide);
  CHECK_FALSE(lt_takes(GemmForm::nn, two, false, key));
}

TEST_CASE("recorded algorithms come back as they were, and what others recorded is kept") {
  const TempFolder folder;
  const std::string file = folder / "cache/cublaslt-NVIDIA_H200-130000.txt";
  const LtKey key{GemmForm::nn, 2816, 2048, 8192, true, false, true};
  LtPlan plan{{1, 2, 0xffffffffffffffffu, 4, 5, 6, 7, 8}, 33554432};
  LtKey read_key;
  LtPlan read_plan;
  REQUIRE(LtPlans::parse(LtPlans::line_of(key, plan), read_key, read_plan));
  CHECK((read_key == key && read_plan == plan));
  for (const char* line : {"", "nn", "xx 1 1 1 0 0 0 0 1 2 3 4 5 6 7 8", "nn 0 1 1 0 0 0 0 1 2 3 4 5 6 7 8",
                           "nn 1 1 1 0 0 0 0 1 2 3 4 5 6 7", "nn 1 1 1 0 0 0 0 1 2 3 4 5 6 7 8 9", "nn 1 1 1 2 0 0 0 1 2 3 4 5 6 7 8"})
    CHECK_FALSE(LtPlans::parse(line, read_key, read_plan));

  LtPlans first(file), second(file);
  CHECK(first.add(key, plan).empty());
  LtKey other = key;
  other.m = 256;
  CHECK(second.add(other, {{9}, 0}).empty());
  const LtPlans third(file);
  REQUIRE(third.find(key));
  CHECK(*third.find(key) == plan);
  REQUIRE(third.find(other));
  CHECK(third.find(other)->algorithm[0] == 9);
  {
    const WithVariable cache("KAVA_CACHE", folder / "cache");
    CHECK(LtPlans::file_for("NVIDIA H200", 130000) == file);
    CHECK(LtPlans::file_for("GB200 (a/b)", 1) == folder / "cache/cublaslt-GB200__a_b_-1.txt");
  }
  LtPlans unwritable("/proc/kava/plans.txt");
  CHECK_FALSE(unwritable.add(key, plan).empty());
  REQUIRE(unwritable.find(key));
  CHECK(unwritable.add(other, plan).empty());  // said once
}

TEST_CASE("without a home no algorithm is recorded, and that is said") {
  const WithVariable cache("KAVA_CACHE", ""), xdg("XDG_CACHE_HOME", ""), home("HOME", "");
  const std::string file = LtPlans::file_for("NVIDIA H200", 130000);
  CHECK(file.empty());
  CHECK(LtPlans(file).add({}, {}).find("KAVA_CACHE") != std::string::npos);
}

TEST_CASE("an algorithm is chosen for a number of rows that is rounded up, and forward for any number of them") {
  CHECK(rounded_key({GemmForm::nt, 1, 2048, 64}) == rounded_key({GemmForm::nt, 2817, 2048, 64}));
  CHECK(rounded_key({GemmForm::nn, 2817, 2048, 64}) == LtKey{GemmForm::nn, 3072, 2048, 64});
  CHECK(rounded_key({GemmForm::tn, 2817, 2048, 64}) == LtKey{GemmForm::tn, 2817, 2048, 256});
}

}  // namespace kava
