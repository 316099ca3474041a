// kava_train as a program: resuming, refusals, plans.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>

#include "engine/files/json.h"
#include "tests/control_group.h"
#include "tests/programs/running.h"

using namespace kava;

TEST_CASE("a resumed run refuses another configuration but for the keys that the arithmetic does not depend on") {
  TempFolder folder;
  const std::string config = folder / "c.toml", out = folder / "run";
  overwrite(config, tiny_toml());
  REQUIRE(train({config, "--set", "train.max_steps=4", "--out", out}).code == 0);
  CHECK(fs::exists(out + "/adapter/adapter_model.safetensors"));
  check_refusal(train({config, "--set", "train.max_steps=4", "--out", out}), 2, "holds a run");
  check_refusal(train({config, "--set", "train.max_steps=5", "--out", out, "--resume"}), 2, "train.max_steps: 4 -> 5");
  const Ended again = train({config, "--set", "train.max_steps=4", "--out", out, "--resume"});
  CHECK(again.code == 0);
  CHECK(again.out.find("is finished") != std::string::npos);
  const std::vector<std::string> others = {"train.log_every=2", "train.valid_every=3", "train.checkpoint_every=2",
                                           "train.keep_checkpoints=5"};
  std::vector<std::string> arguments = {config, "--set", "train.max_steps=4", "--out", out, "--resume", "--threads", "2"};
  for (const std::string& set : others) arguments.push_back("--set"), arguments.push_back(set);
  CHECK(train(arguments).code == 0);
  CHECK(load_config(out + "/config.toml").train.log_every == 2);
}

TEST_CASE("a run tells in progress.json how far it is") {
  TempFolder folder;
  const std::string config = folder / "c.toml", out = folder / "run";
  overwrite(config, tiny_toml());
  REQUIRE(train({config, "--set", "train.max_steps=3", "--out", out}).code == 0);
  const Json progress = read_json(out + "/progress.json");
  CHECK(progress["step"] == 3);
  CHECK(progress["percent"] == 100.0);
  CHECK(progress["eta_s"] == 0.0);
  CHECK(progress["metrics"]["loss"] == timeless(out).back()["loss"]);
  CHECK_FALSE(progress["metrics"].contains("valid"));
  const std::string valid = folder / "valid";
  REQUIRE(train({config, "--set", "train.max_steps=3", "--set", "data.valid=" + kGolden + "data/rows.jsonl", "--out", valid}).code == 0);
  CHECK(read_json(valid + "/progress.json")["metrics"]["valid"]["step"] == 3.0);
  for (const auto& entry : fs::directory_iterator(out)) CHECK(entry.path().extension() != ".part");
}

TEST_CASE("the end of a run is made up for where it was cut short after its last checkpoint") {
  TempFolder folder;
  const std::string config = folder / "c.toml", out = folder / "run";
  overwrite(config, tiny_toml());
  REQUIRE(train({config, "--set", "train.max_steps=4", "--out", out}).code == 0);
  const std::string weights = bytes(out + "/adapter/adapter_model.safetensors");
  fs::remove_all(out + "/adapter");
  fs::remove(out + "/last");
  REQUIRE(train({config, "--set", "train.max_steps=4", "--out", out, "--resume"}).code == 0);
  CHECK(bytes(out + "/adapter/adapter_model.safetensors") == weights);
  CHECK(fs::exists(out + "/last/manifest.json"));
}

