#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <fstream>
#include <sstream>

#include "engine/config/config.h"
#include "engine/error.h"
#include "engine/files/files.h"
#include "tests/io/config_rig.h"

using namespace kava;
using namespace kava::test;
using Catch::Matchers::ContainsSubstring;
namespace fs = std::filesystem;

TEST_CASE("an empty configuration has the defaults of the interface") {
  const RunConfig c = load("");
  CHECK(c == RunConfig{});
  CHECK(c.method == Method::kava);
  CHECK(c.seed == 42);
  CHECK(c.model.dtype == StorageType::bf16);
  CHECK(c.data.answer_prompt == "The answer is:");
  CHECK(c.train.lr == 8e-4);
  CHECK(c.train.betas == std::array<double, 2>{0.9, 0.999});
  CHECK(c.lora.targets == std::vector<std::string>{"q_proj", "k_proj", "v_proj", "o_proj"});
  CHECK(c.latent.count == 24);
  CHECK(c.latent.iterations == 3);
  CHECK(c.codi.weight == 10.0);
}

TEST_CASE("every key of the interface is read into its own member") {
  const RunConfig c = load(R"(
method = "pccot"
seed = 7
[model]
path = "/m"
init = "random"
adapter = "/a"
dtype = "f64"
[data]
train = ["/x.txt", {path = "/y", format = "ids"}]
valid = "/v"
drop_last_step = false
step_separator = " "
answer_prompt = ""
max_tokens = 99
fraction = 0.5
[train]
trainable = "all"
epochs = 3
max_steps = 17
batch = 16
micro_batch = 4
optimizer = "adamw"
lr = 1
betas = [0, 0.95]
eps = 1e-6
weight_decay = 0.25
clip = 1.5
schedule = "linear"
warmup = 0.1
log_every = 5
valid_every = 6
checkpoint_every = 7
keep_checkpoints = 8
recompute = "none"
[lora]
rank = 9
alpha = 10.5
dropout = 0.0
targets = ["down_proj"]
[latent]
count = 11
iterations = 12
projection = false
projection_init = "one"
update = "residual"
[rkv]
policy = "uniform"
lambda = 0.75
group = "mean_prob"
queries = "answer"
order = "score"
short = "zero"
[kv]
weight = 0
reduction = "slot_sum"
loss = "l1"
std = "none"
keys = "pre_rope"
projection = true
[codi]
weight = 2.5
loss = "mse"
std = "global"
[loss]
student = 0.5
teacher = 0.25
[step]
prefix_sharing = false
prune_latents = false
)");
  RunConfig e;
  e.method = Method::pccot, e.seed = 7;
  e.model = {"/m", Init::random, "/a", StorageType::f64};
  e.data = {{{"/x.txt", std::nullopt}, {"/y", DataFormat::ids}}, "/v", false, " ", "", 99, 0.5, "", "", "", "", "", "", ""};
  e.train = {Trainable::all, 3, 17, 16, 4, Optimizer::adamw, 1.0, {0.0, 0.95}, 1e-6, 0.25, 1.5, Schedule::linear, 0.1, 5, 6, 7, 8,
             Recompute::none};
  e.lora = {9, 10.5, 0.0, {"down_proj"}};
  e.latent = {11, 12, false, ProjectionInit::one, Update::residual, ""};
  e.rkv = {Policy::uniform, 0.75, Group::mean_prob, Queries::answer, Order::score, Short::zero};
  e.kv = {0.0, KvReduction::slot_sum, Distance::l1, Std::none, Keys::pre_rope, true};
  e.codi = {2.5, Distance::mse, Std::global};
  e.loss = {0.5, 0.25};
  e.step = {false, false};
  CHECK(c == e);
  CHECK(load(to_toml(c)) == c);
}

