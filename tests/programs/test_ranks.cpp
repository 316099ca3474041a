// kava_train as several processes under mpirun.
#include <catch2/catch_test_macros.hpp>
#include <cstdlib>

#include "engine/files/checkpoint.h"
#include "tests/ports.h"
#include "tests/programs/running.h"
#include "tests/programs/text_run.h"

using namespace kava;

namespace {

void require_mpirun() {
  if (std::system("command -v mpirun >/dev/null 2>&1") != 0) SKIP("mpirun is not on PATH");
  if (!fs::exists(bin_dir() + "/libkava_mpi.so")) SKIP("this build has no libkava_mpi.so");
}

// mpirun with what follows the program's name on each rank, which takes its own: not every mpirun starts several command lines.
Ended mpirun(const std::vector<std::string>& ranks, const std::string& environment = "",
             const std::string& program = bin_dir() + "/kava_train") {
  const TempFolder streams;
  std::string script = "case $OMPI_COMM_WORLD_RANK in\n";
  for (std::size_t i = 0; i < ranks.size(); ++i)
    script += fmt::format("{}) exec '{}' {} --device cpu --threads 1 ;;\n", i, program, ranks[i]);
  overwrite(streams / "rank.sh", script + "esac\n");
  const std::string line = fmt::format(
      "{} OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 mpirun --oversubscribe --bind-to none -n {} sh '{}' >'{}' 2>'{}'",
      environment, ranks.size(), streams / "rank.sh", streams / "out", streams / "err");
  const int status = std::system(line.c_str());
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_file(streams / "out", 1 << 24), read_file(streams / "err", 1 << 24)};
}

// `kava_train ARGUMENTS` on n ranks.
Ended on_ranks(int n, const std::string& arguments, const std::string& environment = "",
               const std::string& program = bin_dir() + "/kava_train") {
  return mpirun(std::vector(static_cast<std::size_t>(n), arguments), environment, program);
}

struct RankProject {
  RankProject() { overwrite(config, tiny_toml()); }
  std::string arguments(const std::string& out) const {
    return fmt::format(
        "'{}' --set train.batch=4 --set train.micro_batch=1 --set train.max_steps=7 --set train.checkpoint_every=2 --set "
        "train.valid_every=3 --set data.valid='{}' --out '{}'",
        config, kGolden + "data/rows.jsonl", folder / out);
  }
  TempFolder folder;
  const std::string config = folder / "c.toml";
};

int errors_in(const std::string& text) {
  int n = 0;
  for (std::size_t at = 0; (at = text.find("error: ", at)) != std::string::npos; ++at) ++n;
  return n;
}

}  // namespace

TEST_CASE("any number of MPI's ranks leaves the run folder of one, also when they die and others go on") {
  require_mpirun();
  const RankProject p;
  const Ended one = run_command("kava_train " + p.arguments("one") + " --device cpu --threads 1");
  REQUIRE(one.code == 0);
  for (int n : {2, 3, 4}) {
    INFO(n);
    const std::string out = fmt::format("run{}", n);
    const Ended run = on_ranks(n, p.arguments(out));
    INFO(run.err);
    CHECK(run.code == 0);
    CHECK(std::count(run.out.begin(), run.out.end(), '\n') == 1 + std::count(one.out.begin(), one.out.end(), '\n'));  // "ranks N"
    check_same_run(p.folder.path() / "one", p.folder.path() / out);
  }
  // Killed within the writing of a later checkpoint.
  const Ended killed = on_ranks(3, p.arguments("killed"), "KAVA_FAIL=rename:11:kill");
  CHECK(killed.code == 128 + SIGKILL);
  CHECK(newest_valid_checkpoint(p.folder.path() / "killed"));
  CHECK(!fs::exists(p.folder.path() / "killed/adapter"));
  const Ended again = on_ranks(2, p.arguments("killed") + " --resume");
  INFO(again.err);
  CHECK(again.code == 0);
  check_same_run(p.folder.path() / "one", p.folder.path() / "killed");
}

TEST_CASE("a profile of ranks tells how long gradients were on their way while the backward went on") {
  require_mpirun();
  const RankProject p;
  const Ended run = on_ranks(2, p.arguments("run") + " --profile --set train.max_steps=200");
  INFO(run.out << run.err);
  REQUIRE(run.code == 0);
  const auto seconds = [&](const std::string& line) {
    const std::size_t at = run.out.find("\n" + line);
    REQUIRE(at != run.out.npos);
    return std::stod(run.out.substr(at + 1 + line.size()));
  };
  CHECK(seconds("sums of gradients, hidden") > 0);
  CHECK(seconds("sums of gradients, exposed") > 0);
}

