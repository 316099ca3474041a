// The programs on --device cuda where its kernels are emulated: what a run gives, and how it ends when the device fails.
#include <algorithm>
#include <catch2/catch_approx.hpp>
#include <map>

#include "engine/files/safetensors.h"
#include "tests/programs/programs_cuda.h"
#include "tests/programs/running.h"
#include "tests/programs/text_run.h"

namespace kava {

namespace {

const std::string kCase = source_dir() + "/tests/golden/cases/kava_defaults.toml";

/// A run of 20 steps on the tiny LLaMA, with a checkpoint every 5; `more`: further arguments.
Ended train_20(const TempFolder& folder, const std::string& out, std::vector<std::string> more) {
  overwrite(folder / "c.toml", tiny_toml());
  more.insert(more.begin(), {folder / "c.toml", "--out", folder / out, "--threads", "1", "--set", "train.max_steps=20", "--set",
                             "train.checkpoint_every=5", "--set", "train.keep_checkpoints=9"});
  return train(more);
}

/// Scripts in the place of programs.
struct StandIns {
  void add(const std::string& name, const std::string& body) const {
    fs::create_directories(bin);
    overwrite((bin / name).string(), "#!/bin/sh\n" + body + "\n");
    fs::permissions(bin / name, fs::perms::owner_exec, fs::perm_options::add);
  }
  const fs::path bin;
};

/// All trained values of a run.
std::vector<double> adapter_of(const fs::path& run) {
  std::vector<double> all;
  for (const char* name : {"adapter/adapter_model.safetensors", "adapter/kava.safetensors"}) {
    if (name == std::string_view("adapter/kava.safetensors") && !fs::exists(run / name)) continue;  // of a method without latents
    const SafetensorsFile file = SafetensorsFile::open((run / name).string());
    for (const TensorInfo& t : file.tensors()) {
      std::vector<double> x(static_cast<std::size_t>(t.count()));
      file.read_as(t, DType::f64, x.data());
      all.insert(all.end(), x.begin(), x.end());
    }
  }
  return all;
}

double distance(const std::vector<double>& a, const std::vector<double>& b) {
  REQUIRE(a.size() == b.size());
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < a.size(); ++i) difference += (a[i] - b[i]) * (a[i] - b[i]), norm += b[i] * b[i];
  return std::sqrt(difference / norm);
}

/// The numbers that KAVA_EMULATED_FAIL=count prints: requests of memory, launches, calls.
std::array<int64_t, 3> counted(const std::string& err) {
  std::array<int64_t, 3> n{};
  const std::size_t at = err.find("emulated device: ");
  REQUIRE(at != std::string::npos);
  REQUIRE(std::sscanf(err.c_str() + at, "emulated device: %ld requests of memory, %ld launches, %ld calls", &n[0], &n[1], &n[2]) == 3);
  return n;
}

}  // namespace

TEST_CASE("a plan (--plan) for a device that is not here takes what the cuda backend would") {
  const TempFolder folder;
  overwrite(folder / "c.toml", tiny_toml());
  const std::vector<std::string> plan = {folder / "c.toml", "--plan", "--device", "cuda", "--memory", "80GB"};
  const Ended there = train(plan);
  const WithVariable no_device("KAVA_EMULATED_DEVICES", "0");
  const Ended absent = train(plan);
  CHECK(absent.code == 0);
  if (run_command("kava_inspect --version").out.find("no libkava_cuda.so") != std::string::npos) {
    CHECK(absent.err.find("planned with the temporaries of the cpu backend") != std::string::npos);
    std::vector<std::string> f64 = plan;
    f64.insert(f64.end(), {"--set", "model.dtype=f64"});
    check_refusal(train(f64), 2, "model.dtype");
    return;
  }
  CHECK(absent.err.empty());
  CHECK(absent.out == there.out);
  CHECK(absent.out.find("memory.host.temporaries  0 bytes") != std::string::npos);
}

