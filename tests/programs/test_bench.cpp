// kava_bench's refusals: all before anything is measured.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>

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
