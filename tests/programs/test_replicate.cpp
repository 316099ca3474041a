// replicate: its table files, and what it does with runs that fail and folders in use.
#include <sys/syscall.h>

#include <atomic>
#include <regex>
#include <set>
#include <thread>

#include "engine/cores.h"
#include "engine/files/checkpoint.h"
#include "engine/files/parts.h"
#include "tests/io/denied_calls.h"
#include "tests/programs/table_rig.h"
#include "tools/replicate_results.h"
#include "tools/replicate_run.h"
#include "tools/replicate_slurm.h"

using namespace kava;

namespace {

// A row on the model and data that the table makes first.
void model_of_synth(const TableRig& rig) {
  rig.model.write(
      "table.toml",
      "seeds = [1, 2]\nsynth = { rows = 100, steps = 3, seed = 1 }\n[[column]]\nname = \"test\"\ndata = \"{out}/data/test.txt\"\n" +
          row("first", "set = ['model.path={out}/data/model', 'data.train=[\"{out}/data/train.txt\"]', 'train.max_steps=7']\n"));
}

}  // namespace

TEST_CASE("replicate runs a table once, and again only what is not done") {
  const TableRig rig;
  const Ended first = rig.run(fmt::format("--jobs {}", std::min(2, usable_cores())));
  INFO(first.out << first.err);
  REQUIRE(first.code == 0);
  const Json table = rig.table();
  CHECK(table["rows"][0]["cells"][0]["n"] == 2);
  CHECK(table["rows"][0]["cells"][1]["mean"] == read_json(rig.out() / "state/first.1.eval_test.json")["result"]["passes"]);
  CHECK(table["missing"].empty());
  CHECK(fs::exists(rig.out() / "runs/second/2/adapter"));
  CHECK(fs::exists(rig.out() / "runs/second/2/log/train.log"));
  const std::string before = rig.form("table.json"), times = rig.form("times.json");
  const Ended second = rig.run();
  CHECK(second.code == 0);
  CHECK_THAT(second.out, ContainsSubstring("8 of 8 works done"));
  CHECK_THAT(second.out, !ContainsSubstring("begins"));
  CHECK(rig.form("table.json") == before);
  CHECK(rig.form("times.json") == times);
  // A prompt that the model writes itself is said.
  const std::string state = (rig.out() / "state/first.1.eval_test.json").string();
  Json free = read_json(state);
  CHECK(free["result"]["prompt"] == "forced");
  free["result"]["prompt"] = "free";
  const std::string forced = read_file(state, 1 << 20);
  overwrite(state, free.dump());
  REQUIRE(rig.run().code == 0);
  CHECK_THAT(rig.form("table.md"), ContainsSubstring("where the model writes them: first. The other rows are given them."));
  overwrite(state, forced);
  REQUIRE(rig.run().code == 0);
  CHECK(rig.form("table.json") == before);
  // A row's own scorer stands in the place of strict alone.
  rig.save("[[row]]\nscorer = \"codi\"" + TableRig::kRows.substr(7));
  Json judged = read_json(state);
  judged["result"]["accuracy"] = {{"strict", 0.25}, {"codi", 0.75}};
  overwrite(state, judged.dump());
  REQUIRE(rig.run().code == 0);
  CHECK(rig.table()["rows"][0]["cells"][0]["values"][0] == 75.0);
  CHECK_THAT(rig.form("table.md"), ContainsSubstring("By the scorer codi where the column says strict: first."));
  overwrite(state, forced);
  rig.save(TableRig::kRows);
  REQUIRE(rig.run().code == 0);
  CHECK(rig.form("table.json") == before);
  CHECK(rig.run("--dry-run").out.empty());
  CHECK_THAT(rig.run("--status").out, ContainsSubstring("8 of 8 works done, 0 running, 0 failed, 0 open"));
  const fs::path folder = rig.model.folder.path();
  // Nor are values of other contents of a file put beside these, whatever is asked for.
  for (const char* name : {"train.txt", "test.txt"}) {
    const std::string held = read_file((folder / name).string(), 1 << 20);
    overwrite((folder / name).string(), held + held.substr(0, held.find('\n') + 1));
    check_refused(rig.run("--seeds 2"), 4, fmt::format("{}: holds something else than when first.1.", name));
    overwrite((folder / name).string(), held);
  }
  CHECK(rig.run().code == 0);
  // Another configuration is not what was done.
  fs::copy(folder / "base", folder / "copy");
  for (const char* set : {"train.lr=1e-5", "train.max_steps=5", "train.epochs=9", "train.micro_batch=1", "train.valid_every=1",
                          "model.path=copy", "data.train=[\\\"test.txt\\\"]", "data.valid=test.txt"}) {
    CAPTURE(set);
    rig.save(row("first", "set = [\"" + std::string(set) + "\"]\n"), "seeds = [1, 2]\n");
    check_refused(rig.run(), 2, "is the result of another configuration");
  }
  rig.save(row("first", "set = [\"train.log_every=7\"]\n"), "seeds = [1, 2]\n");
  CHECK_THAT(rig.run("--status").out, ContainsSubstring("4 of 4 works done"));
  // All of it, elsewhere.
  rig.save(TableRig::kRows);
  const TempFolder other;
  fs::copy(folder, other.path() / "moved", fs::copy_options::recursive | fs::copy_options::copy_symlinks);
  CHECK_THAT(run_command("replicate table.toml --out out --status", other.path() / "moved").out, ContainsSubstring("8 of 8 works done"));
  CHECK(rig.form("table.json") == before);
}

