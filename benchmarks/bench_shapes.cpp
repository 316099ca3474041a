#include "benchmarks/bench_shapes.h"

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "engine/error.h"

namespace kava {

namespace {

// The rows of the larger ones are those of the first pass at that batch.
const Shapes kShapes[] = {
    {"smollm2", "llama", 30, 576, 9, 3, 64, 1536, 49152, 1e5, 32, 3072, 128, 512, 8 << 20, 64 << 20, 2048},
    {"llama1b", "llama", 16, 2048, 32, 8, 64, 8192, 128256, 5e5, 128, 11072, 128, 2816, 64 << 20, 512 << 20, 8192},
    {"qwen05b", "qwen2", 24, 896, 14, 2, 64, 4864, 151936, 1e6, 128, 11072, 128, 2816, 64 << 20, 512 << 20, 8192},
    {"llama3b", "llama", 28, 3072, 24, 8, 128, 8192, 128256, 5e5, 128, 11072, 128, 2816, 64 << 20, 512 << 20, 8192},
    {"qwen3_06b", "qwen3", 28, 1024, 16, 8, 128, 3072, 151936, 1e6, 128, 11072, 128, 2816, 64 << 20, 512 << 20, 8192},
    {"tiny", "llama", 2, 64, 4, 2, 16, 160, 512, 1e4, 2, 140, 8, 32, 4096, 1 << 16, 64},
};

uint64_t hashed(uint64_t n) {
  uint64_t x = (n + 1) * 0x9E3779B97F4A7C15u;
  x ^= x >> 32;
  x *= 0xD6E8FEB86659FD93u;
  return x ^ (x >> 32);
}

}  // namespace

ModelConfig Shapes::model() const {
  if (given) return *given;
  ModelConfig m;
  m.family = family;
  m.layers = layers, m.hidden = hidden, m.heads = heads, m.kv_heads = kv_heads, m.head_dim = head_dim, m.mlp = mlp, m.vocab = vocab;
  m.tied = true, m.norm_eps = 1e-5, m.rope_theta = rope_theta, m.initializer_range = 1 / std::sqrt(static_cast<double>(hidden));
  m.max_positions = 8192;
  return m;
}

Shapes shapes_of(const std::string& name, const std::string& base) {
  std::string all;
  for (const Shapes& s : kShapes) {
    if (s.name == name) return s;
    all += (all.empty() ? "" : &s == std::end(kShapes) - 1 ? " or " : ", ") + s.name;
  }
  std::error_code ignored;
  if (!std::filesystem::is_directory(name, ignored))
    throw Error(Exit::usage, "--shape", "\"" + escaped(name) + "\" is none", "give " + all + ", or the folder of a model");
  Shapes s = shapes_of(base, base);
  ModelConfig m = ModelConfig::load(name);
  s.name = escaped(std::filesystem::weakly_canonical(name).filename().string());
  s.family = m.family, s.layers = m.layers, s.hidden = m.hidden, s.heads = m.heads, s.kv_heads = m.kv_heads, s.head_dim = m.head_dim;
  s.mlp = m.mlp, s.vocab = m.vocab, s.rope_theta = m.rope_theta;
  // Of a model of tests the largest product of the base would take longer than all else.
  s.product = std::min(s.product, std::max<int64_t>(64, 4 * std::max(s.hidden, s.mlp)));
  m.dropouts.clear();
  s.given = std::move(m);
  return s;
}

std::string shapes_help() {
  return "smollm2 (default on the cpu), llama1b (default on cuda), qwen05b, llama3b, qwen3_06b or tiny; or the folder of a model, of which "
         "config.json is read, with batch and rows as by default. Where cuda is emulated, kernels are counted at it (default llama1b, "
         "qwen05b and llama3b), and all is run once at tiny";
}

std::vector<Sample> bench_samples(int64_t vocab, int64_t batch) {
  uint64_t at = uint64_t{1} << 32;
  auto ids = [&](std::vector<int32_t>& to, uint64_t count) {
    for (uint64_t i = 0; i < count; ++i) to.push_back(static_cast<int32_t>(3 + hashed(at++) % static_cast<uint64_t>(vocab - 3)));
  };
  std::vector<Sample> samples;
  constexpr uint64_t kFirst = 20480;  // from here on the means are those of real data
  for (uint64_t s = 0; s < static_cast<uint64_t>(batch); ++s) {
    uint64_t u[4];
    for (uint64_t k = 0; k < 4; ++k) u[k] = hashed(4 * (s + kFirst) + k) >> 48;
    const uint64_t steps = uint64_t{u[2] >= 6554} + uint64_t{u[2] >= 36045} + uint64_t{u[2] >= 55706} + uint64_t{u[2] >= 62259};
    Sample x;
    ids(x.question, 20 + (26 * u[0] >> 16) + (54 * u[1] * u[1] * u[1] >> 48));
    const uint64_t trace = steps == 0 ? 0 : 8 * steps - 1 + (3 * (u[3] & 255) >> 8);
    ids(x.trace, trace);
    ids(x.answer, 6 + uint64_t{u[3] < 19661});
    x.prompt = 4;
    for (uint64_t i = 0; i < steps; ++i) x.steps.push_back(static_cast<int32_t>((i + 1) * trace / steps - i * trace / steps));
    samples.push_back(std::move(x));
  }
  return samples;
}

std::vector<Sample> bench_samples_in_steps(int64_t vocab, int64_t batch) {
  constexpr int32_t kLastStep = 8;
  std::vector<Sample> samples = bench_samples(vocab, batch);
  for (Sample& s : samples) {
    s.trace.insert(s.trace.end(), kLastStep, 3);
    s.steps.push_back(kLastStep);
  }
  return samples;
}

}  // namespace kava