TEST_CASE("a plan (--plan) for a device that is here is judged by its memory as the run is, and one without asks for --memory") {
  const TempFolder folder;
  overwrite(folder / "c.toml", tiny_toml());
  const std::vector<std::string> plan = {folder / "c.toml", "--plan", "--device", "cuda"};
  {
    const WithVariable no_device("KAVA_EMULATED_DEVICES", "0");
    if (programs_cuda() != "cuda") check_refusal(train(plan), 3, "--memory 80GB");
  }
  if (!programs_emulate_cuda()) SKIP(kNoEmulatedCuda);
  const Ended roomy = train(plan);
  REQUIRE(roomy.code == 0);
  const std::string key = "memory.device.total  ";
  REQUIRE(roomy.out.find(key) != std::string::npos);
  const int64_t total = std::stoll(roomy.out.substr(roomy.out.find(key) + key.size()));
  {
    const WithVariable less("KAVA_EMULATED_MEMORY", std::to_string(total / 4 * 3));
    const Ended planned = train(plan);
    CHECK(planned.code == 3);
    CHECK(planned.out.find("fits  false") != std::string::npos);
    check_refusal(train_20(folder, "less", {"--device", "cuda"}), 3, "available");
    CHECK(train({folder / "c.toml", "--plan", "--device", "cpu"}).code == 0);
    CHECK(train({folder / "c.toml", "--plan", "--device", "cuda", "--memory", "80GB"}).code == 0);
  }
  const WithVariable enough("KAVA_EMULATED_MEMORY", std::to_string(total + (int64_t{8} << 20)));
  CHECK(train(plan).code == 0);
  CHECK(train_20(folder, "enough", {"--device", "cuda"}).code == 0);
}

TEST_CASE("a run on cuda tells what the device itself counts, beside the host's memory") {
  if (!programs_emulate_cuda()) SKIP(kNoEmulatedCuda);
  const TempFolder folder;
  const Ended run = train_20(folder, "run", {"--device", "cuda"});
  REQUIRE(run.code == 0);
  double device = 0, host = 0;
  const std::size_t at = run.out.find("peak memory ");
  REQUIRE(at != std::string::npos);
  REQUIRE(std::sscanf(run.out.c_str() + at, "peak memory %lf GB of the device, %lf GB of the host", &device, &host) == 2);
  int64_t most = 0;
  for (const Json& line : lines_of(folder.path() / "run/metrics.jsonl")) {
    if (!line.contains("device_bytes")) continue;
    most = line["device_bytes"];
    // What the engine counts, in whole pages, and what the backend keeps besides.
    CHECK(most > line["memory_bytes"].get<int64_t>());
    CHECK(most < line["memory_bytes"].get<int64_t>() + (1 << 20));
  }
  CHECK(most > 0);
  CHECK(device == Catch::Approx(1e-9 * static_cast<double>(most)).margin(0.005));
  CHECK(host > 0);
  CHECK(train_20(folder, "cpu", {"--device", "cpu"}).out.find("GB of the") == std::string::npos);
  for (const Json& line : lines_of(folder.path() / "cpu/metrics.jsonl")) CHECK(!line.contains("device_bytes"));
}

TEST_CASE("a device of auto says in one line why it takes the cpu, and cuda that there is none") {
  if (programs_cuda() == "cuda") SKIP("there is a device");
  const TempFolder folder;
  const std::string step = "kava_inspect step '" + kCase + "' --out '" + folder / "step" + "'";
  const WithVariable no_device("KAVA_EMULATED_DEVICES", "0");
  const Ended by_default = run_command(step), asked = run_command(step + " --device auto"), cuda = run_command(step + " --device cuda");
  CHECK((by_default.code == 0 && asked.code == 0));
  CHECK(asked.err.starts_with("device cpu: "));
  CHECK(std::count(asked.err.begin(), asked.err.end(), '\n') == 1);
  check_refusal(cuda, 3, "--device");
  CHECK(run_command("kava_inspect --version").out.find("\n  cuda") != std::string::npos);
}

