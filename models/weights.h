// The tensors of a model: which there must be, and reading them from a Hugging Face folder.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "engine/device/ops.h"
#include "engine/files/safetensors.h"
#include "models/config.h"

namespace kava {

struct WeightSpec {
  enum class Role { embedding, linear, residual_linear, gain, bias };  // residual_linear: one whose result is added to the residual
  std::string name;                                                    // as in the folder: model.layers.N.self_attn.q_proj.weight ...
  Role role = Role::linear;
  std::int64_t rows = 0, cols = 0;
  bool transposed = false;                                                  // [cols, rows] in the file
  bool joined = false;                                                      // of a map behind the first of those that share its input
  bool vector() const { return role == Role::gain || role == Role::bias; }  // one-dimensional in the file, rows = 1
  std::vector<std::int64_t> file_shape() const {
    return vector() ? std::vector{cols} : transposed ? std::vector{cols, rows} : std::vector{rows, cols};
  }
};

/// Every tensor of the model: embeddings, layers in order, final norm, and lm_head.weight where it is untied.
std::vector<WeightSpec> weight_specs(const ModelConfig& config);

/// Sets the elements of a tensor (f32, f64 or bf16) to those of a file, each rounded once to nearest even, through a buffer of a
/// few megabytes, or of the whole tensor where the file has it transposed. first_row: of the file's tensor, where `to` is a part of its
/// rows. Error(code data) naming the tensor where a value is, or becomes in that type, NaN or infinite.
void read_tensor(Ops& ops, const Tensor& to, const SafetensorsFile& file, const TensorInfo& tensor, bool transposed = false,
                 std::int64_t first_row = 0);

/// The files that the weights of a folder are read from, whether they are there or not: model.safetensors, else the index and the shards
/// that it names; model.safetensors where there is neither. Error(code data) for an index that is none.
std::vector<std::string> weight_paths(const std::string& folder);

/// The weights of a folder: model.safetensors, else the shards that model.safetensors.index.json names. Reads may come from several
/// threads.
class WeightFiles {
 public:
  /// Reads headers only. Error(code data) naming the tensor when one is missing, extra, of another shape or of a dtype that is not F64,
  /// F32, F16 or BF16. A lm_head.weight that is bitwise the embedding is accepted where the head is tied; rotary_emb.inv_freq and the
  /// architecture's buffers are ignored. Names may lack the architecture's prefix (a model saved without its head), and a tied
  /// lm_head.weight may stand for the embedding.
  static WeightFiles open(const std::string& folder, const ModelConfig& config);

  /// As read_tensor, by the tensor's name.
  void read(const WeightSpec& spec, Ops& ops, const Tensor& to) const;

  /// The headers of all files, in order of their names: what identifies the weights without reading them.
  std::string header_text() const;
  std::vector<std::string> paths() const;

  /// Whether a tensor of the files is one that nobody reads.
  bool passes_over(const std::string& name) const;
  /// The name of a tensor of the files in a model with its head.
  std::string name_with_prefix(const std::string& name) const;

 private:
  const SafetensorsFile& file_of(const std::string& name) const;

  std::string name_in_file(const std::string& name) const;

  std::vector<SafetensorsFile> files_;
  ModelConfig config_;
  std::string prefix_, embedding_;
  bool bare_names_ = false, head_alone_ = false;
};

/// SHA-256 of a base's config.json and the headers of its weights: kava.base of adapters that are trained on it.
std::string digest_of_base(const ModelConfig& config, const WeightFiles& weights);

}  // namespace kava
