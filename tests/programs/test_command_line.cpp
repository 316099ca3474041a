// Faults of a command line.
#include "tests/programs/programs.h"

using namespace kava;

TEST_CASE("what no option or command takes is named first") {
  const std::pair<const char*, const char*> lines[] = {
      {"kava_eval m --tasks gsm8k --num_fewshot 5", "error: kava_eval: option --tasks is unknown"},
      {"kava_eval m --datum=x", "error: kava_eval: option --datum is unknown"},
      {"kava_train --bogus", "error: kava_train: option --bogus is unknown"},
      {"kava_train c.toml --set a=1 b=2", "error: kava_train: argument b=2 is unknown"},
      {"kava_eval comparr a.json b.json", "error: kava_eval: command comparr is unknown"},
      {"kava_inspect stpe c.toml", "error: kava_inspect: command stpe is unknown"},
      {"kava_inspect step --bogus c.toml", "error: kava_inspect: option --bogus is unknown"},
      {"kava_data chekc a b", "error: kava_data: command chekc is unknown"}};
  for (const auto& [line, start] : lines) {
    const Ended f = run_command(line);
    CAPTURE(line, f.err);
    CHECK(f.code == 2);
    CHECK(f.err.starts_with(start));
  }
}