TEST_CASE("the emulated cuda backend is named so, and taken only where it is asked for") {
  if (!programs_emulate_cuda()) SKIP(kNoEmulatedCuda);
  const TempFolder folder;
  const std::string step = "kava_inspect step '" + kCase + "' --set model.dtype=f32 --out '" + folder / "step" + "'";
  CHECK(run_command(step).err.empty());
  CHECK(run_command(step + " --device auto").err.find("device cpu: cuda (emulated)") == 0);
  CHECK(run_command(step + " --device cuda").code == 0);
  check_refusal(run_command(step + " --device cuda --set model.dtype=f64"), 2, "model.dtype");
}

TEST_CASE("tests of ops run on the module's device where they are told to, and fail where it has none") {
  if (!programs_emulate_cuda()) SKIP(kNoEmulatedCuda);
  const std::string tests = "kava_tests 'rkv_select gathers*,swiglu of gates*,upload and download*,copying to bf16*'";
  const Ended there = run_command(tests, ".", "KAVA_TEST_DEVICE=cuda");
  INFO(there.out << there.err);
  CHECK(there.code == 0);
  CHECK(there.out.find("in 4 test cases") != std::string::npos);
  const Ended none = run_command(tests, ".", "KAVA_TEST_DEVICE=cuda KAVA_EMULATED_DEVICES=0");
  CHECK(none.code != 0);
  CHECK(none.out.find("the emulator shows no device") != std::string::npos);
  CHECK(run_command(tests, ".", "KAVA_TEST_DEVICE=gpu").out.find("KAVA_TEST_DEVICE is gpu") != std::string::npos);
}

TEST_CASE("what --version says of a cuda device is what it is, or why it does not say it, and a run on that ends with 3") {
  if (!programs_emulate_cuda()) SKIP(kNoEmulatedCuda);
  const std::string version = run_command("kava_inspect --version").out;
  CHECK(version.find("\n  cuda (emulated): emulated, ") != std::string::npos);
  CHECK(version.find(" GiB, compute capability 9.0, driver for CUDA 13.0\n") != std::string::npos);
  const TempFolder folder;
  const WithVariable fail("KAVA_EMULATED_FAIL", "busy");
  const Ended busy = run_command("kava_inspect --version");
  CHECK(busy.code == 0);
  CHECK(busy.out.find("\n  cuda (emulated): cudaGetDeviceProperties: the device is busy or unavailable\n") != std::string::npos);
  check_refusal(run_command("kava_inspect step '" + kCase + "' --device cuda --out '" + folder / "step" + "'"), 3, "device");
}

TEST_CASE("20 steps on cuda are the cpu's as far as f32 can, and so are their validations, and twice the same bytes", "[device]") {
  if (programs_cuda().empty()) SKIP(kNoCuda);
  // The first one drops, in batches of two; the golden ones' batches are whole.
  const TempFolder tiny;
  overwrite(tiny / "tiny.toml", tiny_toml());
  for (const auto& [name, twice] : {std::pair("tiny", true),
                                    {"kava_defaults", true},
                                    {"codi_exact", false},
                                    {"coconut_stage_1", false},
                                    {"icot_left", false},
                                    {"full_cot", false},
                                    {"qwen2_kava", false},
                                    {"qwen2_coconut", true}}) {
    INFO(name);
    const TempFolder folder;
    std::map<std::string, std::vector<Json>> valid;
    for (const auto& [out, device, dtype] :
         {std::tuple("exact", "cpu", "f64"), {"cpu", "cpu", "f32"}, {"cuda", "cuda", "f32"}, {"again", "cuda", "f32"}}) {
      if (out == std::string("again") && !twice) continue;
      const Ended run = train({(name == std::string_view("tiny") ? tiny.path().string() + "/" : kGolden + "cases/") + name + ".toml",
                               "--out", folder / out, "--threads", "1", "--device", device, "--set", std::string("model.dtype=") + dtype,
                               "--set", "train.max_steps=20", "--set", "data.valid=" + kGolden + "data/rows.jsonl", "--set",
                               "train.valid_every=10", "--set", "train.lr=1e-3", "--set", "decode.max_new_tokens=8"});
      INFO(run.err);
      REQUIRE(run.code == 0);
      for (const Json& line : lines_of(folder.path() / out / "metrics.jsonl"))
        if (line.contains("valid"))
          for (const char* key : {"step", "strict", "forced", "passes", "limit_hits"}) valid[out].push_back(line["valid"][key]);
    }
    if (twice) check_same_run(folder.path() / "cuda", folder.path() / "again");
    REQUIRE(valid.at("cpu").size() == 2 * 5);
    CHECK(valid.at("cuda") == valid.at("cpu"));
    const std::vector<double> exact = adapter_of(folder.path() / "exact");
    CHECK(distance(adapter_of(folder.path() / "cuda"), exact) <= 10 * distance(adapter_of(folder.path() / "cpu"), exact) + 1e-6);
  }
}

