#include "models/starts.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>

#include "engine/device/host.h"
#include "engine/error.h"
#include "engine/files/files.h"
#include "engine/rng.h"
#include "engine/text/tokenizer.h"
#include "models/recipe.h"

namespace kava {

namespace {

using Start = TrainableSpec::Start;

// Numbers drawn for the start of one tensor: a stream of its own per name, so that adding a tensor changes no other.
class Stream {
 public:
  Stream(int64_t seed, const std::string& name) : key_(philox_key(Purpose::init, static_cast<uint64_t>(seed))) {
    uint64_t h = 0xcbf29ce484222325u;  // FNV-1a
    for (unsigned char c : name) h = (h ^ c) * 0x100000001b3u;
    name_ = {static_cast<uint32_t>(h), static_cast<uint32_t>(h >> 32)};
  }
  /// std times the normal numbers from `begin` on, which four divides.
  void normals(int64_t begin, std::span<double> out, double std) const {
    for (std::size_t i = 0; i < out.size(); i += 4) {
      const auto w = words((begin + static_cast<int64_t>(i)) / 4);
      const auto a = normal_pair(w[0], w[1]), b = normal_pair(w[2], w[3]);
      const double z[4] = {a[0], a[1], b[0], b[1]};
      for (std::size_t j = 0; j < std::min<std::size_t>(4, out.size() - i); ++j) out[i + j] = std * z[j];
    }
  }
  double uniform(int64_t i) const { return uniform01(words(i)[0]); }

 private:
  std::array<uint32_t, 4> words(int64_t i) const {
    return philox({static_cast<uint32_t>(i), static_cast<uint32_t>(i >> 32), name_[0], name_[1]}, key_);
  }
  std::array<uint32_t, 2> key_, name_{};
};

// Standard deviation of model.init = "random".
double random_std(const WeightSpec& spec, const ModelConfig& shape) {
  if (spec.role == WeightSpec::Role::residual_linear)
    return 1 / std::sqrt(static_cast<double>(spec.cols)) / std::sqrt(2.0 * static_cast<double>(shape.layers));
  return 1 / std::sqrt(static_cast<double>(spec.cols));  // embeddings and head: cols = C
}

// What starts take from the embedding: the mean of its rows and the root mean square of its elements.
struct EmbeddingStatistics {
  std::vector<double> mean;
  double rms = 0;
};

EmbeddingStatistics statistics_of(Ops& ops, const Tensor& table) {
  constexpr int64_t kRows = 256;
  EmbeddingStatistics s;
  s.mean.assign(static_cast<std::size_t>(table.cols), 0.0);
  for (int64_t begin = 0; begin < table.rows; begin += kRows) {
    const std::vector<double> rows = to_host(ops, table.row_range(begin, std::min(table.rows, begin + kRows)));
    for (std::size_t i = 0; i < rows.size(); i += s.mean.size())
      for (std::size_t c = 0; c < s.mean.size(); ++c) s.mean[c] += rows[i + c], s.rms += rows[i + c] * rows[i + c];
  }
  for (double& m : s.mean) m /= static_cast<double>(table.rows);
  s.rms = std::sqrt(s.rms / static_cast<double>(table.count()));
  return s;
}

// The one token that latent.token_init is.
int64_t start_token(const RunConfig& config) {
  const auto refuse = [&](const std::string& what, const char* remedy) {
    throw Error(Exit::usage, "latent.token_init", fmt::format("\"{}\" {}", escaped(config.latent.token_init), what), remedy);
  };
  if (!is_there(std::filesystem::path(config.model.path) / "tokenizer.json"))
    refuse("needs a tokenizer, and the model's folder has none", "set it to \"\" for the mean of all rows, or add tokenizer.json");
  const std::vector<int32_t> ids = Tokenizer::load(config.model.path).encode_with_special(config.latent.token_init);
  if (ids.size() != 1) refuse(fmt::format("is {} tokens", ids.size()), "give a text that is one token, or \"\" for the mean of all rows");
  return ids[0];
}

bool reads_embedding(const TrainableSpec& t) { return t.start == Start::mean_embedding || t.start == Start::embedding_rms; }

}  // namespace

void set_random_weight(Ops& ops, const Tensor& to, const WeightSpec& spec, const ModelConfig& shape, int64_t seed) {
  if (spec.vector()) return ops.fill(to, spec.role == WeightSpec::Role::gain ? 1 : 0);
  const Stream stream(seed, spec.name);
  const double std = random_std(spec, shape);
  from_host(ops, to, [&](int64_t begin, std::span<double> out) { stream.normals(begin, out, std); });
}

void require_token_init(const RunConfig& config) {
  if (recipe_of(config).markers && config.model.adapter.empty() && !config.latent.token_init.empty()) (void)start_token(config);
}

void set_starts(Model& model, const std::vector<TrainableSpec>& specs) {
  Ops& ops = model.ops;
  EmbeddingStatistics embedding;
  if (std::ranges::any_of(specs, reads_embedding)) embedding = statistics_of(ops, model.embedding);
  for (const TrainableSpec& t : specs) {
    const Tensor& to = model.parameters.at(t.name).value;
    const Stream stream(model.config.seed, t.name);
    const double bound = 1 / std::sqrt(static_cast<double>(t.cols));
    auto each = [&](auto&& value) {
      from_host(ops, to, [&](int64_t begin, std::span<double> out) {
        for (std::size_t i = 0; i < out.size(); ++i) out[i] = value(begin + static_cast<int64_t>(i));
      });
    };
    switch (t.start) {
      case Start::base:
      case Start::zero:
        break;
      case Start::lora_a:
        each([&](int64_t i) { return (2 * stream.uniform(i) - 1) * bound; });
        break;
      case Start::normal:
        if (const double range = model.shape.initializer_range; !(range > 0 && range <= 1))
          throw Error(Exit::data, model.shape.source, fmt::format("initializer_range = {} must be above 0 and at most 1", range),
                      "correct it: the latents' projection is drawn by it");
        from_host(ops, to, [&](int64_t begin, std::span<double> out) { stream.normals(begin, out, model.shape.initializer_range); });
        break;
      case Start::one:
        ops.fill(to, 1);
        break;
      case Start::identity:
        each([&](int64_t i) { return i / t.cols == i % t.cols ? 1.0 : 0.0; });
        break;
      case Start::mean_embedding:
        each([&](int64_t i) { return embedding.mean[static_cast<std::size_t>(i % t.cols)]; });
        break;
      case Start::token_row: {
        if (!model.config.model.adapter.empty()) break;  // which holds these rows
        const int64_t id = start_token(model.config);
        const std::vector<double> row = to_host(ops, model.embedding.row_range(id, id + 1));
        each([&](int64_t i) { return row[static_cast<std::size_t>(i % t.cols)]; });
        break;
      }
      case Start::embedding_rms:
        ops.fill(to, embedding.rms);
        break;
    }
  }
}

}  // namespace kava