TEST_CASE("a run that fails keeps its reason, is tried again, and the others go on") {
  const TableRig rig;
  rig.save(row("bad", "set = [\"train.lr=1e30\", \"train.clip=1e30\", \"train.max_steps=40\"]\n") + row("child", "start = \"bad\"\n") +
               row("good"),
           "seeds = [1]\n");
  const Ended run = rig.run();
  INFO(run.out << run.err);
  CHECK(run.code == 5);
  const Json state = read_json(rig.out() / "state/bad.1.train.json");
  CHECK(state["status"] == "failed");
  CHECK(state["attempts"] == 2);
  CHECK(state["code"] == 5);
  CHECK(!state["reason"].get<std::string>().empty());
  CHECK(fs::exists(rig.out() / state["log"].get<std::string>()));
  CHECK_THAT(run.out, ContainsSubstring("child.1.train waits for bad.1.train"));
  CHECK(rig.table()["rows"][2]["cells"][0]["n"] == 1);
  CHECK(rig.table()["rows"][0]["cells"][0]["mean"].is_null());
  CHECK(rig.run("--retries 0").code == 5);
  CHECK(read_json(rig.out() / "state/bad.1.train.json")["attempts"] == 3);
}

TEST_CASE("replicate refuses what is wrong in one line and leaves what is finished") {
  const TableRig rig;
  const std::string column = "published = [{ column = \"test\", value = 50.0 }]\n";
  const std::pair<std::string, std::string> tables[] = {
      {row("first", column), "published without a source"},
      {row("first", "confg = 1\n"), "is no key of a table; the nearest is config"},
      {row("first") + row("first"), "is taken by another row"},
      {row("first", "start = \"none\"\n"), "names no row above first"},
      {row("../first"), "use up to 100 letters"},
      {row("first", "set = [\"method=magic\"]\n"), ".toml:8:1: row first: --set method=magic: "},
      {row("first") + row("second", "start = \"first\"\nset = [\" model.init = random\"]\n"),
       "set holds \" model.init = random\", but the model is what first trained; leave out one of the two"},
      {row("first", "published = [{ column = \"none\", value = 1.0, source = \"s\" }]\n"), "names no column"},
      {row("first", "published = [{ value = 100.5, source = \"s\" }]\n"), "value is 100.5, which is no accuracy in %; give a value from 0"},
      {row("first", "published = [{ value = -1, source = \"s\" }]\n"), "value is -1, which is no accuracy"},
      {row("first", "set = [\"train.lr=1e-4\", \" seed = 9\"]\n"), "set holds \" seed = 9\", but the seeds are the table's; name it in"},
      {"[[row]]\nname = \"x\"\nconfig = \"none.toml\"\n", "none.toml"},
      {"x = 1979-05-27\n", "is a date"},
      {"[[row]\n", "not valid TOML"}};
  for (const auto& [rows, about] : tables) {
    CAPTURE(rows);
    rig.save(rows, "seeds = [1, 2]\n");
    check_refused(rig.run(), 2, about);
    CHECK(!fs::exists(rig.out()));
  }
  const std::pair<std::string, std::string> heads[] = {
      {"seeds = [1, 1]\n", "seeds names 1 twice"},
      {"measures = []\n", "table.toml:2:1: measures is empty; give some of accuracy, passes, ms"},
      {"measures = [\"passes\", \"ms\", \"passes\"]\n", "measures names passes twice"},
      {"reference = \"zzz\"\n",
       "reference is \"zzz\", which is a group of no row that is shown; put it into the groups of one of first, second"}};
  for (const auto& [head, about] : heads) {
    CAPTURE(head);
    rig.save(TableRig::kRows, head.starts_with("seeds") ? head : "seeds = [1, 2]\n" + head);
    check_refused(rig.run(), 2, about);
  }
  rig.save(row("first") + row("second", "shown = false\ngroups = [\"other\"]\n"));  // never evaluated
  check_refused(rig.run(), 2, "put it into the groups of one of first\n");
  rig.save(TableRig::kRows);
  check_refused(rig.run("--only none"), 2, "is no row and no group");
  check_refused(rig.run("--seeds 7"), 2, "7 is no seed of the table");
  check_refused(rig.run("--jobs 0"), 2, "--jobs");
  check_refused(rig.run(fmt::format("--jobs {}", usable_cores() + 1)), 2, "--jobs: ");
  CHECK(!fs::exists(rig.out()));
  // Everything that is missing is named at once.
  rig.save(row("first", "set = [\"data.train=[\\\"gone_a.txt\\\"]\", \"model.path=gone_b\"]\n"), "seeds = [1, 2]\n");
  const Ended missing = rig.run();
  check_refused(missing, 4, "gone_a.txt");
  CHECK_THAT(missing.err, ContainsSubstring("gone_b"));
  rig.save(TableRig::kRows, "seeds = [1]\nsha256 = { \"test.txt\" = \"" + std::string(64, '0') + "\" }\n");
  check_refused(rig.run(), 4, "has another SHA-256");
  // A half-written state.
  rig.save(TableRig::kRows);
  rig.put_result("first", 1, "1010");
  const std::string done = rig.form("state/first.1.eval_test.json");
  overwrite(rig.out() / "state/first.2.train.json", "{\"format\": 1, \"sta");
  check_refused(rig.run(), 4, "first.2.train.json: is no whole state of a work; remove it");
  CHECK(rig.form("state/first.1.eval_test.json") == done);
}