TEST_CASE("a run of one device goes on on cuda and back, and says that its bytes are not those of one device", "[device]") {
  const std::string cuda = programs_cuda();
  if (cuda.empty()) SKIP(kNoCuda);
  const TempFolder folder;
  for (const auto& [first, second, name] : {std::tuple("cpu", "cuda", cuda), {"cuda", "cpu", "cpu"}}) {
    const fs::path out = folder.path() / first;
    REQUIRE(train_20(folder, first, {"--device", first}).code == 0);
    fs::remove_all(out / "adapter");
    for (const char* step : {"step_15", "step_20"}) fs::remove_all(out / "checkpoints" / step);
    const Ended resumed = train({out.string(), "--resume", "--device", second});
    INFO(resumed.out << resumed.err);
    CHECK(resumed.code == 0);
    CHECK(resumed.out.find(fmt::format("device      {}, and {} before: the bytes", name, first == std::string("cpu") ? "cpu" : cuda)) !=
          std::string::npos);
    CHECK(fs::exists(out / "adapter/adapter_model.safetensors"));
  }
}

TEST_CASE("decoding and evaluation on cuda answer as the cpu does", "[device]") {
  const std::string cuda = programs_cuda();
  if (cuda.empty()) SKIP(kNoCuda);
  const TextRun tiny;
  const std::string run = "'" + tiny.dir.string() + "'", data = "'" + tiny.write("rows.txt", kQuestions) + "'";
  std::map<std::string, Json> results;
  for (const std::string device : {"cpu", "cuda"}) {
    const std::string out = tiny.folder / (device + ".json");
    const Ended eval =
        run_command("kava_eval " + run + " --data " + data + " --max-new-tokens 12 --force --device " + device + " --out '" + out + "'");
    INFO(eval.err);
    REQUIRE(eval.code == 0);
    Json& result = results[device] = read_json(out);
    CHECK(result["device"] == (device == "cpu" ? "cpu" : cuda));
    const Ended generated = run_command("kava_generate " + run + " 'How many?' --latents --max-new-tokens 12 --device " + device);
    REQUIRE(generated.code == 0);
    result["generated"] = generated.out;
  }
  CHECK(results["cpu"]["generated"] == results["cuda"]["generated"]);
  auto records = [&](const std::string& device) -> const Json& { return results.at(device).at("results").at(0).at("records"); };
  REQUIRE(records("cpu").size() == 4);
  for (std::size_t i = 0; i < 4; ++i) {
    const Json &a = records("cpu")[i], &b = records("cuda")[i];
    CHECK(a["output"] == b["output"]);
    CHECK(a["correct"] == b["correct"]);
  }
}