TEST_CASE("a stop signal that comes while a rank waits for the others stops all of them before the first step") {
  require_mpirun();
  const RankProject p;
  const std::string late = p.folder / "late.sh", first = p.folder / "first";
  overwrite(late,
            fmt::format("#!/bin/sh\nif [ \"$OMPI_COMM_WORLD_RANK\" = 0 ]; then echo $$ >'{0}'; else sleep 1; kill -USR1 $(cat '{0}'); fi\n"
                        "exec '{1}/kava_train' \"$@\"\n",
                        first, bin_dir()));
  fs::permissions(late, fs::perms::owner_all);
  const Ended run = on_ranks(2, p.arguments("run"), "", late);
  INFO(run.err);
  CHECK(run.code == 75);
  CHECK(on_ranks(2, p.arguments("run") + " --resume").code == 0);
}

TEST_CASE("ranks that are refused end together, with one line") {
  require_mpirun();
  const RankProject p;
  auto check = [](const Ended& run, int code, const std::string& about) {
    INFO(run.err);
    CHECK(run.code == code);
    CHECK(errors_in(run.err) == 1);
    CHECK(run.err.find(about) != std::string::npos);
  };
  check(on_ranks(5, p.arguments("many")), 2, "5 ranks are more than the 4 forwards of a step");
  CHECK(!fs::exists(p.folder.path() / "many"));
  check(on_ranks(5, p.arguments("many") + " --plan"), 2, "5 ranks are more than the 4 forwards of a step");
  check(on_ranks(2, p.arguments("rate") + " --set train.lrr=1"), 2, "train.lr");
  check(on_ranks(2, p.arguments("model") + " --set model.path=/nowhere"), 4, "/nowhere");
  const Ended full = on_ranks(2, p.arguments("full"), "KAVA_FAIL=write:9:enospc");
  CHECK(full.code == 7);
  CHECK(full.err.find("error: ") != std::string::npos);
}

TEST_CASE("ranks that differ name the one and both values") {
  require_mpirun();
  const RankProject p;
  auto check = [](const Ended& run, int code, const std::string& about) {
    INFO(run.err);
    CHECK(run.code == code);
    CHECK(errors_in(run.err) == 1);
    CHECK(run.err.find(about) != std::string::npos);
  };
  const std::string plain = p.arguments("x");
  check(mpirun({plain, plain + " --set train.lr=0.02"}), 2, "rank 1 has train.lr = 0.02, rank 0 has train.lr = 0.01");
  const std::string rows = read_file(kGolden + "data/rows.jsonl", 1 << 20), other = p.folder / "rows.jsonl";
  overwrite(other, rows + rows.substr(0, rows.find('\n') + 1));
  check(mpirun({plain, plain + fmt::format(" --set 'data.train=[\"{}\"]'", other)}), 4,
        "the data: is not the same on all ranks: rank 1 has");
  CHECK(!fs::exists(p.folder.path() / "x"));
}

TEST_CASE("any number of ranks evaluates to the bytes of one") {
  require_mpirun();
  const TextRun run;
  std::string rows;
  for (int i = 0; i < 70; ++i) rows += fmt::format("What is {}+{}?||<<{}+{}={}>>#### {}\n", i, i, i, i, 2 * i, 2 * i);
  const std::string data = run.write("test.txt", rows);
  auto result = [&](int ranks, const std::string& more) {
    const std::string out = run.folder / fmt::format("{}.json", ranks);
    const Ended ended = on_ranks(ranks, fmt::format("'{}' --data '{}' --batch 2 --out '{}' --force {}", run.dir.string(), data, out, more),
                                 "", bin_dir() + "/kava_eval");
    INFO(ended.err);
    REQUIRE(ended.code == 0);
    Json json = read_json(out, std::size_t{1} << 24);
    for (const char* key : {"seconds", "ms_per_question", "ms_batch_1"}) json["results"][0].erase(key);
    return json.dump();
  };
  for (const std::string more : {"--limit 11", "--limit 11 --samples 3 --seed 5", "--controls --method kava"}) {
    INFO(more);
    const std::string one = result(1, more);
    for (int ranks : {2, 3, 4}) CHECK(result(ranks, more) == one);
  }
}