TEST_CASE("a row that the adapter of its start does not fit is refused before the start is trained") {
  const TableRig rig;
  // A base whose every weight is trained is a model of its own, and any row starts from it.
  const std::string latents = "start = \"base\"\nset = ['method=kava', 'latent.count=2']\n";
  rig.save(row("base", "set = ['train.trainable=all']\nshown = false\n") + row("first", latents), "seeds = [1]\n");
  REQUIRE(rig.run("--dry-run").code == 0);
  const std::tuple<const char*, const char*, const char*> rows[] = {
      {"", "'method=kava'", "kava has new tokens, no_cot has none"},
      {"'method=pccot'", "'train.lr=1'", "pccot has new tokens, no_cot has none"},
      {"", "'train.trainable=all'", "this one trains all weights"},
      {"", "'lora.rank=3'", "lora.rank differs"},
      {"", "'lora.alpha=3'", "lora.alpha differs"},
      {"", "'lora.targets=[\"q_proj\"]'", "lora.targets differ"},
      {"'method=pccot'", "'method=kava', 'latent.projection=false'", "latent.projection differs"},
      {"'method=pccot'", "'method=kava', 'kv.projection=true'", "kv.projection differs"}};
  for (const auto& [base, first, why] : rows) {
    CAPTURE(base, first);
    rig.save(
        row("base", fmt::format("set = [{}]\nshown = false\n", base)) + row("first", fmt::format("start = \"base\"\nset = [{}]\n", first)),
        "seeds = [1]\n");
    for (const char* options : {"", "--plan"}) {
      check_refused(rig.run(options), 2, "table.toml:13:1: row first cannot start from the LoRA adapter of base: " + std::string(why));
      check_refused(rig.run(options), 2, "; set train.trainable=all in row base, or leave out start");
    }
    CHECK(!fs::exists(rig.out()));
  }
  // What fits: the same tensors, of another method too; and another adapter in its place.
  rig.save(row("base", "set = ['method=pccot', 'lora.targets=[\"q_proj\", \"k_proj\"]']\n") +
               row("first", "start = \"base\"\nset = ['method=kava', 'lora.targets=[\"k_proj\", \"q_proj\"]']\n") +
               row("second", "start = \"base\"\nset = ['method=kava', 'model.adapter=run/adapter']\n"),
           "seeds = [1, 2]\n");
  CHECK(rig.run("--dry-run").code == 0);
}