TEST_CASE("a device that fails ends a run with its exit code, and the last checkpoint is whole") {
  if (!programs_emulate_cuda()) SKIP(kNoEmulatedCuda);
  const TempFolder folder;
  std::array<int64_t, 3> n{};
  {
    const WithVariable count("KAVA_EMULATED_FAIL", "count");
    const Ended whole = train_20(folder, "whole", {"--device", "cuda"});
    REQUIRE(whole.code == 0);
    n = counted(whole.err);
  }
  const auto [requests, launches, calls] = n;
  struct Failure {
    std::string kind;
    int64_t at;
    int code;
    bool later;  // after the first checkpoint
  };
  const Failure failures[] = {{"memory", 1, 3, false},          {"memory", requests, 3, false}, {"fault", launches / 2, 6, true},
                              {"fault", launches - 1, 6, true}, {"lost", calls / 20, 6, false}, {"lost", calls * 2 / 3, 6, true}};
  for (const Failure& f : failures) {
    const std::string out = fmt::format("{}_{}", f.kind, f.at);
    INFO(out);
    {
      const WithVariable fail("KAVA_EMULATED_FAIL", fmt::format("{}:{}", f.kind, f.at));
      check_refusal(train_20(folder, out, {"--device", "cuda"}), f.code, f.code == 3 ? "device memory" : "device: ");
    }
    if (!f.later) continue;
    const Ended resumed = train({folder / out, "--resume", "--device", "cuda"});
    CHECK(resumed.code == 0);
    CHECK(resumed.out.find("resuming") != std::string::npos);
    check_same_run(folder.path() / "whole", folder.path() / out);
  }
}

TEST_CASE("a run whose graphs fail says so in one line and gives what one with graphs does") {
  if (!programs_emulate_cuda()) SKIP(kNoEmulatedCuda);
  const TempFolder folder;
  const Ended with = train_20(folder, "with", {"--device", "cuda"});
  REQUIRE((with.code == 0 && with.err.empty()));
  const WithVariable fail("KAVA_EMULATED_FAIL", "capture:9");
  const Ended without = train_20(folder, "without", {"--device", "cuda"});
  CHECK(without.code == 0);
  CHECK(without.err ==
        "cuda (emulated): kernels are launched one by one, as graphs failed: cudaStreamEndCapture: operation failed due to a "
        "previous error during capture\n");
  check_same_run(folder.path() / "with", folder.path() / "without");
}

TEST_CASE("kava_bench runs everything on emulated cuda and says that its times mean nothing") {
  if (!programs_emulate_cuda()) SKIP(kNoEmulatedCuda);
  const TempFolder folder;
  const Ended bench = run_command("kava_bench --device cuda --shape tiny --json '" + folder / "bench.json" + "'");
  INFO(bench.err);
  REQUIRE(bench.code == 0);
  CHECK(bench.out.starts_with("emulated: "));
  CHECK(bench.out.find("step 3: ") != std::string::npos);
  CHECK(bench.out.find("counts at tiny's shape") != std::string::npos);
  const Json results = read_json(folder / "bench.json");
  REQUIRE(results.size() > 10);
  for (const Json& result : results) CHECK((result["device"] == "cuda (emulated)" && result["shape"] == "tiny"));
  const auto with_counts = std::ranges::find_if(results, [](const Json& result) { return result.contains("sectors"); });
  REQUIRE(with_counts != results.end());
  CHECK((*with_counts)["sectors"] >= (*with_counts)["fewest_sectors"]);
  for (const char* name : {"add_rms_norm_fwd", "rms_norm_bwd", "swiglu_fwd", "swiglu_bwd", "gelu_fwd"})
    for (const std::string at : {"", ", 32 rows"})
      CHECK(std::ranges::any_of(results, [&](const Json& result) { return result["name"] == name + at && result.contains("ceiling"); }));
  const auto step = std::ranges::find_if(results, [](const Json& result) { return result["name"] == "step"; });
  REQUIRE(step != results.end());
  CHECK(((*step)["uploads"] == 1 && (*step)["reads"] == 1 && (*step)["allocations"] == 0));
  CHECK((*step)["launches"] > (*step)["calls"]);
  const double most = (*step)["matrix_rate"].get<double>() * 1e9 * (*step)["seconds"].get<double>();
  CHECK((*step)["share"].get<double>() == Catch::Approx((*step)["flops"].get<double>() / most));
  CHECK((*step)["bytes"] > 0);
  for (const char* name : {"matrix rate", "copy rate"})
    CHECK(std::ranges::any_of(results, [&](const Json& result) { return result["name"] == name && result["rate"] > 0; }));
  // Of four steps the first runs kernel by kernel; each pass has a form and a graph of its own.
  const Json& graphs = (*step)["graphs"];
  CHECK(graphs["recorded"] > 0);
  CHECK(graphs["recorded"].get<int64_t>() == 3 * (graphs["recorded"].get<int64_t>() - graphs["updated"].get<int64_t>()));
  CHECK(graphs["fallbacks"] == 0);
  check_refusal(run_command("kava_bench --shape 7b"), 2, "--shape");
}

