#include <catch2/catch_test_macros.hpp>
#include <string>

#include "engine/files/json.h"
#include "tests/folders.h"
#include "tests/programs/programs.h"

using namespace kava;

TEST_CASE("a profile (--profile) tells the time and work of each op, and changes no byte of the run") {
  const TempFolder folder;
  const std::string train = "kava_train '" + source_dir() + "/tests/golden/cases/full_cot.toml' --threads 1 --set 'model.adapter=\"\"' " +
                            "--set train.max_steps=2 --out ";
  const Ended plain = run_command(train + "plain", folder.path()), run = run_command(train + "profiled --profile", folder.path());
  INFO(run.err);
  REQUIRE(plain.code == 0);
  REQUIRE(run.code == 0);
  for (const char* op : {"linear_group_fwd", "linear_group_bwd_params", "attention_fwd", "adamw", "all ops"}) {
    CAPTURE(op);
    CHECK(run.out.find(std::string("\n") + op) != std::string::npos);
    CHECK(plain.out.find(std::string("\n") + op) == std::string::npos);
  }
  CHECK(run.out.find("ceilings ") != std::string::npos);
  CHECK(run.out.find("ceiling %\n") != std::string::npos);
  CHECK(sha256_file(folder / "plain/adapter/adapter_model.safetensors") ==
        sha256_file(folder / "profiled/adapter/adapter_model.safetensors"));

  const Json trace = read_json(folder / "profiled/log/profile.trace.json");
  REQUIRE(trace["traceEvents"].size() > 100);
  double end = 0, flops = 0;
  for (const Json& event : trace["traceEvents"]) {
    REQUIRE(event["ph"] == "X");
    REQUIRE(event["ts"].get<double>() >= end - 0.002);  // microseconds, rounded to three digits
    end = event["ts"].get<double>() + event["dur"].get<double>();
    flops += event["args"]["flops"].get<double>();
    REQUIRE(event["args"]["bytes"].get<double>() >= 0);
    REQUIRE(event["args"]["of_ceiling"].get<double>() >= 0);
  }
  CHECK(flops > 0);
}

TEST_CASE("an op is named by --check-ops that made the first value of a step that is not finite, and changes no byte") {
  const TempFolder folder;
  const std::string train = "kava_train '" + source_dir() + "/tests/golden/cases/full_cot.toml' --threads 1 --set 'model.adapter=\"\"' ";
  const std::string wild = train + "--set train.max_steps=30 --set train.lr=1e30 --set train.warmup=0 --set train.clip=1e30 --out ";
  const Ended checked = run_command(wild + "wild --check-ops", folder.path()), plain = run_command(wild + "unseen", folder.path());
  INFO(checked.out + checked.err);
  CHECK(checked.code == 5);
  const std::size_t at = checked.out.find(" of the step) wrote a value that is not finite, in row ");
  REQUIRE(at != checked.out.npos);
  CHECK(checked.out.substr(checked.out.rfind('\n', at) + 1).starts_with("step "));
  CHECK(plain.out.find("wrote a value") == plain.out.npos);

  const std::string tame = train + "--set train.max_steps=3 --out ";
  const Ended quiet = run_command(tame + "a --check-ops", folder.path());
  REQUIRE(quiet.code == 0);
  REQUIRE(run_command(tame + "b", folder.path()).code == 0);
  CHECK(quiet.out.find("wrote a value") == quiet.out.npos);
  for (const char* name : {"adapter/adapter_model.safetensors", "last/optimizer.safetensors"})
    CHECK(sha256_file(folder / (std::string("a/") + name)) == sha256_file(folder / (std::string("b/") + name)));
}
