// An adapter merged into its base: a Hugging Face folder that other programs read without knowing of adapters.
#pragma once
#include <string>

#include "engine/config/config.h"
#include "engine/device/ops.h"
#include "engine/files/writers.h"

namespace kava {

struct MergeInput {
  std::string base;         // model folder whose config.json and tokenizer files are taken
  std::string weights;      // model folder whose tensors are taken: the base, or a run's whole trained model
  std::string adapter;      // folder in PEFT's format whose LoRA is added to them; empty for none
  double scale = 1;         // alpha / r
  bool transposed = false;  // the base stores these matrices as [in, out]
};

/// What a PEFT folder's adapter_config.json says of its base and its scale. Error(code data) where it describes more than LoRA on whole
/// linears, or other tensors than the folder holds.
MergeInput peft_merge_input(const std::string& adapter, const std::string& base);
/// The same of CODI's folder, whose scale the run's configuration tells. Error(code data) where it is none, or of another rank.
MergeInput codi_merge_input(const std::string& adapter, const std::string& base, const RunConfig& config);
/// base_model_name_or_path of an adapter folder; Error(code data) where it has none.
std::string peft_base(const std::string& adapter);

/// Writes the base's files and model.safetensors with W + scale B A, computed in f64 and rounded once to `type` (bf16 or f32); under the
/// names of the weight files. Memory: one tensor. Error(code data) naming the tensor that the base and the adapter disagree about.
void write_merged(Ops& ops, const MergeInput& input, DType type, FolderWriter& out);

}  // namespace kava