TEST_CASE("gpu_check on emulated cuda writes what it found, and without a device says so in one line") {
  if (!programs_emulate_cuda()) SKIP(kNoEmulatedCuda);
  const TempFolder folder;
  const std::string check = "'" + source_dir() + "/tools/gpu_check.sh' --bin '" + bin_dir() + "' --out '" + folder / "out" + "'";
  const auto run = [&](const std::string& command) { return run_command("kava_inspect --version >/dev/null; " + command); };
  const Ended whole = run(check + " --part 2");
  INFO(whole.out << whole.err);
  CHECK(whole.code == 0);
  const Json result = read_json(folder / "out/gpu_check.json");
  CHECK(result["emulated"] == true);
  const Json& results = result["results"];
  CHECK(results["samples_per_s"].get<double>() > 0);
  CHECK((results["plan_bytes"].get<int64_t>() > 0 && results["peak_bytes"].get<int64_t>() > 0));
  CHECK(results["peak_to_plan"].get<double>() ==
        Catch::Approx(results["peak_bytes"].get<double>() / results["plan_bytes"].get<double>()).margin(1e-4));
  for (const char* bench : {"bench_qwen05b", "bench_llama3b"}) CHECK(results[bench].back()["graphs"]["fallbacks"] == 0);
  for (const Json& c : result["checks"]) CHECK(c["result"] == "ok");
  CHECK(run(check + " --part 4").code == 2);
  {  // A doctor that misses nothing but what the device needs.
    const fs::path bin = folder.path() / "bin";
    StandIns{bin}.add("kava_inspect", "case \"$*\" in *--help) ;; 'doctor --device cuda '*) echo missing; exit 3 ;; *) exec '" + bin_dir() +
                                          "/kava_inspect' \"$@\" ;; esac");
    fs::create_symlink(bin_dir() + "/kava_train", bin / "kava_train");
    const Ended wrong =
        run("'" + source_dir() + "/tools/gpu_check.sh' --part 1 --bin '" + bin.string() + "' --out '" + folder / "wrong" + "'");
    INFO(wrong.out << wrong.err);
    CHECK(wrong.code == 1);
    CHECK(wrong.out.find("failed   doctor: exit 3: missing") != std::string::npos);
  }
  const WithVariable no_device("KAVA_EMULATED_DEVICES", "0");
  const Ended none = run(check);
  CHECK(none.code == 3);
  CHECK(std::count(none.err.begin(), none.err.end(), '\n') == 1);
  CHECK(none.err.find("no device") != std::string::npos);
}