TEST_CASE("a column whose scorer does not apply to a row is refused before anything is trained") {
  const TableRig rig;
  const auto save = [&](const std::string& column, const std::string& rows) {
    rig.save("[[column]]\nname = \"more\"\ndata = \"test.txt\"\n" + column + rows, "seeds = [1]\n");
  };
  save("scorer = \"gsm8k\"\n", row("chain", "set = ['method=full_cot']\n") + row("hidden", "shown = false\n"));
  CHECK(rig.run("--dry-run").code == 0);
  save("scorer = \"gsm8k\"\n", row("chain", "set = ['method=full_cot']\n") + row("other"));
  check_refused(
      rig.run(), 2,
      "table.toml:8:1: scorer gsm8k of column more does not apply to row other, of method no_cot; give one of strict, raw, codi\n");
  save("scorer = \"codi\"\nformat = \"ids\"\n", row("first"));
  CHECK(rig.run("--dry-run").code == 0);
  save("scorer = \"gsm_hard\"\nformat = \"icot_text\"\n", row("first"));
  check_refused(rig.run(), 2, "does not apply to row first, of method no_cot, and data of form icot_text; give one of strict, raw, codi");
  save("scorer = \"gsm_hard\"\n", row("first"));
  check_refused(rig.run(), 2, "table.toml:8:1: scorer gsm_hard of column more does not apply to ");
  CHECK(!fs::exists(rig.out()));
  rig.model.write("test.txt", "{\"input\": \"1 + 1?\", \"target\": 2}\n");
  CHECK(rig.run("--plan").code == 0);
}

TEST_CASE("a row that is not asked for and cannot be planned is named before anything is trained, as the tables hold it") {
  const TableRig rig;
  rig.save(row("first") + "[[row]]\nname = \"second\"\nconfig = \"none.toml\"\n", "seeds = [1]\n");
  CHECK(rig.run("--only first --dry-run").code == 0);
  check_refused(rig.run("--only first"), 2, "none.toml");
  CHECK(!fs::exists(rig.out()));
}

TEST_CASE("a row with the adapter of another model ends with 4 in one line, and the others go on") {
  const TableRig rig;
  const fs::path folder = rig.model.folder.path();
  fs::copy(folder / "base", folder / "wide");
  Json config = read_json(folder / "base/config.json");
  config["hidden_size"] = 32;
  overwrite(folder / "wide/config.json", config.dump());
  rig.save(row("first", "set = ['model.path=wide', 'model.adapter=run/adapter']\n") + row("second"), "seeds = [1]\n");
  check_refused(rig.run(), 4, "first.1.train: ");
  CHECK_THAT(read_json(rig.out() / "state/first.1.train.json")["reason"].get<std::string>(), ContainsSubstring("adapter"));
  CHECK(rig.table()["rows"][1]["cells"][0]["n"] == 1);
}

TEST_CASE("a full disk ends replicate with 7 in one line, and what is finished stays") {
  const TableRig rig;
  rig.save(row("first") + row("second"), "seeds = [1]\n");
  auto call = [&](const std::string& out, const std::string& fail) {
    return run_command("replicate table.toml --device cpu --out " + out, rig.model.folder.path(), "KAVA_FAIL=" + fail);
  };
  const Ended whole = call("whole", "count");
  REQUIRE(whole.code == 0);
  if (whole.err.find("failpoints: ") == whole.err.npos) SKIP("built without KAVA_FAILPOINTS");
  std::map<std::string, std::string> done;
  int calls = 0;
  // The disk is full a write later with each call, which goes on where the last one was.
  for (Ended ended; (ended = call("out", fmt::format("write:{}:enospc", ++calls))).code != 0;) {
    REQUIRE(calls < 20);
    check_refused(ended, 7, "No space left on device");
    for (const auto& [file, bytes] : done) CHECK(read_file(file, 1 << 20) == bytes);
    for (const auto& entry : fs::directory_iterator(rig.out() / "state")) done[entry.path()] = read_file(entry.path(), 1 << 20);
  }
  CHECK(calls > 4);
  CHECK(done.size() >= 4);
  for (const char* name : {"table.json", "table.md", "table.tex", "table.csv"})
    CHECK(rig.form(name) == read_file(rig.model.folder / "whole" + ("/" + std::string(name)), 1 << 24));
}

