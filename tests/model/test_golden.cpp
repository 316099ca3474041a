// The whole KaVa step against the PyTorch reference: every tensor that `kava_inspect step` writes, on tiny models (tests/golden/README.md).
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <set>

#include "engine/files/files.h"
#include "engine/files/json.h"
#include "engine/files/safetensors.h"
#include "tests/programs/programs_cuda.h"

namespace fs = std::filesystem;
using namespace kava;

namespace {

const fs::path kGoldenFolder = fs::path(source_dir()) / "tests/golden";

double sign(uint64_t n) {
  uint64_t x = (n + 1) * 0x9E3779B97F4A7C15u;
  x ^= x >> 32;
  x *= 0xD6E8FEB86659FD93u;
  x ^= x >> 32;
  return x >> 63 ? -1 : 1;
}

constexpr std::string_view kDots = "dots.";

std::vector<double> values(const SafetensorsFile& file, const TensorInfo& t) {
  std::vector<double> x(static_cast<std::size_t>(t.count()));
  if (t.dtype == "I32") {
    std::vector<int32_t> raw(x.size());
    file.read(t, raw.data());
    x.assign(raw.begin(), raw.end());
  } else {
    file.read_as(t, DType::f64, x.data());
  }
  return x;
}

std::vector<double> dots(const std::vector<double>& x) {
  std::vector<double> out(16, 0.0);
  for (std::size_t i = 0; i < x.size(); ++i)
    for (std::size_t d = 0; d < 16; ++d) out[d] += sign(16 * i + d) * x[i];
  return out;
}

double error_to_stored(const std::vector<double>& found, const std::vector<double>& stored) {
  double difference = 0, norm = 0, own = 0;
  for (std::size_t i = 0; i < stored.size(); ++i) {
    difference += (found[i] - stored[i]) * (found[i] - stored[i]);
    norm += stored[i] * stored[i];
    own += found[i] * found[i];
  }
  if (stored.empty()) return 0;
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(own / static_cast<double>(stored.size()));
}

void compare(const std::string& name, const SafetensorsFile& golden, const SafetensorsFile& step, const Json* f32_errors) {
  std::set<std::string> expected;
  for (const TensorInfo& t : golden.tensors()) {
    const bool projected = t.name.starts_with(kDots);
    const std::string tensor = projected ? t.name.substr(kDots.size()) : t.name;
    expected.insert(tensor);
    const TensorInfo* found = step.find(tensor);
    INFO(name << ": " << tensor);
    REQUIRE(found);
    if (!projected) REQUIRE(found->shape == t.shape);
    std::vector<double> x = values(step, *found);
    if (projected) x = dots(x);
    const std::vector<double> y = values(golden, t);
    REQUIRE(x.size() == y.size());
    if (t.dtype == "I32") {
      CHECK(x == y);
      continue;
    }
    double limit = 1e-9;
    if (f32_errors) limit = 10 * f32_errors->at(t.name).get<double>() + 1e-6;
    CHECK(error_to_stored(x, y) <= limit);
  }
  for (const TensorInfo& t : step.tensors()) {
    INFO(name << ": " << t.name << " is written but not expected");
    CHECK(expected.contains(t.name));
  }
}

/// method: of KaVa and the methods that share its step, with Llama and Qwen2 (method.md). more: Coconut, iCoT and exact CODI, and Qwen3 and
/// GPT-2.
enum class Cases { method, more, all };

/// The files of tests/golden/cases, without their ending.
std::vector<fs::path> cases(Cases which = Cases::all) {
  std::vector<fs::path> some;
  for (const auto& entry : fs::directory_iterator(kGoldenFolder / "cases")) {
    if (entry.path().extension() != ".toml") continue;
    const std::string name = entry.path().stem().string();
    const auto names = [&](const char* part) { return name.find(part) != std::string::npos; };
    const bool more = names("coconut") || names("icot") || names("codi_exact") || names("qwen3") || names("gpt2");
    if (which == Cases::all || more == (which == Cases::more)) some.push_back(entry.path().parent_path() / name);
  }
  REQUIRE(some.size() == (which == Cases::all ? 85 : which == Cases::more ? 41 : 44));
  return some;
}

SafetensorsFile run_step(const fs::path& name, const std::string& dtype, const std::string& device, const std::string& out) {
  const Ended run = run_command(
      fmt::format("kava_inspect step '{}.toml' --set model.dtype={} --device {} --out '{}'", name.string(), dtype, device, out));
  INFO(name << ": " << run.err);
  REQUIRE(run.code == 0);
  return SafetensorsFile::open(out);
}

void run_cases(Cases which, const std::string& dtype, const std::string& device = "cpu") {
  const Json errors = read_json((kGoldenFolder / "f32_errors.json").string());
  const TempFolder temporary;
  for (const fs::path& file : cases(which)) {
    const std::string name = file.stem().string();
    const SafetensorsFile golden = SafetensorsFile::open(file.string() + ".safetensors");
    compare(name, golden, run_step(file, dtype, device, temporary / "step.safetensors"), dtype == "f32" ? &errors.at(name) : nullptr);
  }
}

/// Of all gradients of a step together, relative.
double gradient_error(const SafetensorsFile& step, const SafetensorsFile& exact) {
  std::vector<double> found, expected;
  for (const TensorInfo& t : exact.tensors()) {
    if (!t.name.starts_with("grad.")) continue;
    const std::vector<double> x = values(step, *step.find(t.name)), y = values(exact, t);
    found.insert(found.end(), x.begin(), x.end()), expected.insert(expected.end(), y.begin(), y.end());
  }
  return error_to_stored(found, expected);
}

}  // namespace