TEST_CASE("gpu_check tells a fault from a test that its time cut short") {
  const TempFolder folder;
  const auto fault = [&](const std::string& log) {
    overwrite(folder / "log", log);
    return run_command("kava_inspect --version >/dev/null; eval \"$(sed -n '/^first_fault()/,/^}/p' '" + source_dir() +
                       "/tools/gpu_check.sh')\"; first_fault '" + folder / "log" + "'")
        .out;
  };
  const std::string cut =
                        "test_a.cpp:37: FAILED:\n  {Unknown expression after the reported line}\ndue to a fatal error condition:\n"
                        "  SIGTERM - Termination request signal\n\n=====\ntest cases: 3 | 2 passed | 1 failed\n",
                    failed = "test_b.cpp:9: FAILED:\n  CHECK( 1 == 2 )\n\n-------\n";
  CHECK(fault(cut).empty());
  CHECK(fault(failed + cut) == "test_b.cpp:9: FAILED:\n");
  CHECK(fault("test_a.cpp:9: FAILED:\n  CHECK( 1 == 2 )\n\n" + cut) == "test_a.cpp:9: FAILED:\n");  // of one test case
  CHECK(fault("========= Program hit cudaErrorMisalignedAddress (error 716) due to \"misaligned address\"\n").find("hit") !=
        std::string::npos);
  CHECK(fault("test_b.cpp:9: FAILED:\n  CHECK( 1 == 2 )\n") == "test_b.cpp:9: FAILED:\n");
  CHECK(fault("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n========= Error: process didn't terminate\n")
            .empty());
  CHECK(fault("========= ERROR SUMMARY: 12 errors\n") == "========= ERROR SUMMARY: 12 errors\n");
  CHECK(fault("========= Invalid __global__ read of size 4 bytes\n").starts_with("========= Invalid"));
}

TEST_CASE("gpu_check takes a rival that is not there for no fault of the bench, and any other exit of 3 for one") {
  const TempFolder folder;
  const fs::path bin = folder.path() / "bin";
  const StandIns programs{bin};
  programs.add("kava_train", "echo 'kava 1'; echo '  cuda (emulated): GPU'");
  programs.add("kava_inspect", "exit 0");
  const auto check = [&] {
    return run_command("kava_inspect --version >/dev/null; '" + source_dir() + "/tools/gpu_check.sh' --part 2 --bin '" + bin.string() +
                       "' --out '" + folder / "out" + "'");
  };
  programs.add("kava_bench", "echo 'rope 1 ms'; echo 'error: rivals: no libcudnn.so.9 is found; install it' >&2; exit 3");
  const Ended no_rival = check();
  INFO(no_rival.out << no_rival.err);
  CHECK(no_rival.code == 0);
  CHECK(no_rival.out.find("ok       bench: ") != std::string::npos);
  CHECK(no_rival.out.find("skipped  bench_rivals: error: rivals: no libcudnn") != std::string::npos);
  programs.add("kava_bench", "echo 'error: values: attention_bwd: dq is 0.9 away from cuDNN; run the tests' >&2; exit 5");
  CHECK(check().code == 1);
  programs.add("kava_bench", "echo 'error: memory: a step takes 9 MiB, the device has 8' >&2; exit 3");
  const Ended small = check();
  CHECK(small.code == 0);
  CHECK(small.out.find("skipped  bench: error: memory: a step takes 9 MiB") != std::string::npos);
  programs.add("kava_bench", "echo 'error: device: the driver is too old' >&2; exit 3");
  const Ended failed = check();
  CHECK(failed.code == 1);
  CHECK(failed.out.find("failed   bench: exit 3: error: device: ") != std::string::npos);
  CHECK(read_json(folder / "out/gpu_check.json")["checks"][0]["result"] == "failed");
}

TEST_CASE("kava_bench takes a cuBLASLt that is there and makes other products for a fault, and none for no rival") {
  if (!programs_emulate_cuda()) SKIP(kNoEmulatedCuda);
  const std::string bench = "kava_bench --device cuda --shape tiny --filter '^product qkv'";
  const WithVariable second("KAVA_EMULATED_LT", "wrong:2");
  const Ended wrong = run_command(bench);
  check_refusal(wrong, 5, "values");
  CHECK(wrong.err.find("cuBLASLt's product nn to bf16 is not the own kernel's") != std::string::npos);
  const WithVariable none("KAVA_EMULATED_LT", "none");
  const Ended unmade = run_command(bench);
  check_refusal(unmade, 5, "values");
  CHECK(unmade.err.find("cuBLASLt makes none of the products") != std::string::npos);
  const WithVariable all("KAVA_EMULATED_LT", "all");
  CHECK(run_command(bench).code == 0);
}