TEST_CASE("replicate on a read-only file system ends with 7 in one line") {
  const TableRig rig;
  const std::string err = rig.model.folder / "err", line = fmt::format("cd '{}' && '{}/replicate' table.toml --out out --device cpu 2>'{}'",
                                                                       rig.model.folder.path().string(), bin_dir(), err);
  const auto check_read_only = [&](long call) {
    CHECK(ends_well_without({{call, EROFS}}, [&] {
      const int status = std::system(line.c_str());
      if (!WIFEXITED(status) || WEXITSTATUS(status) != 7) std::abort();
    }));
    check_refused({7, "", read_file(err, 1 << 20)}, 7, "/out: could not write: Read-only file system; ");
  };
  check_read_only(SYS_mkdir);
  for (const char* name : {"state", "runs"}) fs::create_directories(rig.out() / name);
  check_read_only(SYS_access);
}

TEST_CASE("replicate makes nothing in a checkpoint") {
  const TableRig rig;
  const fs::path checkpoint = rig.model.dir / "checkpoints/step_3";
  overwrite(checkpoint / "state.json", "{}");
  for (const char* below : {"", "/adapter/new"}) {
    CAPTURE(below);
    const Ended ended =
        run_command(fmt::format("replicate table.toml --device cpu --out run/checkpoints/step_3{}", below), rig.model.folder.path());
    check_refused(ended, 2, "lies in the checkpoint ");
    for (const char* name : {"state", "runs", "adapter/new"}) CHECK(!fs::exists(checkpoint / name));
  }
}

TEST_CASE("replicate names missing weights, tokenizers and adapters at once") {
  const TableRig rig;
  const fs::path folder = rig.model.folder.path();
  for (const char* name : {"sharded", "bare"}) {
    fs::create_directories(folder / name);
    fs::copy(folder / "base/config.json", folder / name);
  }
  overwrite(folder / "sharded/one.safetensors", "");
  overwrite(folder / "sharded/model.safetensors.index.json", R"({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})");
  fs::create_symlink("nowhere", folder / "sharded/tokenizer.json");
  rig.model.write("ids.jsonl", "{\"question\": [1, 2], \"trace\": [3], \"answer\": [4]}\n");
  rig.model.write("whole.toml",
                  "method = \"no_cot\"\n[model]\npath = \"base\"\ninit = \"random\"\nadapter = \"whole\"\n[data]\n"
                  "train = [\"train.txt\"]\n[train]\nmax_steps = 2\ntrainable = \"all\"\n");
  fs::create_directories(folder / "pickled");
  for (const char* name : {"adapter_config.json", "adapter_model.bin"}) overwrite(folder / "pickled" / name, "");
  rig.save(row("single", "set = ['model.init=pretrained']\n") + row("pickled", "set = ['model.adapter=pickled']\n") +
               row("shards", "set = ['model.init=pretrained', 'model.path=sharded']\n") +
               row("ids", "set = ['model.path=bare', 'data.train=[\"ids.jsonl\"]']\n") + row("tuned", "set = ['model.adapter=tuned']\n") +
               "[[row]]\nname = \"whole\"\nconfig = \"whole.toml\"\n",
           "seeds = [1, 2]\n");
  const Ended missing = rig.run("--plan --rate 1");
  INFO(missing.out << missing.err);
  CHECK(missing.code == 4);
  CHECK(std::ranges::count(missing.err, '\n') == 1);
  for (const char* name : {"base/model.safetensors", "sharded/two.safetensors", "sharded/tokenizer.json", "tuned/adapter_config.json",
                           "tuned/adapter_model.safetensors", "whole/config.json", "whole/model.safetensors"})
    CHECK_THAT(missing.err, ContainsSubstring(std::string("/") + name));
  for (const char* name : {"one.safetensors", "sharded/model.safetensors", "bare/", "base/tokenizer.json", "pickled/"})
    CHECK_THAT(missing.err, !ContainsSubstring(name));
}