TEST_CASE("a broken checkpoint is passed over by name, and without a whole one there is nothing to resume") {
  TempFolder folder;
  const std::string config = folder / "c.toml", out = folder / "run";
  overwrite(config, tiny_toml());
  const std::vector<std::string> arguments = {config, "--set", "train.max_steps=6", "--set", "train.checkpoint_every=2", "--out", out};
  REQUIRE(train(arguments).code == 0);
  const std::string before = bytes(out + "/adapter/adapter_model.safetensors");
  overwrite(out + "/checkpoints/step_6/optimizer.safetensors", "broken");
  std::vector<std::string> resume = arguments;
  resume.push_back("--resume");
  const Ended run = train(resume);
  CHECK(run.code == 0);
  CHECK(run.out.find("step_6/optimizer.safetensors") != std::string::npos);
  CHECK(run.out.find("from step 4") != std::string::npos);
  CHECK(bytes(out + "/adapter/adapter_model.safetensors") == before);
  for (const char* step : {"step_4", "step_6"}) fs::remove(fs::path(out) / "checkpoints" / step / "state.json");
  check_refusal(train(resume), 4, "no valid checkpoint");
  fs::remove_all(out);
  check_refusal(train(resume), 4, "no valid checkpoint");
  CHECK(!fs::exists(out));
}

TEST_CASE("a changed data file or model is refused on resume") {
  TempFolder folder;
  const std::string config = folder / "c.toml", out = folder / "run", data = folder / "rows.jsonl", model = folder / "model";
  fs::copy(kGolden + "data/rows.jsonl", data);
  fs::copy(kGolden + "models/llama", model);
  overwrite(config, tiny_toml());
  auto arguments = [&](bool resume) {
    std::vector<std::string> a = {config,
                                  "--set",
                                  "train.max_steps=4000",
                                  "--set",
                                  "train.checkpoint_every=10",
                                  "--set",
                                  "data.train=[\"" + data + "\"]",
                                  "--set",
                                  "model.path=" + model,
                                  "--out",
                                  out};
    if (resume) a.push_back("--resume");
    return a;
  };
  Running run(arguments(false));
  REQUIRE(run.reaches(out + "/metrics.jsonl", 30));
  run.send(SIGTERM);
  REQUIRE(run.wait().code == 75);
  const std::string rows = bytes(data), shape = bytes(model + "/config.json");
  overwrite(data, rows + rows.substr(0, rows.find('\n') + 1));
  check_refusal(train(arguments(true)), 4, "has changed since the run began");
  overwrite(data, rows);
  overwrite(model + "/config.json", shape + "\n");
  check_refusal(train(arguments(true)), 4, "has changed since the run began");
}

TEST_CASE("a learning rate that breaks the run is exit 5") {
  TempFolder folder;
  const std::string config = folder / "c.toml";
  overwrite(config, tiny_toml());
  const Ended run = train(
      {config, "--set", "train.lr=1e30", "--set", "train.max_steps=100", "--set", "train.checkpoint_every=1000", "--out", folder / "run"});
  check_refusal(run, 5, "10 steps in a row");
  CHECK(run.out.find("no update made") != std::string::npos);
  CHECK(run.out.find("rows.jsonl:") != std::string::npos);  // the samples
}