TEST_CASE("kava_bench ends with 3 and a line where a rival is missing") {
  if (!programs_emulate_cuda()) SKIP(kNoEmulatedCuda);
  const std::string bench = "kava_bench --device cuda --shape tiny --filter '^product qkv'";
  CHECK(run_command(bench).code == 0);
  const WithVariable judged("KAVA_EMULATED_RIVALS", "1");
  const Ended missing = run_command(bench);
  check_refusal(missing, 3, "rivals");
  CHECK(missing.err.find("cuBLASLt is not there") != std::string::npos);
  CHECK(missing.out.find("product qkv, own kernel") != std::string::npos);
  const WithVariable twin("KAVA_EMULATED_LT", "all");
  CHECK(run_command(bench).code == 0);
}

TEST_CASE("gpu_check ends in its time whatever hangs, and tells of the clocks") {
  const TempFolder folder;
  const fs::path bin = folder.path() / "bin";
  const StandIns programs{bin};
  programs.add("kava_train",
               "case \"$*\" in *--version) echo 'kava_train 1 (commit abc)'; echo '  cuda (emulated): GPU' ;; *) exec sleep 1000 ;; esac");
  programs.add("kava_inspect", "exit 0");
  programs.add("kava_bench", "exec sleep 1000");
  programs.add("nvidia-smi",
               "case \"$*\" in *' -l 1 '*) sleep 3; cat <<EOF; exec sleep 1000 ;; *) echo GPU ;; esac\n"
               "timestamp, index, clocks.current.sm [MHz], more, clocks_event_reasons.active\n"
               "1, 0, 1500 MHz, 1, 0x0000000000000000\n2, 0, 210 MHz, 1, 0x0000000000000001\n3, 0, 1980 MHz, 1, 0x0000000000000004\nEOF");
  const auto begin = std::chrono::steady_clock::now();
  const Ended ended =
      run_command("kava_inspect --version >/dev/null; PATH='" + bin.string() + "':$PATH GPU_CHECK_SECONDS=22 '" + source_dir() +
                  "/tools/gpu_check.sh' --part 2 --bin '" + bin.string() + "' --out '" + folder / "out" + "'");
  INFO(ended.out << ended.err);
  CHECK(ended.code == 0);
  CHECK(ended.out.find("skipped  bench: cut short after ") != std::string::npos);
  CHECK(ended.out.find("skipped  ranks: the minutes of this part are over") != std::string::npos);
  CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(500));
  const Json found = read_json(folder / "out/gpu_check.json");
  CHECK(found["commit"] == "abc");
  CHECK(found["results"]["part_2_clocks"] ==
        Json{{"sm_mhz", {210, 1500, 1980}}, {"reasons", {"0x0000000000000001", "0x0000000000000004"}}});
}

TEST_CASE("kava_bench writes what it measured before the memory of a device ran out") {
  if (!programs_emulate_cuda()) SKIP(kNoEmulatedCuda);
  const TempFolder folder;
  const WithVariable memory("KAVA_EMULATED_MEMORY", "2300000");
  const Ended bench = run_command("kava_bench --device cuda --shape tiny --filter '^(step|rope)$' --json '" + folder / "bench.json" + "'");
  check_refusal(bench, 3, "memory");
  const Json results = read_json(folder / "bench.json");
  const auto has = [&](const char* name) {
    return std::ranges::any_of(results, [&](const Json& result) { return result["name"] == name && !result.contains("sectors"); });
  };
  CHECK((has("rope") && has("copy rate") && !has("step")));
  const WithVariable none("KAVA_EMULATED_MEMORY", "100000");
  check_refusal(run_command("kava_bench --device cuda --shape tiny --filter rope --json '" + folder / "bench.json" + "'"), 3, "memory");
  CHECK(read_json(folder / "bench.json") == results);  // nothing was measured
}

}  // namespace kava
