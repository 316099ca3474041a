// kava_bench's refusals: all before anything is measured.
#include <sys/wait.h>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cstdlib>

#include "engine/files.h"
#include "tests/folders.h"

using namespace kava;

TEST_CASE("kava_bench refuses what it cannot do in one line before it measures") {
  TempFolder folder;
  overwrite(folder / "empty", "");
  const std::string model = "--tokenizer " KAVA_SOURCE_DIR "/tests/golden/models/llama";
  const std::pair<std::string, int> refused[] = {{"--filter '('", 2},
                                                 {"--filter \"$(head -c 100000 /dev/zero | tr '\\0' '(')\"", 2},
                                                 {"--threads 0", 2},
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
    const int status =
        std::system((KAVA_BIN_DIR "/kava_bench " + arguments + " > '" + folder / "out" + "' 2> '" + folder / "err" + "'").c_str());
    CHECK((WIFEXITED(status) && WEXITSTATUS(status) == code));
    const std::string error = read_file(folder / "err", 1 << 20);
    CHECK(error.starts_with("error: "));
    CHECK(std::count(error.begin(), error.end(), '\n') == 1);
    CHECK(read_file(folder / "out", 1 << 20).empty());
  }
}