TEST_CASE("ranks that die while they evaluate leave the answers that each has finished to any number of others") {
  require_mpirun();
  const TextRun run;
  std::string rows;
  for (int i = 0; i < 40; ++i) rows += fmt::format("What is {}+{}?||<<{}+{}={}>>#### {}\n", i, i, i, i, 2 * i, 2 * i);
  const std::string data = run.write("test.txt", rows), one_dies = run.folder / "one_dies.sh";
  // All questions of a rank are one batch.
  overwrite(one_dies,
            fmt::format("#!/bin/sh\n[ \"$OMPI_COMM_WORLD_RANK\" != 1 ] || export KAVA_FAIL=write:7:kill\nexec '{}/kava_eval' \"$@\"\n",
                        bin_dir()));
  fs::permissions(one_dies, fs::perms::owner_all);
  for (const std::string more : {"", "--controls --method kava"}) {
    INFO(more);
    auto arguments = [&](const std::string& out) {
      return fmt::format("'{}' --data '{}' --out '{}' {}", run.dir.string(), data, run.folder / out, more);
    };
    auto results = [&](const std::string& out) {
      const Json json = read_json(run.folder / out, std::size_t{1} << 24).at("results").at(0);
      return json.at("records").dump() + (more.empty() ? "" : json.at("controls").dump());
    };
    const std::string program = bin_dir() + "/kava_eval";
    REQUIRE(on_ranks(1, arguments("one.json") + " --force", "", program).code == 0);
    for (const auto& entry : fs::directory_iterator(run.dir / "eval")) fs::remove(entry);
    CHECK(on_ranks(2, arguments("two.json"), "", one_dies).code == 128 + SIGKILL);
    const Ended again = on_ranks(3, arguments("two.json"), "", program);
    INFO(again.err);
    CHECK(again.code == 0);
    const std::size_t at = again.err.find(" answers of an interrupted evaluation are taken over");
    REQUIRE(at != std::string::npos);
    CHECK(std::stoi(again.err.substr(again.err.rfind(' ', at - 1) + 1)) >= 6);
    CHECK(results("two.json") == results("one.json"));
    for (const auto& entry : fs::directory_iterator(run.dir / "eval")) {
      CHECK(entry.path().extension() == ".json");
      fs::remove(entry);
    }
  }
}

TEST_CASE("any number of ranks answers a file of questions to the bytes of one") {
  require_mpirun();
  const TextRun run;
  std::string lines;
  for (int i = 0; i < 7; ++i) lines += fmt::format("What is {}+{}?\n", i, i);
  const std::string questions = run.write("questions.txt", lines);
  for (const char* more : {"", "--latents"}) {
    INFO(more);
    const std::string arguments = fmt::format("'{}' --file '{}' --max-new-tokens 6 {}", run.dir.string(), questions, more);
    const Ended one = run_command("kava_generate " + arguments + " --device cpu --threads 1");
    REQUIRE(one.code == 0);
    CHECK(std::count(one.out.begin(), one.out.end(), '\n') >= 7);
    for (int ranks : {2, 3}) {
      const Ended several = on_ranks(ranks, arguments, "", bin_dir() + "/kava_generate");
      INFO(several.err);
      CHECK((several.code == 0 && several.out == one.out));
    }
  }
  const Ended wrong =
      on_ranks(2, fmt::format("'{}' --file '{}'", run.dir.string(), run.write("bad.txt", "\xff\n")), "", bin_dir() + "/kava_generate");
  CHECK(wrong.code == 4);
  CHECK(errors_in(wrong.err) == 1);
  CHECK(on_ranks(2, fmt::format("'{}'", run.dir.string()), "", bin_dir() + "/kava_generate").code == 2);
}

TEST_CASE("ranks of the emulated cuda backend train over TCP to the bytes of one") {
  if (!fs::exists(bin_dir() + "/libkava_cuda.so")) SKIP("this build has no cuda backend");
  const RankProject p;
  const std::string more = " --set train.max_steps=2 --set data.valid= --device cuda --threads 1";
  const Ended one = run_command("kava_train " + p.arguments("one") + more);
  INFO(one.err);
  REQUIRE(one.code == 0);
  const std::string ranks =
      fmt::format("{}{} --world-size 2 --rendezvous 127.0.0.1:{} --rank ", p.arguments("two"), more, free_ports(1)[0]);
  const Ended two =
      run_command(fmt::format("kava_train {0}1 >/dev/null & '{1}/kava_train' {0}0; code=$?; wait $! && exit $code", ranks, bin_dir()));
  INFO(two.err);
  CHECK(two.code == 0);
  check_same_run(p.folder.path() / "one", p.folder.path() / "two");
}

TEST_CASE("several ranks on the CPU without MPI are refused") {
  const RankProject p;
  const std::string arguments = p.arguments("x") + " --device cpu --rank 0 --world-size 2 --rendezvous 127.0.0.1:29999";
  const Ended run = run_command("kava_train " + arguments);
  check_refusal(run, 2, "2 ranks on the CPU need MPI");
  CHECK(run.err.find("--device cuda") != std::string::npos);
  CHECK(!fs::exists(p.folder.path() / "x"));
}