TEST_CASE("what cannot be run is refused in one line with its exit code") {
  TempFolder folder;
  const std::string config = folder / "c.toml", out = folder / "run", file = folder / "file";
  overwrite(config, tiny_toml());
  overwrite(file, "not a row");
  check_refusal(train({}), 2, "CONFIG");
  check_refusal(train({config, "--nonsense"}), 2, "--nonsense");
  check_refusal(train({folder / "missing.toml"}), 2, "missing.toml");
  check_refusal(train({config, "--set", "train.lrr=1"}), 2, "train.lr");
  check_refusal(train({config, "--set", "lora.targets=[]", "--out", out}), 2, "lora.targets");
  check_refusal(train({config, "--set", "model.path=", "--out", out}), 2, "model.path");
  check_refusal(train({config, "--threads", "0", "--out", out}), 2, "--threads");
  check_refusal(train({config, "--threads", "", "--out", out}), 2, "--threads");
  check_refusal(train({config, "--out", ""}), 2, "--out");
  check_refusal(train({""}), 2, "\"\": no such file");
  check_refusal(train({config, "--device", "tpu", "--out", out}), 2, "--device");
  {
    const WithVariable no_device("KAVA_EMULATED_DEVICES", "0");
    check_refusal(train({config, "--device", "cuda", "--out", out}), 3, "--device");
  }
  check_refusal(train({config, "--out", file}), 3, "is no folder");
  check_refusal(train({config, "--out", file + "/below"}), 3, "is no folder");
  check_refusal(train({config, "--out", "/proc/kava"}), 3, "--out");
  check_refusal(train({config, "--set", "model.path=" + folder / "none", "--out", out}), 4, "none");
  check_refusal(train({config, "--set", "data.train=[\"" + folder / "none" + "\"]", "--out", out}), 4, "none");
  check_refusal(train({config, "--set", "data.valid=" + folder / "none", "--out", out}), 4, "none");
  check_refusal(train({config, "--set", "data.train=[\"" + file + "\"]", "--out", out}), 4, "file:1");
  check_refusal(train({config, "--set", "data.max_tokens=3", "--out", out}), 4, "no row is left");
  check_refusal(train({config, "--set", "model.adapter=" + kGolden + "adapters/llama_seven", "--out", out}), 4, "target_modules");
  fs::copy(kGolden + "models/llama", folder / "model");
  Json shape = read_json(folder / "model/config.json");
  shape["vocab_size"] = (int64_t{1} << 31) - 1;
  overwrite(folder / "model/config.json", shape.dump());
  check_refusal(train({config, "--set", "model.path=" + folder / "model", "--out", out}), 4, "config.json asks for");
  CHECK(!fs::exists(out));
}

// Total and trainable parameters of one group of --plan.
std::pair<long, long> planned(const Ended& run, const std::string& group) {
  const auto at = run.out.find("\n  " + group + " ");
  REQUIRE(at != std::string::npos);
  long total = -1, trainable = -1;
  std::sscanf(run.out.c_str() + at + 3 + group.size(), "%ld %ld", &total, &trainable);
  return {total, trainable};
}

TEST_CASE("a plan (--plan) counts parameters without the weights") {
  TempFolder folder;
  const std::string config = folder / "c.toml", model = folder / "model";
  fs::create_directory(model);
  fs::copy(kGolden + "models/llama/config.json", model + "/config.json");
  overwrite(config, tiny_toml("[kv]\nprojection = true\n"));
  const Ended run = train({config, "--plan", "--set", "model.path=" + model});
  CHECK(run.code == 0);
  CHECK(run.err.empty());
  auto counts = [&](const std::string& group) { return planned(run, group); };
  // 2 layers, C 16, 4/2 heads of 6, F 24, V 61, tied; LoRA of rank 2 on q, k, v, o.
  CHECK(counts("embedding") == std::pair(61L * 16, 0L));
  CHECK(counts("attention") == std::pair(2L * (16 * 24 + 2 * 16 * 12 + 24 * 16), 0L));
  CHECK(counts("mlp") == std::pair(2L * 3 * 16 * 24, 0L));
  CHECK(counts("norms") == std::pair(5L * 16, 0L));
  CHECK(counts("lora") == std::pair(2L * 2 * ((16 + 24) + 2 * (16 + 12) + (24 + 16)), 2L * 2 * ((16 + 24) + 2 * (16 + 12) + (24 + 16))));
  CHECK(counts("new tokens") == std::pair(48L, 48L));
  CHECK(counts("latent projection") == std::pair(2L * (256 + 16) + 32, 2L * (256 + 16) + 32));
  CHECK(counts("kv projection") == std::pair(2L * 2 * 36, 2L * 2 * 36));
  const auto [total, trainable] = counts("all");
  CHECK(total == 61 * 16 + 2304 + 2304 + 80 + 544 + 48 + 576 + 144);
  CHECK(trainable == 544 + 48 + 576 + 144);
  CHECK(!fs::exists("runs/c"));
  CHECK(train({config, "--plan", "--set", "model.path=" + model, "--set", "data.train=[\"absent.txt\"]"}).code == 4);
}

