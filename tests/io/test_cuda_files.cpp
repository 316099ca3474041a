// What the cuda backend looks for on a machine and keeps there: libraries, recorded algorithms.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <map>

#include "engine/device/cuda/lt_plans.h"
#include "engine/device/library_search.h"
#include "engine/files/files.h"
#include "tests/folders.h"

namespace kava {

namespace fs = std::filesystem;

TEST_CASE("a library of CUDA is looked for by its name, in the toolkit, and in Python environments") {
  const TempFolder folder;
  const std::string name = "libkava_test.so.13";
  const std::map<std::string, std::string> places = {{"CUDA_PATH", folder / "toolkit/lib64"},
                                                     {"VIRTUAL_ENV", folder / "venv/lib/python3.11/site-packages/nvidia/cu13/lib"},
                                                     {"PATH", folder / "env/lib/python3.12/site-packages/nvidia/cublas/lib"}};
  for (const auto& [variable, place] : places) {
    fs::create_directories(place);
    overwrite(place + "/" + name, "");
  }
  const std::map<std::string, std::string> variables = {{"CUDA_PATH", folder / "toolkit"},
                                                        {"VIRTUAL_ENV", folder / "venv"},
                                                        {"PATH", "relative:" + folder / "env/bin" + ":" + folder / "none"}};
  auto environment = [&](const char* variable) { return variables.contains(variable) ? variables.at(variable).c_str() : nullptr; };
  CHECK(library_places(name, environment) == std::vector<std::string>{name, places.at("CUDA_PATH") + "/" + name,
                                                                      places.at("VIRTUAL_ENV") + "/" + name,
                                                                      places.at("PATH") + "/" + name});
  CHECK(library_places(name, [](const char*) { return nullptr; }) == std::vector<std::string>{name});
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

  std::string note;
  LtPlans first(file), second(file);
  first.add(key, plan, note);
  LtKey other = key;
  other.m = 256;
  second.add(other, {{9}, 0}, note);
  CHECK(note.empty());
  const LtPlans third(file);
  REQUIRE(third.find(key));
  CHECK(*third.find(key) == plan);
  REQUIRE(third.find(other));
  CHECK(third.find(other)->algorithm[0] == 9);
  LtPlans unwritable("/proc/kava/plans.txt");
  unwritable.add(key, plan, note);
  CHECK(!note.empty());
  REQUIRE(unwritable.find(key));
}

TEST_CASE("an algorithm is chosen for a number of rows that is rounded up, and forward for any number of them") {
  CHECK(rounded_key({GemmForm::nt, 1, 2048, 64}) == rounded_key({GemmForm::nt, 2817, 2048, 64}));
  CHECK(rounded_key({GemmForm::nn, 2817, 2048, 64}) == LtKey{GemmForm::nn, 3072, 2048, 64});
  CHECK(rounded_key({GemmForm::tn, 2817, 2048, 64}) == LtKey{GemmForm::tn, 2817, 2048, 256});
}

}  // namespace kava
