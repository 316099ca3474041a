// plan_peak [--bin DIR] [--large]: what `kava_train --plan` says of memory, against what a run takes.
//
// Each case is planned by the program and then run here, in a process of its own: steps, validation with decoding, checkpoints. The arena's
// high-water mark must be the plan's to the byte, and the process may grow to 1.01 of the plan and 128 MiB. A case whose shared data are
// not there is named as skipped; --large runs the largest one too, and SmolLM2's for 30 steps. The last line is "N cases, M wrong, K
// skipped"; exit 0 or 1, or 4: cannot run.
#include <fmt/format.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/files/json.h"
#include "engine/memory.h"
#include "models/run_folder.h"
#include "models/text.h"
#include "models/trainer.h"
#include "models/validation.h"
#include "tests/folders.h"
#include "tests/model/resident.h"

namespace kava {

namespace {

namespace fs = std::filesystem;

struct Case {
  std::string name, config;
  std::vector<std::string> sets;
  int threads = 2;
};

struct Measured {
  int64_t arena = 0, growth = 0;
};

// As kava_train runs it.
Measured run(const Case& c, const fs::path& out) {
  const RunConfig config = load_config(c.config, c.sets);
  const TextModel text = open_text_model(config.model.path);
  LeftOut left_out;
  const std::vector<Sample> samples = read_samples(text, config, read_train_files(config), &left_out);
  std::optional<Validator> valid;
  if (!config.data.valid.empty()) valid.emplace(text, config);
  const std::unique_ptr<Ops> ops = make_cpu_ops(c.threads);
  RunFolder folder(out);
  forget_highest();
  const int64_t before = resident_memory();
  Model model(*ops, config, text.shape);
  TrainingState state;
  folder.open(config, state);
  Trainer trainer(model, samples, state);
  TrainingHooks hooks;
  if (valid) hooks.validate = [&](Arena& arena, int64_t stage) { return valid->run(model, arena, stage, {}); };
  trainer.run(&folder, hooks);
  return {trainer.arena().peak_bytes(), status_bytes("VmHWM") - before};
}

Measured run_apart(const Case& c, const fs::path& work) {
  const std::string result = (work / "measured").string();
  std::fflush(nullptr);
  const pid_t child = ::fork();
  if (child == 0) {
    int code = 1;
    try {
      const Measured m = run(c, work / "run");
      overwrite(result, fmt::format("{} {}", m.arena, m.growth));
      code = 0;
    } catch (const std::exception& e) {
      fmt::print(stderr, "error: {}: {}\n", c.name, e.what());
    }
    std::fflush(nullptr);
    ::_exit(code);
  }
  int status = 0;
  if (child < 0 || ::waitpid(child, &status, 0) != child || status != 0) throw Error(Exit::internal, c.name, "the run failed", "");
  Measured m;
  std::istringstream(read_file(result, 100)) >> m.arena >> m.growth;
  return m;
}

void shell(const std::string& line) {
  if (std::system((line + " >/dev/null").c_str()) != 0) throw Error(Exit::internal, line, "failed", "");
}

// A set with its value as TOML.
std::string set(const std::string& key, const std::string& value) { return key + "=\"" + value + "\""; }

bool holds(const Case& c, const fs::path& bin) {
  const TempFolder work;
  const std::string json = work / "plan.json";
  std::string line = fmt::format("'{}' '{}' --plan --json '{}' --threads {}", (bin / "kava_train").string(), c.config, json, c.threads);
  for (const std::string& s : c.sets) line += " --set '" + s + "'";
  shell(line);
  const Json memory = read_json(json).at("memory");
  const auto bytes = [&](const char* where, const char* what) { return memory.at(where).at(what).get<int64_t>(); };
  const int64_t step = bytes("device", "activations") + bytes("device", "temporaries"), arena = std::max(step, bytes("device", "decoding"));
  const int64_t total = bytes("device", "total") + bytes("host", "total"), most = total + total / 100 + (int64_t{128} << 20);
  const Measured m = run_apart(c, work.path());
  const bool right = m.arena == arena && m.growth <= most;
  fmt::print("{:<44} arena {} of {} planned, process {:.0f} MiB of {:.0f}{}\n", c.name, m.arena, arena,
             static_cast<double>(m.growth) / 0x1p20, static_cast<double>(total) / 0x1p20, right ? "" : ": WRONG");
  std::fflush(stdout);
  return right;
}

// The first lines of a file, in another.
std::string head_of(const std::string& file, int lines, const std::string& to) {
  std::ifstream in(file);
  std::ofstream out(to);
  std::string line;
  while (lines-- > 0 && std::getline(in, line)) out << line << "\n";
  return to;
}

std::vector<Case> quickstart_cases(const fs::path& bin, const TempFolder& data) {
  shell(fmt::format("'{}' synth --rows 2000 --out '{}'", (bin / "kava_data").string(), data / "synth"));
  const std::string source = KAVA_SOURCE_DIR;
  const std::string valid = head_of(data / "synth/valid.txt", 150, data / "valid.txt");
  const std::vector<std::string> sets = {set("model.path", data / "synth/model"),
                                         set("model.init", "random"),
                                         set("data.valid", valid),
                                         "data.train=[\"" + data / "synth/train.txt" + "\"]",
                                         "train.max_steps=30",
                                         "train.valid_every=15"};
  std::vector<Case> cases{{"quickstart, 30 steps", source + "/configs/quickstart.toml", sets}};
  for (const char* recompute : {"cheap", "block"}) {
    cases.push_back({std::string("quickstart, 3 steps, recompute ") + recompute, source + "/configs/quickstart.toml", sets});
    cases.back().sets.insert(cases.back().sets.end(), {"train.max_steps=3", set("train.recompute", recompute)});
  }
  cases.push_back({"quickstart, 3 steps, forwards of 16", source + "/configs/quickstart.toml", sets});
  cases.back().sets.insert(cases.back().sets.end(), {"train.max_steps=3", "train.micro_batch=16"});
  return cases;
}

// Four questions of 5,000 tokens: attention's room for each thread is what counts.
std::vector<Case> long_cases(const TempFolder& data) {
  std::string question = "1", rows;
  for (int i = 1; i < 5000; ++i) question += fmt::format(",{}", 3 + i % 50);
  for (int i = 0; i < 4; ++i) rows += "{\"question\":[" + question + "],\"trace\":[5,6,7],\"answer\":[7,8,9,2],\"prompt\":3}\n";
  overwrite(data / "long.jsonl", rows);
  overwrite(data / "long.toml", "[model]\npath = \"" KAVA_SOURCE_DIR
                                "/tests/golden/models/llama\"\ninit = \"random\"\ndtype = \"f32\"\n"
                                "[data]\ntrain = [\"long.jsonl\"]\nmax_tokens = 6000\n[train]\nbatch = 4\nmax_steps = 2\n[lora]\nrank = 2\n"
                                "[latent]\ncount = 5\n");
  std::vector<Case> cases;
  for (int threads : {1, 4})
    cases.push_back({fmt::format("four questions of 5,000 tokens, {} threads", threads), data / "long.toml", {}, threads});
  return cases;
}

// A published shape with random weights, on real rows.
std::vector<Case> shape_cases(const TempFolder& data, const std::string& name, const std::string& tokenizer, const std::string& rows,
                              const std::string& more) {
  const std::string train = head_of(rows, 64, data / (name + ".txt")), valid = head_of(rows, 4, data / (name + "_valid.txt"));
  const std::string file = data / (name + ".toml");
  overwrite(file, fmt::format("[model]\npath = \"{}\"\ninit = \"random\"\n[data]\ntrain = [\"{}\"]\nvalid = \"{}\"\n[train]\n{}\n",
                              tokenizer, train, valid, more));
  return {{name, file, {}}};
}

int main_of(int argc, char** argv) {
  fs::path bin = "build/cpu/bin";
  bool large = false;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--large") large = true;
    else if (name == "--bin" && i + 1 < argc) bin = argv[++i];
    else throw Error(Exit::usage, "plan_peak", "unknown argument " + escaped(name), "plan_peak [--bin DIR] [--large]");
  }
  bin = fs::absolute(bin);
  if (!fs::exists(bin / "kava_train") || !fs::exists(bin / "kava_data")) {
    fmt::print("skipped: {} holds no kava_train and kava_data\n", bin.string());
    return 4;
  }
  const TempFolder data;
  std::vector<Case> cases = quickstart_cases(bin, data);
  const auto add = [&](std::vector<Case> more) { cases.insert(cases.end(), more.begin(), more.end()); };
  add(long_cases(data));
  int skipped = 0, wrong = 0;
  const auto skip = [&](const char* name, const char* why) { ++skipped, fmt::print("{}: skipped, {}\n", name, why); };
  const std::string rows = shared_data("data/gsm8k_aug/train.txt"), small = shared_data("data/tokenizers/smollm2-135m-instruct"),
                    half = shared_data("data/tokenizers/qwen2.5-0.5b-instruct");
  if (rows.empty() || small.empty()) skip("SmolLM2-135M shape", "the shared data are not there");
  else
    add(shape_cases(data, "SmolLM2-135M shape", small, rows,
                    large ? "batch = 4\nmax_steps = 30\nvalid_every = 15" : "batch = 4\nmax_steps = 2"));
  if (rows.empty() || half.empty()) skip("Qwen2.5-0.5B shape", "the shared data are not there");
  else if (!large) skip("Qwen2.5-0.5B shape", "--large is not given");
  else add(shape_cases(data, "Qwen2.5-0.5B shape", half, rows, "batch = 2\nmax_steps = 1"));
  for (const Case& c : cases) wrong += !holds(c, bin);
  fmt::print("{} cases, {} wrong, {} skipped\n", cases.size(), wrong, skipped);
  return wrong > 0;
}

}  // namespace

}  // namespace kava

int main(int argc, char** argv) {
  try {
    return kava::main_of(argc, argv);
  } catch (const std::exception& e) {
    fmt::print(stderr, "error: {}\n", e.what());
    return 1;
  }
}
