// Evaluations that are stopped, and go on.
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include "tests/programs/text_run.h"

using namespace kava;
namespace fs = std::filesystem;
using Catch::Matchers::ContainsSubstring;

TEST_CASE("an interrupted kava_eval goes on where it was, to the same result") {
  TextRun tiny;
  std::string rows;
  for (int i = 0; i < 40; ++i) rows += fmt::format("How many are {} and 1?||#### {}\n", i, i + 1);
  const std::string data = tiny.write("rows.txt", rows), command = "kava_eval " + tiny.dir.string() + " --data " + data + " --threads 1";
  const fs::path result = tiny.dir / "eval" / ("rows-" + sha256(rows).substr(0, 8) + ".step_3.json"),
                 partial = result.string() + ".partial";
  REQUIRE(run(command).code == 0);
  const Json whole = read_json(result.string()).at("results").at(0).at("records");
  CHECK_FALSE(fs::exists(partial));
  fs::remove(result);
  // Killed in the middle of a line.
  const Ended torn = run_command(command + " --batch 4", ".", "KAVA_FAIL=write:9:kill");
  CHECK(torn.code == 128 + 9);
  REQUIRE(fs::exists(partial));
  CHECK_FALSE(fs::exists(result));
  const Finished again = run(command);
  INFO(again.output);
  REQUIRE(again.code == 0);
  CHECK_THAT(again.output, ContainsSubstring("answers of an interrupted evaluation are taken over"));
  CHECK(read_json(result.string()).at("results").at(0).at("records") == whole);
  CHECK_FALSE(fs::exists(partial));
  // Behind the last answer, where no question is left to be timed.
  fs::remove(result);
  CHECK(run_command(command, ".", "KAVA_FAIL=rename:2:kill").code == 128 + 9);
  REQUIRE(fs::exists(partial));
  CHECK_THAT(run(command).output, ContainsSubstring(" 40 answers of an interrupted evaluation are taken over"));
  CHECK(read_json(result.string()).at("results").at(0).at("ms_per_question").is_null());
  // A sweep, between two of its points.
  const std::string sweep = command + " --batch 16 --sweep-passes 0..2 --limit 16";
  REQUIRE(run(sweep).code == 0);
  const fs::path swept = tiny.dir / "eval" / ("rows-" + sha256(rows).substr(0, 8) + ".step_3.limit16.sweep.json");
  const auto points = [&] {
    Json all = read_json(swept.string()).at("results").at(0).at("sweep").at("passes");
    for (Json& point : all) point.erase("ms_per_question"), point.erase("ms_batch_1");
    return all;
  };
  const Json complete = points();
  fs::remove(swept);
  CHECK(run_command(sweep, ".", "KAVA_FAIL=write:30:kill").code == 128 + 9);
  const Finished swept_again = run(sweep);
  INFO(swept_again.output);
  CHECK_THAT(swept_again.output, ContainsSubstring("16 answers of an interrupted evaluation are taken over"));
  CHECK(points() == complete);
  CHECK(std::ranges::none_of(fs::directory_iterator(tiny.dir / "eval"), [](const auto& e) { return e.path().extension() == ".partial"; }));
  // Controls, before the means are known and behind that.
  const std::string control = command + " --batch 4 --controls --limit 16";
  REQUIRE(run(control).code == 0);
  const fs::path controlled = tiny.dir / "eval" / ("rows-" + sha256(rows).substr(0, 8) + ".step_3.limit16.controls.json");
  const auto controls = [&] {
    const Json all = read_json(controlled.string()).at("results").at(0);
    return Json{{"controls", all.at("controls")}, {"records", all.at("records")}, {"answer_ce", all.at("answer_ce")}};
  };
  const Json all_controls = controls();
  for (const auto& [at, taken] : {std::pair(9, 7), std::pair(25, 16)}) {
    fs::remove(controlled);
    CHECK(run_command(control, ".", fmt::format("KAVA_FAIL=write:{}:kill", at)).code == 128 + 9);
    const Finished going_on = run(control);
    INFO(going_on.output);
    CHECK_THAT(going_on.output, ContainsSubstring(fmt::format(" {} answers of an interrupted evaluation are taken over", taken)));
    CHECK(controls() == all_controls);
  }
  CHECK(std::ranges::none_of(fs::directory_iterator(tiny.dir / "eval"), [](const auto& e) { return e.path().extension() == ".partial"; }));
  // A plain folder keeps what is done beside --out, also where that is a bare name.
  const std::string golden = source_dir() + "/tests/golden/";
  const std::string plain =
      fmt::format("kava_eval '{0}models/llama' --data '{0}data/rows.jsonl' --batch 1 --max-new-tokens 4 --out bare.json", golden);
  const Ended bare = run_command(plain, tiny.folder.path().string());
  INFO(bare.err);
  CHECK(bare.code == 0);
  CHECK(fs::exists(tiny.folder.path() / "bare.json"));
}