TEST_CASE("a plan (--plan) names the positions that rows pass, and refuses a start of the new rows that training would") {
  const std::string cases = kGolden + "cases/";
  const Ended gpt2 = train({cases + "gpt2_positions_end.toml", "--plan"});
  INFO(gpt2.err);
  CHECK(gpt2.code == 0);
  CHECK(gpt2.out.find("2 (left out: 1 over n_positions = 40)") != std::string::npos);
  check_refusal(train({cases + "coconut_stage_1.toml", "--plan", "--set", "model.adapter="}), 2,
                "latent.token_init: \"<<\" needs a tokenizer");
}

TEST_CASE("a plan (--plan --json) has every number of the contract, and says where the run does not fit") {
  TempFolder folder;
  const std::string config = folder / "c.toml", json = folder / "plan.json";
  overwrite(config, tiny_toml());
  const std::vector<std::string> base = {
      config, "--plan", "--json", json, "--set", "train.max_steps=5", "--set", "data.valid=" + kGolden + "data/rows.jsonl"};
  auto with = [&](std::vector<std::string> more) {
    fs::remove(json);
    more.insert(more.begin(), base.begin(), base.end());
    return train(more);
  };
  const Ended run = with({"--rate", "2"});
  INFO(run.err);
  REQUIRE(run.code == 0);
  const Json plan = read_json(json);
  for (const char* where : {"device", "host"})
    for (const char* key : {"weights", "trainables", "activations", "temporaries", "decoding", "total"}) {
      const int64_t bytes = plan.at("memory").at(where).at(key).get<int64_t>();
      CHECK(bytes >= 0);
      CHECK(run.out.find(fmt::format("\nmemory.{}.{}  {} bytes\n", where, key, bytes)) != std::string::npos);
    }
  CHECK(plan.at("memory").at("device").at("decoding").get<int64_t>() > 0);
  CHECK(plan.at("parameters").at("total").get<int64_t>() > plan.at("parameters").at("trainable").get<int64_t>());
  CHECK(plan.at("worst_batch").at("samples") == 2);
  CHECK(plan.at("worst_batch").at("stage") == 0);
  CHECK(plan.at("worst_batch").at("rows").get<int64_t>() > 2);
  CHECK(plan.at("steps") == 5);
  CHECK(plan.at("disk_bytes").get<int64_t>() > 16 * plan.at("parameters").at("trainable").get<int64_t>());
  CHECK(plan.at("seconds").get<double>() == plan.at("flops_per_step").get<double>() * 5 / 2e12);
  CHECK(plan.at("fits") == true);
  CHECK(plan.at("largest_micro_batch") == 2);
  CHECK(run.out.find("\nflops_per_step  ") != std::string::npos);

  const int64_t device = plan.at("memory").at("device").at("total").get<int64_t>(),
                host = plan.at("memory").at("host").at("total").get<int64_t>();
  const Ended fits = with({"--memory", std::to_string(device + host)});
  CHECK(fits.code == 0);
  CHECK(read_json(json).at("seconds").is_null());
  const Ended small = with({"--memory", std::to_string(device + host - 1)});
  check_refusal({small.code, "", small.err}, 3, "set train.micro_batch = 1, the largest that fits");
  CHECK(small.out.find("\nfits  false -\n") != std::string::npos);
  CHECK(read_json(json).at("largest_micro_batch") == 1);
  CHECK(with({"--memory", "0.00001GB"}).code == 3);
  CHECK(read_json(json).at("largest_micro_batch") == 0);
  CHECK(with({"--memory", "80GiB"}).code == 0);
  for (const char* bad : {"", "x", "-1", "0", "1TB", "1 GB", "nan", "1e300"}) CHECK(with({"--memory", bad}).code == 2);
  for (const char* bad : {"", "x", "-1", "0", "1T"}) CHECK(with({"--rate", bad}).code == 2);
  CHECK(train({config, "--rate", "1"}).code == 2);
}