TEST_CASE("replicate --plan of a row with a start takes all of the row's settings but what it starts from") {
  const TableRig rig;
  Json config = read_json(rig.model.folder.path() / "base/config.json");
  config["attention_dropout"] = 0.1;
  overwrite(rig.model.folder.path() / "base/config.json", config.dump());
  rig.save(row("first", "set = ['model.dropout=off']\n") + row("second", "start = \"first\"\nset = ['model.dropout=off']\n"),
           "seeds = [1]\n");
  const Ended plan = rig.run("--plan --rate 1");
  INFO(plan.out << plan.err);
  CHECK(plan.code == 0);
  rig.save(row("first", "set = ['model.dropout=off']\n") + row("second", "start = \"first\"\n"), "seeds = [1]\n");
  check_refused(rig.run("--plan --rate 1"), 2, "attention_dropout");
}

TEST_CASE("replicate checks every SHA-256 but those that only other rows need") {
  const TableRig rig;
  overwrite(rig.model.folder.path() / "base/model.safetensors", "weights");
  const std::string rows = row("first", "set = ['model.init=pretrained']\n") +
                           row("second", "set = ['model.init=pretrained', 'model.path=elsewhere']\ngroups = [\"other\"]\n");
  const auto run = [&](const std::string& name, const std::string& digest) {
    rig.save(rows, "seeds = [1]\nsha256 = { \"" + name + "\" = \"" + digest + "\" }\n");
    return rig.run("--only first --plan --rate 1");
  };
  const std::string zeros(64, '0');
  CHECK(run("base/model.safetensors", sha256("weights")).code == 0);
  const Ended changed = run("base/model.safetensors", zeros);
  CHECK(changed.code == 4);
  CHECK_THAT(changed.err, ContainsSubstring("base/model.safetensors: has another SHA-256"));
  for (const char* name : {"typo.txt", "base/typo.json", "base"}) {
    const Ended absent = run(name, zeros);
    CAPTURE(name, absent.err);
    CHECK(absent.code == 4);
    CHECK_THAT(absent.err, ContainsSubstring("needs what is not there: "));
    CHECK_THAT(absent.err, ContainsSubstring(std::string("/") + name));
  }
  CHECK(run("elsewhere/model.safetensors", zeros).code == 0);
  check_refused(rig.run(), 4, "elsewhere/model.safetensors");
}

TEST_CASE("runs at a time share cores equally and have a GPU each") {
  const std::vector<int> cores = {0, 1, 2, 3, 6};
  const auto two = shares_of(2, cores, 5, {});
  CHECK(two[0].cores == std::vector<int>{0, 1});
  CHECK(two[1].cores == std::vector<int>{2, 3});
  CHECK(two[1].gpu.empty());
  CHECK(two[1].threads == 2);
  CHECK(shares_of(2, cores, 3, {})[1].cores == two[1].cores);  // a control group's quota is time, not cores
  CHECK(shares_of(2, cores, 3, {})[1].threads == 1);
  const Share one = shares_of(1, cores, 5, {"3"})[0];
  CHECK((one.cores.empty() && one.threads == 0));  // all
  CHECK(shares_of(5, cores, 5, {})[4].cores == std::vector<int>{6});
  CHECK_THROWS_WITH(shares_of(6, cores, 5, {}), "--jobs: 6 runs at a time, but 5 cores; give at most 5");
  CHECK_THROWS_WITH(shares_of(2, cores, 1, {}), "--jobs: 2 runs at a time, but 1 core; give at most 1");
  const std::vector<Share> many = shares_of(2, {4}, 1, {"0", "1"});  // fewer cores than GPUs: each run has all
  CHECK((many[1].cores.empty() && many[1].threads == 1));
  CHECK(gpu_names(nullptr, 3) == std::vector<std::string>{"0", "1", "2"});
  CHECK(gpu_names("7,GPU-5ab,9", 2) == std::vector<std::string>{"7", "GPU-5ab"});  // the driver counts to the first that is not there
  CHECK(gpu_names("", 0).empty());
  CHECK(shares_of(2, cores, 5, gpu_names("7,GPU-5ab", 2))[1].gpu == "GPU-5ab");
  CHECK_THROWS_WITH(shares_of(4, cores, 5, gpu_names("0,1", 2)), ContainsSubstring("--jobs: 4 runs at a time, but 2 GPUs"));
}

