// The kinds of transformers that there are, as data: for each its tensors by the names of its files, and the block that they make. Files,
// model, adapters, FLOPs and plans read this table and no model_type, so that another kind is another row.
#pragma once
#include <array>
#include <string>
#include <string_view>
#include <vector>

namespace kava {

/// Widths of a model: C, F, H*D, K*D, and q, k and v side by side.
enum class Width { hidden, mlp, query, key, fused };

/// A linear map of a block by its name within the layer, as "self_attn.q_proj".
struct LinearSpec {
  std::string path;
  Width out, in;
  bool bias = false;
};

enum class NormKind { rms, layer };        // layer: with a bias
enum class MlpKind { swiglu, gelu_tanh };  // swiglu: the maps into it are gate and up, in this order

/// The maps of a block that share an input, in the order of a row: q, k, v (or one that holds all three); the one after attention; those
/// into the activation; the one after it.
enum MapGroup : std::size_t { kAttentionIn, kAttentionOut, kMlpIn, kMlpOut, kMapGroups };

struct Architecture {
  std::string family;                            // model_type of config.json
  std::string prefix;                            // of all tensors but the head; files of a model saved without its head lack it
  std::string layers;                            // layer N's tensors begin with prefix, this, "N."
  std::string embedding, positions, final_norm;  // after the prefix, without ".weight"; positions: empty where they are rotary
  std::string norm1, norm2;                      // within the layer, before attention and before the MLP
  std::string q_norm, k_norm;                    // of each head, before its rotary embedding; empty where there are none
  std::array<std::vector<LinearSpec>, kMapGroups> maps;
  NormKind norm = NormKind::rms;
  MlpKind mlp = MlpKind::swiglu;
  bool transposed = false;                // linears are stored [in, out], as PEFT's fan_in_fan_out says
  std::vector<std::string> buffers;       // within the layer: what old files also hold and nobody reads
  std::vector<std::string> lora_targets;  // LoRA's by default

  bool rotary() const { return positions.empty(); }
  bool has_head_norms() const { return !q_norm.empty(); }
  std::string layer(int64_t n) const { return prefix + layers + std::to_string(n) + "."; }
  /// What lora.targets may name: the last parts of the maps' paths, and whole paths where one part stands for several maps.
  std::vector<std::string> target_names() const;
};

/// The head of every model, tied or not.
inline constexpr const char* kHeadName = "lm_head.weight";

/// In the order in which messages name them.
const std::vector<Architecture>& architectures();
/// nullptr where there is none of this name.
const Architecture* find_architecture(std::string_view family);
/// The same of one that is known to be there.
const Architecture& architecture_of(std::string_view family);

/// Whether a target of LoRA names this map, as PEFT does: its path, or the end of it from a point on.
bool names_map(std::string_view target, std::string_view path);
bool is_adapted(const std::vector<std::string>& targets, std::string_view path);

}  // namespace kava
