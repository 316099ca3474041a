// A model in memory: the base's weights, the trainables on top of them, and the maps that the passes apply.
#pragma once
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/config/config.h"
#include "engine/device/ops.h"
#include "models/config.h"
#include "models/params.h"
#include "models/weights.h"

namespace kava {

/// The type that a model.dtype names.
DType storage_of(StorageType t);

// What PEFT puts before the names of an adapter's tensors.
inline const std::string kLoraPrefix = "base_model.model.";

/// Linear maps of one input with the gradients of their trainable parts.
struct TrainedGroup {
  LinearGroup map;
  LinearGroupGrad grad;

  TrainedGroup out_range(int64_t begin, int64_t end) const { return {map.out_range(begin, end), grad.out_range(map, begin, end)}; }
};

/// A norm with its gradients where it is trained. bias: of a LayerNorm. All are empty where the architecture has no such norm.
struct Norm {
  Tensor gain, bias, dgain, dbias;  // [1, columns]
};

/// The block of models/transformer.h in the terms of its Architecture.
struct LayerWeights {
  Norm norm1, norm2, q_norm, k_norm;
  TrainedGroup qkv, o, gate_up, down;  // the four groups of maps; gate_up: the one map into the activation where there is no gate
};

/// prj of docs/method.md section 3: Linear, GELU, Linear, LayerNorm.
struct LatentProjection {
  TrainedGroup linear1, linear2;
  Tensor norm_w, norm_b, dnorm_w, dnorm_b;
};

struct KvProjection {
  TrainedGroup k, v;  // [D, D]
};

/// A trainable tensor by its name in the adapter (or checkpoint), and how it starts.
struct TrainableSpec {
  enum class Start { base, lora_a, zero, mean_embedding, token_row, normal, embedding_rms, one, identity };
  std::string name;
  int64_t rows = 0, cols = 0;
  bool vector = false, decay = true;
  Start start = Start::zero;
  bool joined = false;      // lies without a gap behind the one of the same kind before it: rows of one packed tensor
  bool transposed = false;  // [cols, rows] in files
};
/// All trainables of a run, in the order of its files; needs no weights.
std::vector<TrainableSpec> trainable_specs(const RunConfig& config, const ModelConfig& shape);

/// Where a model's values come from. start: the base's weights, and every trainable at its start. loaded: the frozen weights of the base;
/// the trainables are read afterwards, all of them (load_adapter, load_optimizer). none: nothing is read or drawn, which is enough to plan
/// a step on a dry backend.
enum class Values { start, loaded, none };

/// Error(code usage): a device of this name does not store that type.
[[noreturn]] void refuse_storage(DType storage, std::string_view device);

class Model {
 public:
  /// Reads (or, for model.init = "random", draws) what `values` says. The adapter is not read.
  Model(Ops& ops, const RunConfig& config, const ModelConfig& shape, Values values = Values::start, ModelUse use = ModelUse::training);
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  /// What the model has of the base under this name; empty where that is nothing, or trained.
  Tensor base_tensor(const std::string& name) const;

  /// The rotary tables reach at least this many positions afterwards; learned ones must.
  void ensure_positions(int64_t count);

  Ops& ops;
  const RunConfig config;
  const ModelConfig shape;
  const DType storage;
  std::string base_digest;  // SHA-256 of config.json and the weights' headers; empty for init = "random"

  Tensor embedding, head, dembedding, dhead;  // [V, C]; head is embedding where tied
  Tensor positions, dpositions;               // [P, C], added to the first layer's input; empty where positions are rotary
  Norm final_norm;
  Tensor new_tokens, dnew_tokens;  // [3, C]: bot, eot, latent; empty without markers
  std::vector<LayerWeights> layers;
  std::optional<LatentProjection> projection;
  std::vector<KvProjection> kv_projection;  // per layer, empty when off
  Tensor cosine, sine;                      // [positions, D/2]; empty where positions are learned
  ParameterStore parameters;

 private:
  Tensor allocate(DType dtype, int64_t rows, int64_t cols);
  void allocate_groups();
  void bind();
  TrainedGroup bind_group(const std::string& layer, const std::vector<LinearSpec>& maps);
  Norm bind_norm(const std::string& path);
  TrainedGroup bind_plain(const std::string& path, bool bias);

  std::vector<Buffer> owned_;
  std::vector<std::pair<std::string, Tensor>> frozen_;
  Buffer cosine_, sine_;
  int64_t table_positions_ = 0;
};

}  // namespace kava