TEST_CASE("a plan (--plan) gives the published sizes of the six rows of Table 6") {
  const std::string llama = shared_data("data/tokenizers/llama-3.2-1b-instruct"),
                    qwen = shared_data("data/tokenizers/qwen2.5-0.5b-instruct");
  if (llama.empty() || qwen.empty()) SKIP("the shared tokenizers are not there");
  TempFolder folder;
  const std::string rows_file = folder / "rows.txt";
  overwrite(rows_file, "Out of 5 apples 2 are eaten. How many are left?||<<5-2=3>> <<3+1=4>> #### 4\n");
  // The 3B shape: that of the 1B's config.json with other sizes, and the 1B's tokenizer.
  const std::string big = folder / "3b";
  fs::create_directory(big);
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"})
    fs::copy(fs::path(llama) / name, fs::path(big) / name);
  Json shape = read_json(llama + "/config.json");
  shape["num_hidden_layers"] = 28, shape["hidden_size"] = 3072, shape["num_attention_heads"] = 24, shape["head_dim"] = 128;
  overwrite(big + "/config.json", shape.dump());
  struct Row {
    const char* config;
    std::string model;
    long base, lora, others;  // others: new tokens and projection
  };
  const Row rows[] = {
      {"kava_llama1b_aug", llama, 1235814400, 27262976, 6144 + 8396800}, {"kava_llama1b_nl", llama, 1235814400, 27262976, 6144 + 8396800},
      {"kava_qwen05b_aug", qwen, 494032768, 17301504, 2688 + 1609216},   {"kava_qwen05b_nl", qwen, 494032768, 17301504, 2688 + 1609216},
      {"kava_llama3b_aug", big, 3212749824, 73400320, 9216 + 18886656},  {"kava_llama3b_nl", big, 3212749824, 73400320, 9216}};
  for (const Row& row : rows) {
    const Ended run = train({source_dir() + "/configs/table1/" + row.config + ".toml", "--plan", "--memory", "80GB", "--set",
                             "model.path=" + row.model, "--set", "data.train=[\"" + rows_file + "\"]", "--set", "data.valid="});
    INFO(row.config << run.err);
    CHECK(run.code == 0);
    CHECK(planned(run, "lora") == std::pair(row.lora, row.lora));
    CHECK(planned(run, "all") == std::pair(row.base + row.lora + row.others, row.lora + row.others));
  }
}

TEST_CASE("without --out a run goes to runs/ and the configuration's name") {
  TempFolder folder;
  overwrite(folder / "first.try.toml", tiny_toml());
  Running::Limits limits;
  limits.working_folder = folder.path().string();
  const Ended run = Running({"first.try.toml", "--set", "train.max_steps=1"}, limits).wait();
  INFO(run.err);
  CHECK(run.code == 0);
  CHECK(fs::exists(folder / "runs/first.try/last/state.json"));
}

