// What a program finds around it: few descriptors, streams that are closed or full, a working folder that is gone.
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include "tests/programs/running.h"
#include "tests/programs/text_run.h"

using namespace kava;
using Catch::Matchers::ContainsSubstring;
using Catch::Matchers::StartsWith;

namespace {

bool is_one_error(const std::string& text) { return text.starts_with("error: ") && std::ranges::count(text, '\n') == 1; }

}  // namespace

TEST_CASE("whole checkpoints that cannot be opened end a program, and no other is taken for them") {
  const TempFolder folder;
  const std::string config = folder / "c.toml", out = folder / "run";
  overwrite(config, tiny_toml());
  REQUIRE(train({config, "--set", "train.max_steps=4", "--set", "train.checkpoint_every=2", "--out", out}).code == 0);
  int refused = 0;
  for (int files = 4; files <= 12; ++files) {
    const std::string limit = fmt::format("ulimit -n {};", files);
    const Ended resumed = run_command("kava_train '" + out + "' --resume", ".", limit);
    INFO(files << ": " << resumed.out << resumed.err);
    if (resumed.code == 127) continue;  // the loader's own files were too many
    if (resumed.code == 0) CHECK_THAT(resumed.out, ContainsSubstring("is finished: 4 steps of 4"));
    else CHECK((is_one_error(resumed.err) && resumed.code != 1 && resumed.err.find("no valid checkpoint") == std::string::npos));
    CHECK(resumed.out.find("skipped") == std::string::npos);
    const Ended asked = run_command("kava_eval '" + out + "' --data '" + kGolden + "data/rows.jsonl' --limit 1", ".", limit);
    INFO(asked.out << asked.err);
    CHECK(asked.err.find("passed over") == std::string::npos);
    if (asked.code != 0) CHECK((is_one_error(asked.err) && asked.code != 1));
    refused += (resumed.code != 0) + (asked.code != 0);
  }
  CHECK(refused > 0);
}

TEST_CASE("a standard error that is closed or full takes the notes alone") {
  const TextRun tiny;
  const std::string ask = "kava_generate " + tiny.dir.string() + " --max-new-tokens 4", lines = tiny.folder / "lines";
  tiny.write("lines", "What is 2+2?\n/stats\n/latents\nTom?\n");
  tiny.write("bad.txt", "q||a #### 1\nbroken\n");
  const std::string made = tiny.folder / "made.jsonl";
  const std::string commands[] = {ask + " 'What is 2+2?'", ask + " < '" + lines + "'",
                                  "kava_data convert '" + tiny.folder / "bad.txt" + "' '" + made + "' --skip-malformed"};
  for (const std::string& command : commands) {
    const Ended shown = run_command(command);
    INFO(command);
    REQUIRE(shown.code == 0);
    CHECK_FALSE(shown.err.empty());
    for (const char* broken : {" 2>&-", " 2>/dev/full"}) {
      fs::remove(made);
      const Ended hidden = run_command(command + broken);
      CHECK(hidden.code == 0);
      CHECK(hidden.out == shown.out);
    }
  }
  CHECK(fs::exists(made));
}

TEST_CASE("a command whose standard output cannot be written leaves no output behind") {
  const TextRun tiny;
  const fs::path out = tiny.folder.path() / "out";
  const std::string run = tiny.dir.string(), data = tiny.write("rows.txt", kQuestions), to = " '" + out.string() + "' >/dev/full";
  overwrite(tiny.dir / "metrics.jsonl", "");
  const std::string commands[] = {"kava_merge '" + kGolden + "adapters/llama' --base '" + kGolden + "models/llama' --out" + to,
                                  "kava_data convert " + data + to, "kava_report " + run + " --out" + to,
                                  "kava_train '" + source_dir() + "/tests/errors/run.toml' --plan --json" + to};
  for (const std::string& command : commands) {
    const Ended e = run_command(command);
    INFO(command << ": " << e.err);
    CHECK(e.code == 7);
    CHECK(is_one_error(e.err));
    CHECK_FALSE(fs::exists(out));
  }
}

TEST_CASE("a working folder that is gone is told as such") {
  const TextRun tiny;
  const std::string run = tiny.dir.string(), data = tiny.write("rows.txt", kQuestions), out = tiny.folder / "out";
  tiny.write("c.toml", tiny_toml());
  const std::string commands[] = {"kava_train " + (tiny.folder / "c.toml") + " --set train.max_steps=1 --out " + out,
                                  "kava_eval " + run + " --data " + data,
                                  "kava_generate " + run + " Hi",
                                  "kava_merge " + run + " --out " + out,
                                  "kava_report " + run + " --out " + out,
                                  "kava_data synth --rows 10 --out synth",
                                  "kava_inspect step " + (tiny.folder / "c.toml") + " --out " + out};
  for (const std::string& command : commands) {
    const Ended e = run_command(command, tiny.folder.path(), "mkdir gone; cd gone; rmdir ../gone;");
    INFO(command << ": " << e.err);
    if (e.code == 0) continue;  // it needs none
    CHECK(e.code != 1);
    CHECK(is_one_error(e.err));
    CHECK_THAT(e.err, StartsWith("error: the working folder: "));
  }
}
