// kava_bench's refusals, all but that of a filter before anything is measured, and its comparisons of whole steps.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>

#include "engine/files/json.h"
#include "tests/programs/programs.h"

using namespace kava;

TEST_CASE("kava_bench refuses what it cannot do in one line before it measures") {
  TempFolder folder;
  const WithVariable no_device("KAVA_EMULATED_DEVICES", "0");
  overwrite(folder / "empty", "");
  const std::string model = "--tokenizer " + source_dir() + "/tests/golden/models/llama";
  const std::pair<std::string, int> refused[] = {{"--filter '('", 2},
                                                 {"--filter \"$(head -c 100000 /dev/zero | tr '\\0' '(')\"", 2},
                                                 {"--threads 0", 2},
                                                 {"--recompute all", 2},
                                                 {"--device tpu", 2},
                                                 {"--device cuda", 3},
                                                 {"--json ''", 2},
                                                 {"--json '" + folder / "no/such/folder" + "'", 3},
                                                 {"--text '" + folder / "empty" + "'", 2},
                                                 {model, 2},
                                                 {model + " --text '" + folder / "empty" + "'", 4},
                                                 {model + " --text '" + folder / "none" + "'", 4}};
  for (const auto& [arguments, code] : refused) {
    CAPTURE(arguments);
    const Ended run = run_command("kava_bench " + arguments);
    CHECK(run.code == code);
    CHECK(run.err.starts_with("error: "));
    CHECK(std::count(run.err.begin(), run.err.end(), '\n') == 1);
    CHECK(run.out.empty());
  }
}

TEST_CASE("kava_bench refuses a filter that finds no benchmark, by some that there are") {
  const TempFolder folder;
  const std::string bench = "kava_bench --device cpu --threads 1 --shape tiny --json '" + folder / "bench.json" + "' --filter ";
  const Ended none = run_command(bench + "zzz");
  CHECK(none.code == 2);
  CHECK(none.err ==
        "error: --filter: \"zzz\" finds no benchmark; give a part of a name, such as rms_norm, attention, linear, head, adamw, "
        "step or comm\n");
  CHECK(!std::filesystem::exists(folder / "bench.json"));
  for (const char* name : {"rms_norm", "attention", "linear", "head", "adamw", "step", "decoding"}) {
    CAPTURE(name);
    CHECK(run_command(bench + name).code == 0);
  }
}

TEST_CASE("kava_bench takes the shape of a model's folder") {
  const TempFolder folder;
  const std::string bench =
      "kava_bench --device cpu --threads 1 --filter '^add_rms_norm|^step' --json '" + folder / "bench.json" + "' --shape ";
  const Ended run = run_command(bench + "'" + source_dir() + "/tests/golden/models/qwen2/'");
  INFO(run.err);
  REQUIRE(run.code == 0);
  CHECK(run.out.find("step: qwen2's shape, bf16, batch 32") != std::string::npos);
  const Json results = read_json(folder / "bench.json"), config = read_json(source_dir() + "/tests/golden/models/qwen2/config.json");
  for (const Json& result : results) CHECK(result["shape"] == "qwen2");
  REQUIRE(results[0]["name"] == "add_rms_norm_fwd");
  const double bytes = results[0]["rate"].get<double>() * 1e9 * results[0]["seconds"].get<double>();
  CHECK(std::round(bytes) == 8 * 3072 * config["hidden_size"].get<double>());
  const Ended none = run_command(bench + "'" + folder.path().string() + "'");
  CHECK(none.code == 4);
  CHECK(none.err.find("config.json") != std::string::npos);
}

TEST_CASE("kava_bench compares methods and architectures where its filter names them") {
  const TempFolder folder;
  const std::string bench = "kava_bench --device cpu --threads 1 --shape tiny --json '" + folder / "bench.json" + "' --filter ";
  const Ended compared = run_command(bench + "'method|model'");
  INFO(compared.err);
  REQUIRE(compared.code == 0);
  for (const char* line : {"\nmethod kava ", "\nmethod coconut ", "\nmethod codi ", "\na stage change: ", "\nmodel llama ",
                           "\nmodel qwen3 ", "\nnorms of q and k: "})
    CHECK(compared.out.find(line) != std::string::npos);
  std::vector<std::string> names;
  for (const Json& result : read_json(folder / "bench.json")) {
    names.push_back(result["name"]);
    if (names.back().ends_with(" rate")) continue;
    CHECK(result["share"] > 0);
    CHECK((result["of_first"] == 1) == (names.back() == "method kava" || names.back() == "model llama"));
  }
  CHECK(names ==
        std::vector<std::string>{"matrix rate", "copy rate", "method kava", "method coconut", "method codi", "model llama", "model qwen3"});
  CHECK(run_command(bench + "rms_norm").out.find("method") == std::string::npos);
}
