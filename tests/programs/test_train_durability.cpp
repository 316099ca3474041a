// kava_train as a program: signals, locks, full disks, and what a run leaves. Kills: tests/kill_resume.cpp.
#include <sys/syscall.h>

#include <catch2/catch_test_macros.hpp>

#include "engine/files/safetensors.h"
#include "tests/io/denied_calls.h"
#include "tests/programs/running.h"

using namespace kava;

TEST_CASE("a checkpoint holds the trainables and both moments in the type of the sums, so that nothing is rounded on the way") {
  TempFolder folder;
  overwrite(folder / "c.toml", tiny_toml("[kv]\nprojection = true\n"));
  for (const char* dtype : {"f32", "f64", "bf16"}) {
    const std::string out = folder / dtype, cut = out + "_cut", type = std::string("model.dtype=") + dtype;
    const std::vector<std::string> base = {folder / "c.toml", "--threads",        "1", "--set", type, "--set", "train.checkpoint_every=2",
                                           "--set",           "train.max_steps=4"};
    auto with = [&](std::vector<std::string> more) { return more.insert(more.begin(), base.begin(), base.end()), more; };
    REQUIRE(train(with({"--out", out})).code == 0);
    const SafetensorsFile file = SafetensorsFile::open(out + "/last/optimizer.safetensors");
    CHECK(file.tensors()[0].dtype == (std::string(dtype) == "f64" ? "F64" : "F32"));
    CHECK(file.find("m.new_tokens.weight"));
    CHECK(file.find("v.kv_projection.0.k.weight"));
    // From the checkpoint in the middle on: the same bytes.
    fs::copy(out, cut, fs::copy_options::recursive | fs::copy_options::copy_symlinks);
    fs::remove_all(cut + "/checkpoints/step_4");
    fs::remove_all(cut + "/adapter");
    REQUIRE(train(with({"--out", cut, "--resume"})).code == 0);
    check_same_run(out, cut);
  }
}

TEST_CASE("a stop signal writes a checkpoint and gives 75, and the run goes on to the same bytes") {
  TempFolder folder;
  const std::string config = folder / "c.toml";
  overwrite(config, tiny_toml());
  const std::vector<std::string> base = {
      config,  "--threads",          "1",    "--set", "train.max_steps=2000", "--set", "train.checkpoint_every=1000",
      "--set", "train.log_every=10", "--out"};
  auto arguments = [&](const std::string& out, bool resume) {
    std::vector<std::string> a = base;
    a.push_back(out);
    if (resume) a.push_back("--resume");
    return a;
  };
  const std::string whole = folder / "whole", cut = folder / "cut";
  REQUIRE(train(arguments(whole, false)).code == 0);
  std::size_t lines = 10;
  for (int signal : {SIGTERM, SIGINT, SIGHUP, SIGUSR1}) {
    Running run(arguments(cut, lines > 10));
    REQUIRE(run.reaches(cut + "/metrics.jsonl", lines));
    run.send(signal);
    if (signal == SIGTERM) run.send(SIGTERM);  // a second one at once is the same one
    const Ended ended = run.wait();
    INFO(ended.err);
    CHECK(ended.code == 75);
    CHECK(ended.out.find("stopped at step") != std::string::npos);
    lines += 35;
  }
  REQUIRE(train(arguments(cut, true)).code == 0);
  // Logged losses, not only the end: nothing was repeated or left out.
  check_same_run(whole, cut);
}

TEST_CASE("SIGUSR2 writes a checkpoint and the run goes on; a signal that is ignored stays ignored") {
  TempFolder folder;
  const std::string config = folder / "c.toml", out = folder / "run";
  overwrite(config, tiny_toml());
  Running::Limits limits;
  limits.ignored = {SIGINT, SIGHUP};
  Running run({config, "--threads", "1", "--set", "train.max_steps=100000", "--set", "train.checkpoint_every=100000", "--out", out},
              limits);
  REQUIRE(run.reaches(out + "/metrics.jsonl", 10));
  run.send(SIGINT);
  run.send(SIGHUP);
  std::int64_t step = -1;
  for (int asked = 0; asked < 2; ++asked) {
    const std::int64_t before = step;
    run.send(SIGUSR2);
    for (int i = 0; i < 60000 && step == before; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      step = linked_step(out, "last").value_or(-1);
    }
    CHECK(step > before);
  }
  run.send(SIGTERM);
  CHECK(run.wait().code == 75);
  CHECK(newest_valid_checkpoint(out)->manifest.step > step);
}

TEST_CASE("a run is locked before anything of it is read, and a lock that cannot be had is named") {
  TempFolder folder;
  const std::string config = folder / "c.toml", out = folder / "run";
  overwrite(config, tiny_toml());
  const std::vector<std::string> arguments = {config, "--set", "train.max_steps=2", "--out", out};
  {
    fs::create_directory(out);
    const PathLock other(out, PathLock::Kind::exclusive, false);
    REQUIRE(other.error() == 0);
    check_refusal(train(arguments), 3, "another process is training there");
    // Not what lies there: that may change until the other has ended.
    overwrite(out + "/config.toml", "nonsense");
    std::vector<std::string> resume = arguments;
    resume.push_back("--resume");
    check_refusal(train(resume), 3, "another process is training there");
  }
  fs::remove_all(out);
  CHECK(ends_well_without({{SYS_flock, ENOLCK}}, [&] {
    const Ended refused = train(arguments);
    if (refused.code != 3 || refused.err.find("could not lock the folder") == std::string::npos || fs::exists(out)) std::abort();
  }));
  CHECK(ends_well_without({{SYS_symlink, EPERM}}, [&] {
    const Ended refused = train(arguments);
    if (refused.code != 3 || refused.err.find("could not make a symbolic link") == std::string::npos || fs::exists(out)) std::abort();
  }));
}

