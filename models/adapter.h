// Adapter folders: LoRA in PEFT's format with kava.safetensors beside it; with train.trainable = "all" a whole Hugging Face folder instead
// (docs/formats.md).
#pragma once
#include <cstdint>
#include <optional>
#include <string>

#include "engine/files/safetensors.h"
#include "engine/files/writers.h"
#include "models/model.h"

namespace kava {

/// The file of an adapter's tensors: adapter_model.safetensors, else adapter_model.bin.
SafetensorsFile open_adapter_file(const std::string& folder);

/// Error(code data) where the folder holds the other kind of trained weights than `whole` says.
void require_adapter_kind(const std::string& folder, bool whole);
/// Sets every trainable of the model from the folder. Names, shapes and adapter_config.json must match the run's configuration exactly, all
/// values must be finite: else Error(code data) naming the tensor or the key.
void load_adapter(Model& model, const std::string& folder);

/// Writes the folder, in the place of an older one. Error(code write).
void save_adapter(const Model& model, const std::string& folder);
/// Writes its files into a folder under names that begin with `prefix`. last_stage: that the run decodes with, if not the configuration's
/// last.
void save_adapter(const Model& model, FolderWriter& folder, const std::string& prefix, std::optional<int64_t> last_stage = std::nullopt);

/// Writes the base's config.json, for weights of this type (f32 or bf16), and a copy of its tokenizer's and generation files.
void write_base_files(const std::string& base, DType type, FolderWriter& folder, const std::string& prefix);

}  // namespace kava