TEST_CASE("two replicates do not work in one folder") {
  const TableRig rig;
  fs::create_directories(rig.out());
  const PathLock other(rig.out(), PathLock::Kind::exclusive, false);
  REQUIRE(other.error() == 0);
  check_refused(rig.run(), 3, "another replicate works in this folder");
  CHECK(rig.run("--status").code == 0);
}

TEST_CASE("replicate --plan of a table that makes its data says steps and disk before they are made") {
  const TableRig rig;
  model_of_synth(rig);
  const Ended plan = rig.run("--plan --rate 1");
  INFO(plan.out << plan.err);
  CHECK(plan.code == 0);
  CHECK_THAT(plan.out, ContainsSubstring("runs        2 trainings, 2 evaluations"));
  CHECK_THAT(plan.out, ContainsSubstring("disk        "));
  CHECK(std::regex_search(plan.out, std::regex("first +2 +7 +[0-9.]+ +[0-9.]+ +yes")));
  CHECK(!fs::exists(rig.out()));
}

TEST_CASE("replicate --slurm keeps to one folder and gives its options to the tasks") {
  const TableRig rig;
  const std::string options = "--slurm --keep all --times --jobs 2 --retries 5 --budget-hours 1 --only first --seeds 2";
  fs::create_directories(rig.out());
  {
    const PathLock other(rig.out(), PathLock::Kind::exclusive, false);
    check_refused(rig.run(options), 3, "another replicate works in this folder");
  }
  rig.model.write("sbatch", "#!/bin/sh\ncat \"$1\"\n");
  fs::permissions(rig.model.folder.path() / "sbatch", fs::perms::owner_all);
  const std::string path = rig.model.folder.path().string() + ":" + std::getenv("PATH");
  const WithVariable found("PATH", path);
  const Ended run = run_command("replicate table.toml --out 'a b%a' --device cpu " + options, rig.model.folder.path());
  INFO(run.out << run.err);
  CHECK(run.code == 0);
  for (const char* option : {"'--keep' 'all'", "'--jobs' '2'", "'--retries' '5'", "'--budget-hours' '1'", "'--times'", "'--device' 'cpu'",
                             "'--only' 'first'", "'--seeds' '2'"})
    CHECK_THAT(run.out, ContainsSubstring(option));
  CHECK_THAT(run.out, ContainsSubstring("/a b%%a/slurm_%A_%a.log\"\n"));
  CHECK_THAT(run.out, ContainsSubstring("--output=\"/"));
}

TEST_CASE("a task of a Slurm job waits while another writes the tables") {
  const TableRig rig;
  rig.save(row("first"), "seeds = [1]\n");
  fs::create_directories(rig.out());
  auto other = std::make_unique<PathLock>(rig.out(), PathLock::Kind::exclusive, false);
  std::thread writer([&] {
    std::this_thread::sleep_for(std::chrono::seconds(1));
    other.reset();
  });
  const Ended task = rig.run("--task 0");
  writer.join();
  INFO(task.out << task.err);
  CHECK(task.code == 0);
  CHECK(fs::exists(rig.out() / "table.json"));
}

TEST_CASE("a run that is stopped keeps its seconds and attempts and is open") {
  const TableRig rig;
  rig.save(row("first", "set = [\"train.max_steps=1000000\"]\n"), "seeds = [1]\n");
  const Ended stopped = rig.run("--budget-hours 0.0003");
  INFO(stopped.out << stopped.err);
  CHECK(stopped.code == 75);
  CHECK_THAT(stopped.out, ContainsSubstring("stopped with 0 of 2 works done; the same command goes on"));
  const Json work = read_json(rig.out() / "times.json")["works"]["first.1.train"];
  CHECK(work["attempts"] == 1);
  CHECK(work["seconds"].get<double>() > 0.5);
  CHECK_THAT(rig.run("--status").out, ContainsSubstring("0 of 2 works done, 0 running, 0 failed, 2 open"));
  CHECK(rig.table()["missing"][0]["status"] == "open");
  CHECK(rig.run("--budget-hours 0.0003").code == 75);
  CHECK(read_json(rig.out() / "times.json")["works"]["first.1.train"]["attempts"] == 2);
}