TEST_CASE("a forward that does not fit the memory is refused with one that does") {
#if defined(KAVA_ASAN) || defined(KAVA_TSAN)
  SKIP("a sanitizer's own memory does not fit into a limited address space");
#endif
  const bool grouped = GENERATE(false, true);
  const std::string bytes = std::to_string(grouped ? int64_t{240} << 20 : int64_t{1} << 40);
  const ControlGroup group("memory", {"memory.limit_in_bytes", bytes}, {"memory.max", bytes});
  if (grouped && group.path().empty()) SKIP("no control group can be made here");
  TempFolder folder;
  // So many rows that the step is large beside the program.
  std::string row = "{\"question\":[1", rows;
  for (int i = 0; i < 60; ++i) row += ",5";
  row += "],\"trace\":[2,3],\"answer\":[7,8,9,2],\"prompt\":3}\n";
  for (int i = 0; i < 1024; ++i) rows += row;
  overwrite(folder / "rows.jsonl", rows);
  overwrite(folder / "c.toml", tiny_toml());
  const std::vector<std::string> base = {folder / "c.toml",
                                         "--threads",
                                         "1",
                                         "--set",
                                         "train.batch=1024",
                                         "--set",
                                         "model.dtype=f64",
                                         "--set",
                                         "data.train=[\"" + folder / "rows.jsonl" + "\"]",
                                         "--set",
                                         "train.max_steps=1",
                                         "--out",
                                         folder / "run"};
  Running::Limits limits;
  if (grouped) limits.control_group = group.path();
  else limits.address_space = rlim_t{480} << 20;
  const Ended refused = Running(base, limits).wait();
  check_refusal(refused, 3, "train.micro_batch: with forwards of 1024 samples");
  CHECK(!fs::exists(folder / "run"));
  const std::string words = "set train.micro_batch = ";
  const auto at = refused.err.find(words);
  REQUIRE(at != std::string::npos);
  std::vector<std::string> smaller = base;
  smaller.push_back("--set");
  smaller.push_back("train.micro_batch=" + std::to_string(std::stoi(refused.err.substr(at + words.size()))));
  const Ended fits = Running(smaller, limits).wait();
  INFO(fits.err);
  CHECK(fits.code == 0);
}

TEST_CASE("two hundred KaVa steps run on a real small model and its loss falls") {
  const std::string model = shared_data("data/models/stories260k");
  if (model.empty()) SKIP("the shared data is absent");
  TempFolder folder;
  const Json golden = read_json(model + "/golden.json");
  const std::vector<int32_t> ids = golden["ids"].get<std::vector<int32_t>>();
  // Rows cut out of the model's own story: question, trace of 0 to 12 ids, answer after a prompt of two.
  std::string rows;
  for (std::size_t i = 0; i < 32; ++i) {
    auto piece = [&](std::size_t from, std::size_t n) { return std::vector<int32_t>(ids.begin() + from, ids.begin() + from + n); };
    std::vector<int32_t> answer = piece(i + 30, 4);
    answer.push_back(2);
    rows += Json{{"question", piece(i, 12)}, {"trace", piece(i + 12, i % 13)}, {"answer", answer}, {"prompt", 2}}.dump() + "\n";
  }
  overwrite(folder / "rows.jsonl", rows);
  overwrite(folder / "stories.toml", "[model]\npath = \"" + model +
                                         "\"\n[data]\ntrain = [\"rows.jsonl\"]\nvalid = \"rows.jsonl\"\n[train]\nbatch = 4\n"
                                         "max_steps = 200\nlr = 3e-3\nvalid_every = 100\n[lora]\nrank = 8\n[latent]\ncount = 6\n");
  // One thread: of two, one would wait for its part of these small tensors a third of the time, and the bytes are the same.
  const Ended run = train({folder / "stories.toml", "--threads", "1", "--out", folder / "run"});
  INFO(run.err);
  REQUIRE(run.code == 0);
  const std::vector<Json> lines = timeless(folder / "run");
  REQUIRE(lines.size() == 202);
  for (const Json& line : lines) {
    if (line.contains("valid")) continue;
    for (const char* term : {"student_ce", "teacher_ce", "kv", "codi"}) CHECK(line[term].get<double>() > 0);
  }
  const Json &valid = lines.back()["valid"], &last = lines[lines.size() - 2];
  CHECK(valid["step"] == 200);
  CHECK(last["loss"].get<double>() < 0.7 * lines[0]["loss"].get<double>());
  CHECK(valid["passes"].get<double>() >= 5);  // 1 + T + 1 and more for what is generated
}