TEST_CASE("the effective configuration reads back equal from another folder") {
  TempFolder folder;
  const auto c = load_config(written(folder, R"(
method = "codi"
[model]
path = "../some model/é"
[data]
train = ["a.txt", {path = "sub/b\t\"q\".jsonl", format = "jsonl"}]
step_separator = "\n\u0001\\"
[train]
lr = 0.1
eps = 1.0000000000000002e-7
)"));
  CHECK(c.model.path == (folder.path() / "../some model/é").string());
  CHECK(c.data.train[0].path == (folder.path() / "a.txt").string());
  TempFolder other;
  const RunConfig back = load_config(written(other, to_toml(c)));
  CHECK(back == c);
  CHECK(to_toml(back) == to_toml(c));
  CHECK(back.train.eps == 1.0000000000000002e-7);
}

TEST_CASE("a relative configuration path gives absolute paths") {
  TempFolder folder;
  overwrite(folder / "run.toml", "[model]\npath='m'");
  const auto before = fs::current_path();
  fs::current_path(folder.path());
  const std::string path = load_config("run.toml").model.path;
  fs::current_path(before);
  CHECK(path == fs::canonical(folder.path()) / "m");
}

TEST_CASE("an unknown key is refused with its place and the nearest valid key") {
  CHECK_THAT(refusal("seed = 1\n[train]\n  learning_rate = 1e-3\n"), ContainsSubstring("run.toml:3:3: unknown key train.learning_rate"));
  CHECK_THAT(refusal("[train]\nbacth = 3\n"), ContainsSubstring("run.toml:2:1") && ContainsSubstring("train.batch"));
  CHECK_THAT(refusal("[trian]\nlr = 3\n"),
             ContainsSubstring("run.toml:1:2: unknown section [trian]; the nearest valid section is [train]"));
  CHECK_THAT(refusal("\"\" = 3\n"), ContainsSubstring("unknown key"));
  CHECK_THAT(refusal("lr = 3\n"), ContainsSubstring("train.lr"));
  CHECK_THAT(refusal("sed = 3\n"), ContainsSubstring("nearest valid key is seed"));
  CHECK_THAT(refusal("[lora]\nmicro_batch = 3\n"), ContainsSubstring("train.micro_batch"));
  CHECK_THAT(refusal("[train]\n\"a.b\" = 1.0\n"), ContainsSubstring("unknown key"));
  CHECK_THAT(refusal("[train.lr]\nx = 1.0\n"), ContainsSubstring("train.lr must be a number, not a table"));
  CHECK_THAT(refusal("train = 4\n"), ContainsSubstring("train must be a table"));
  CHECK_THAT(refusal("[[train]]\nlr=1\n"), ContainsSubstring("train must be a table"));
  CHECK_THAT(refusal("[data]\ntrain = [{path='a', fromat='ids'}]\n"), ContainsSubstring("fromat") && ContainsSubstring("key is format"));
  CHECK_THAT(refusal("[train]\n" + std::string(500'000, 'x') + " = 1\n"), ContainsSubstring("nearest valid key"));
}

TEST_CASE("a value of the wrong type or out of range is refused") {
  const std::string bad = GENERATE(
      as<std::string>{}, "seed = -1", "seed = 1.0", "seed = '1'", "seed = 9223372036854775808", "method = 3", "method = 'kawa'",
      "method = ''", "[train]\nbatch = 0", "[train]\nbatch = 4294967297", "[train]\nbatch = true", "[train]\nbatch = 1979-05-27",
      "[train]\nlr = nan", "[train]\nlr = inf", "[train]\nlr = -1e-3", "[train]\nlr = '1e-3'", "[train]\nbetas = [0.9]",
      "[train]\nbetas = [0.9, 1.0]", "[train]\nbetas = [-0.1, 0.9]", "[train]\nbetas = 0.9", "[train]\nbetas = ['a', 'b']",
      "[train]\nbetas=[0.9,0.9,0.9]", "[train]\neps = 0.0", "[train]\nclip = 0", "[train]\nwarmup = 1.5", "[train]\noptimizer = 'sgd'",
      "[train]\nschedule = 'Cosine'", "[train]\nkeep_checkpoints = 0", "[train]\nlog_every = 0", "[train]\nbatch = 4\nmicro_batch = 5",
      "[train]\nrecompute = 'all'", "[lora]\nrank = 0", "[lora]\ndropout = 1.0", "[lora]\ntargets = []",
      "[lora]\ntargets = ['q_proj','q_proj']", "[lora]\ntargets = ['lm_head']", "[lora]\ntargets = 'q_proj'", "[lora]\ntargets = [1]",
      "[latent]\ncount = 0", "[latent]\niterations = -1", "[latent]\nprojection = 1", "[rkv]\nlambda = 1.01", "[rkv]\npolicy = 'lru'",
      "[kv]\nweight = -1", "[codi]\nweight = -0.5", "[loss]\nstudent = -1", "[loss]\nteacher = -1e-9", "[kv]\nstd = 'Layer'",
      "[data]\nfraction = 0.0", "[data]\nfraction = 1.1", "[data]\nmax_tokens = 0", "[data]\ntrain = 'a.txt'", "[data]\ntrain = [3]",
      "[data]\ntrain = ['']", "[data]\ntrain = [{format='ids'}]", "[data]\ntrain = [{path='a', format='csv'}]",
      "[data]\ntrain = [{path=3}]", "[model]\npath = 3", "[model]\npath = 'a\\u0000'\n[model]", "[model]\ndtype = 'fp16'",
      "[step]\nprefix_sharing = 'no'", "[codi]\nmse_std = 3", "[stages]\nmix = 1.5", "[stages]\nfixed = -2", "[stages]\nepochs = 0",
      "[icot]\nremove_per_epoch = 0.0", "[icot]\nsmoothing = -1", "[coconut]\nthoughts = 65", "[coconut]\nmax_stage = 1025",
      "[coconut]\nthoughts = 64\nmax_stage = 65", "method = 'coconut'\n[stages]\nfixed = 5",
      "method = 'coconut'\n[stages]\nfirst = 2\nlast = 1", "method = 'coconut'\n[coconut]\nmarkers = false",
      "method = 'icot'\n[loss]\nteacher = 1.0", "method = 'codi_exact'\n[latent]\niterations = 3", "include = 3", "include = 'absent.toml'",
      "[model]\npath = \"a\\u0000b\"");
  CAPTURE(bad);
  CHECK_THAT(refusal(bad), !ContainsSubstring("accepted"));
}

TEST_CASE("a refusal names the key, its range and the valid words") {
  CHECK_THAT(refusal("[rkv]\npolicy = 'lru'"), ContainsSubstring("rkv, cosine, attention, crop, random, uniform"));
  CHECK_THAT(refusal("[train]\nbatch = 0"), ContainsSubstring("run.toml:2:1: train.batch = 0 is outside its range; give 1 to 1048576"));
  CHECK_THAT(refusal("[lora]\ntargets = ['lm_head']"), ContainsSubstring("gate_proj"));
  CHECK_THAT(refusal("[train]\nrecompute = 'all'"), ContainsSubstring("none, cheap, block"));
}

TEST_CASE("an override (--set) takes a TOML value, and a string where it is none") {
  CHECK(load("[train]\nlr = 1.0", {"train.lr=1e-3"}).train.lr == 1e-3);
  CHECK(load("", {"train.lr=1", "train.lr=2"}).train.lr == 2);
  CHECK(load("", {"method=pccot"}).method == Method::pccot);
  CHECK(load("", {"method=\"pccot\""}).method == Method::pccot);
  CHECK(load("", {"latent.projection=false"}).latent.projection == false);
  CHECK(load("", {"data.answer_prompt=So, a = b:"}).data.answer_prompt == "So, a = b:");
  CHECK(load("", {"data.answer_prompt="}).data.answer_prompt == "");
  CHECK(load("", {"data.answer_prompt=x\ny = 3"}).data.answer_prompt == "x\ny = 3");
  CHECK(load("", {"data.answer_prompt='a' # b"}).data.answer_prompt == "'a' # b");
  CHECK(load("", {"data.answer_prompt='a', 'b'"}).data.answer_prompt == "'a', 'b'");
  CHECK(load("", {"lora.targets=[\"q_proj\", \"v_proj\"]"}).lora.targets == std::vector<std::string>{"q_proj", "v_proj"});
  CHECK(load("", {"data.train=[{path=\"/a b\", format=\"ids\"}]"}).data.train[0] == DataFile{"/a b", DataFormat::ids});
  CHECK(load("", {"data.answer_prompt=R\xC3\xA9ponse:"}).data.answer_prompt == "R\xC3\xA9ponse:");
  TempFolder folder;
  CHECK(load_config(written(folder, ""), {"model.path=../m"}).model.path == (fs::current_path() / "../m").string());
  const std::string home = std::getenv("HOME") ? std::getenv("HOME") : "~";
  CHECK(load("", {"model.path=~/m"}).model.path == (fs::path(home) / "m").string());
  CHECK(load("[model]\npath = '~/m'").model.path == (fs::path(home) / "m").string());
}

TEST_CASE("an error in --set names the argument") {
  check_refused_sets({{"train.lr", "--set train.lr: has no ="},
                      {"train.lrr=1", "--set train.lrr=1: unknown key train.lrr; the nearest valid key is train.lr"},
                      {"=1", "unknown key"},
                      {"", "has no ="},
                      {"train={lr=1.0}", "train is a section"},
                      {"train.batch=4.5", "--set train.batch=4.5: train.batch must be an integer"},
                      {"train.batch=99999999999999999999", "train.batch"},
                      {"train.micro_batch=129", "--set train.micro_batch=129"},
                      {"model.path=\xff", "UTF-8"},
                      {"train.lr=" + std::string(100'000, '['), "train.lr must be a number"}});
  std::string deep;
  for (int i = 0; i < 50'000; ++i) deep += "a.";
  CHECK_THAT(refusal("", {"train.lr={" + deep + "a=1}"}), ContainsSubstring("train.lr must be a number"));
}

TEST_CASE("a method defaults and fixes its keys") {
  const RunConfig full = load("method = 'full_cot'");
  CHECK(!full.data.drop_last_step);
  CHECK((full.loss.student == 0 && full.loss.teacher == 1 && full.kv.weight == 0 && full.codi.weight == 0));
  const RunConfig none = load("method = 'no_cot'");
  CHECK((none.loss.student == 1 && none.loss.teacher == 0 && none.kv.weight == 0 && none.codi.weight == 0 && none.data.drop_last_step));
  const RunConfig codi = load("method = 'codi'");
  CHECK((codi.latent.count == 6 && codi.latent.iterations == 6 && codi.kv.weight == 0 && codi.codi.weight == 10));
  CHECK(load("method = 'codi'\n[latent]\ncount = 8").latent.iterations == 8);
  CHECK(load("method = 'codi'\n[latent]\ncount = 8\niterations = 8").latent.count == 8);
  CHECK(load("[latent]\ncount = 8", {"method=codi"}).latent.iterations == 8);
  const RunConfig pccot = load("method = 'pccot'");
  CHECK((pccot.kv.weight == 0 && pccot.latent.count == 24 && pccot.latent.iterations == 3));
  CHECK(load("[kv]\nweight = 0", {"method=pccot"}).kv.weight == 0);

  CHECK_THAT(refusal("method = 'codi'\n[latent]\ncount = 8\niterations = 3"),
             ContainsSubstring("run.toml:4:1") && ContainsSubstring("latent.iterations = 8"));
  CHECK_THAT(refusal("[kv]\nweight = 1.0", {"method=pccot"}), ContainsSubstring("run.toml:2:1: method pccot has kv.weight = 0.0"));
  CHECK_THAT(refusal("method = 'full_cot'", {"data.drop_last_step=true"}), ContainsSubstring("--set data.drop_last_step=true"));
  CHECK_THAT(refusal("method = 'full_cot'\n[loss]\nstudent = 1"), ContainsSubstring("loss.student = 0.0"));
  CHECK_THAT(refusal("method = 'no_cot'\n[loss]\nteacher = 1"), ContainsSubstring("loss.teacher = 0.0"));
  CHECK_THAT(refusal("method = 'no_cot'\n[codi]\nweight = 1"), ContainsSubstring("codi.weight = 0.0"));
  CHECK_THAT(refusal("method = 'no_cot'\n[rkv]\nlambda = 2"), ContainsSubstring("rkv.lambda"));
  for (const char* method : {"full_cot", "no_cot", "codi", "pccot", "kava"}) {
    const RunConfig c = load(std::string("method = '") + method + "'");
    CHECK(load(to_toml(c)) == c);
  }
}

TEST_CASE("a hostile file is one clear line") {
  CHECK_THAT(refusal("seed = 1\nseed = 2"), ContainsSubstring("run.toml:2"));
  CHECK_THAT(refusal("seed = \n"), ContainsSubstring("not valid TOML"));
  CHECK_THAT(refusal("seed = 1\x80"), ContainsSubstring("not valid TOML"));
  CHECK_THAT(refusal(std::string("\x7f"
                                 "ELF\0\1",
                                 6)),
             ContainsSubstring("NUL"));
  CHECK_THAT(refusal("# " + std::string(2 << 20, 'x')), ContainsSubstring("larger than"));
  CHECK_THAT(refusal("x = " + std::string(100'000, '[')), ContainsSubstring("not valid TOML"));
  std::string deep;
  for (int i = 0; i < 300'000; ++i) deep += "a.";
  CHECK_THAT(refusal(deep + "a = 1"), ContainsSubstring("dots"));
  CHECK_THAT(refusal(deep.substr(0, 8000) + "a = 1"), ContainsSubstring("unknown section"));
  CHECK_THAT(refusal("[\n {\"a\": 1"), ContainsSubstring("run.toml:1:") && ContainsSubstring("not valid TOML"));
  CHECK_THAT(refusal("[ {]\n"), ContainsSubstring("not valid TOML"));
  CHECK_THAT(refusal("seed = 1\n\xEF\xBA\xBA = 2"), ContainsSubstring("run.toml:2: not valid TOML"));
  CHECK_THAT(refusal("x = \"\"\"\"\"\xEF\xBA\xBA\"\"\"\"\" \xEF\xBA\xBA\n"), ContainsSubstring("beyond ASCII"));
  TempFolder folder;
  CHECK_THROWS_AS(load_config((folder.path() / "none.toml").string()), Error);
  CHECK_THROWS_AS(load_config(folder.path().string()), Error);
  CHECK(load("\xEF\xBB\xBFseed = 3\r\n").seed == 3);
}

TEST_CASE("text beyond ASCII behind a backslash, or in quotes behind a bare word, is refused by its line") {
  CHECK_THAT(refusal("x = 1\ny = \"a\\\xC3\xA9\"\n"), ContainsSubstring(":2: not valid TOML"));
  CHECK_THAT(refusal("ab\"\xC3\xA9\"\n"), ContainsSubstring("beyond ASCII"));
  CHECK_THAT(refusal("ab['\xC3\xA9']\n"), ContainsSubstring("beyond ASCII"));
  CHECK_THAT(refusal("x = \"\"\"a\\  \n "), ContainsSubstring("not valid TOML"));
  for (const char* keys : {"ab.'\xC3\xA9'", "'ab'.\"\xC3\xA9\"", "{ab.'\xC3\xA9' = 1}"})
    CHECK_THAT(refusal(keys[0] == '{' ? "x = " + std::string(keys) : "[" + std::string(keys) + "]"), ContainsSubstring("unknown"));
}

TEST_CASE("text beyond ASCII is free in strings of every kind and in comments") {
  auto prompt = [](const std::string& value) {
    return load("# \xC3\xA9 'x\n[data]\nanswer_prompt = " + value + " # \xC3\xA9 \"\nmax_tokens = 9\n").data.answer_prompt;
  };
  CHECK(prompt("\"\xC3\xA9 # \\\" '\"") == "\xC3\xA9 # \" '");
  CHECK(prompt("'\xC3\xA9\\'") == "\xC3\xA9\\");
  CHECK(prompt("\"\"\"\"\xC3\xA9\"\"\n\\\"\xC3\xA9\"\"\"\"\"") == "\"\xC3\xA9\"\"\n\"\xC3\xA9\"\"");
  CHECK(prompt("''''\xC3\xA9''a\\''''") == "'\xC3\xA9''a\\'");
  CHECK(prompt("\"\"") == "");
}

TEST_CASE("a run's configuration names what it reads from where the run lies") {
  TempFolder folder;
  const fs::path root = fs::canonical(folder.path()), run = root / "runs/a run é";
  fs::create_directories(run);
  fs::create_directories(root / "disk/data");
  overwrite(root / "disk/data/rows", "");
  fs::create_symlink(root / "disk/data", root / "data");
  fs::create_symlink(root / "disk", root / "runs/~");
  RunConfig c;
  c.model.path = (root / "some model/é/").string();
  c.data.train = {{(root / "data/rows").string(), DataFormat::ids}, {(run / "inside").string(), std::nullopt}};
  c.data.valid = (root / "runs/~/data/rows").string();
  overwrite(run / "config.toml", to_toml(c, run.string()));
  CHECK_THAT(to_toml(c, run.string()), ContainsSubstring("path = \"../../some model/é\"") && ContainsSubstring("\"../../data/rows\"") &&
                                           ContainsSubstring("\"inside\"") && ContainsSubstring("\"../~/data/rows\""));
  c.model.path = (root / "some model/é").string();
  CHECK(load_run_config(run.string()) == c);
  // From a folder that a link leads to, steps upwards are those of the folder itself; and what lies together moves together.
  fs::create_directory_symlink(run, root / "link");
  CHECK(load_run_config((root / "link").string()) == c);
  CHECK(to_toml(c, (root / "link").string()) == to_toml(c, run.string()));
  fs::create_directory(root / "moved");
  fs::rename(root / "runs", root / "moved/runs");
  CHECK(load_run_config((root / "moved/runs/a run é").string()).model.path == (root / "moved/some model/é").string());
  c.model.path = "/a\xff";
  CHECK_THROWS_AS(to_toml(c, run.string()), Error);
}

TEST_CASE("the hash covers the method and the fixed keys that differ from its defaults, and nothing else") {
  const RunConfig a = load("");
  const RunConfig b = load(
      "[model]\npath = 'm'\nadapter = 'a'\n[data]\ntrain = ['t']\nvalid = 'v'\n[train]\nlog_every = 2\nvalid_every = 3\n"
      "checkpoint_every = 4\nkeep_checkpoints = 5\nmax_hours = 2.5\nmax_steps = 7\nepochs = 3\nmicro_batch = 2");
  CHECK(config_hash(a) == config_hash(b));
  CHECK(config_hash(a) == sha256("method = kava\n"));
  CHECK(config_differences(a, b).empty());
  CHECK(config_differences(a, b, OnResume::extend) ==
        std::vector<std::string>{"train.epochs: 10 -> 3", "train.max_steps: 0 -> 7", "train.micro_batch: 0 -> 2"});
  const RunConfig c = load("[train]\nlr = 1e-3\n[kv]\nstd = 'none'");
  CHECK(config_hash(c) == sha256("kv.std = \"none\"\nmethod = kava\ntrain.lr = 0.001\n"));
  CHECK(config_differences(a, c) == std::vector<std::string>{"train.lr: 0.0008 -> 0.001", "kv.std: \"layer\" -> \"none\""});
  // A method's own defaults are no difference.
  for (const char* method : {"full_cot", "no_cot", "codi", "pccot"})
    CHECK(config_hash(load("", {std::string("method=") + method})) == sha256(std::string("method = ") + method + "\n"));
}

TEST_CASE("training needs a model and data") {
  auto missing = [](const RunConfig& c) {
    try {
      require_for_training(c, "run.toml");
    } catch (const Error& e) {
      CHECK(e.code() == Exit::usage);
      return std::string(e.what());
    }
    return std::string();
  };
  RunConfig c;
  CHECK_THAT(missing(c), ContainsSubstring("model.path"));
  c.model.path = "/m";
  CHECK_THAT(missing(c), ContainsSubstring("data.train"));
  c.data.train = {{"/a", std::nullopt}};
  CHECK(missing(c).empty());
}

TEST_CASE("the documentation of the keys is that of the schema") {
  std::ifstream file(source_dir() + "/docs/configuration.md");
  std::stringstream text;
  text << file.rdbuf();
  CHECK_THAT(text.str(), ContainsSubstring(config_reference()));
}

TEST_CASE("a value that TOML cannot hold names its key") {
  CHECK_THAT(refusal("seed = 99999999999999999999"), ContainsSubstring("run.toml:1:") && ContainsSubstring("at seed: "));
  CHECK_THAT(refusal("# x\n[train]\nlr = 1.0\nmax_steps = 9223372036854775808"), ContainsSubstring("at train.max_steps: "));
  CHECK_THAT(refusal("[train]\nbetas = [0,\n 99999999999999999999]"), ContainsSubstring("at train.betas: "));
  for (const char* text : {"[train]\nlr = 1e-3\n\"batch\" = 99999999999999999999", "[train]\n'batch' = 99999999999999999999",
                           "[\"train\"]\nbatch = 99999999999999999999", "[ train ] # [lora]\nbatch = 99999999999999999999",
                           "train = {lr = 1e-3, batch = 99999999999999999999}", "train . batch = 99999999999999999999",
                           "[train]\nbetas = [0.9, 1.0]\nbatch = 99999999999999999999",
                           "[data]\nanswer_prompt = \"\"\"\n[lora]\nrank = 3\n\"\"\"\n[train]\nbatch = 0x1FFFFFFFFFFFFFFFFFFF"}) {
    CAPTURE(text);
    CHECK_THAT(refusal(text), ContainsSubstring("at train.batch: "));
  }
  CHECK_THAT(refusal("[data]\ntrain = [{path = 'a', format = 99999999999999999999}]"), ContainsSubstring("at data.train.format: "));
  CHECK_THAT(refusal("", {"train.max_steps=99999999999999999999"}), ContainsSubstring("train.max_steps has a number"));
  CHECK(load("", {"data.answer_prompt=99999999999999999999 apples"}).data.answer_prompt == "99999999999999999999 apples");
  CHECK_THAT(refusal("\"train.lr\" = 1.0"), ContainsSubstring("write it without the quotes"));
  CHECK_THAT(refusal("", {"include=other.toml"}), ContainsSubstring("include is of a file alone"));
}

TEST_CASE("an included file lies below the one that names it, and its paths start from its own folder") {
  const TempFolder folder;
  fs::create_directories(folder.path() / "common");
  overwrite(folder / "common/lora.toml", "[model]\npath = \"base\"\n[train]\nlr = 1.0\nbatch = 3\n");
  overwrite(folder / "run.toml", "include = \"common/lora.toml\"\n[train]\nlr = 2.0\n[data]\ntrain = [\"rows\"]\n");
  const RunConfig c = load_config(folder / "run.toml", {"train.epochs=7"});
  CHECK((c.train.lr == 2 && c.train.batch == 3 && c.train.epochs == 7));
  CHECK(c.model.path == (folder.path() / "common/base").string());
  CHECK(c.data.train[0].path == (folder.path() / "rows").string());
  CHECK(to_toml(c).find("include") == std::string::npos);
  overwrite(folder / "common/lora.toml", "include = \"\"\n[train]\nlr = 3.0\n");  // the default
  CHECK(load_config(folder / "run.toml", {"train.epochs=7"}).train.lr == 2);
  overwrite(folder / "common/lora.toml", "include = \"other.toml\"\n");
  CHECK_THROWS_AS(load_config(folder / "run.toml"), Error);
  overwrite(folder / "common/lora.toml", "[train]\nlr = true\n");
  try {
    load_config(folder / "run.toml");
    FAIL("accepted");
  } catch (const Error& e) {
    CHECK(e.code() == Exit::usage);
    CHECK_THAT(e.what(), ContainsSubstring("lora.toml:2:1"));
  }
}

TEST_CASE("the methods of Table 1 have their own text, latents and decoding") {
  const RunConfig coconut = load("method = 'coconut'"), icot = load("method = 'icot'"), exact = load("method = 'codi_exact'");
  CHECK((coconut.data.question_suffix == "\n" && coconut.data.step_suffix == "\n" && coconut.data.answer_prompt == "###"));
  CHECK((!coconut.data.drop_last_step && !coconut.latent.projection && coconut.latent.token_init == "<<"));
  CHECK((icot.data.separator == Separator::eos && icot.data.answer_commas == Commas::remove && icot.data.answer_prompt == " ####"));
  CHECK(icot.stages.reset_optimizer == ResetOptimizer::stage);
  CHECK((exact.latent.count == 6 && exact.latent.iterations == 6 && exact.latent.tokens == NewTokens::frozen));
  CHECK((exact.codi.states == CodiStates::all && exact.codi.mse_std == 2 && exact.loss.mean == LossMean::forward &&
         exact.data.drop_last_step));
  for (const RunConfig& c : {coconut, icot, exact}) CHECK((c.decode.prompt == DecodePrompt::free && c.kv.weight == 0));
  CHECK((coconut.loss.teacher == 0 && icot.codi.weight == 0 && exact.codi.weight == 10));
  CHECK(load("method = 'coconut'\n[decode]\nprompt = 'forced'").decode.prompt == DecodePrompt::forced);
}

TEST_CASE("every configuration of Table 1 loads and is what its name says") {
  int files = 0;
  for (const auto& entry : fs::directory_iterator(source_dir() + "/configs/table1")) {
    const std::string name = entry.path().stem().string();
    if (name == "lora" || name == "full") continue;
    INFO(name);
    const RunConfig c = load_config(entry.path().string());
    const std::string method = name.starts_with("cot_") ? "full_cot" : name_of(c.method);
    CHECK(method == name_of(c.method));
    CHECK((name.starts_with(method + "_") || name.starts_with("cot_")));
    CHECK(c.data.train.at(0).path.find(name.find("_aug") != std::string::npos ? "gsm8k_aug" : "gsm8k_nl") != std::string::npos);
    const char* model = name.find("qwen05b") != std::string::npos ? "Qwen2.5-0.5B" : name.find("3b") != std::string::npos ? "3B" : "1B";
    CHECK((c.model.path.find(model) != std::string::npos || name.starts_with("coconut_")));
    ++files;
  }
  CHECK(files == 49);
}

TEST_CASE("every configuration of another model loads and is what its name says") {
  int files = 0;
  for (const auto& entry : fs::directory_iterator(source_dir() + "/configs/models")) {
    const std::string name = entry.path().stem().string();
    INFO(name);
    const RunConfig c = load_config(entry.path().string());
    const bool gpt2 = name.find("_gpt2_") != std::string::npos;
    CHECK(name.starts_with(name.starts_with("cot_") ? "cot_" : name_of(c.method) + "_"));
    CHECK(c.data.train.at(0).path.find(name.find("_aug") != std::string::npos ? "gsm8k_aug" : "gsm8k_nl") != std::string::npos);
    const char* model = gpt2 ? "gpt2" : name.find("06b") != std::string::npos ? "Qwen3-0.6B" : "Qwen3-1.7B";
    CHECK(c.model.path.find(model) != std::string::npos);
    CHECK((c.model.dropout == BaseDropout::off) == gpt2);
    if (gpt2 && c.train.trainable == Trainable::lora) CHECK(c.lora.targets == std::vector<std::string>{"c_attn", "c_proj", "c_fc"});
    ++files;
  }
  CHECK(files >= 8);
}