TEST_CASE("a full disk is exit 7 and leaves the last checkpoint whole") {
  TempFolder folder;
  const std::string config = folder / "c.toml", out = folder / "run";
  overwrite(config, tiny_toml());
  // The limit lets the small files of the first checkpoints pass and stops metrics.jsonl as it grows.
  Running::Limits limits;
  limits.file_bytes = 64 << 10;
  const Ended run = Running({config, "--set", "train.max_steps=4000", "--set", "train.checkpoint_every=20", "--out", out}, limits).wait();
  check_refusal(run, 7, "metrics.jsonl");
  const std::optional<Checkpoint> last = newest_valid_checkpoint(out);
  REQUIRE(last);
  CHECK(last->manifest.step >= 20);
  for (const auto& entry : fs::directory_iterator(out + "/checkpoints")) CHECK(!entry.path().string().ends_with(".part"));
  for (const Json& line : timeless(out)) CHECK(line.contains("step"));  // no half line
  // A checkpoint that does not fit leaves nothing of itself.
  limits.file_bytes = 4 << 10;
  const std::string small = folder / "small";
  const Ended second = Running({config, "--set", "train.max_steps=4", "--out", small}, limits).wait();
  check_refusal(second, 7, "could not write");
  CHECK(!newest_valid_checkpoint(small));
  CHECK(!fs::exists(small + "/checkpoints"));
}

TEST_CASE("too few open files end a run in one line and leave nothing of what was being written") {
  TempFolder folder;
  const std::string config = folder / "c.toml";
  overwrite(config, tiny_toml());
  int refused = 0, not_written = 0, done = 0;
  for (rlim_t files = 4; done == 0; ++files) {
    REQUIRE(files < 100);
    INFO(files);
    const std::string out = folder / fmt::format("run{}", files);
    Running::Limits limits;
    limits.open_files = files;
    const Ended run = Running({config, "--threads", "1", "--set", "train.max_steps=4", "--set", "train.checkpoint_every=2", "--set",
                               "train.keep_checkpoints=1", "--out", out},
                              limits)
                          .wait();
    if (run.code == 127) continue;  // not even the program's libraries
    if (run.code == 0) ++done;
    else check_refusal(run, run.code, "Too many open files; raise the limit of open files (ulimit -n)");
    not_written += run.code == 7, refused += run.code == 4;
    if (!fs::exists(out)) continue;
    CHECK(!fs::is_empty(out));
    for (const auto& entry : fs::recursive_directory_iterator(out)) {
      INFO(entry.path());
      CHECK((!entry.path().string().ends_with(".part") && !(entry.is_directory() && fs::is_empty(entry.path()))));
    }
  }
  CHECK(refused > 0);
  CHECK(not_written > 0);
}

TEST_CASE("standard output that goes away does not end a run") {
  TempFolder folder;
  const std::string config = folder / "c.toml", out = folder / "run";
  overwrite(config, tiny_toml());
  Running::Limits limits;
  limits.out_to = "/dev/full";
  const Ended run = Running({config, "--set", "train.max_steps=4", "--out", out}, limits).wait();
  check_refusal(run, 7, "standard output");
  CHECK(newest_valid_checkpoint(out)->manifest.step == 4);
  CHECK(fs::exists(out + "/adapter/kava.safetensors"));
}

TEST_CASE("a reader of standard output that went away is named") {
  TempFolder folder;
  overwrite(folder / "c.toml", tiny_toml());
  const Ended run =
      run_command(fmt::format("kava_train '{}' --set train.max_steps=2 --out '{}' | true", folder / "c.toml", folder / "run"));
  CHECK(run.err.find("standard output: its reader has closed it (broken pipe)") != std::string::npos);
  CHECK(newest_valid_checkpoint(folder / "run")->manifest.step == 2);
}

TEST_CASE("a run in which no step made an update is exit 5 and publishes nothing") {
  TempFolder folder;
  const std::string config = folder / "c.toml", out = folder / "run";
  overwrite(config, tiny_toml());
  // Sound numbers whose products are none.
  const std::string model = folder / "model", weights = model + "/model.safetensors";
  fs::copy(kGolden + "models/llama", model);
  const SafetensorsFile file = SafetensorsFile::open(weights);
  const TensorInfo* norm = file.find("model.norm.weight");
  REQUIRE(norm);
  REQUIRE(norm->dtype == "F32");
  const std::vector<float> huge(static_cast<std::size_t>(norm->count()), 3e38f);
  std::fstream(weights, std::ios::binary | std::ios::in | std::ios::out)
      .seekp(static_cast<std::streamoff>(8 + file.header_text().size() + norm->begin))
      .write(reinterpret_cast<const char*>(huge.data()), norm->count() * 4);
  const Ended run = train({config, "--set", "train.max_steps=3", "--set", "model.path=" + model, "--out", out});
  check_refusal(run, 5, "no step made an update");
  CHECK(!fs::exists(out + "/adapter"));
  CHECK(!newest_valid_checkpoint(out));
}