TEST_CASE("a task of a Slurm job that waits ends with 75 at a stop signal") {
  const TableRig rig;
  rig.save(row("first"), "seeds = [1]\n");
  fs::create_directories(rig.out());
  const PathLock other(rig.out(), PathLock::Kind::exclusive, false);
  const Ended task = run_command("kava_inspect --version > /dev/null; exec timeout --preserve-status -s TERM 1 '" + bin_dir() +
                                     "/replicate' table.toml --out out --device cpu --task 0",
                                 rig.model.folder.path());
  check_refused(task, 75, "stopped while another replicate works in this folder");
}

TEST_CASE("what replicate --status shows names a work while it runs") {
  const TableRig rig;
  rig.save(row("first", "set = [\"train.max_steps=1000000\"]\n"), "seeds = [1]\n");
  std::atomic<bool> over = false;
  int code = 0;
  std::thread work([&] { code = rig.run("--budget-hours 0.001").code, over = true; });
  bool seen = false;
  while (!over && !seen) seen = rig.run("--status").out.find("running  first.1.train: ") != std::string::npos;
  work.join();
  CHECK(code == 75);
  CHECK(seen);
  CHECK_THAT(rig.run("--status").out, ContainsSubstring("0 running"));
}

TEST_CASE("what replicate --status shows names an evaluation that runs") {
  const TableRig rig;
  rig.save(row("first"), "seeds = [1]\n");
  REQUIRE(rig.run().code == 0);
  fs::remove(rig.out() / "state/first.1.eval_test.json");
  // What a running evaluation holds.
  const PathLock evaluation(rig.out() / "runs/first/1/log/eval_test.log", PathLock::Kind::shared, false);
  REQUIRE(evaluation.error() == 0);
  CHECK_THAT(rig.run("--status").out, ContainsSubstring("1 of 2 works done, 1 running, 0 failed, 0 open"));
}

TEST_CASE("checkpoints that a kill left behind go with the next call, but one that is read with the one after") {
  const TableRig rig;
  rig.save(row("first", "set = [\"train.max_steps=3\", \"train.checkpoint_every=1\"]\n"), "seeds = [1]\n");
  REQUIRE(rig.run("--keep all").code == 0);
  auto checkpoints = [&] {
    const fs::directory_iterator all(rig.out() / "runs/first/1/checkpoints");
    return std::distance(begin(all), end(all));
  };
  REQUIRE(checkpoints() > 1);
  {
    const Checkpoint read = open_checkpoint(rig.out() / "runs/first/1/checkpoints/step_2");
    CHECK(rig.run().code == 0);
    CHECK(checkpoints() == 2);
    CHECK(fs::exists(read.path / "manifest.json"));
  }
  CHECK(rig.run().code == 0);
  CHECK(checkpoints() == 1);
}

TEST_CASE("the only rows asked for are run, with those that they start from") {
  const TableRig rig;
  rig.save(row("base", "shown = false\n") + row("first", "start = \"base\"\ngroups = [\"g\"]\n") + row("second"), "seeds = [1, 2]\n");
  const std::string lines = rig.run("--dry-run --only g --seeds 2").out;
  CHECK_THAT(lines, ContainsSubstring("runs/base/2 "));
  CHECK_THAT(lines, ContainsSubstring("runs/first/2"));
  CHECK_THAT(lines, !ContainsSubstring("second"));
  CHECK(std::ranges::count(lines, '\n') == 3);
  // Rows that start from one row are one task of a seed: no run is trained by two.
  const ReplicaTable table = rig.read();
  const auto works = works_of(table, {}, rig.out());
  std::multiset<std::string> ids;
  for (int64_t task = 0; task < 4; ++task)
    for (const Work& work : task_works(table, works, task)) ids.insert(work.id);
  CHECK(ids.size() == works.size());
  CHECK(std::set<std::string>(ids.begin(), ids.end()).size() == works.size());
  CHECK_THROWS(task_works(table, works, 4));
}
