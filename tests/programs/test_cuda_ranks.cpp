// kava_train as two ranks of the emulated cuda backend, whose devices sum by NCCL's twin: what a run gives, and how it ends when a call of
// NCCL fails or never ends.
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <map>

#include "engine/files/checkpoint.h"
#include "tests/ports.h"
#include "tests/programs/running.h"
#include "tests/programs/text_run.h"

using namespace kava;
using Catch::Matchers::ContainsSubstring;

namespace {

struct TwoRanks {
  int codes[2];
  std::string errs[2], out;
};

struct DeviceProject {
  DeviceProject() {
    if (!fs::exists(bin_dir() + "/libkava_cuda.so") || !fs::exists(bin_dir() + "/libkava_nccl.so"))
      SKIP("this build has no emulated cuda backend");
    overwrite(config, tiny_toml());
  }
  std::string arguments(const std::string& out) const {
    return fmt::format(
        "'{}' --set train.batch=4 --set train.micro_batch=1 --set train.max_steps=4 --set train.checkpoint_every=2 --out '{}' "
        "--device cuda --threads 1",
        config, folder / out);
  }
  // fail: KAVA_NCCL_FAIL of rank 1.
  TwoRanks run(const std::string& out, const std::string& fail = "", const std::string& more = "") const {
    const std::string ranks = fmt::format("{} {} --world-size 2 --rendezvous 127.0.0.1:{} --comm-timeout {}", arguments(out), more,
                                          free_ports(1)[0], fail.empty() || fail == "count" ? 120 : 12);
    const TempFolder streams;
    std::string line = "cd '" + streams.path().string() + "';";
    for (int r : {1, 0})
      line += fmt::format("({} {} '{}/kava_train' {} --rank {} >out{} 2>err{}; echo $? >code{}){}", environment,
                          r == 1 && !fail.empty() ? "KAVA_NCCL_FAIL=" + fail : "", bin_dir(), ranks, r, r, r, r, r == 1 ? " & " : "; wait");
    REQUIRE(std::system(line.c_str()) == 0);
    TwoRanks ended;
    for (int r : {0, 1}) {
      ended.codes[r] = std::stoi(read_file(streams / fmt::format("code{}", r), 100));
      ended.errs[r] = read_file(streams / fmt::format("err{}", r), 1 << 20);
    }
    ended.out = read_file(streams / "out0", 1 << 20);
    return ended;
  }
  TempFolder folder;
  const std::string config = folder / "c.toml";
  std::string environment = "KAVA_EMULATED_DEVICES=2";
};

int calls_of(const std::string& err) {
  const std::size_t at = err.find("emulated NCCL: ");
  REQUIRE(at != std::string::npos);
  return std::atoi(err.c_str() + at + 15);
}

}  // namespace

TEST_CASE("two cuda ranks train by NCCL's sums, twice to the same bytes, from the losses of one") {
  const DeviceProject p;
  const TwoRanks run = p.run("two");
  INFO(run.errs[0] << run.errs[1]);
  REQUIRE((run.codes[0] == 0 && run.codes[1] == 0));
  CHECK_THAT(run.out, ContainsSubstring("gradients   summed by NCCL 2.28.9"));
  const TwoRanks again = p.run("again");
  CHECK((again.codes[0] == 0 && again.codes[1] == 0));
  check_same_run(p.folder.path() / "two", p.folder.path() / "again");
  const Ended one = run_command("kava_train " + p.arguments("one"));
  REQUIRE(one.code == 0);
  const auto first = [&](const char* out) {
    const std::string text = read_file((p.folder.path() / out / "metrics.jsonl").string(), 1 << 20);
    Json line = Json::parse(text.substr(0, text.find('\n')));
    return fmt::format("{} {} {}", line["student_ce"].dump(), line["teacher_ce"].dump(), line["kv"].dump());
  };
  CHECK(first("two") == first("one"));
}

TEST_CASE("a call of NCCL that fails or never ends stops every cuda rank with 6, and the run goes on to the same bytes") {
  const DeviceProject p;
  const TwoRanks whole = p.run("whole", "count");
  REQUIRE((whole.codes[0] == 0 && whole.codes[1] == 0));
  const int calls = calls_of(whole.errs[1]);
  for (const std::string& fail : std::vector<std::string>{"fail:1", "hang:1", "fail:3", "hang:5", fmt::format("fail:{}", calls - 2),
                                                          fmt::format("hang:{}", calls - 1), fmt::format("stuck:{}", calls - 1)}) {
    INFO(fail);
    const std::string out = "run" + fail;
    const TwoRanks failed = p.run(out, fail);
    INFO(failed.errs[0] << failed.errs[1]);
    CHECK((failed.codes[0] == 6 && failed.codes[1] == 6));
    // Which operation the other rank is in depends on how far it has come.
    const bool late = std::atoi(fail.c_str() + fail.find(':') + 1) > 10;
    CHECK_THAT(failed.errs[1], ContainsSubstring(late ? "adding gradients, step 4: " : " NCCL: "));
    for (const std::string& err : failed.errs) {
      CHECK(std::count(err.begin(), err.end(), '\n') == 1);
      CHECK_THAT(err, ContainsSubstring(late ? ", step 4: " : " NCCL: "));
    }
    if (late) CHECK(newest_valid_checkpoint(p.folder.path() / out)->manifest.step == 2);
    const TwoRanks on = p.run(out, "", fs::exists(p.folder / out) ? "--resume" : "");
    INFO(on.errs[0] << on.errs[1]);
    CHECK((on.codes[0] == 0 && on.codes[1] == 0));
    check_same_run(p.folder.path() / "whole", p.folder.path() / out);
  }
  const TwoRanks good = p.run("good", "stuck:1000000");
  CHECK((good.codes[0] == 0 && good.codes[1] == 0));
  CHECK(good.errs[1] == "rank 1 of 2: NCCL does not end (ncclCommAbort, 10 s)\n");
  check_same_run(p.folder.path() / "whole", p.folder.path() / "good");
}

TEST_CASE("ranks that share a device plan with a part of its memory each") {
  DeviceProject p;
  const Ended plan = run_command("kava_train " + p.arguments("none") + " --plan");
  const std::size_t at = plan.out.find("memory.device.total");
  REQUIRE(at != std::string::npos);
  const std::string memory = fmt::format("KAVA_EMULATED_MEMORY={}", std::atoll(plan.out.c_str() + at + 19) * 3 / 2);
  p.environment = "KAVA_EMULATED_DEVICES=2 " + memory;
  const TwoRanks apart = p.run("apart");
  INFO(apart.errs[0] << apart.errs[1]);
  // The plan fits; what is in no plan, more than all that this model takes, may not.
  CHECK_THAT(apart.errs[0] + apart.errs[1], !ContainsSubstring("are available"));
  p.environment = "KAVA_EMULATED_DEVICES=1 " + memory;
  const TwoRanks shared = p.run("shared");
  CHECK((shared.codes[0] == 3 && shared.codes[1] == 3));
  CHECK_THAT(shared.errs[0] + shared.errs[1], ContainsSubstring("are available"));
}
