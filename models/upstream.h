// Adapters as PCCoT's and CODI's own programs write them: LoRA, the three new tokens and the latents' projection under other names, and
// parts of the base beside them (docs/formats.md section 5.3).
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "engine/files/safetensors.h"
#include "models/config.h"
#include "models/model.h"

namespace kava {

/// Row `row` of a [rows, C] tensor; null where there is none.
struct TensorRow {
  const TensorInfo* tensor = nullptr;
  std::int64_t row = 0;
};

class UpstreamAdapter {
 public:
  enum class Program { pccot, codi };

  /// Whether the folder is one of these: pccot_args.json beside adapter_config.json, or weights of which one is named "codi....".
  static bool is_at(const std::string& folder);
  /// Reads headers only. Error(code data) naming the tensor that has no place in such a folder, or the key that is missing.
  static UpstreamAdapter open(const std::string& folder);

  Program program() const { return program_; }
  const SafetensorsFile& file() const { return file_; }
  /// The keys of adapter_config.json that speak of tensors which are read here.
  std::set<std::string> config_keys() const;
  /// By their names in a folder of kava's: LoRA and the latents' projection; of CODI also every tensor of the base, embeddings with three
  /// rows more.
  const std::map<std::string, const TensorInfo*>& tensors() const { return tensors_; }

  struct Rows {
    std::array<TensorRow, 3> markers;             // bot, eot, latent; CODI has no latent's
    std::map<std::int64_t, TensorRow> embedding;  // of the base's vocabulary, by id: those that were trained
  };
  /// The rows that were trained, on a base of this shape. Error(code data) where ids and sizes do not fit it.
  Rows rows(const ModelConfig& shape) const;
  /// The tensor of CODI that stands for one of the base's, of its shape but for more rows of the vocabulary; null where there is none.
  /// Error(code data) where its shape is another.
  const TensorInfo* base_tensor(const WeightSpec& spec, const ModelConfig& shape) const;

 private:
  UpstreamAdapter(const std::string& folder, Program program);
  void read_names();
  void read_rows(const std::string& folder);
  [[noreturn]] void fail(const std::string& what) const;

  Program program_;
  SafetensorsFile file_;
  std::map<std::string, const TensorInfo*> tensors_;
  const TensorInfo* trained_rows_ = nullptr;  // PCCoT: [ids, C], the embedding's rows in the order of ids_
  std::vector<std::int64_t> ids_;
  std::array<std::int64_t, 3> marker_ids_{};
};

/// As load_adapter. What the folder holds of the base takes the place of the base's own. Such a model can be run, not trained: what would
/// be written of it goes on another base.
void load_upstream_adapter(Model& model, const std::string& folder);

}  // namespace kava