TEST_CASE("kava_eval asks for the chain that an icot run's last stage has left, as its validation does") {
  TempFolder folder;
  std::string rows;
  for (int i = 0; i < 3; ++i)
    rows += Json{{"question", {10 + i, 20 + i}}, {"trace", {30 + i, 40 + i, 50 + i}}, {"answer", {15 + i, 2}}}.dump() + "\n";
  overwrite(folder / "rows.jsonl", rows);
  overwrite(folder / "c.toml", "method = \"icot\"\n[model]\npath = \"" + kGolden +
                                   "models/llama\"\ndtype = \"f32\"\n[data]\ntrain = [\"rows.jsonl\"]\nvalid = \"rows.jsonl\"\n"
                                   "separator = \"none\"\n[train]\ntrainable = \"all\"\nbatch = 3\nmax_steps = 150\nlr = 1e-2\n"
                                   "schedule = \"constant\"\nwarmup = 0.0\nweight_decay = 0.0\nvalid_every = 150\n"
                                   "[icot]\nremove_per_epoch = 1e-6\nsmoothing = 0.0\n");
  const Ended run = train({folder / "c.toml", "--out", folder / "run"});
  INFO(run.err);
  REQUIRE(run.code == 0);
  REQUIRE(timeless(folder / "run").back()["valid"]["strict"] == 1.0);
  const Ended eval =
      run_command("kava_eval '" + folder / "run" + "' --data '" + folder / "rows.jsonl" + "' --out '" + folder / "r.json" + "'");
  INFO(eval.err);
  REQUIRE(eval.code == 0);
  const Json result = read_json(folder / "r.json");
  CHECK(result["results"][0]["records"].size() == 3);
  for (const Json& record : result["results"][0]["records"]) CHECK(record["correct"]["strict"] == true);
}

TEST_CASE("a run prints an alarm with what to do about it, and counts it at the end") {
  TempFolder folder;
  const std::string config = folder / "c.toml", rows = folder / "rows.jsonl";
  overwrite(config, tiny_toml());
  const std::string row = R"({"question": [1, 50, 25], "trace": [TRACE], "answer": [7, 8, 9, 36, 2], "prompt": 3})";
  const auto with = [&](const std::string& ids) { return std::string(row).replace(row.find("TRACE"), 5, ids) + "\n"; };
  const auto alarms = [&](const std::string& text, const std::string& set, const std::string& out) {
    overwrite(rows, text);
    const Ended run = train({config, "--set", "data.train=[\"" + rows + "\"]", "--set", "train.max_steps=3", "--set", "train.log_every=1",
                             "--set", "train.warmup=0.0", "--set", set, "--out", folder / out});
    INFO(run.err);
    REQUIRE(run.code == 0);
    std::string lines;
    std::istringstream all(run.out + run.err);
    for (std::string line; std::getline(all, line);)
      if (line.starts_with("warning")) lines += line + "\n";
    return lines;
  };
  const std::string some = with("13, 30, 37"), none = with("");
  CHECK(alarms(some + none, "train.lr=0.01", "quiet").empty());
  CHECK(
      alarms(some + none + none, "train.lr=0.01", "rows") ==
      "warning: 2 of 3 rows have no trace token (n_c = 0), so L_KV has no target there; set data.drop_last_step = false, or train on rows "
      "with longer chains\nwarnings    rows without a trace 1 time\n");
  // The first update makes the latents' projection large.
  const std::string norm = alarms(some + none, "train.lr=10.0", "norm"), times = " times as large as the embeddings";
  CAPTURE(norm);
  const std::string start = "warning: step 2: the latents' inputs are ";
  REQUIRE(norm.starts_with(start));
  CHECK(std::stod(norm.substr(start.size())) > 10);
  CHECK(norm.substr(norm.find(times)) == times + "; lower train.lr\nwarnings    latents' norm 2 times\n");
  CHECK(timeless(folder / "norm").back()["latent_norm_ratio"].get<double>() > 10);
}