TEST_CASE("what a step keeps or computes again changes none of its bytes") {
  const TempFolder temporary;
  int cases = 0;
  for (const auto& entry : fs::directory_iterator(kGoldenFolder / "cases")) {
    if (entry.path().extension() != ".toml") continue;
    const std::string name = entry.path().stem().string();
    for (const char* dtype : {"f64", "bf16"}) {
      if (dtype == std::string_view("bf16") && name != "kava_seven_linears" && name != "qwen2_all" && name != "codi_exact") continue;
      std::string kept;
      for (const char* recompute : {"none", "cheap", "block"}) {
        const std::string out = temporary / "step.safetensors";
        const Ended run = run_command(fmt::format("kava_inspect step '{}' --set model.dtype={} --set train.recompute={} --out '{}'",
                                                  entry.path().string(), dtype, recompute, out));
        INFO(name << " in " << dtype << ", " << recompute << ": " << run.err);
        REQUIRE(run.code == 0);
        const std::string bytes = read_file(out, 1 << 26);
        if (kept.empty()) kept = bytes;
        else CHECK((bytes == kept));
      }
      ++cases;
    }
  }
  REQUIRE(cases == 85 + 3);
}

TEST_CASE("every tensor of the step equals the reference in f64") { run_cases(Cases::method, "f64"); }
TEST_CASE("every tensor of the other methods' and models' step equals the reference in f64") { run_cases(Cases::more, "f64"); }

TEST_CASE("every tensor of the step equals the reference in f32 as far as f32 can") { run_cases(Cases::method, "f32"); }
TEST_CASE("every tensor of the other methods' and models' step equals the reference in f32 as far as f32 can") {
  run_cases(Cases::more, "f32");
}

TEST_CASE("every tensor of the step on cuda equals the reference in f32 as far as f32 can", "[device]") {
  if (programs_cuda().empty()) SKIP(kNoCuda);
  run_cases(Cases::all, "f32", "cuda");
}

// Which way a rounding falls in a step this small says little about one case: the root mean square over the cases does.
TEST_CASE("bf16 gradients on cuda are at most 1.5 times as far from f64 as the cpu's", "[device]") {
  if (programs_cuda().empty()) SKIP(kNoCuda);
  const TempFolder temporary;
  double on_cpu = 0, on_cuda = 0;
  for (const fs::path& file : cases()) {
    const SafetensorsFile exact = run_step(file, "f64", "cpu", temporary / "exact");
    on_cpu += std::pow(gradient_error(run_step(file, "bf16", "cpu", temporary / "cpu"), exact), 2);
    on_cuda += std::pow(gradient_error(run_step(file, "bf16", "cuda", temporary / "cuda"), exact), 2);
  }
  INFO("cuda " << std::sqrt(on_cuda) << ", cpu " << std::sqrt(on_cpu));
  CHECK(on_cuda <= 1.5 * 1.5 * on_cpu);
}

TEST_CASE("a step with numbers that are not finite is written out, with a line that names what they are in") {
  const TempFolder folder;
  fs::copy(kGoldenFolder / "models/llama", folder / "large", fs::copy_options::recursive);
  std::string weights = read_file(folder / "large/model.safetensors", 1 << 24);
  uint64_t header = 0;
  std::memcpy(&header, weights.data(), sizeof header);
  const float large = 1e37f;
  for (std::size_t i = 8 + header; i + sizeof large <= weights.size(); i += sizeof large) std::memcpy(&weights[i], &large, sizeof large);
  overwrite(folder / "large/model.safetensors", weights);
  const std::string step = "kava_inspect step '" + (kGoldenFolder / "cases/kava_defaults.toml").string() +
                           "' --set model.dtype=f32 --out '" + folder / "step" + "'";
  const Ended ended = run_command(step + " --set model.path='" + folder / "large" + "'");
  CHECK(ended.code == 0);
  CHECK(ended.err.starts_with("not finite: grad."));
  CHECK(std::ranges::count(ended.err, '\n') == 1);
  CHECK(ended.err.find(" more\n") != std::string::npos);
  CHECK(run_command(step).err.empty());
}
